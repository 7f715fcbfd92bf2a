"""Peers on the same ruler: language models of others, scored by the accounting of our own.

Any causal language model that transformers can load has its own tokenizer, context and symbols.
What must be alike is the text, that every token of it counts, and what the bits are divided by.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.evaluation import BPCReport, bits_report
from flashlm_helpers.machine.threads import follow
from flashlm_helpers.sources.gpt2 import SURROGATE
from flashlm_helpers.sources.hub import explain_errors
from flashlm_helpers.sources.models import ModelFiles, find_model

# Tokens that a model reads at once unless told otherwise, even if it could read more: the logits
# of a GPT-2 vocabulary take 0.4 GB for so many.
USUAL_CONTEXT = 2048

POSITIONS = 1024  # that a model reads per pass, in all windows together, or one window if longer

# What configs call the number of positions that a model has.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")

_PROBE = 8  # ids, in the check that a model sees no future
_TOLERANCE = 1e-3  # of the largest logit: rounding is far less, a model that looks ahead far more

_ANOTHER = "give a causal language model"


# ---- overlapping windows over what is longer than a context ----


class Window(NamedTuple):
    """A part of a sequence that is read at once, with nothing before it."""

    sequence: int  # its index
    start: int  # position of the first id that is read
    end: int  # one after the position of the last
    first: int  # from this position on, what is predicted counts; before, it counted elsewhere


def cut_into_windows(lengths: Sequence[int], context: int, stride: int) -> list[Window]:
    """Cut sequences into windows of at most `context` positions, each `stride` after the last.

    lengths: positions per sequence. Every position counts in exactly one window: the first that
    reads it. So each sees all before it, or at least context - stride positions.
    """
    windows = []
    for sequence, length in enumerate(lengths):
        start = 0
        counted = 0
        while counted < length:
            end = min(start + context, length)
            windows.append(Window(sequence, start, end, counted))
            counted = end
            start += stride
    return windows


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Group windows of similar width, the widest first, into passes of about POSITIONS."""
    batch = []
    for window in sorted(windows, key=lambda window: window.start - window.end):
        if batch and (len(batch) + 1) * (batch[0].end - batch[0].start) > POSITIONS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


# ---- a peer ----


@dataclass(frozen=True)
class PeerReport:
    """What a text costs a peer, and how it was read."""

    report: BPCReport
    parameters: int
    context: int  # tokens that were read at once, at most
    stride: int  # tokens between the starts of two windows over a longer story
    start_symbol: str  # the first token is predicted from it
    end_symbol: str
    lossy_stories: int  # stories that its tokenizer does not give back as they were
    unknown_tokens: int  # of all stories
    revision: str | None  # the hub's commit; None for a local folder
    safetensors: bool  # False: the weights were pickled, and read as numbers only

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the fields of the BPCReport, then the others."""
        rest = asdict(self)
        return rest.pop("report") | rest


class Peer:
    """A causal language model of transformers with its tokenizer.

    files: where it came from. network: gives logits (B, T, V) for ids (B, T). context and stride:
    see cut_into_windows(); by default what the model has, at most 2,048, and half of that.
    Raises FlashLMError, in one line, for a model that cannot be scored fairly.
    """

    def __init__(
        self,
        files: ModelFiles,
        network: nn.Module,
        tokenizer: Any,
        context: int | None = None,
        stride: int | None = None,
    ):
        self.files = files
        self.name = files.name
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        self.context, self.stride = _choose_window(self.name, network.config, context, stride)

        # Most models know one symbol that ends a text and begins the next; some have two.
        self.size = self._check_causal()
        self.start = self._find_symbol("bos_token_id", "eos_token_id")
        self.end = self._find_symbol("eos_token_id", "bos_token_id")

    def _find_symbol(self, *names: str) -> int:
        """Return the id of the first of these symbols that the tokenizer or the config has."""
        for name in names:
            for source in (self.tokenizer, self.network.config):
                value = getattr(source, name, None)
                if isinstance(value, list):  # some models have several end symbols
                    value = value[0] if value else None

                # A config that names none has the usual one of its architecture.
                if value is not None and value < self.size:
                    return int(value)
        advice = "give it the tokenizer it was trained with, or name bos_token_id in config.json"
        raise FlashLMError(f"{self.name} has no start or end symbol among its ids: {advice}")

    @torch.no_grad()
    def _check_causal(self) -> int:
        """Return V; raise FlashLMError if editing the last id changes earlier logits."""
        # With these weights and these ids, whatever the architecture promises.
        with explain_errors(f"{self.name} cannot be run", _ANOTHER):
            size = self.network.get_input_embeddings().weight.shape[0]
            ids = (torch.arange(min(_PROBE, self.context)) % size).repeat(2, 1)
            ids[1, -1] = (ids[1, -1] + 1) % size
            logits = self.network(input_ids=ids).logits[:, :-1].float()
        difference = (logits[0] - logits[1]).abs().max()
        if difference > _TOLERANCE * logits.abs().max():
            problem = f"{self.name} sees the tokens that it is to predict, as encoders such as BERT"
            raise FlashLMError(f"{problem} do: {_ANOTHER}")
        return min(size, logits.shape[-1])

    def symbol(self, token_id: int) -> str:
        """Return how the tokenizer writes an id."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    def encode(self, story: str) -> np.ndarray:
        """Return the start symbol, the ids of a story without any special ones, the end symbol.

        int64. Half a UTF-16 pair, which no tokenizer takes, becomes U+FFFD. Raises FlashLMError
        for ids that the network does not have.
        """
        # What looks like a special token is written out, as the ordinary text that it is.
        text = SURROGATE.sub("\ufffd", story)
        with explain_errors(f"the tokenizer of {self.name} fails", _ANOTHER):
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            ids = np.array([self.start, *ids["input_ids"], self.end], dtype=np.int64)
        if ids.max() >= self.size:
            problem = f"the tokenizer of {self.name} gives id {ids.max():,}"
            advice = "give it the tokenizer it was trained with"
            raise FlashLMError(f"{problem}, and the network has {self.size:,} ids: {advice}")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, every symbol written out."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    @torch.no_grad()
    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return -ln p of every id but the first of each sequence, in nats, as float64.

        Raises FlashLMError where the network gives something that is no probability.
        """
        lengths = [len(sequence) - 1 for sequence in sequences]
        result = list(map(np.empty, lengths))
        for windows in _batches(cut_into_windows(lengths, self.context, self.stride)):
            # What fills up a row comes after all that counts, so nothing depends on it.
            width = windows[0].end - windows[0].start
            ids = torch.full((len(windows), width), self.start)
            for row, window in enumerate(windows):
                part = sequences[window.sequence][window.start : window.end]
                ids[row, : len(part)] = torch.from_numpy(part)

            # Row by row, since each is as large as its logits again.
            follow()
            logits = self.network(input_ids=ids).logits
            for row, (sequence, start, end, first) in enumerate(windows):
                own = logits[row, first - start : end - start].float()
                targets = torch.from_numpy(sequences[sequence][first + 1 : end + 1])
                result[sequence][first:end] = F.cross_entropy(own, targets, reduction="none")

        if not all(np.isfinite(nats).all() for nats in result):
            problem = f"{self.name} gives probabilities that are not finite numbers"
            raise FlashLMError(f"{problem}: its files may be damaged, so download or save it anew")
        return result

    def evaluate(self, stories: Sequence[str]) -> PeerReport:
        """Score whole stories: every token, the first one included, as evaluate() does ours.

        Raises FlashLMError if there is no story, an empty one, or one that cannot be scored.
        """
        if not stories or not all(stories):
            raise FlashLMError("there is no story to score: give a text with at least one")
        sequences = list(map(self.encode, stories))
        if not any(len(sequence) > 2 for sequence in sequences):
            problem = f"the tokenizer of {self.name} makes no token of this text"
            raise FlashLMError(f"{problem}: give a model for texts of this kind")
        report = bits_report(stories, self.token_nats(sequences))

        # What a tokenizer drops or merges costs the model nothing: its figure would be too low.
        lossy = 0
        unknown = 0
        for story, sequence in zip(stories, sequences, strict=True):
            lossy += self.decode(sequence[1:-1].tolist()) != story
            unknown += int((sequence[1:-1] == self.tokenizer.unk_token_id).sum())
        return PeerReport(
            report=report,
            parameters=self.parameters,
            context=self.context,
            stride=self.stride,
            start_symbol=self.symbol(self.start),
            end_symbol=self.symbol(self.end),
            lossy_stories=lossy,
            unknown_tokens=unknown,
            revision=self.files.revision,
            safetensors=self.files.safe,
        )


def _choose_window(
    name: str, config: Any, context: int | None, stride: int | None
) -> tuple[int, int]:
    """Return (context, stride) in tokens; raise FlashLMError for what a model cannot do."""
    # Some models, such as recurrent ones, have no limit.
    limit = None
    for field in _CONTEXT_NAMES:
        limit = limit or getattr(config, field, None)

    if context is None:
        context = min(limit or USUAL_CONTEXT, USUAL_CONTEXT)
    if limit and context > limit:
        raise FlashLMError(f"{name} reads {limit:,} tokens at most: try --context {limit}")
    if context < 2:
        raise FlashLMError(f"--context must be at least 2 tokens, not {context}: try 512")

    if stride is None:
        stride = context // 2
    if not 1 <= stride < context:
        problem = f"--stride must be from 1 to {context - 1:,}, less than the context of {name}"
        raise FlashLMError(f"{problem}, not {stride:,}: try {context // 2}")
    return context, stride


# ---- loading one ----


def require_transformers() -> None:
    """Raise FlashLMError if transformers, which is an optional extra, is not installed."""
    if importlib.util.find_spec("transformers") is None:
        problem = "a model of others needs transformers"
        raise FlashLMError(f'{problem}: pip install -e ".[peers]" in the clone')


def load_peer(
    model: str | ModelFiles, context: int | None = None, stride: int | None = None
) -> Peer:
    """Load a causal language model and its tokenizer, from the hub or a local folder.

    model: a name of the hub, a folder, or what find_model() gave. context, stride: see Peer.
    No code that comes with a model is run: none is downloaded or imported, and weights are
    safetensors or, if there are none, a pickle of which nothing but tensors is read. They are
    computed in float32, whatever they are stored in.
    Raises FlashLMError, in one line, for everything that keeps it from being loaded and scored.
    """
    require_transformers()
    files = find_model(model) if isinstance(model, str) else model
    name = files.name
    import transformers

    # Its warnings and bars would bury our one line.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    own = {"local_files_only": True, "trust_remote_code": False}
    with explain_errors(f"{name} is no model that transformers can read", _ANOTHER):
        config = transformers.AutoConfig.from_pretrained(files.folder, **own)
    if config.is_encoder_decoder or type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "translates one text into another" if config.is_encoder_decoder else "has no head"
        raise FlashLMError(
            f"{name} ({config.model_type}) is no causal language model: it {kind}: {_ANOTHER}"
        )
    context, stride = _choose_window(name, config, context, stride)
    with explain_errors(f"the tokenizer of {name} cannot be loaded", "save the model's own anew"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(files.folder, **own)

    # A config may name kernels to download; "eager" is always at hand.
    with explain_errors(f"{name} cannot be loaded", "download or save it anew"):
        network, found = transformers.AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            use_safetensors=files.safe,
            weights_only=True,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **own,
        )
    if missing := sorted(found["missing_keys"]):
        problem = f"{name} lacks {len(missing)} of its weights, such as {missing[0]}"
        raise FlashLMError(f"{problem}: {_ANOTHER} that has them all")
    network.config.use_cache = False
    return Peer(files, network, tokenizer, context, stride)
