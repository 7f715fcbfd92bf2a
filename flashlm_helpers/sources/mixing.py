"""Several texts read as one, each with its share."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from flashlm_helpers.config import FlashLMError


class Readable(Protocol):
    """Anything with a name and stories, such as a Corpus."""

    name: str

    def stories(self, split: str) -> Iterator[str]:
        """Yield the stories of "train" or "valid"."""


def read_in_turns(stages: Sequence[tuple[Readable, float]], split: str) -> Iterator[str]:
    """Yield the stories of several texts in turns, so that each has its share of the characters.

    stages: texts and shares. A text that ends before the others begins again, until each was read
    once. Raises FlashLMError if one has no story.
    """
    reading = [text.stories(split) for text, _ in stages]
    spent = [0.0] * len(stages)  # characters, over the share
    unread = set(range(len(stages)))
    while unread:
        # Whoever has had least is next.
        turn = spent.index(min(spent))
        text, share = stages[turn]
        story = next(reading[turn], None)
        if story is not None:
            spent[turn] += len(story) / share
            yield story
            continue

        # From the start again, if it has one.
        if spent[turn] == 0:
            problem = f"{text.name} has no story in its {split} split"
            raise FlashLMError(f"{problem}: leave it out of the curriculum, or add some")
        unread.discard(turn)
        reading[turn] = text.stories(split)
