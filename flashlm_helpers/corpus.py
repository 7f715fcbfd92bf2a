"""Texts as streams of stories: from the hub, a folder, any strings, or the built-in generator."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from flashlm_helpers import builtin
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.sources.folders import find_stories, read_folder, state_of
from flashlm_helpers.sources.hub import HUB, HubText, choose_text, find_dataset
from flashlm_helpers.sources.mixing import read_in_turns
from flashlm_helpers.sources.readability import EasyText
from flashlm_helpers.sources.strings import split_strings

SPLITS = ("train", "valid")
BUILTIN_STORIES = {"train": 20_000, "valid": 1_000}
SMALLEST_SHARE = 0.001  # of a run's budget, for a stage


@dataclass(frozen=True)
class TextSource:
    """How to open a text again: a data set's name, a folder, or stages. Checkpoints hold it."""

    dataset: str | None = None
    text_dir: str | None = None
    limit: int | None = None  # training stories
    revision: str | None = None  # the hub's commit that a run has read, to be told, not chosen
    max_grade: float | None = None  # harder texts are left out

    # Of a curriculum: its stages, each with its share of the budget, and whether they are shuffled.
    stages: tuple["TextSource", ...] = ()
    share: float | None = None
    shuffled: bool = False

    @classmethod
    def from_dict(cls, content: dict) -> "TextSource | None":
        """Read what asdict() gave, also in an earlier version; return None if it names no text."""
        # Earlier versions kept the size of the vocabulary here, too, and fewer other things.
        known = {field.name: content.get(field.name, field.default) for field in fields(cls)}
        known["stages"] = tuple(map(cls.from_dict, known["stages"]))
        source = cls(**known)
        return source if source.dataset or source.text_dir or source.stages else None


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


@dataclass(frozen=True)
class Curriculum(Corpus):
    """Several texts in one run: one after another, or shuffled together.

    stages: the texts, in order, and the shares of the budget that are spent on them. shuffled:
    every step reads from all of them, by their shares. What its stories() yields is the mix.
    """

    stages: tuple[tuple[Corpus, float], ...] = ()
    shuffled: bool = False


def open_corpus(
    text: Any = "auto", limit: int | None = None, max_grade: float | None = None
) -> Corpus:
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
    max_grade: leave out texts with a higher reading_grade(), in both splits.
    Raises FlashLMError if there is no such text. A hub is asked when the stories are read; "auto"
    also asks at once.
    """
    if limit is not None and limit < 1:
        raise FlashLMError(f"limit must be at least 1 story, not {limit}")
    if isinstance(text, Corpus | TextSource) and (limit, max_grade) != (None, None):
        raise FlashLMError("this text has its limits already: give them where you first open it")

    # What was opened before.
    if isinstance(text, Corpus):
        return text
    if isinstance(text, TextSource):
        return _open_source(text)
    if max_grade is not None:
        return _open_easy(text, limit, max_grade)

    # A name, a folder, or the stories themselves.
    if isinstance(text, str):
        return _open_named(text, limit)
    if isinstance(text, Path):
        return _open_folder(text, limit)
    return _open_strings(text, limit)


def _open_source(source: TextSource) -> Corpus:
    if source.stages:
        stages = [(stage, stage.share) for stage in source.stages]
        return open_curriculum(stages, source.shuffled)
    place = Path(source.text_dir) if source.text_dir else source.dataset
    return open_corpus(place, source.limit, source.max_grade)


def _open_easy(text: Any, limit: int | None, max_grade: float) -> Corpus:
    # The limit counts what is left.
    whole = open_corpus(text)
    source = whole.source and replace(whole.source, limit=limit, max_grade=max_grade)
    key = _key(whole.key, limit, max_grade)
    return Corpus(whole.name, key, EasyText(whole.read, max_grade, limit), source)


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


def _open_strings(text: Any, limit: int | None) -> Corpus:
    # Equal stories have equal keys, so caches are found again in another process, too.
    stories = split_strings(text, limit)
    return Corpus("stories", _key("stories", stories), stories.__getitem__)


# ---- a folder, and the files in it ----


def _open_folder(folder: Path, limit: int | None) -> Corpus:
    # A file that is written again has another time of change, so its caches are built anew.
    files = find_stories(folder)
    key = _key(state_of(files), limit)

    # The full path, since a run may be resumed from another working folder.
    folder = folder.resolve()
    read = partial(read_folder, files, limit)
    return Corpus(folder.name, key, read, TextSource(None, str(folder), limit))


# ---- several texts ----


def check_shares(shares: Sequence[float]) -> None:
    """Raise FlashLMError unless the shares of a budget are at least 0.001 each and add up to 1."""
    large_enough = all(share >= SMALLEST_SHARE for share in shares)
    if not large_enough or abs(sum(shares) - 1) > SMALLEST_SHARE / 2:
        given = " + ".join(f"{share:g}" for share in shares)
        problem = f"the shares of a curriculum are {given} = {sum(shares):g}"
        raise FlashLMError(f"{problem}: give at least {SMALLEST_SHARE} to each, and 1 to all")


def open_curriculum(stages: Sequence[tuple[Any, float]], shuffled: bool = False) -> Curriculum:
    """Open several texts for one run, in stages or shuffled together.

    stages: each a text, as open_corpus() takes it, and its share of the budget.
    Raises FlashLMError for a text that is not there, and for shares that cannot be.
    """
    check_shares([share for _, share in stages])
    opened = tuple((open_corpus(text), share) for text, share in stages)

    # Caches of the mix belong to these texts and shares.
    name = "-".join(dict.fromkeys(corpus.name for corpus, _ in opened))[:80]
    key = _key("curriculum", [(corpus.key, share) for corpus, share in opened], shuffled)

    # It can be opened again if each of its texts can.
    source = None
    if all(corpus.source for corpus, _ in opened):
        parts = [replace(corpus.source, share=share) for corpus, share in opened]
        source = TextSource(stages=tuple(parts), shuffled=shuffled)
    return Curriculum(name, key, partial(read_in_turns, opened), source, opened, shuffled)
