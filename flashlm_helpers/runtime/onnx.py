"""FlashLM as an ONNX graph: of standard operators as float32, with one of ONNX Runtime's own for weights of few bits.

One graph reads any number of ids of any number of texts, with the states in and out: a step is a call with one id a
text, and a whole story is one call from empty states.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from flashlm_helpers import __version__
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.files import atomic_write, one_line
from flashlm_helpers.hardware import usable_cores
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import ternarize
from flashlm_helpers.vocab import Vocabulary

OPSET = 23
PIECE = 512  # positions scored at once
BLOCK = 32  # weights of a row that share a scale in MatMulNBits; all of a layer's are the same here
EPSILON, ATTENTION_EPSILON = 1e-6, float(torch.finfo(torch.float32).eps)
END = np.iinfo(np.int64).max


class _Graph:
    """Nodes and weights, collected by calling it as g("Add", x, y); returns the names of what a node puts out."""

    def __init__(self):
        self.nodes, self.weights, self.known = [], [], {}

    def constant(self, value) -> str:
        """The name of a weight; equal ones are kept once."""
        array = np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.known:
            self.known[key] = f"weight{len(self.weights)}"
            self.weights.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def __call__(self, operator: str, *inputs, outputs: int = 1, names=None, domain: str = "", **attributes):
        inputs = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        names = names or [f"{operator}{len(self.nodes)}_{n}" for n in range(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names


def _ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def _floats(values) -> np.ndarray:
    return (values.detach().numpy() if isinstance(values, Tensor) else np.array(values)).astype(np.float32)


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, K) uint8, `bits` each, as MatMulNBits takes them: (N, K / BLOCK rounded up, bytes of a block)."""
    columns, each = codes.shape[1], 8 // bits
    codes = np.pad(codes, ((0, 0), (0, -columns % BLOCK)), constant_values=2 ** (bits - 1))
    packed = sum(codes[:, n::each] << np.uint8(bits * n) for n in range(each)).astype(np.uint8)
    return packed.reshape(len(codes), -1, BLOCK // each)


class _Builder:
    """Writes the operators of one model into a graph."""

    def __init__(self, model: FlashLM, low_bit: bool):
        self.model, self.config, self.low_bit, self.g = model, model.config, low_bit, _Graph()
        self.states: list[tuple[str, str, tuple[int, int]]] = []  # (input, what to put out, shape of one text's)

    def _norm(self, x: str, weight, epsilon: float = EPSILON) -> str:
        return self.g("RMSNormalization", x, _floats(weight), axis=-1, epsilon=epsilon)

    def _low_bit_product(self, x: str, packed: np.ndarray, scales: np.ndarray, columns: int, bits: int) -> str:
        """x times the transpose of (codes - 2^(bits - 1)) * scales; packed: the codes, scales: one a row."""
        rows, blocks, _ = packed.shape
        return self.g("MatMulNBits", x, packed, np.repeat(scales.astype(np.float32), blocks), domain="com.microsoft",
                      K=columns, N=rows, bits=bits, block_size=BLOCK, accuracy_level=4)

    def _linear(self, layer, x: str) -> str:
        if not layer.ternary:
            return self.g("MatMul", x, _floats(layer.weight.T))
        ternary, scale = ternarize(layer.weight.detach())
        if self.low_bit:
            codes = _pack((ternary.numpy() + 2).astype(np.uint8), 2)
            return self._low_bit_product(x, codes, np.full(len(ternary), scale), layer.in_features, 2)
        return self.g("MatMul", x, _floats(layer.effective_weight.T))

    def _extended(self, name: str, new: str, rows: int, channels: int) -> str:
        """new (B, T, C) behind a state (B, rows, C), which is an input; the last rows of both are an output."""
        both = self.g("Concat", name, new, axis=1)
        last = self.g("Slice", both, _ints(-rows if rows else END), _ints(END), _ints(1))
        self.states.append((name, last, (rows, channels)))
        return both

    def _convolution(self, number: int, value: str, taps: Tensor) -> str:
        """Each channel of (B, T, C) over its K last values, of which the state has K - 1."""
        g, (kernel, channels) = self.g, taps.shape
        window = self._extended(f"recent{number}", value, kernel - 1, channels)
        mixed = g("Conv", g("Transpose", window, perm=[0, 2, 1]), _floats(taps.T)[:, None], group=channels)
        return g("Transpose", mixed, perm=[0, 2, 1])

    def _sigmoid_times(self, gate: str, value: str) -> str:
        return self.g("Mul", value, self.g("Sigmoid", gate))

    def _attention(self, number: int, mixer, x: str) -> str:
        """As AttentionMixer; its state has the last window - 1 keys and values, side by side."""
        g, D, heads, window = self.g, self.config.width, mixer.heads, mixer.window
        qkv, gate = g("Split", self._linear(mixer.project_in, x), _ints(3 * D, D), axis=-1, outputs=2)
        query, key, value = g("Split", self._convolution(number, qkv, mixer.taps), _ints(D, D, D), axis=-1, outputs=3)
        ones = np.ones(D // heads)
        query, key = (self._norm(g("Reshape", part, _ints(0, 0, heads, D // heads)), ones, ATTENTION_EPSILON)
                      for part in (query, key))
        new = g("Concat", g("Reshape", key, _ints(0, 0, D)), value, axis=-1)
        rows = self._extended(f"attended{number}", new, window - 1, 2 * D)
        keys, values = (g("Reshape", part, _ints(0, 0, heads, D // heads))
                        for part in g("Split", rows, _ints(D, D), axis=-1, outputs=2))
        scores = g("MatMul", g("Transpose", query, perm=[0, 2, 1, 3]), g("Transpose", keys, perm=[0, 2, 3, 1]))
        scores = g("Mul", scores, _floats((D // heads) ** -0.5))
        bias = g("Mul", self.distance, _floats(-2.0 ** -torch.linspace(1, 8, heads))[:, None, None])
        chances = g("Softmax", g("Where", self.seen, g("Add", scores, bias), _floats(-1e30)), axis=-1)
        attended = g("Transpose", g("MatMul", chances, g("Transpose", values, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])
        return self._linear(mixer.project_out, self._sigmoid_times(gate, g("Reshape", attended, _ints(0, 0, D))))

    def _gated_convolution(self, number: int, mixer, x: str) -> str:
        D = self.config.width
        gate, value = self.g("Split", self._linear(mixer.project_in, x), _ints(D, D), axis=-1, outputs=2)
        return self._linear(mixer.project_out, self._sigmoid_times(gate, self._convolution(number, value, mixer.taps)))

    def _glu(self, glu, x: str) -> str:
        gate = self._linear(glu.gate, x)
        return self._linear(glu.down, self.g("Mul", self._sigmoid_times(gate, gate), self._linear(glu.up, x)))

    def _add(self, x: str, branch: str, block, which: int) -> str:
        if block.layer_scale is not None:
            branch = self.g("Mul", branch, _floats(block.layer_scale[which]))
        return self.g("Add", x, branch)

    def _place(self, ids: str) -> None:
        """How far each of T positions is from each of window - 1 + T keys, and whether it sees it."""
        g, before = self.g, self.config.window - 1
        time = g("Gather", g("Shape", ids), np.int64(1))
        keys = g("Range", np.int64(0), g("Add", time, np.int64(before)), np.int64(1))
        queries = g("Unsqueeze", g("Range", np.int64(before), g("Add", time, np.int64(before)), np.int64(1)), _ints(1))
        distance = g("Sub", queries, keys)
        self.distance = g("Cast", distance, to=TensorProto.FLOAT)
        near = g("And", g("GreaterOrEqual", distance, np.int64(0)), g("LessOrEqual", distance, np.int64(before)))
        first = g("Unsqueeze", g("Sub", np.int64(before), "read"), _ints(1, 2, 3))  # (B, 1, 1, 1)
        self.seen = g("And", near, g("GreaterOrEqual", keys, first))
        self.read = g("Add", "read", time)

    def _embedding(self, ids: str) -> tuple[str, Callable[[str], str]]:
        """The rows of some ids, and the head: from what it reads to logits. Both take one copy of the weights."""
        g, weight, width = self.g, self.model.embedding.weight.detach(), self.config.width
        if not self.low_bit:
            table = _floats(weight)
            return g("Gather", table, ids), lambda x: g("MatMul", x, g("Transpose", table, perm=[1, 0]))
        scales = (weight.abs().amax(1) / 127).clamp(min=1e-30).numpy()
        packed = _pack((np.rint(weight.numpy() / scales[:, None]) + 128).astype(np.uint8), 8)
        rows = g("Cast", g("Reshape", g("Gather", packed, ids), _ints(0, 0, -1)), to=TensorProto.FLOAT)
        rows = g("Slice", g("Sub", rows, _floats(128)), _ints(0), _ints(width), _ints(2))  # without what pads a block
        rows = g("Mul", rows, g("Unsqueeze", g("Gather", _floats(scales), ids), _ints(-1)))
        return rows, lambda x: self._low_bit_product(x, packed, scales, width, 8)

    def build(self, vocabulary: Vocabulary) -> onnx.ModelProto:
        """The whole model, with its vocabulary in the metadata."""
        g, config = self.g, self.config
        x, head = self._embedding("ids")
        if config.attention:
            self._place("ids")
        for number, block in enumerate(self.model.blocks):
            mix = self._attention if number in config.attention else self._gated_convolution
            x = self._add(x, mix(number, block.mixer, self._norm(x, block.mixer_norm.weight)), block, 0)
            x = self._add(x, self._glu(block.glu, self._norm(x, block.glu_norm.weight)), block, 1)
        x = self._norm(x, self.model.norm.weight)
        logits = head(x)

        texts, floats, whole = "texts", TensorProto.FLOAT, TensorProto.INT64
        inputs = [("ids", whole, [texts, "time"])]
        outputs = [("logits", floats, [texts, "time", len(vocabulary)], logits)]
        if config.attention:
            inputs.append(("read", whole, [texts]))
            outputs.append(("read_next", whole, [texts], self.read))
        for name, last, shape in self.states:
            inputs.append((name, floats, [texts, *shape]))
            outputs.append((f"{name}_next", floats, [texts, *shape], last))
        for name, *_, result in outputs:
            g("Identity", result, names=[name])
        inputs, outputs = ([helper.make_tensor_value_info(*each[:3]) for each in ends] for ends in (inputs, outputs))
        graph = helper.make_graph(g.nodes, config.name, inputs, outputs, g.weights)
        domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        built = helper.make_model(graph, producer_name="flashlm", producer_version=__version__, opset_imports=domains,
                                  ir_version=11)
        helper.set_model_props(built, {"name": config.name, "vocabulary": ",".join(map(str, vocabulary.kept)),
                                       "vocabulary_hash": vocabulary.hash})
        onnx.checker.check_model(built)
        return built


def save_onnx(path: str | Path, model: FlashLM, vocabulary: Vocabulary, low_bit: bool = True) -> None:
    """Write a model and its vocabulary as an ONNX file, atomically.

    low_bit: ternary weights at 2 bits and the embedding at 8, by ONNX Runtime's MatMulNBits, which rounds what it
    multiplies to 8 bits; otherwise float32 throughout. Raises FlashLMError if the file cannot be written.
    """
    content = _Builder(model, low_bit).build(vocabulary).SerializeToString()
    with atomic_write(Path(path)) as file:
        file.write(content)


class OnnxModel:
    """A model in an ONNX file, run by ONNX Runtime.

    path: of a file that save_onnx() wrote. threads: None for all cores. Raises FlashLMError if it cannot be used.
    """

    def __init__(self, path: str | Path, threads: int | None = None):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads or usable_cores(), 4
        try:
            self._session = onnxruntime.InferenceSession(Path(path).read_bytes(), options,
                                                         providers=["CPUExecutionProvider"])
            properties = self._session.get_modelmeta().custom_metadata_map
            self.vocabulary = Vocabulary([int(kept) for kept in properties["vocabulary"].split(",")])
            self.vocabulary.require(properties["vocabulary_hash"], str(path))
        except OSError as error:
            raise FlashLMError(f"cannot read {path}: {error.strerror}") from error
        except Exception as error:  # ONNX Runtime's errors have no common class of their own
            raise FlashLMError(f"{path} is not an ONNX model of ours that can be used: {one_line(error)}") from error

    def read(self, ids: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """ids (B, T), and the states before them; returns logits (B, T, V) and the states after them."""
        _, *states = self._session.get_inputs()
        if past is None:
            past = [torch.zeros(len(ids), *state.shape[1:], dtype=torch.int64 if len(state.shape) == 1 else None)
                    for state in states]
        fed = {state.name: value.numpy() for state, value in zip(states, past, strict=True)}
        try:
            logits, *states = self._session.run(None, {"ids": ids.numpy()} | fed)
        except Exception as error:
            raise FlashLMError(f"ONNX Runtime: {one_line(error)}") from error
        return torch.from_numpy(logits), [torch.from_numpy(state) for state in states]

    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """-ln p of every id but the first of each sequence, as evaluation.token_nats()."""
        result = []
        for sequence in sequences:
            ids, past, nats = torch.from_numpy(np.asarray(sequence)), None, []
            for piece, targets in zip(ids[:-1].split(PIECE), ids[1:].split(PIECE), strict=True):
                logits, past = self.read(piece[None], past)
                nats.append(F.cross_entropy(logits[0], targets, reduction="none").double())
            result.append(torch.cat(nats).numpy())
        return result
