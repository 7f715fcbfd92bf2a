"""A validation split for texts that have none, by the content of their stories."""

import zlib
from collections.abc import Iterable, Iterator

# Where a text has no validation split, one story in so many is held out.
HELD_OUT = 20


def is_held_out(story: str) -> bool:
    """Return whether a story, by its content, is the one in twenty that is held out."""
    # Not hash(), which differs from process to process.
    content = story.strip().encode("utf-8", "surrogatepass")
    return zlib.crc32(content) % HELD_OUT == 0


def hold_out(stories: Iterable[str], split: str) -> Iterator[str]:
    """Yield the stories that belong to a split by their content."""
    wanted = split == "valid"
    for story in stories:
        if is_held_out(story) == wanted:
            yield story
