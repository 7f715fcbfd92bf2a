"""Stories, one string each, from the hub, from a folder of one's own, or from the built-in generator."""

import hashlib
import itertools
import json
import logging
import os
import queue
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashlm_helpers import builtin
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.files import one_line

SEPARATOR = "<|endoftext|>"
SPLITS = ("train", "valid")
HELD_OUT = 20  # without a validation split, one story in twenty is held out
HUB_PATIENCE = 5.0  # seconds the hub has to answer at all
DOWNLOAD_PATIENCE = 120.0  # seconds a hub that answers has to deliver its first story
BUILTIN_STORIES = {"train": 20_000, "valid": 1_000}


@dataclass(frozen=True)
class HubDataset:
    """Where a dataset is on the hub; valid=None means that one story in twenty of train is held out."""

    path: str
    subset: str | None
    train: str
    valid: str | None
    field: str


HUB = {
    "tinystories": HubDataset("roneneldan/TinyStories", None, "train", "validation", "text"),
    "simplestories": HubDataset("SimpleStories/SimpleStories", None, "train", "test", "story"),
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", None, "text"),
}


@dataclass(frozen=True)
class Corpus:
    """A source of stories. name: for people; key: changes whenever the text does (caches are keyed by it)."""

    name: str
    key: str
    read: Callable[[str], Iterator[str]]

    def stories(self, split: str) -> Iterator[str]:
        """Yield the stories of "train" or "valid", without white space around them and without empty ones.

        Raises FlashLMError if the split is unknown or its text cannot be read.
        """
        if split not in SPLITS:
            raise FlashLMError(f"unknown split {split!r}: choose train or valid")
        return (story for story in map(str.strip, self.read(split)) if story)


def open_corpus(dataset: str = "auto", text_dir: str | Path | None = None, limit: int | None = None) -> Corpus:
    """The one way to text: a folder of one's own if given, otherwise a dataset by name.

    dataset: "tinystories", "simplestories" or "fineweb-edu" from the hub, "builtin" for the built-in
    generator, or "auto": TinyStories, or the built-in corpus when the hub does not answer within 5 seconds.
    limit: take only the first `limit` training stories (of a generator: make that many).
    Raises FlashLMError for an unknown name or a folder that does not hold what it should.
    """
    if text_dir is not None:
        return _folder_corpus(Path(text_dir), limit)
    if dataset == "builtin":
        return _builtin_corpus(limit)
    if dataset == "auto":
        try:
            _start_hub_stream(HUB["tinystories"], "train")
        except FlashLMError as error:
            print(f"{one_line(error)}; using the built-in corpus", file=sys.stderr)
            return _builtin_corpus(limit)
        dataset = "tinystories"
    if dataset not in HUB:
        raise FlashLMError(f"unknown dataset {dataset!r}: choose one of auto, builtin, {', '.join(HUB)}, "
                           "or give a folder with --text-dir")
    source = HUB[dataset]
    return Corpus(dataset, _key(dataset, source, limit), lambda split: _hub_stories(source, split, limit))


def _key(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def is_held_out(story: str) -> bool:
    """Whether a story belongs to validation where a corpus brings no validation split: one in twenty, by content."""
    return zlib.crc32(story.strip().encode("utf-8", "surrogatepass")) % HELD_OUT == 0


# The built-in corpus


def _builtin_corpus(limit: int | None) -> Corpus:
    counts = BUILTIN_STORIES | ({"train": limit} if limit else {})
    return Corpus("builtin", _key("builtin", builtin.VERSION, counts),
                  lambda split: builtin.stories(split, count=counts[split]))


# A folder of one's own


def _folder_corpus(folder: Path, limit: int | None) -> Corpus:
    if not folder.is_dir():
        raise FlashLMError(f"{folder} is not a folder: --text-dir wants one that holds train*.txt")
    files = {split: sorted(p for p in folder.glob(f"{split}*") if p.suffix in _READERS and p.is_file())
             for split in SPLITS}
    if not files["train"]:
        what = "holds no train*.txt, train*.jsonl or train*.parquet" if any(folder.iterdir()) else "is empty"
        raise FlashLMError(f"{folder} {what}: put your stories into train.txt, with a line {SEPARATOR} after each")

    def read(split: str) -> Iterator[str]:
        own_validation = bool(files["valid"])
        stories = itertools.chain.from_iterable(map(read_stories, files[split if own_validation else "train"]))
        if not own_validation:
            stories = (story for story in stories if is_held_out(story) == (split == "valid"))
        return itertools.islice(stories, limit if split == "train" else None)

    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files["train"] + files["valid"]]
    return Corpus(folder.resolve().name, _key(stats, limit), read)


def read_stories(path: str | Path) -> Iterator[str]:
    """Yield the stories of a .txt file (separated by <|endoftext|>), or of a .jsonl or .parquet one.

    A .jsonl or .parquet file has a field `text` or `story`. Only one story is in memory at a time.
    Raises FlashLMError if the file is missing, is not text, or has no such field.
    """
    path = Path(path)
    try:
        yield from _READERS.get(path.suffix, _read_text)(path)
    except UnicodeDecodeError as error:
        raise FlashLMError(f"{path} is not valid UTF-8 text ({error.reason} in byte {error.start} of a block): "
                           "convert it to UTF-8, or take it out") from error
    except OSError as error:
        raise FlashLMError(f"cannot read {path}: {error.strerror or one_line(error)}") from error


def _read_text(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8-sig") as file:
        while block := file.read(1 << 20):
            if "\0" in block:
                raise FlashLMError(f"{path} is a binary file, not text: give a plain UTF-8 .txt file")
            *stories, rest = (rest + block).split(SEPARATOR)
            yield from stories
    yield rest


def _text_of(record, path: Path) -> str:
    for field in ("text", "story"):
        if isinstance(record, dict) and isinstance(record.get(field), str):
            return record[field]
    raise FlashLMError(f"{path} has a record without a string field `text` or `story`: name the field so")


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise FlashLMError(f"{path}, line {number} is not JSON ({error.msg}): "
                                       "write one object a line") from error
                yield _text_of(record, path)


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "story") if name in table.schema_arrow.names][:1]
        for rows in table.iter_batches(batch_size=1024, columns=columns):
            for record in rows.to_pylist():
                yield _text_of(record, path)
    except pyarrow.ArrowInvalid as error:
        raise FlashLMError(f"{path} is not a parquet file, or is damaged: {one_line(error)}") from error


_READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


# The hub


def _hub_stories(source: HubDataset, split: str, limit: int | None) -> Iterator[str]:
    rows = _start_hub_stream(source, split)
    stories = (row[source.field] for row in rows)
    if source.valid is None:
        stories = (story for story in stories if is_held_out(story) == (split == "valid"))
    count = limit if split == "train" else BUILTIN_STORIES["valid"] if source.valid is None else None
    try:
        yield from itertools.islice(stories, count)
    except Exception as error:  # whatever the network does halfway must not become a short corpus
        raise FlashLMError(f"{source.path} broke off ({one_line(error)}): try again") from error


def _start_hub_stream(source: HubDataset, split: str) -> Iterator[dict]:
    """The rows of a split, once the first has come; the hub has 5 seconds to answer at all.

    The work is in a daemon thread because the hub's client retries for minutes and takes no time-out.
    """
    import datasets  # takes seconds to import, so only here and before the clock starts

    for name in ("datasets", "huggingface_hub", "fsspec", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    outcome: queue.Queue = queue.Queue()
    answered = threading.Event()

    def load():
        try:
            part = getattr(source, split) or source.train
            rows = iter(datasets.load_dataset(source.path, source.subset, split=part, streaming=True))
            first = next(rows)
            outcome.put(itertools.chain([first], rows))
        except BaseException as error:
            outcome.put(error)

    threading.Thread(target=load, daemon=True).start()
    threading.Thread(target=lambda: _hub_answers() and answered.set(), daemon=True).start()
    hint = "check the connection, or choose --dataset builtin or --text-dir"
    try:
        result = outcome.get(timeout=HUB_PATIENCE)
    except queue.Empty:
        if not answered.is_set():
            raise FlashLMError(f"the hub did not answer within {HUB_PATIENCE:.0f} seconds ({hint})") from None
        try:
            result = outcome.get(timeout=DOWNLOAD_PATIENCE)
        except queue.Empty:
            raise FlashLMError(f"{source.path} sent no story in {DOWNLOAD_PATIENCE:.0f} seconds ({hint})") from None
    if isinstance(result, BaseException):
        raise FlashLMError(f"{source.path} cannot be read from the hub ({type(result).__name__}; {hint})") from result
    return result


def _hub_answers() -> bool:
    """Whether the hub's server answers a request at all, be it with an error."""
    try:
        address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_PATIENCE).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
