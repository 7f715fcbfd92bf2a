"""What a model has to beat on the same text, counted alike: counting models and compressors."""

import lzma
import math
from collections.abc import Sequence

import numpy as np
import zstandard

from flashlm_helpers.evaluation import BPCReport, bits_report, encode_stories
from flashlm_helpers.vocab import BOS, EOS, Vocabulary

TRAINING_IDS = 20_000_000  # as many ids as counting models read, to limit their memory

Ints = np.ndarray  # int64: ids, counts, or n-grams of ids as one number each
Floats = np.ndarray  # float64


class TrigramModel:
    """An interpolated Kneser-Ney trigram over token ids.

    A trigram's probability is its discounted count, plus the mass that the discount frees times
    the bigram's probability. Bigrams and unigrams count in how many different contexts a token
    occurs, and the unigram is mixed with the uniform distribution.
    Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language
    modeling", doi:10.1006/csla.1999.0128.
    """

    def __init__(self, ids: Ints, size: int):
        """Count the ids of a training stream, stories as BOS ... EOS; size: V."""
        self.size = size
        stream = np.asarray(ids[:TRAINING_IDS]).astype(np.int64)

        # A story starts with BOS twice, so that its first token has two ids before it, too.
        stream = np.insert(stream, np.flatnonzero(stream == BOS), BOS)
        first = stream[:-2]
        second = stream[1:-1]
        token = stream[2:]

        # Each trigram is one number, with V as the base; none reaches into the next story.
        trigrams = (first * size + second) * size + token
        inside = (token != BOS) & (second != EOS)
        trigrams, trigram_counts = np.unique(trigrams[inside], return_counts=True)

        # The shorter ones: every context in which a token was seen counts once.
        bigrams, bigram_counts = np.unique(trigrams % size**2, return_counts=True)
        unigrams, unigram_counts = np.unique(bigrams % size, return_counts=True)
        self.unigrams = _DiscountedCounts(unigrams, unigram_counts, size)
        self.bigrams = _DiscountedCounts(bigrams, bigram_counts, size)
        self.trigrams = _DiscountedCounts(trigrams, trigram_counts, size)

    def probability(self, first: Ints, second: Ints, token: Ints) -> Floats:
        """Return p(token | first, second), float64, for arrays of ids of one shape.

        In every context the probabilities of all V tokens sum to 1.
        """
        uniform = np.full(token.shape, 1 / self.size)
        p = self.unigrams.interpolate(np.zeros_like(second), token, uniform)
        p = self.bigrams.interpolate(second, token, p)
        return self.trigrams.interpolate(first * self.size + second, token, p)

    def nats(self, sequence: Ints) -> Floats:
        """Return -ln p of every id of BOS ... EOS but the first."""
        padded = np.insert(sequence, 0, BOS)
        return -np.log(self.probability(padded[:-2], padded[1:-1], padded[2:]))


class _DiscountedCounts:
    """Counts of n-grams, less one absolute discount."""

    def __init__(self, keys: Ints, counts: Ints, size: int):
        """Take over sorted keys, context * V + token, and how often each occurs; size: V."""
        self.keys = keys
        self.counts = counts
        self.size = size

        # For each context: the sum of its counts, and how many different tokens follow it.
        self.contexts, first = np.unique(keys // size, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.followers = np.diff(np.append(first, len(keys)))

        # The usual estimate of the best discount, n1 / (n1 + 2 n2), from how many n-grams occur
        # once and twice. A text too small to estimate it from gets a half.
        once = int((counts == 1).sum())
        twice = int((counts == 2).sum())
        self.discount = 0.5
        if once and twice:
            self.discount = once / (once + 2 * twice)

    def interpolate(self, context: Ints, token: Ints, lower: Floats) -> Floats:
        """Mix discounted counts with `lower`, the probabilities of the n-grams one id shorter."""
        # p = (max(count - d, 0) + d * followers * lower) / total: what the discount d takes from
        # each n-gram of a context is shared out by `lower`, so p still sums to 1.
        total = _look_up(self.contexts, self.totals, context)
        freed = self.discount * _look_up(self.contexts, self.followers, context)
        count = _look_up(self.keys, self.counts, context * self.size + token)
        seen = np.maximum(count - self.discount, 0)
        p = (seen + freed * lower) / np.maximum(total, 1)

        # A context that was never seen says nothing of its own.
        return np.where(total > 0, p, lower)


def _look_up(keys: Ints, values: Ints, wanted: Ints) -> Ints:
    """Return the value of each wanted key, or 0; keys: sorted."""
    # Where a key is missing, the search finds a neighbour, or the place behind the last one.
    place = np.searchsorted(keys, wanted)
    place = np.minimum(place, len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def counting_baselines(
    vocabulary: Vocabulary, training_ids: Ints | None, stories: Sequence[str]
) -> dict[str, BPCReport]:
    """Score stories with models that only count: a uniform one, a unigram, a trigram.

    training_ids: the training stream; None leaves out all but the uniform one.
    Returns the reports by name, in this order.
    """
    size = len(vocabulary)
    costs = {"uniform": lambda ids: np.full(len(ids) - 1, math.log(size))}
    if training_ids is not None:
        # One is added to each count. A start symbol is given, and never predicted.
        counts = np.bincount(training_ids[:TRAINING_IDS], minlength=size) + 1.0
        counts[BOS] = 1.0
        unigram = -np.log(counts / counts.sum())
        costs["unigram"] = lambda ids: unigram[ids[1:]]
        costs["trigram (Kneser-Ney)"] = TrigramModel(training_ids, size).nats

    # All are counted like a model.
    sequences = encode_stories(vocabulary, stories)
    reports = {}
    for name, cost in costs.items():
        reports[name] = bits_report(stories, [cost(ids) for ids in sequences])
    return reports


def compressor_baselines(stories: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the bits per character and per byte that xz and zstd need, {name: {"bpc", "bpb"}}.

    The stories are compressed as one text, a line break between each two. Compressors start from
    nothing, without the training text.
    """
    # Both at their strongest setting.
    text = "\n".join(stories)
    raw = text.encode("utf-8", "surrogatepass")
    compressed = {
        "xz -9e": lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
        "zstd -19": zstandard.ZstdCompressor(level=19).compress(raw),
    }

    found = {}
    for name, content in compressed.items():
        bits = 8 * len(content)
        found[name] = {"bpc": bits / len(text), "bpb": bits / len(raw)}
    return found
