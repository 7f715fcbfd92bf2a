"""Bits per character, counted so that nobody can object: every token of every story."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.numbers import matmul_autocast
from flashlm_helpers.machine.threads import follow
from flashlm_helpers.mixers import State, map_state
from flashlm_helpers.model import LanguageModel
from flashlm_helpers.quantization import freeze_ternary
from flashlm_helpers.vocab import BOS, EOS, PAD, Vocabulary

# ---- what every token costs: negative log-likelihoods in nats ----

# Stories differ in length, and padding all to the longest would waste most of the work. Instead
# they are cut into pieces of one width, which fill a few lanes:
#
#               pass 0     pass 1     pass 2     pass 3
#     lane 0   | A, 0     | A, 1     | A, 2     | A, 3  |     A is the longest story
#     lane 1   | B, 0     | B, 1     | D, 0     | F, 0  |
#     lane 2   | C, 0     | C, 1     | E, 0     |       |
#
# A pass reads one piece per lane. "A, 1" goes on from the states that "A, 0" left in its lane;
# before the first piece of another story, the states of the lane become zeros again.

POSITIONS = 2048  # that the network reads per pass, in all lanes together
LANES = (32, 16, 8, 4, 2, 1)  # the numbers of lanes to choose from


class Piece(NamedTuple):
    """Where a part of a sequence is read."""

    lane: int
    sequence: int  # its index
    start: int  # position of the part's first id in the sequence


def pack_into_lanes(lengths: Sequence[int], lanes: int, width: int) -> list[list[Piece]]:
    """Cut sequences into pieces of `width` positions and spread them over lanes, longest first.

    lengths: positions per sequence. Returns the pieces of each pass, at most one per lane; the
    pieces of a sequence follow one another in one lane.
    """
    passes = []
    filled = [0] * lanes  # passes that each lane is busy in
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for sequence in longest_first:
        lane = filled.index(min(filled))

        # The lane's next free passes are for this sequence, from its start to its end.
        for start in range(0, lengths[sequence], width):
            if filled[lane] == len(passes):
                passes.append([])
            passes[filled[lane]].append(Piece(lane, sequence, start))
            filled[lane] += 1
    return passes


def _count_passes(lengths: Sequence[int], lanes: int) -> int:
    """Return how many passes sequences of these lengths take, at the least, in so many lanes."""
    width = POSITIONS // lanes
    longest = 0
    total = 0
    for length in lengths:
        pieces = math.ceil(length / width)
        longest = max(longest, pieces)
        total += pieces
    return max(longest, math.ceil(total / lanes))


def _reset_states(states: list[State], keep: Tensor) -> list[State]:
    """Set the states to zeros in every lane where `keep` (lanes,) is False."""

    def reset(state: Tensor) -> Tensor:
        return state * keep.view(-1, *[1] * (state.ndim - 1))

    return [map_state(reset, state) for state in states]


@torch.no_grad()
def token_nats(
    network: nn.Module, sequences: Sequence[np.ndarray], bfloat16: bool | None = None
) -> list[np.ndarray]:
    """Return the negative log-likelihood, in nats, of every id of each sequence but the first.

    network: a FlashLM, or anything with its hidden() and token_nll(). sequences: int64 ids that
    start with BOS, of any length; nothing is truncated, and memory does not grow with length.
    bfloat16: whether matmuls are computed in it (None: where the processor has it). Returns
    float64 arrays, one id shorter than the sequences.
    """
    # The frozen copy is not compiled: that would take longer than it saves.
    frozen = freeze_ternary(network)
    lengths = [len(sequence) - 1 for sequence in sequences]
    result = list(map(np.empty, lengths))
    lanes = min(LANES, key=lambda count: _count_passes(lengths, count))
    width = POSITIONS // lanes

    states = None
    for pieces in pack_into_lanes(lengths, lanes, width):
        # Put the pieces side by side; each takes along the id after it, its last target.
        ids = torch.full((lanes, width + 1), PAD)
        continues = torch.zeros(lanes, dtype=torch.bool)
        for lane, sequence, start in pieces:
            part = torch.from_numpy(sequences[sequence][start : start + width + 1])
            ids[lane, : len(part)] = part
            continues[lane] = start > 0
        if states is not None:
            states = _reset_states(states, continues)

        # Read them all at once.
        follow()
        with matmul_autocast(bfloat16):
            hidden, states = frozen.hidden(ids[:, :-1], states)
            targets = ids[:, 1:].flatten()
            nats = frozen.token_nll(hidden.flatten(0, 1), targets).view(lanes, width)

        # Hand each sequence its own, without what only fills up a piece.
        for lane, sequence, start in pieces:
            own = result[sequence][start : start + width]
            own[:] = nats[lane, : len(own)]
    return result


# ---- the accounting: from nats to bits per character ----

# The intervals: how many of the draws of the bootstrap they hold, and how many there are.
LEVEL = 0.95
DRAWS = 1000


@dataclass(frozen=True)
class BPCReport:
    """What a text costs a model, with the counts that it was divided by."""

    bpc: float  # bits per character (Unicode code point)
    bpb: float  # bits per byte of UTF-8
    nats_per_token: float
    n_stories: int
    n_tokens: int  # of the text, without BOS and EOS
    n_chars: int
    n_bytes: int
    end_nats_per_story: float  # what the end symbols cost, in none of the other figures

    # From a bootstrap over stories: {"level": 0.95, "bpc": [low, high], "bpb": [low, high]}, plain
    # numbers for JSON. None for a single story.
    interval: dict | None

    def __str__(self) -> str:
        interval = " [{:.4f}, {:.4f}]".format(*self.interval["bpc"]) if self.interval else ""
        stories = "story" if self.n_stories == 1 else "stories"
        return (
            f"BPC {self.bpc:.4f}{interval}  BPB {self.bpb:.4f}  "
            f"{self.nats_per_token:.4f} nats/token over {self.n_stories:,} {stories}, "
            f"{self.n_tokens:,} tokens, {self.n_chars:,} characters"
        )


def encode_stories(vocabulary: Vocabulary, stories: Sequence[str]) -> list[np.ndarray]:
    """Return each story as BOS, its ids, EOS (int64).

    Raises FlashLMError if there is no story, or an empty one.
    """
    if not stories or not all(stories):
        raise FlashLMError("there is no story to score: give a text with at least one")
    sequences = []
    for ids in vocabulary.encode_batch(stories):
        sequences.append(np.concatenate(([BOS], ids, [EOS])).astype(np.int64))
    return sequences


def bits_report(stories: Sequence[str], nats: Sequence[np.ndarray], seed: int = 0) -> BPCReport:
    """Turn nats into bits per character and per byte; the same for a model and every baseline.

    stories: the texts. nats: for each story the negative log-likelihoods of its tokens and, last,
    of its end symbol. The tokens' nats are summed over all stories and divided by ln 2 and by the
    characters or bytes of the texts, so that long stories count as much as they are long.
    """
    # Sum each story by itself, since the bootstrap draws whole stories.
    text_nats = []
    end_nats = []
    characters = []
    size = []  # bytes
    for story, values in zip(stories, nats, strict=True):
        text_nats.append(values[:-1].sum())
        end_nats.append(values[-1])
        characters.append(len(story))
        size.append(len(story.encode("utf-8", "surrogatepass")))

    # The end symbols are left out: they belong to no character.
    total = float(np.sum(text_nats))
    bits = total / math.log(2)
    n_tokens = sum(map(len, nats)) - len(nats)

    # What the figures would have been for other stories of the same kind.
    interval = None
    if len(stories) > 1:
        times = _bootstrap(len(stories), seed)
        interval = {
            "level": LEVEL,
            "bpc": _interval(times @ text_nats / (times @ characters)),
            "bpb": _interval(times @ text_nats / (times @ size)),
        }
    return BPCReport(
        bpc=bits / sum(characters),
        bpb=bits / sum(size),
        nats_per_token=total / n_tokens,
        n_stories=len(stories),
        n_tokens=n_tokens,
        n_chars=sum(characters),
        n_bytes=sum(size),
        end_nats_per_story=float(np.mean(end_nats)),
        interval=interval,
    )


def _bootstrap(stories: int, seed: int) -> np.ndarray:
    """Draw as many stories as there are, with replacement; return how often each was drawn.

    Returns (DRAWS, stories): a row is a text that might as well have been there.
    """
    # Drawing the counts at once is the same as drawing story by story, and faster.
    rng = np.random.default_rng(seed)
    return rng.multinomial(stories, np.full(stories, 1 / stories), DRAWS)


def _interval(nats: np.ndarray) -> list[float]:
    """Return [low, high], in bits, between which LEVEL of the draws (in nats) lie."""
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return np.quantile(nats / math.log(2), tails).tolist()


def evaluate(model: LanguageModel, stories: Sequence[str]) -> BPCReport:
    """Score whole stories: every token, the first one included, given BOS and all tokens before it.

    model: of any runtime. Raises FlashLMError if there is no story, or an empty one.
    """
    sequences = encode_stories(model.vocabulary, stories)
    return bits_report(stories, model.token_nats(sequences))
