"""What training and validation stories have in common: it flatters a model, so it is said.

A validation story that is trained on is remembered, not predicted. Runs of 13 words are seldom the
same by chance, and shared ones show stories that are nearly the same, or quote each other
(arXiv:2005.14165, appendix C).
"""

import itertools
import string
from collections.abc import Iterable, Iterator

import numpy as np
from tqdm import tqdm

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.notices import LenientStream
from flashlm_helpers.sources.gpt2 import batches_of_text

RUN = 13  # words

# Case and punctuation do not count, and an apostrophe does not end a word.
_PLAIN = str.maketrans(dict.fromkeys(string.punctuation + "“”—–…", " ") | {"'": None, "’": None})

# Any odd number that mixes the bits of 64-bit hashes well.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_TABLE_BITS = 24


def leave_out_copies(stories: Iterable[str], held_out: Iterable[str]) -> Iterator[str]:
    """Yield the training stories that are no validation stories, and say what the two share.

    A copy has the same words in the same order. Stories that share a run of 13 words are kept, and
    at the end counted in one line on stderr, with the copies. Reads a few thousand stories at a
    time; of all validation runs it remembers 8 bytes each.
    Raises FlashLMError if all training stories are copies.
    """
    valid = _HeldOut(held_out)
    if not valid.count:
        yield from stories
        return

    kept = 0
    copies = 0
    sharing = 0
    near = 0
    for batch in batches_of_text(stories):
        words = [words_of(story) for story in batch]
        shares = valid.mark_shared(words)
        for story, own, share in zip(batch, words, shares, strict=True):
            if own and hash(tuple(own)) in valid.stories:
                copies += 1
                continue
            kept += 1
            sharing += int(share > 0)
            near += int(share >= 0.5)
            yield story

    if copies and not kept:
        problem = "every training story is a validation story, too"
        raise FlashLMError(f"{problem}: validate on other stories, or give none to hold some out")

    # tqdm.write goes around the progress bar, which is still there.
    said = []
    if copies:
        copied = "1 copy" if copies == 1 else f"{copies:,} copies"
        said.append(f"{copied} of validation stories left out of training")
    if sharing:
        told = f"{sharing:,} of {kept:,} training stories share a run of {RUN} words"
        told += f" with {valid.count_shared():,} of {valid.count:,} validation stories"
        said.append(f"{told}, {near:,} of them at least half of their runs")
    if said:
        tqdm.write("; ".join(said), file=LenientStream())


def words_of(story: str) -> list[str]:
    """Return the words of a text in small letters, without punctuation."""
    return story.lower().translate(_PLAIN).split()


class _HeldOut:
    """The validation stories and all their runs of words, as hashes.

    stories: hashes of whole stories. count: how many stories there are.
    """

    def __init__(self, stories: Iterable[str]):
        self.stories: set[int] = set()
        self.count = 0
        runs = [np.zeros(0, np.uint64)]
        owners = [np.zeros(0, np.int64)]
        for batch in batches_of_text(stories):
            words = [words_of(story) for story in batch]
            self.stories.update(hash(tuple(one)) for one in words)
            found, owner = _hash_runs(words)
            runs.append(found)
            owners.append(owner + self.count)
            self.count += len(batch)

        # The runs in order, each once, and which of them each place of each story has.
        self._owners = np.concatenate(owners)
        self._runs, self._place = np.unique(np.concatenate(runs), return_inverse=True)
        self._is_shared = np.zeros(len(self._runs), bool)

        # Nearly all runs of a training story miss this table, which is faster than a search.
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[_slot(self._runs)] = True

    def mark_shared(self, batch: list[list[str]]) -> np.ndarray:
        """Return for each story of a batch the share of its runs that validation stories have, too.

        batch: the words of each story. Remembers which runs were found.
        """
        runs, owner = _hash_runs(batch)
        count = np.bincount(owner, minlength=len(batch))
        maybe = self._table[_slot(runs)]
        runs = runs[maybe]
        owner = owner[maybe]

        # The next run in order is the same, or there is none.
        if len(runs):
            place = np.searchsorted(self._runs, runs)
            place = np.minimum(place, len(self._runs) - 1)
            same = self._runs[place] == runs
            self._is_shared[place[same]] = True
            owner = owner[same]
        return np.bincount(owner, minlength=len(batch)) / np.maximum(count, 1)

    def count_shared(self) -> int:
        """Return how many of the stories have a run that was marked."""
        return len(np.unique(self._owners[self._is_shared[self._place]]))


def _slot(runs: np.ndarray) -> np.ndarray:
    return runs >> np.uint64(64 - _TABLE_BITS)


def _hash_runs(batch: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash (uint64) of every run of 13 words, and which story of the batch has it."""
    lengths = np.array([len(words) for words in batch], np.int64)
    total = int(lengths.sum())
    words = itertools.chain.from_iterable(batch)
    hashes = np.fromiter(map(hash, words), np.int64, total).view(np.uint64)
    owner = np.repeat(np.arange(len(batch)), lengths)

    # A polynomial of 13 hashes, modulo 2**64, at all places at once.
    count = max(total - RUN + 1, 0)
    runs = np.zeros(count, np.uint64)
    for place in range(RUN):
        runs *= _BASE
        runs += hashes[place : place + count]

    # Where a story ends, a run would go on in the next one.
    inside = owner[:count] == owner[total - count :]
    return runs[inside], owner[:count][inside]
