"""A validation split for texts that have none, by the content of their stories."""

import itertools
import zlib
from collections.abc import Iterable, Iterator

# Where a text has no validation split, one story in so many is held out.
HELD_OUT = 20


def is_held_out(story: str) -> bool:
    """Return whether a story, by its content, is the one in twenty that is held out."""
    return _hash(story) % HELD_OUT == 0


def _hash(story: str) -> int:
    # Not hash(), which differs from process to process.
    content = story.strip().encode("utf-8", "surrogatepass")
    return zlib.crc32(content)


def read_ahead(stories: Iterator[str]) -> tuple[list[str], bool]:
    """Read stories until one in twenty leaves something to train on and something to validate with.

    Returns those that were read, about twenty, and whether there were enough of them. If not,
    they are all there are.
    """
    read = []
    held_out = 0
    kept = 0
    for story in stories:
        read.append(story)
        if story.strip():
            held_out += is_held_out(story)
            kept += not is_held_out(story)
        if held_out and kept >= 2:
            return read, True
    return read, False


def hold_out(stories: Iterable[str], split: str) -> Iterator[str]:
    """Yield the stories that belong to a split by their content.

    Of a text too small to have one in twenty, the story with the smallest hash is held out.
    """
    stories = iter(stories)
    read, enough = read_ahead(stories)
    smallest = None
    if not enough:
        different = {story.strip() for story in read} - {""}
        smallest = min(different, key=_hash, default=None)

    wanted = split == "valid"
    for story in itertools.chain(read, stories):
        held_out = is_held_out(story) if enough else story.strip() == smallest
        if held_out == wanted:
            yield story
