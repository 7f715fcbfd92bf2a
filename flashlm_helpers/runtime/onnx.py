"""Models as ONNX files, which many programs can run, and ONNX Runtime to run them here.

A file holds one graph, which torch.onnx.export makes from the network itself, mixers of your own
included. Each call reads any number of ids of any number of texts:

    ids (B, T) and the states before them  ->  logits (B, T, V) and the states after them

States are zeros at the start of a text, and a state NAME comes back as NAME_next. In block n, a
convolution has recentn (B, K-1, D); attention has recentn (B, K-1, 3D) and attendedn (B, W-1, 2D),
its keys and values side by side. If there is attention, `read` (B) counts the tokens so far.
"""

import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers import __version__
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.generation import Prompts, Sampling, Story, stream_by_reading
from flashlm_helpers.machine.files import atomic_write, one_line
from flashlm_helpers.machine.hardware import usable_cores
from flashlm_helpers.machine.threads import follow
from flashlm_helpers.mixers import AttentionMixer, AttentionState, State, map_state
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import BitLinear, freeze_ternary
from flashlm_helpers.registry import own_mixers
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import Vocabulary

# The version of ONNX's operators; it is the first one with RMSNormalization and Attention.
OPSET = 23

# MatMulNBits has a scale for so many weights of a row; ours are all the same.
BLOCK = 32

# Positions whose logits exist at the same time.
PIECE = 512


# ---- layers of few bits, for ONNX Runtime's operator MatMulNBits ----


class _LowBitLinear(nn.Module):
    """A linear layer (..., K) -> (..., N) with weights (codes - 2^(bits-1)) * scales.

    codes: (N, K) uint8, below 2^bits. scales: (N), one per row.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bits: int):
        super().__init__()
        N, K = codes.shape
        self.attributes = {
            "N": N,
            "K": K,
            "bits": bits,
            "block_size": BLOCK,
            "accuracy_level": 4,  # round the input to 8 bits
        }

        # Zeros fill up the last block of a row.
        zero = 2 ** (bits - 1)
        codes = F.pad(codes, (0, -K % BLOCK), value=zero)
        blocks = codes.shape[1] // BLOCK

        # Of the codes in a byte, the first has the lowest bits.
        per_byte = 8 // bits
        packed = torch.zeros_like(codes[:, ::per_byte])
        for n in range(per_byte):
            packed |= codes[:, n::per_byte] << bits * n
        self.register_buffer("packed", packed.view(N, blocks, -1))
        self.register_buffer("scales", scales.repeat_interleave(blocks))

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch cannot compute it, but knows the shape: enough to make a graph.
        return torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scales),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )


class _LowBitEmbedding(nn.Module):
    """The embedding, ids (B, T) -> (B, T, D), from the weights of an 8-bit head."""

    def __init__(self, head: _LowBitLinear, scales: Tensor):
        super().__init__()
        self.head = head
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        D = self.head.attributes["K"]
        codes = self.head.packed[ids].flatten(2)

        # Without the zeros that fill up the last block.
        steps = codes[..., :D].float() - 128
        scales = self.scales[ids]
        return steps * scales[..., None]


def _low_bit_linear(layer: BitLinear) -> _LowBitLinear:
    # The codes of -1, 0 and +1 are 1, 2 and 3.
    ternary, scale = layer.ternarized()
    codes = (ternary + 2).to(torch.uint8)
    return _LowBitLinear(codes, scale.expand(len(codes)), bits=2)


def _low_bit_head(weight: Tensor) -> tuple[_LowBitEmbedding, _LowBitLinear]:
    # The largest value of a row is 127 steps, and even a row of zeros needs a step.
    scales = weight.abs().amax(1) / 127
    scales = scales.clamp(min=1e-30)
    steps = (weight / scales[:, None]).round()
    codes = (steps + 128).to(torch.uint8)

    head = _LowBitLinear(codes, scales, bits=8)
    return _LowBitEmbedding(head, scales), head


# ---- the network as one graph ----


class _Attended(NamedTuple):
    """The state of an AttentionMixer in the graph; all of them share one count, `read`."""

    recent: Tensor  # (B, K-1, 3D)
    attended: Tensor  # (B, W-1, 2D), keys and values side by side


class _Graph(nn.Module):
    """The computation of one call.

    network: a frozen copy, changed here so that it can be exported. original: the network with
    its ternary layers.
    """

    def __init__(self, network: nn.Module, original: nn.Module, low_bit: bool):
        super().__init__()
        self.network = network
        self.head = network.head
        for name, layer in original.named_modules():
            if low_bit and isinstance(layer, BitLinear) and layer.ternary:
                network.set_submodule(name, _low_bit_linear(layer))

        # A network of your own may use its embedding otherwise, so that one stays float32.
        if low_bit and type(original) is FlashLM:
            weight = original.embedding.weight.detach()
            network.embedding, self.head = _low_bit_head(weight)

        # A loop over chunks of queries would fix their number in the graph.
        for layer in network.modules():
            if getattr(type(layer), "_attend", None) is AttentionMixer._attend:
                layer._attend = partial(_attend_at_once, layer)

    def forward(self, ids: Tensor, read: Tensor | None, states: list[State]) -> list:
        before = []
        for state in states:
            before.append(_to_mixer(state, read))
        hidden, after = self.network.hidden(ids, before)

        # The order of the outputs is that of the inputs.
        results = [self.head(hidden)]
        if read is not None:
            results.append(read + ids.shape[1])
        for state in after:
            results.append(_to_graph(state))
        return results


def _to_mixer(state: State, read: Tensor | None) -> State:
    """Return a state of the graph as its mixer takes it."""
    if not isinstance(state, _Attended):
        return state

    # The mixer subtracts its count from the window: a row per text, (B, 1).
    keys, values = state.attended.chunk(2, dim=-1)
    count = read[:, None]
    return AttentionState(state.recent, keys, values, count)


def _to_graph(state: State) -> State:
    """Return a mixer's state as the graph takes it."""
    if not isinstance(state, AttentionState):
        return state

    # Its count is the same for all, so the graph counts once.
    attended = torch.cat([state.keys, state.values], dim=-1)
    return _Attended(state.recent, attended)


def _attend_at_once(
    mixer: AttentionMixer, query: Tensor, keys: Tensor, values: Tensor, empty: Tensor
) -> Tensor:
    """Compute AttentionMixer._attend() for all queries together."""
    S = keys.shape[1]
    earlier = S - query.shape[1]
    heads = (mixer.heads, -1)

    # All as (B, heads, T or S, D / heads).
    query = query.transpose(1, 2)
    keys = keys.unflatten(-1, heads).transpose(1, 2)
    values = values.unflatten(-1, heads).transpose(1, 2)

    # A query sees the window's tokens up to its own, of those that there are; (B, 1, T, S).
    positions = torch.arange(S)
    distance = positions[earlier:, None] - positions
    in_window = (distance >= 0) & (distance < mixer.window)
    there = positions >= empty
    seen = in_window & there[:, None, None]

    # The farther away, the less they count.
    slopes = 2.0 ** -torch.linspace(1, 8, mixer.heads)
    costs = slopes[:, None, None] * distance
    bias = torch.where(seen, -costs, -math.inf)
    attended = F.scaled_dot_product_attention(query, keys, values, bias)
    return attended.transpose(1, 2).flatten(2)


def save_onnx(path: str | Path, model: PyTorchModel, low_bit: bool = True) -> None:
    """Write a model with its vocabulary as an ONNX file, atomically; takes some seconds.

    low_bit: store ternary weights at 2 bits and the embedding at 8, for an operator of ONNX
    Runtime that also rounds its input to 8 bits; otherwise everything is float32.
    Raises FlashLMError for a mixer that torch.export cannot trace for any number of tokens, and
    if the file cannot be written.
    """
    config = model.network.config
    try:
        with _without_warnings(), torch.no_grad():
            program = _export(model.network, low_bit)
    except Exception as error:  # the code of a mixer may raise anything
        what = config.name
        if own := own_mixers(config):
            what = "mixer " + " or ".join(map(repr, own))

        # The exporter wraps the error of the mixer in words of its own.
        reason = one_line(error.__cause__ or error)[:200]
        raise FlashLMError(f"{what} cannot be exported to ONNX: {reason}") from error

    # Nobody needs to know where on this machine the code of each operator was.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.producer_name = "flashlm"
    program.model.producer_version = __version__

    # OnnxModel looks for these.
    properties = program.model.metadata_props
    properties["name"] = config.name
    properties["vocabulary"] = ",".join(map(str, model.vocabulary.kept))
    properties["vocabulary_hash"] = model.vocabulary.hash
    with atomic_write(Path(path)) as file:
        file.write(program.model_proto.SerializeToString())


def _export(network: nn.Module, low_bit: bool) -> torch.onnx.ONNXProgram:
    # Two texts of three tokens show what the states look like.
    frozen = freeze_ternary(network)
    ids = torch.zeros(2, 3, dtype=torch.long)
    _, after = frozen.hidden(ids)
    states = [_to_graph(state) for state in after]

    # Names of the inputs, and for each which of its sizes may change from call to call.
    names = []
    sizes = []
    for number, state in enumerate(states):
        names += _state_names(number, state)
        sizes.append(map_state(lambda _: {0: "texts"}, state))

    # Attention also counts.
    read = None
    read_sizes = None
    if any(isinstance(state, _Attended) for state in states):
        names.insert(0, "read")
        read = torch.zeros(2, dtype=torch.long)
        read_sizes = {0: "texts"}

    # PyTorch traces the module, and turns its operators into ONNX's.
    program = torch.onnx.export(
        _Graph(frozen, network, low_bit).eval(),
        (ids, read, states),
        dynamic_shapes=({0: "texts", 1: "time"}, read_sizes, sizes),
        input_names=["ids", *names],
        output_names=["logits", *(f"{name}_next" for name in names)],
        opset_version=OPSET,
        verbose=False,
    )

    # If a mixer asks how many tokens there are, its answer is for good: only one branch is here.
    for limits in program.exported_program.range_constraints.values():
        if limits.lower > 2 or limits.upper < PIECE:
            raise ValueError("it computes something else for other numbers of tokens")

    # It has invented names for the two sizes.
    texts, time = program.model.graph.inputs[0].shape
    program.rename_axes({texts: "texts", time: "time"})
    return program


def _state_names(number: int, state: State) -> list[str]:
    """Return the names of a block's state in the graph."""
    if isinstance(state, Tensor):
        return [f"recent{number}"]
    if isinstance(state, _Attended):
        return [f"recent{number}", f"attended{number}"]

    # A mixer of your own may keep several tensors.
    return [f"state{number}_{part}" for part in range(len(state))]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence the exporter, which has much to say about its own parts."""
    # Some of it is logged, by many loggers, some printed; the rest are warnings.
    earlier = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(earlier)


# ---- ONNX Runtime ----


class OnnxModel:
    """A model in an ONNX file, run by ONNX Runtime: a LanguageModel.

    path: of a file that save_onnx() wrote. threads: all usable cores by default, but those that
    other programs use.
    Raises FlashLMError if the file cannot be used.
    """

    runtime = "onnx"
    source = None

    def __init__(self, path: str | Path, threads: int | None = None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or min(follow(), usable_cores())
        options.log_severity_level = 4
        try:
            content = Path(path).read_bytes()
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )

            # As save_onnx() has put them into the file.
            properties = self._session.get_modelmeta().custom_metadata_map
            kept = properties["vocabulary"].split(",")
            wanted = properties["vocabulary_hash"]
            self.vocabulary = Vocabulary(list(map(int, kept)))
            self.vocabulary.check_matches(wanted, str(path))
        except OSError as error:
            raise FlashLMError(f"cannot read {path}: {error.strerror}") from error
        except Exception as error:  # ONNX Runtime's errors have no class in common
            reason = f"{path} is not an ONNX model of ours that can be used: {one_line(error)}"
            raise FlashLMError(reason) from error

    def read(self, ids: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Read ids (B, T), given the states before them, None at the start of a text.

        Returns logits (B, T, V) and the states after the last id, in the order of the graph.
        """
        _, *inputs = self._session.get_inputs()
        if states is None:
            states = [_zeros(one, texts=len(ids)) for one in inputs]

        # The graph takes its inputs by name, and gives its outputs in order.
        given = {"ids": ids.numpy()}
        for one, state in zip(inputs, states, strict=True):
            given[one.name] = state.numpy()
        try:
            results = self._session.run(None, given)
        except Exception as error:
            raise FlashLMError(f"ONNX Runtime: {one_line(error)}") from error
        logits, *after = map(torch.from_numpy, results)
        return logits, after

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) after each of ids (B, T), from the start of the texts."""
        pieces = list(self._pieces(ids))
        return torch.cat(pieces, dim=1)

    def _pieces(self, ids: Tensor) -> Iterator[Tensor]:
        # The memory for one piece is enough for a text of any length.
        states = None
        for piece in ids.split(PIECE, dim=1):
            logits, states = self.read(piece, states)
            yield logits

    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the negative log-likelihood, in nats, of every id but the first (float64)."""
        result = []
        for sequence in sequences:
            ids = torch.tensor(sequence, dtype=torch.long)
            pieces = self._pieces(ids[None, :-1])
            targets = ids[1:].split(PIECE)

            # Each position predicts the id after it.
            nats = []
            for logits, target in zip(pieces, targets, strict=True):
                nll = F.cross_entropy(logits[0], target, reduction="none")
                nats.append(nll.double().numpy())
            result.append(np.concatenate(nats))
        return result

    def write(self, prompts: Prompts, sampling: Sampling) -> list[Story]:
        """Write one story for each prompt."""
        *_, stories = self.stream(prompts, sampling)
        return stories

    def stream(self, prompts: Prompts, sampling: Sampling) -> Iterator[list[Story]]:
        """Write the same stories, and yield them after each token, grown in place."""

        def read(ids: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
            # Only the logits after the last id count.
            logits, states = self.read(ids, states)
            return logits[:, -1], states

        return stream_by_reading(read, prompts, sampling)


def _zeros(state: onnxruntime.NodeArg, texts: int) -> Tensor:
    """Return a state at the start of so many texts."""
    # Only the count of tokens is a whole number.
    counts = state.type == "tensor(int64)"
    dtype = torch.long if counts else torch.float32
    return torch.zeros(texts, *state.shape[1:], dtype=dtype)
