"""Data sets of the hub, streamed: a place that may not answer, or may break off halfway."""

import itertools
import logging
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashlm_helpers.config import FlashLMError

# Seconds in which the hub must answer at all, and in which it must then send a first story.
HUB_PATIENCE = 5.0
DOWNLOAD_PATIENCE = 120.0


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub. Where a field is None, it is found when the data set is read."""

    # Corpus.key depends on these names and on that of the class: if one changes, every cache of
    # the data sets below is built anew.
    path: str
    subset: str | None = None  # the hub calls it a config
    train: str = "train"
    valid: str | None = None
    field: str | None = None


HUB = {
    "tinystories": HubDataset("roneneldan/TinyStories", None, "train", "validation", "text"),
    "simplestories": HubDataset("SimpleStories/SimpleStories", None, "train", "test", "story"),
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", None, "text"),
}

# owner/name, owner/name:config or owner/name:config:field, where config may be empty.
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]*))?(?::([^:]*))?")

# What data sets call their validation split; the first of these that exists is taken.
_VALID_SPLITS = ("validation", "valid", "val", "dev", "test")

_ADVICE = "check the connection and try again, or choose builtin or a folder of text"


def choose_reachable() -> str:
    """Return "tinystories" if its first story comes; otherwise say why not and return "builtin"."""
    try:
        open_split(HUB["tinystories"], "train")
    except FlashLMError as error:
        print(f"{error}; using the built-in corpus", file=sys.stderr)
        return "builtin"
    return "tinystories"


def open_split(dataset: HubDataset, split: str) -> tuple[Iterator[str], bool]:
    """Open a split, and wait for its first story.

    split: "train" or "valid". Returns the stories, and whether the data set has a validation split
    of its own; without one, "valid" is the training split, too.
    Raises FlashLMError, in one line, for whatever the hub does instead.
    """
    # This takes seconds that are not the hub's, so it comes before the clock starts.
    import datasets  # noqa: F401

    # The warnings of the hub's client would bury the one line in which we say the same.
    for name in ("datasets", "huggingface_hub", "fsspec", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # The client retries for minutes, so it is not asked for anything before the hub has answered.
    path = dataset.path
    late = f"{path} sent no story"
    with _explain_errors(f"{path} cannot be read from the hub"):
        _in_time(HUB_PATIENCE, "the hub did not answer", _ask_hub, path)
        stories, own = _in_time(DOWNLOAD_PATIENCE, late, _load_split, dataset, split)
    return _guard(stories, path), own


def _guard(stories: Iterator[str], path: str) -> Iterator[str]:
    # A download that ends halfway must not become a short corpus.
    with _explain_errors(f"{path} broke off"):
        yield from stories


@contextmanager
def _explain_errors(problem: str) -> Iterator[None]:
    """Raise every error as a FlashLMError: the problem, the error, and what to do."""
    try:
        yield
    except FlashLMError:
        raise
    except Exception as error:
        # The client writes whole paragraphs.
        kind = type(error).__name__
        reason = textwrap.shorten(f"{kind}: {error}", 160)
        raise FlashLMError(f"{problem} ({reason}): {_ADVICE}") from error


def _in_time(seconds: float, late: str, work: Callable, *arguments) -> Any:
    """Return work(*arguments); raise FlashLMError, beginning with `late`, if it takes longer."""
    outcome = Future()

    def run():
        try:
            outcome.set_result(work(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    # Nothing can stop the work; in a daemon thread it does not keep the process alive.
    threading.Thread(target=run, daemon=True).start()
    wait([outcome], seconds)
    if not outcome.done():
        raise FlashLMError(f"{late} within {seconds:g} seconds: {_ADVICE}")
    return outcome.result()


def _ask_hub(path: str) -> None:
    """Ask the hub whether it has a data set, which needs only a short answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().dataset_info(path, expand=["private"])
    except RepositoryNotFoundError as error:
        problem = f"the hub has no public data set {path!r}, and there is no such folder here"
        raise FlashLMError(f"{problem}: check the name") from error


def _load_split(dataset: HubDataset, split: str) -> tuple[Iterator[str], bool]:
    """Find the split and the field, and wait for the first row."""
    parts = _load_parts(dataset)
    if dataset.train not in parts:
        problem = f"{dataset.path} has no split {dataset.train}, only {', '.join(parts)}"
        raise FlashLMError(f"{problem}: give its stories as an iterable of strings")

    # Data sets call their validation split by several names.
    part = dataset.train
    own = [name for name in (dataset.valid, *_VALID_SPLITS) if name in parts]
    if split == "valid" and own:
        part = own[0]

    # The first row shows the fields, and it is a story, too.
    rows = iter(parts[part])
    first = next(rows)
    field = _find_field(dataset, first)
    rows = itertools.chain([first], rows)
    return _texts_of(rows, field, dataset.path), bool(own)


def _texts_of(rows: Iterable[dict], field: str, path: str) -> Iterator[str]:
    # A data set may have gaps, which are None.
    for row in rows:
        text = row[field] or ""
        if not isinstance(text, str):
            kind = type(text).__name__
            raise FlashLMError(f"{path} holds a {kind} in {field}: name a field of text")
        yield text


def _load_parts(dataset: HubDataset) -> dict[str, Iterable[dict]]:
    """Return the rows of every split of a data set."""
    import datasets

    path = dataset.path
    try:
        return datasets.load_dataset(path, dataset.subset, streaming=True)

    # If the config is to blame, say which there are; otherwise the client knows better.
    except ValueError as error:
        configs = datasets.get_dataset_config_names(path)
        if (dataset.subset or "default") in configs:
            raise
        listed = textwrap.shorten(", ".join(configs), 300)
        advice = f"name one of them, as in {path}:{configs[0]}"
        raise FlashLMError(f"{path} has the configs {listed}: {advice}") from error


def _find_field(dataset: HubDataset, row: dict) -> str:
    """Return the field that holds stories: the one asked for, or `text`, `story`, the only text."""
    # A gap may be text; the other rows will show.
    texts = [name for name, value in row.items() if isinstance(value, str | None)]
    wanted = [dataset.field] if dataset.field else ["text", "story"]
    for name in wanted:
        if name in texts:
            return name
    if len(texts) == 1 and not dataset.field:
        return texts[0]

    # Show how to write it, with a field that would do if there is one.
    problem = f"{dataset.path} has no text in {' or '.join(wanted)}"
    fields = ", ".join(row)
    example = [dataset.path, dataset.subset or "", *texts, "FIELD"]
    advice = f"name one of its fields ({fields}), as in {':'.join(example[:3])}"
    raise FlashLMError(f"{problem}: {advice}")
