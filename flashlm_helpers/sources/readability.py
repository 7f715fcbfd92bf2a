"""How hard a text is to read, to take the easy part of what the web has."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.sources.files import say_once

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?…]+(?=\W|$)")


def reading_grade(text: str) -> float:
    """Estimate the school grade that a text in English is written for: 1 is age 6, 12 is age 17.

    This is the Automated Readability Index, from letters per word and words per sentence; easy
    texts may have less than 0. A text without words is infinitely hard.
    Source: E. A. Smith and R. J. Senter, Automated Readability Index, AMRL-TR-66-220, 1967.
    """
    words = _WORD.findall(text)
    if not words:
        return float("inf")
    letters = sum(map(len, words))
    sentences = max(1, len(_SENTENCE_END.findall(text)))
    return 4.71 * letters / len(words) + 0.5 * len(words) / sentences - 21.43


class EasyText:
    """The stories of a text up to a reading grade; called with a split, as Corpus.read is.

    read: yields the stories of a split. limit: of those that are easy enough, take so many for
    training. How many were is said on stderr.
    """

    def __init__(self, read: Callable[[str], Iterable[str]], grade: float, limit: int | None):
        self.read = read
        self.grade = grade
        self.limit = limit

    @property
    def revision(self) -> str | None:
        """Return the hub's commit of the text, if it has one."""
        return getattr(self.read, "revision", None)

    def __call__(self, split: str) -> Iterator[str]:
        limit = self.limit if split == "train" else None
        return itertools.islice(self._easy(split), limit)

    def _easy(self, split: str) -> Iterator[str]:
        total = 0
        kept = 0
        easiest = float("inf")
        for story in filter(str.strip, self.read(split)):
            total += 1
            grade = reading_grade(story)
            easiest = min(easiest, grade)
            if grade <= self.grade:
                kept += 1
                yield story

        # A stream that was read to its end can be summed up.
        if total and not kept:
            problem = f"no text is for grade {self.grade:g} or below, the easiest is for"
            raise FlashLMError(f"{problem} {easiest:.1f}: give a higher --max-grade")
        say_once(f"{split}: {kept:,} of {total:,} texts are for grade {self.grade:g} or below")
