"""Bits per character that nobody can object to: every token of every story, divided by the text itself."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.hardware import products
from flashlm_helpers.head import ROWS
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import freeze_ternary
from flashlm_helpers.vocab import BOS, EOS, PAD, Vocabulary

LEVEL = 0.95  # of the intervals
_POSITIONS = 2048  # in the model at once, of all sequences that stand side by side

# (model, BPC, how it was counted): what others report, and why these figures cannot be compared with ours directly.
PUBLISHED = (
    ("TinyStories-1M (float, GPU)", 0.62, "as reported: at most 257 tokens of a story scored, and not the first, "
                                          "but all its characters counted"),
    ("TinyStories-1M (float, GPU)", 0.69, "about: every token of every story"),
    ("FlashLM v4 (ternary, CPU)", 0.88, "as reported: cut as above, and by ids of another vocabulary than the model's"),
)


@dataclass(frozen=True)
class BPCReport:
    """What a model needs for a text, with the counts it was divided by.

    bpc, bpb: bits per character (Unicode code point) and per UTF-8 byte. nats_per_token: mean over the
    n_tokens tokens of the text. end_nats_per_story: what the end symbols cost, in none of the other figures.
    interval: bootstrap over stories, {"level", "bpc": [low, high], "bpb": [low, high]}, None for a single story.
    """

    bpc: float
    bpb: float
    nats_per_token: float
    n_stories: int
    n_tokens: int
    n_chars: int
    n_bytes: int
    end_nats_per_story: float
    interval: dict | None

    def as_dict(self) -> dict:
        """The report as plain numbers, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        low, high = self.interval["bpc"] if self.interval else (float("nan"), float("nan"))
        return (f"BPC {self.bpc:.4f} [{low:.4f}, {high:.4f}]  BPB {self.bpb:.4f}  "
                f"{self.nats_per_token:.4f} nats/token over {self.n_stories:,} stories, "
                f"{self.n_tokens:,} tokens, {self.n_chars:,} characters")


def encode_stories(vocabulary: Vocabulary, stories: Sequence[str]) -> list[np.ndarray]:
    """Each story as BOS, its ids, EOS (int64); raises FlashLMError if there is none or one is empty."""
    if not stories or not all(stories):
        raise FlashLMError("there is no story to score: give a text with at least one")
    return [np.concatenate(([BOS], ids, [EOS])).astype(np.int64) for ids in vocabulary.encode_batch(stories)]


def _count_lanes(lengths: list[int]) -> int:
    """Side by side in how many lanes sequences of these lengths take the fewest passes of _POSITIONS positions."""

    def passes(lanes: int) -> int:
        pieces = [-(-length * lanes // _POSITIONS) for length in lengths]
        return max(max(pieces, default=0), -(-sum(pieces) // lanes))

    return min((32, 16, 8, 4, 2, 1), key=passes)


@torch.no_grad()
def token_nats(model: FlashLM, sequences: Sequence[np.ndarray], bfloat16: bool | None = None) -> list[np.ndarray]:
    """-ln p of every id but the first of each sequence, given all ids before it; float64 arrays.

    sequences: ids starting with BOS, of any length; nothing is truncated and memory does not grow with length.
    bfloat16: whether matrix products are made in it (None: where the processor has it); all the rest is float32.
    """
    frozen = freeze_ternary(model)  # its blocks are eager: compiling them once more takes longer than it saves
    result = [np.empty(len(sequence) - 1) for sequence in sequences]
    # The sequences stand end to end in a few lanes, whose width never changes: no padding, and one program for rows.
    lanes = _count_lanes([len(nats) for nats in result])
    width = _POSITIONS // lanes
    queues: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]  # (sequence, first position) of every piece
    for i in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        shortest = min(queues, key=len)
        shortest += [(i, start) for start in range(0, len(result[i]), width)]
    past = None
    for pieces in itertools.zip_longest(*queues, fillvalue=(None, 0)):
        ids = torch.full((lanes, width + 1), PAD)
        for lane, (i, start) in enumerate(pieces):
            if i is not None:
                piece = torch.from_numpy(sequences[i][start : start + width + 1])
                ids[lane, : len(piece)] = piece
        if past is not None:
            carried = torch.tensor([start > 0 for _, start in pieces])
            past = [state * carried.view(-1, *[1] * (state.ndim - 1)) for state in past]
        with products(bfloat16):
            hidden, past = frozen.hidden(ids[:, :-1], past)
            rows = zip(hidden.flatten(0, 1).split(ROWS), ids[:, 1:].flatten().split(ROWS), strict=True)
            nats = torch.cat([frozen.row_nats(frozen.head(h), targets) for h, targets in rows]).view(lanes, width)
        for lane, (i, start) in enumerate(pieces):
            if i is not None:
                count = min(width, len(result[i]) - start)
                result[i][start : start + count] = nats[lane, :count]
    return result


def bits_report(stories: Sequence[str], nats: Sequence[np.ndarray], seed: int = 0) -> BPCReport:
    """The accounting, the same for a model and for every baseline.

    stories: the texts. nats: for each, -ln p of its tokens and, last, of the end symbol. Sums the tokens'
    nats over all stories and divides by ln 2 and by the characters (BPC) or UTF-8 bytes (BPB) of these texts.
    """
    text = np.array([n[:-1].sum() for n in nats])
    chars = np.array([len(s) for s in stories])
    size = np.array([len(s.encode("utf-8", "surrogatepass")) for s in stories])
    n_tokens = sum(len(n) - 1 for n in nats)
    interval = None
    if len(stories) > 1:
        draws = np.random.default_rng(seed).multinomial(len(stories), np.full(len(stories), 1 / len(stories)), 1000)
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        interval = {"level": LEVEL}
        for name, lengths in (("bpc", chars), ("bpb", size)):
            interval[name] = np.quantile(draws @ text / (draws @ lengths) / math.log(2), tails).tolist()
    bits = float(text.sum()) / math.log(2)
    return BPCReport(
        bpc=bits / int(chars.sum()), bpb=bits / int(size.sum()), nats_per_token=float(text.sum()) / n_tokens,
        n_stories=len(stories), n_tokens=n_tokens, n_chars=int(chars.sum()), n_bytes=int(size.sum()),
        end_nats_per_story=float(np.mean([n[-1] for n in nats])), interval=interval,
    )


def evaluate(model: FlashLM, vocabulary: Vocabulary, stories: Sequence[str],
             bfloat16: bool | None = None) -> BPCReport:
    """Score whole stories: every token, the first one included, given BOS and all tokens before it.

    model: a FlashLM, or one of another runtime that has a token_nats(sequences) of its own.
    bfloat16: as in token_nats(); on real text the two formats differ by 0.00004 nats/token.
    Raises FlashLMError if there is no story, or if vocabulary and model do not belong together.
    """
    if not isinstance(model, FlashLM):
        return bits_report(stories, model.token_nats(encode_stories(vocabulary, stories)))
    if len(vocabulary) != model.config.vocabulary_size:
        raise FlashLMError(f"the model knows {model.config.vocabulary_size} ids and the vocabulary has "
                           f"{len(vocabulary)}: use the vocabulary the model was trained with")
    return bits_report(stories, token_nats(model, encode_stories(vocabulary, stories), bfloat16))
