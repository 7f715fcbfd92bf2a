"""Data sets of the hub, streamed: a place that may not answer, or may break off halfway."""

import itertools
import logging
import re
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import project_dir
from flashlm_helpers.machine.network import is_offline
from flashlm_helpers.machine.notices import notice
from flashlm_helpers.sources.files import SEPARATOR
from flashlm_helpers.sources.prepared import find_prepared
from flashlm_helpers.sources.splits import hold_out

# Seconds in which the hub must answer at all, and in which it must then send a first story.
HUB_PATIENCE = 5.0
DOWNLOAD_PATIENCE = 120.0

# Without a validation split, so many stories are held out, and not one in twenty of millions.
HELD_OUT_STORIES = 1_000

# So many lines of a text file show whether its stories are separated.
_PEEK = 1_000


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


def find_dataset(name: str) -> HubDataset:
    """Return the data set of a name: one of HUB, owner/name, owner/name:config, and so on.

    Raises FlashLMError if it is no such name; whether the hub has it shows when it is read.
    """
    if name in HUB:
        return HUB[name]
    if match := HUB_NAME.fullmatch(name):
        path, subset, field = match.groups()
        return HubDataset(path, subset or None, field=field or None)

    known = f"auto, builtin, {', '.join(HUB)}"
    others = "any data set of the hub as owner/name, or a folder that holds train*.txt"
    raise FlashLMError(f"there is no text {name!r}: give {known}, {others}")


def choose_text(key: str) -> str:
    """Return what "auto" is, "tinystories" or "builtin", and say it and why in one line.

    key: of the corpus "tinystories". What was prepared here before is used without asking the hub.
    """
    prepared = find_prepared(project_dir() / "data", "tinystories", key)
    if prepared is not None:
        revision = prepared.get("revision")
        told = f" (revision {revision[:12]} of the hub)" if revision else ""
        notice(f"using TinyStories{told}: it was prepared here before")
        return "tinystories"

    try:
        open_split(HUB["tinystories"], "train")
    except FlashLMError as error:
        notice(f"{error}; using the built-in corpus")
        return "builtin"
    notice("using TinyStories: the hub answers")
    return "tinystories"


class HubText:
    """The stories of a data set; called with a split, as Corpus.read is.

    limit: training stories. revision: the hub's commit that all of it is read from, the one that
    was the newest when the hub was first asked; None until then.
    """

    def __init__(self, dataset: HubDataset, limit: int | None):
        self.dataset = dataset
        self.limit = limit
        self.revision: str | None = None

    def __call__(self, split: str) -> Iterator[str]:
        stories, own, self.revision = open_split(self.dataset, split, self.revision)
        limit = self.limit
        if split == "valid":
            limit = None if own else HELD_OUT_STORIES
        if not own:
            stories = hold_out(stories, split)
        return itertools.islice(stories, limit)


def open_split(
    dataset: HubDataset, split: str, revision: str | None = None
) -> tuple[Iterator[str], bool, str | None]:
    """Open a split, and wait for its first story.

    split: "train" or "valid". revision: a commit of the hub; the newest by default. Returns the
    stories, whether the data set has a validation split of its own, and the revision; without such
    a split, "valid" is the training split, too.
    Raises FlashLMError, in one line, for whatever the hub does instead.
    """
    path = dataset.path
    if is_offline():
        problem = f"{path} is not prepared here, and FLASHLM_OFFLINE or HF_HUB_OFFLINE is set"
        raise FlashLMError(f"{problem}: unset it, or choose builtin or a folder of text")

    # This takes seconds that are not the hub's, so it comes before the clock starts.
    import datasets

    # The warnings of the hub's client would bury the one line in which we say the same.
    for name in ("datasets", "huggingface_hub", "fsspec", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)

    # The client below tries again for half a minute, and datasets would ask it twenty times.
    datasets.config.STREAMING_READ_MAX_RETRIES = 2
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 2

    # So it is not asked for anything before the hub has answered.
    late = f"{path} sent no story"
    with explain_errors(f"{path} cannot be read from the hub"):
        newest = in_time(HUB_PATIENCE, "the hub did not answer", _ask_hub, path)
        revision = revision or newest
        stories, own = in_time(DOWNLOAD_PATIENCE, late, _load_split, dataset, split, revision)
    return _guard(stories, path), own, revision


def _guard(stories: Iterator[str], path: str) -> Iterator[str]:
    # A download that ends halfway must not become a short corpus.
    with explain_errors(f"{path} broke off"):
        yield from stories


@contextmanager
def explain_errors(problem: str, advice: str = _ADVICE) -> Iterator[None]:
    """Raise every error as a FlashLMError: the problem, the error, and what to do.

    advice: what to do; where the hub refuses access, how to ask for it takes its place.
    """
    try:
        yield
    except (FlashLMError, MemoryError):
        raise
    except Exception as error:
        # Where a person has to ask for access, trying again does not help.
        if _is_refusal(error):
            asking = "ask for access on its page of the hub, then log in with: hf auth login"
            raise FlashLMError(f"{problem}, since it is gated or private: {asking}") from error

        # The client writes whole paragraphs.
        kind = type(error).__name__
        reason = textwrap.shorten(f"{kind}: {error}", 160)
        raise FlashLMError(f"{problem} ({reason}): {advice}") from error


def _is_refusal(error: BaseException | None) -> bool:
    """Return whether the hub refused to show something to this person, at the root of an error."""
    from huggingface_hub.errors import GatedRepoError

    # The client wraps such an answer into errors of its own, sometimes with nothing but words.
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = isinstance(error, GatedRepoError) or status in (401, 403)
        if refused or "gated dataset" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def in_time(seconds: float, late: str, work: Callable, *arguments, advice: str = _ADVICE) -> Any:
    """Return work(*arguments); raise FlashLMError if it takes longer than so many seconds.

    The error's line is `late`, the seconds, and the advice.
    """
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
        raise FlashLMError(f"{late} within {seconds:g} seconds: {advice}")
    return outcome.result()


def _ask_hub(path: str) -> str | None:
    """Ask the hub for the newest commit of a data set, which needs only a short answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(path, expand=["sha"]).sha
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        problem = f"the hub has no public data set {path!r}, and there is no such folder here"
        raise FlashLMError(f"{problem}: check the name") from error


def _load_split(
    dataset: HubDataset, split: str, revision: str | None
) -> tuple[Iterator[str], bool]:
    """Find the split and the field, and wait for the first row."""
    parts = _load_parts(dataset, revision)
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
    texts = _texts_of(rows, field, dataset.path)
    if getattr(getattr(parts[part], "info", None), "builder_name", None) == "text":
        texts = _join_lines(texts)
    return texts, bool(own)


def _texts_of(rows: Iterable[dict], field: str, path: str) -> Iterator[str]:
    # A data set may have gaps, which are None.
    for row in rows:
        text = row[field] or ""
        if not isinstance(text, str):
            kind = type(text).__name__
            raise FlashLMError(f"{path} holds a {kind} in {field}: name a field of text")
        yield text


def _join_lines(lines: Iterator[str]) -> Iterator[str]:
    """Yield the stories of text files, which the client cuts into lines.

    They end where <|endoftext|> stands. Without any among the first lines, each line is a story.
    """
    start = list(itertools.islice(lines, _PEEK))
    lines = itertools.chain(start, lines)
    if not any(SEPARATOR in line for line in start):
        yield from lines
        return

    # A line may end several stories, and the last story may lack its end.
    story = ""
    for line in lines:
        *ended, rest = line.split(SEPARATOR)
        for end in ended:
            yield story + end
            story = ""
        story += f"{rest}\n"
    yield story


def _load_parts(dataset: HubDataset, revision: str | None) -> dict[str, Iterable[dict]]:
    """Return the rows of every split of a data set."""
    import datasets

    path = dataset.path
    try:
        return datasets.load_dataset(path, dataset.subset, revision=revision, streaming=True)

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
