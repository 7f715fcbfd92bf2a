"""Stories that are in memory already, as strings."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.sources.splits import hold_out, is_held_out


def split_strings(text: Any, limit: int | None) -> dict[str, list[str]]:
    """Return the stories of {"train": strings, "valid": strings}, or of any strings, by split.

    limit: training stories at most. Of strings without splits, one in twenty is held out.
    Raises FlashLMError for other keys, and for what is no string.
    """
    if isinstance(text, dict):
        if set(text) != {"train", "valid"}:
            raise FlashLMError("a dict of stories has the keys train and valid, and no other")
        train = itertools.islice(_check(text["train"]), limit)
        return {"train": list(train), "valid": list(_check(text["valid"]))}

    # A generator can be read only once, and may be endless: so the limit ends it.
    read = []
    kept = 0
    for story in _check(text):
        read.append(story)
        kept += not is_held_out(story)
        if kept == limit:
            break
    return {split: list(hold_out(read, split)) for split in ("train", "valid")}


def _check(stories: Iterable[Any]) -> Iterator[str]:
    for story in stories:
        if not isinstance(story, str):
            kind = type(story).__name__
            raise FlashLMError(f"a story must be a string, not {kind}: give an iterable of strings")
        yield story
