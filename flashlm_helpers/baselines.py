"""What a model has to beat on the same text with the same accounting: counting models and compressors."""

import lzma
import math
from collections.abc import Sequence

import numpy as np
import zstandard

from flashlm_helpers.evaluation import BPCReport, bits_report, encode_stories
from flashlm_helpers.vocab import BOS, EOS, Vocabulary

TRAINING_IDS = 20_000_000  # as many ids as the counting models read, for the sake of memory


class TrigramModel:
    """An interpolated Kneser-Ney trigram over token ids.

    ids: the training stream, stories as BOS ... EOS. size: V. A trigram's probability is its discounted
    count plus the mass that the discount frees times the bigram's; bigrams and unigrams count in how many
    different contexts a token occurs, and the unigram is mixed with the uniform distribution.
    Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for
    language modeling", doi:10.1006/csla.1999.0128.
    """

    def __init__(self, ids: np.ndarray, size: int):
        self.size = size
        stream = np.asarray(ids[:TRAINING_IDS]).astype(np.int64)
        stream = np.insert(stream, np.flatnonzero(stream == BOS), BOS)  # the first token has two ids before it
        trigrams = (stream[:-2] * size + stream[1:-1]) * size + stream[2:]
        within = (stream[2:] != BOS) & (stream[1:-1] != EOS)
        trigrams, counts = np.unique(trigrams[within], return_counts=True)
        bigrams, bigram_counts = np.unique(trigrams % size**2, return_counts=True)
        unigrams, unigram_counts = np.unique(bigrams % size, return_counts=True)
        self.tables = [_Discounted(t, c, size) for t, c in
                       ((unigrams, unigram_counts), (bigrams, bigram_counts), (trigrams, counts))]

    def probability(self, first: np.ndarray, second: np.ndarray, token: np.ndarray) -> np.ndarray:
        """p(token | first, second) for arrays of ids of one shape; float64. Sums to 1 over all V tokens."""
        contexts = (np.zeros_like(second), second, first * self.size + second)
        p = np.full(token.shape, 1 / self.size)
        for table, context in zip(self.tables, contexts, strict=True):
            p = table.interpolate(context, token, p)
        return p

    def nats(self, sequence: np.ndarray) -> np.ndarray:
        """-ln p of every id of BOS ... EOS but the first; float64."""
        padded = np.insert(sequence, 0, BOS)
        return -np.log(self.probability(padded[:-2], padded[1:-1], padded[2:]))


class _Discounted:
    """Counts of n-grams (keys context * size + token), less one absolute discount."""

    def __init__(self, keys: np.ndarray, counts: np.ndarray, size: int):
        self.keys, self.counts, self.size = keys, counts, size
        self.contexts, first = np.unique(keys // size, return_index=True)
        self.totals = np.add.reduceat(counts, first)
        self.types = np.diff(np.append(first, len(keys)))
        once, twice = int((counts == 1).sum()), int((counts == 2).sum())
        self.discount = once / (once + 2 * twice) if once and twice else 0.5

    def interpolate(self, context: np.ndarray, token: np.ndarray, lower: np.ndarray) -> np.ndarray:
        total = _look_up(self.contexts, self.totals, context)
        freed = self.discount * _look_up(self.contexts, self.types, context)
        count = _look_up(self.keys, self.counts, context * self.size + token)
        seen = np.maximum(count - self.discount, 0)
        return np.where(total > 0, (seen + freed * lower) / np.maximum(total, 1), lower)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def counting_baselines(vocabulary: Vocabulary, training_ids: np.ndarray | None,
                       stories: Sequence[str]) -> dict[str, BPCReport]:
    """Reports of models that only count, over the tokens of `stories`, in the order uniform, unigram, trigram.

    training_ids: the training stream (None leaves out all but the uniform one). The unigram adds one to each count.
    """
    sequences, size = encode_stories(vocabulary, stories), len(vocabulary)
    nats = {"uniform": [np.full(len(s) - 1, math.log(size)) for s in sequences]}
    if training_ids is not None:
        counts = np.bincount(training_ids[:TRAINING_IDS], minlength=size) + 1.0
        counts[BOS] = 1.0  # a start symbol is given, never predicted
        unigram, trigram = -np.log(counts / counts.sum()), TrigramModel(training_ids, size)
        nats["unigram"] = [unigram[s[1:]] for s in sequences]
        nats["trigram (Kneser-Ney)"] = [trigram.nats(s) for s in sequences]
    return {name: bits_report(stories, values) for name, values in nats.items()}


def compressor_baselines(stories: Sequence[str]) -> dict[str, dict[str, float]]:
    """Bits per character and byte that xz and zstd need for the stories, one after another, a line break between.

    They start from nothing, without the training text. Returns {name: {"bpc", "bpb"}}.
    """
    text = "\n".join(stories)
    raw = text.encode("utf-8", "surrogatepass")
    packed = {"xz -9e": lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME),
              "zstd -19": zstandard.ZstdCompressor(level=19).compress(raw)}
    return {name: {"bpc": 8 * len(p) / len(text), "bpb": 8 * len(p) / len(raw)} for name, p in packed.items()}
