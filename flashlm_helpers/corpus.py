"""Texts as streams of stories: from the hub, a folder, any strings, or the built-in generator."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from flashlm_helpers import builtin
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.sources.folders import find_stories, read_folder, state_of
from flashlm_helpers.sources.hub import HUB, HubText, choose_text, find_dataset
from flashlm_helpers.sources.splits import hold_out, is_held_out

SPLITS = ("train", "valid")
BUILTIN_STORIES = {"train": 20_000, "valid": 1_000}


@dataclass(frozen=True)
class TextSource:
    """How to open a text again: the name of a data set, or a folder. Checkpoints hold it."""

    dataset: str | None = None
    text_dir: str | None = None
    limit: int | None = None  # training stories
    revision: str | None = None  # the hub's commit that a run has read, to be told, not chosen

    @classmethod
    def from_dict(cls, content: dict) -> "TextSource | None":
        """Read what asdict() gave, also in an earlier version; return None if it names no text."""
        # Earlier versions kept the size of the vocabulary here, too, and no revision.
        source = cls(*[content.get(field.name) for field in fields(cls)])
        return source if source.dataset or source.text_dir else None


@dataclass(frozen=True)
class Corpus:
    """An open text.

    name: for people, and for the names of caches. key: changes whenever the text does, so caches
    are keyed by it. read: yields the stories of "train" or "valid"; its `revision`, if it has one,
    is that of the text on the hub. source: how to open the text again; None if that is impossible.
    """

    name: str
    key: str
    read: Callable[[str], Iterable[str]]
    source: TextSource | None = None

    def stories(self, split: str) -> Iterator[str]:
        """Yield the stories of "train" or "valid", stripped of white space, without empty ones.

        Raises FlashLMError if there is no such split or its text cannot be read.
        """
        if split not in SPLITS:
            raise FlashLMError(f"unknown split {split!r}: choose train or valid")
        return filter(None, map(str.strip, self.read(split)))


def open_corpus(text: Any = "auto", limit: int | None = None) -> Corpus:
    """Open a text, wherever it is.

    text is one of
      - "tinystories", "simplestories", "fineweb-edu": data sets of the hub;
      - "owner/name", "owner/name:config", "owner/name:config:field": any data set of the hub;
      - "builtin": the built-in story generator;
      - "auto": TinyStories, or "builtin" if it was not prepared here before and the hub does not
        answer within 5 seconds;
      - a folder that holds train*, and perhaps valid*, val* or dev*, in any format of
        read_stories();
      - strings: any iterable, read once into memory, or {"train": strings, "valid": strings};
      - a TextSource, as a checkpoint holds it, or a Corpus, which is returned as it is.
    limit: take only the first `limit` training stories (of the generator: make that many).
    Raises FlashLMError if there is no such text. A hub is asked when the stories are read; "auto"
    also asks at once.
    """
    if limit is not None and limit < 1:
        raise FlashLMError(f"limit must be at least 1 story, not {limit}")
    if limit is not None and isinstance(text, Corpus | TextSource):
        raise FlashLMError("this text has its limit already: give one where you first open it")

    # What was opened before.
    if isinstance(text, Corpus):
        return text
    if isinstance(text, TextSource):
        place = Path(text.text_dir) if text.text_dir else text.dataset
        return open_corpus(place, text.limit)

    # A name, a folder, or the stories themselves.
    if isinstance(text, str):
        return _open_named(text, limit)
    if isinstance(text, Path):
        return _open_folder(text, limit)
    return _open_strings(text, limit)


def _open_named(name: str, limit: int | None) -> Corpus:
    # A checkpoint must name what "auto" became: it may become something else tomorrow.
    if name == "auto":
        name = choose_text(_key("tinystories", HUB["tinystories"], limit))
    if name == "builtin":
        return _open_builtin(limit)

    # A folder comes before a data set of the hub, whose name looks like a path.
    if name not in HUB and os.path.isdir(name):
        return _open_folder(Path(name), limit)
    dataset = find_dataset(name)

    # Caches are keyed by the place on the hub: they keep, and name, the revision they are of.
    key = _key(name, dataset, limit)
    return Corpus(name, key, HubText(dataset, limit), TextSource(name, None, limit))


def _key(*parts) -> str:
    content = repr(parts).encode()
    return hashlib.sha256(content).hexdigest()[:16]


# ---- the built-in generator, and strings in memory ----
#
# Here and below, `read` is a function and not a closure, so that a corpus can be pickled and
# sent to another process.


def _open_builtin(limit: int | None) -> Corpus:
    # It has no end, so a limit may also ask for more.
    counts = dict(BUILTIN_STORIES)
    if limit:
        counts["train"] = limit
    key = _key("builtin", builtin.VERSION, counts)
    read = partial(_read_builtin, counts)
    return Corpus("builtin", key, read, TextSource("builtin", None, limit))


def _read_builtin(counts: dict[str, int], split: str) -> Iterator[str]:
    return builtin.stories(split, count=counts[split])


def _open_strings(text: Iterable[str], limit: int | None) -> Corpus:
    stories = {"train": [], "valid": []}
    if isinstance(text, dict):
        if set(text) != set(SPLITS):
            raise FlashLMError("a dict of stories has the keys train and valid, and no other")
        stories["train"] += itertools.islice(_check_strings(text["train"]), limit)
        stories["valid"] += _check_strings(text["valid"])
    else:
        # A generator can be read only once, and may be endless: so the limit ends it.
        read = []
        kept = 0
        for story in _check_strings(text):
            read.append(story)
            kept += not is_held_out(story)
            if kept == limit:
                break
        for split in SPLITS:
            stories[split] += hold_out(read, split)

    # Equal stories have equal keys, so caches are found again in another process, too.
    key = _key("stories", stories)
    return Corpus("stories", key, stories.__getitem__)


def _check_strings(stories: Iterable[Any]) -> Iterator[str]:
    for story in stories:
        if not isinstance(story, str):
            kind = type(story).__name__
            raise FlashLMError(f"a story must be a string, not {kind}: give an iterable of strings")
        yield story


# ---- a folder, and the files in it ----


def _open_folder(folder: Path, limit: int | None) -> Corpus:
    # A file that is written again has another time of change, so its caches are built anew.
    files = find_stories(folder)
    key = _key(state_of(files), limit)

    # The full path, since a run may be resumed from another working folder.
    folder = folder.resolve()
    read = partial(read_folder, files, limit)
    return Corpus(folder.name, key, read, TextSource(None, str(folder), limit))
