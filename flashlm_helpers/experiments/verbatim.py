"""What a model has learned by heart: runs of its words that the training text has, too.

Stories of one kind share phrases, so a run in common means little by itself. Held-out stories,
which no model can have learned, are therefore measured in the same way: only what goes beyond them
is recited.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from tqdm import tqdm

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.experiments.experiment import Text
from flashlm_helpers.generation import generate
from flashlm_helpers.machine.notices import LenientStream
from flashlm_helpers.model import LanguageModel
from flashlm_helpers.sources.overlap import RUN, words_of
from flashlm_helpers.tokens import TokenFile, tokenize
from flashlm_helpers.vocab import BOS, Vocabulary

STORIES = 20
PROMPT_WORDS = 8
TOKENS = 200  # that the model writes per story, at most

_BLOCK = 1 << 20  # token ids in memory at a time


# ---- what is reported ----


@dataclass(frozen=True)
class Copied:
    """What some texts have in common with the training text, word for word."""

    longest: int  # words of the longest run
    run: str  # that run, in small letters and without punctuation
    median_longest: float  # over the texts, words of the longest run of each
    share: float  # of the words, those inside runs of 13 words or more


@dataclass(frozen=True)
class Overlap:
    """How much a model copies, beside how much stories have in common anyway."""

    n_stories: int
    n_words: int  # that were written, prompts not counted; as many are held out
    written: Copied
    held_out: Copied

    def __str__(self) -> str:
        rows = [
            f"word for word in the training text, of {self.n_stories} stories written and "
            f"{self.n_stories} held out, {self.n_words:,} words each:",
            f"  {'':<9} longest run  median  words in runs of {RUN} or more",
        ]
        for name, found in {"written": self.written, "held out": self.held_out}.items():
            longest = f"{found.longest} words"
            rows.append(
                f"  {name:<9} {longest:>11}  {found.median_longest:>6g}  {found.share:>6.1%}"
            )
        return "\n".join([*rows, f'  the longest that was written: "{self.written.run}"'])


# ---- a model and its training text ----


def measure_overlap(
    model: LanguageModel, held_out: Sequence[str], training: Iterable[str], count: int = STORIES
) -> Overlap:
    """Let a model write stories, and find their longest runs of words in the training text.

    Each story goes on from the first 8 words of a held-out one, with a seed of its own (0, 1, ...).
    The prompt does not count. Of the held-out story, as many words are compared as were written,
    or the other way round if that one is shorter.
    held_out: stories that were not trained on; `count` of them, spread evenly, are taken. training:
    the stories that were, of which only one is in memory at a time.
    Raises FlashLMError if no held-out story is long enough.
    """
    prompts, endings = _split(held_out, count)
    stories = generate(model, prompts, tokens=TOKENS, seed=0)

    # Equal lengths, since a longer text has longer runs by chance.
    written = []
    real = []
    for story, ending in zip(stories, endings, strict=True):
        own = words_of(story.text[len(story.prompt) :])
        other = words_of(ending)
        length = min(len(own), len(other))
        written.append(own[:length])
        real.append(other[:length])

    # Both kinds are looked for in one pass.
    runs = longest_runs([*written, *real], map(words_of, training))
    n = len(written)
    return Overlap(
        n_stories=n,
        n_words=sum(map(len, written)),
        written=_summarize(written, runs[:n]),
        held_out=_summarize(real, runs[n:]),
    )


def _split(stories: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Split `count` stories, spread evenly, after their first words, if enough words follow."""
    start = re.compile(rf"\s*\S+(?:\s+\S+){{{PROMPT_WORDS - 1}}}(?=\s)")
    prompts = []
    endings = []
    for story in stories:
        found = start.match(story)
        if found and len(words_of(story[found.end() :])) >= RUN:
            prompts.append(found[0])
            endings.append(story[found.end() :])
    if not prompts:
        least = PROMPT_WORDS + RUN
        raise FlashLMError(
            f"no story of this text has {least} words, the fewest that can show an overlap: give "
            "longer ones"
        )

    # The first and the last one are among them.
    places = np.linspace(0, len(prompts) - 1, min(count, len(prompts))).astype(int)
    return [prompts[n] for n in places], [endings[n] for n in places]


def _summarize(texts: list[list[str]], runs: list[np.ndarray]) -> Copied:
    """Describe the runs, by the length of the longest one that ends at each word of each text."""
    run = []
    longest = []
    copied = 0
    for words, lengths in zip(texts, runs, strict=True):
        longest.append(int(lengths.max(initial=0)))
        if longest[-1] > len(run):
            end = int(lengths.argmax()) + 1
            run = words[end - longest[-1] : end]

        # A word is copied if a long run ends at it, or at a word after it and reaches back to it.
        inside = np.zeros(len(words), bool)
        for end in np.flatnonzero(lengths >= RUN) + 1:
            inside[end - lengths[end - 1] : end] = True
        copied += int(inside.sum())

    total = sum(map(len, texts))
    return Copied(len(run), " ".join(run), float(median(longest)), copied / max(total, 1))


def training_stories(text: Text | None, vocabulary: Vocabulary) -> Iterator[str]:
    """Return an iterator over the stories that are trained on: those of a text without copies.

    text: whatever open_corpus() takes, such as a model's `source`. It is tokenized if no earlier
    run has left its tokens. Raises FlashLMError at once if it is None, or cannot be opened.
    """
    if text is None:
        raise FlashLMError(
            "the overlap needs the training text, and this model does not say which it is: give "
            "the checkpoint of its run"
        )
    try:
        tokens = tokenize(open_corpus(text), "train", vocabulary)
    except FlashLMError as error:
        problem = "the overlap needs the training text, which is not at hand"
        raise FlashLMError(f"{problem}: {error}") from error
    return _decode(tokens, vocabulary)


def _decode(tokens: TokenFile, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield the stories of a token file, with a block of ids in memory at a time."""
    rest = np.zeros(0, np.uint16)
    with tqdm(
        total=tokens.n_stories, desc="searching", unit=" stories", file=LenientStream()
    ) as bar:
        for place in range(0, tokens.n_tokens, _BLOCK):
            # A story begins with its BOS, and the last one may go on in the next block.
            ids = np.concatenate([rest, tokens.ids[place : place + _BLOCK]])
            *stories, rest = np.split(ids, np.flatnonzero(ids == BOS)[1:])
            yield from map(vocabulary.decode, stories)
            bar.update(len(stories))
        yield vocabulary.decode(rest)
        bar.update(1)


# ---- the search ----


def longest_runs(
    texts: Sequence[Sequence[str]], training: Iterable[Sequence[str]]
) -> list[np.ndarray]:
    """Find the longest run that ends at each word of each text and stands in a training story.

    texts, training: words of each text; no run goes from one into the next. Training stories are
    read once, in time proportional to their words; memory is for `texts` alone.
    Returns the lengths, in words: for each text (n_words,) int64, 0 where no story has the word.
    """
    # None, which is no word, stands between two texts.
    joined = []
    for words in texts:
        joined += [*words, None]
    automaton = SuffixAutomaton(joined)
    for words in training:
        automaton.read(words)

    # Cut the result where the texts were joined.
    lengths = automaton.lengths_found()
    results = []
    start = 0
    for words in texts:
        results.append(lengths[start : start + len(words)])
        start += len(words) + 1
    return results


class SuffixAutomaton:
    """The smallest automaton that reads the runs of a text, and nothing else.

    A state stands for the runs that end at the same places of the text. The longest of them has
    `length` words. Dropping words from its front gives the others, and then, where a run ends at
    more places, the state that `link` leads to; state 0 is the empty run. There are at most two
    states per word. Source: A. Blumer et al., doi:10.1016/0304-3975(85)90157-4.
    """

    def __init__(self, text: Iterable):
        self._next: list[dict] = [{}]  # of each state: word -> the state after it
        self._length = [0]
        self._link = [-1]
        self._found = [0]  # of each state: words of its longest run that was read
        self._ends = []  # the state of the whole text up to each of its words
        for word in text:
            last = self._ends[-1] if self._ends else 0
            self._ends.append(self._append(word, last))

    def _append(self, word, last: int) -> int:
        """Add a word after the whole text, whose state is `last`; return the new one's."""
        new = self._add_state(self._length[last] + 1, {}, 0)

        # Every end of the text can now be followed by the word; longer ones never were before.
        state = last
        while state >= 0 and word not in self._next[state]:
            self._next[state][word] = new
            state = self._link[state]
        if state < 0:
            return new

        # The longest end that had it before: the run with the word must have a state of its own.
        after = self._next[state][word]
        if self._length[after] > self._length[state] + 1:
            after = self._divide(state, word, after)
        self._link[new] = after
        return new

    def _divide(self, state: int, word, after: int) -> int:
        """Split off the runs of `after` that now end at one more place; return their state."""
        shorter = self._add_state(
            self._length[state] + 1, dict(self._next[after]), self._link[after]
        )
        self._link[after] = shorter
        while state >= 0 and self._next[state].get(word) == after:
            self._next[state][word] = shorter
            state = self._link[state]
        return shorter

    def _add_state(self, length: int, following: dict, link: int) -> int:
        self._next.append(following)
        self._length.append(length)
        self._link.append(link)
        self._found.append(0)
        return len(self._length) - 1

    def read(self, words: Iterable[str]) -> None:
        """Read a story, and remember in each state the longest run that led to it."""
        state = 0
        length = 0
        for word in words:
            # Drop words from the front until the rest, with this word, is a run of the text.
            while state and word not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if word in self._next[state]:
                state = self._next[state][word]
                length += 1
            if length > self._found[state]:
                self._found[state] = length

    def lengths_found(self) -> np.ndarray:
        """Return for each word of the text the longest run read that ends there: (n_words,)."""
        # Whoever read a run has read its shorter ends, which link leads to: longest states first.
        found = list(self._found)
        by_length = sorted(range(len(found)), key=self._length.__getitem__)
        for state in reversed(by_length[1:]):
            if found[state]:
                link = self._link[state]
                found[link] = self._length[link]

        # Where nothing of a state was read, a shorter end may have been.
        for state in by_length[1:]:
            found[state] = found[state] or found[self._link[state]]
        return np.array([found[state] for state in self._ends], np.int64)
