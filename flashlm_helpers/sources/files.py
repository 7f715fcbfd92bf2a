"""Stories in files of several formats, one in memory at a time."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line

# What stands between two stories of a text file.
SEPARATOR = "<|endoftext|>"


def read_stories(path: str | Path) -> Iterator[str]:
    """Yield the stories of a .txt, .jsonl or .parquet file, with only one of them in memory.

    A .txt file has <|endoftext|> between stories; the others have a field `text` or `story`.
    Raises FlashLMError if the file is missing, is not text, or has no such field.
    """
    path = Path(path)
    read = READERS.get(path.suffix, _read_text)

    # A generator opens its file, and sees what is wrong with it, once a story is asked for.
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise FlashLMError(f"{path} is not valid UTF-8 text: convert it to UTF-8") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise FlashLMError(f"cannot read {path}: {reason}") from error


def _read_text(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8-sig") as file:
        while block := file.read(1 << 20):
            if "\0" in block:
                raise FlashLMError(f"{path} is a binary file, not text: give a plain UTF-8 file")

            # The last story, or even a separator, may go on in the next block.
            *stories, rest = (rest + block).split(SEPARATOR)
            yield from stories
    yield rest


def _read_jsonl(path: Path) -> Iterator[str]:
    # Some editors begin a file with a byte order mark; "utf-8-sig" skips it.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue

            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                problem = f"{path}, line {number} is not JSON ({error.msg})"
                raise FlashLMError(f"{problem}: write one object per line") from error
            yield _text_of(record, path)


def _read_parquet(path: Path) -> Iterator[str]:
    # Only this kind of file needs it, and it takes time to import.
    import pyarrow
    import pyarrow.parquet

    # One column of a batch of rows at a time, so memory stays flat.
    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "story") if name in table.schema_arrow.names]
        for rows in table.iter_batches(batch_size=1024, columns=columns[:1]):
            for record in rows.to_pylist():
                yield _text_of(record, path)
    except pyarrow.ArrowInvalid as error:
        problem = f"{path} is not a parquet file, or is damaged"
        raise FlashLMError(f"{problem}: {one_line(error)}") from error


def _text_of(record: Any, path: Path) -> str:
    for field in ("text", "story"):
        if isinstance(record, dict) and isinstance(record.get(field), str):
            return record[field]
    problem = f"{path} has a record without a string field `text` or `story`"
    raise FlashLMError(f"{problem}: name the field so")


READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def find_stories(folder: Path, splits: Sequence[str]) -> dict[str, list[Path]]:
    """Find the files of each split in a folder, by their names and in the order of these.

    Raises FlashLMError if there is no such folder, or nothing in it for the first split.
    """
    if not folder.is_dir():
        raise FlashLMError(f"{folder} is not a folder: give one that holds train*.txt")
    files = {}
    for split in splits:
        found = sorted(folder.glob(f"{split}*"))
        files[split] = [path for path in found if path.suffix in READERS and path.is_file()]

    # Say what is there instead, and what to do.
    if not files[splits[0]]:
        problem = "is empty"
        if any(folder.iterdir()):
            problem = "holds no train*.txt, train*.jsonl or train*.parquet"
        advice = f"put stories into train.txt, with a line {SEPARATOR} after each"
        raise FlashLMError(f"{folder} {problem}: {advice}")
    return files
