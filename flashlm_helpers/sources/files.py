"""Stories in files as people have them, one in memory at a time.

A file is a text, with <|endoftext|> between its stories, or it has records (JSON, CSV, parquet).
What its name does not tell, its first bytes do.
"""

import csv
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line
from flashlm_helpers.machine.notices import notice

# What stands between two stories of a text.
SEPARATOR = "<|endoftext|>"

# The fields of a record that may hold a story; the first one that holds a string does.
FIELDS = ("text", "story")

# Characters of a single story. More means that a text has no separators, and would fill memory.
LONGEST_STORY = 1 << 28

# Bytes that tell what a file is.
_HEAD = 1 << 16

# Other things that people have files of, by their first bytes.
_OTHERS = {
    b"FLASHLM\0": "a packed model",
    b"PK\x03\x04": "a checkpoint, or something else that is zipped",
    b"%PDF-": "a PDF",
    b"\xfd7zXZ": "compressed by xz",
}


def read_stories(path: str | Path) -> Iterator[str]:
    """Yield the stories of a file, with only one of them in memory.

    Formats are .txt, .json (an array, which is read whole, or lines), .jsonl, .csv and .parquet;
    all but the last also as .gz or .zst. Records have a field `text` or `story`, and may hold
    several stories as a .txt does; null is no story, and how many there are is said on stderr. A
    pipe may be any of these; it is copied into a temporary file.
    Raises FlashLMError if the file is missing, damaged, no text, or has no such field.
    """
    path = Path(path)
    if path.is_dir():
        raise FlashLMError(f"cannot read {path}: it is a folder, so name a file in it")
    nulls = 0

    # A generator opens its file, and sees what is wrong with it, once a story is asked for.
    try:
        with _open(path) as file:
            read = _reader_of(path, _unpack(file).read(_HEAD))
            for text in read(_unpack(file), path):
                if text is None:
                    nulls += 1
                    continue

                # Line ends as a text file has them, so that a text is the same in every format.
                text = text.replace("\r\n", "\n").replace("\r", "\n")
                yield from text.split(SEPARATOR)
    except UnicodeDecodeError as error:
        raise FlashLMError(f"{path} is not valid UTF-8 text: convert it to UTF-8") from error
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise FlashLMError(f"cannot read {path}: {reason}") from error

    if nulls:
        say_once(f"{path}: {nulls:,} records without text skipped")


@functools.cache
def say_once(message: str) -> None:
    """Print a line on stderr the first time that it is said."""
    # A process that was started by another, as in a race, would only repeat it.
    if multiprocessing.parent_process() is None:
        notice(message)


# ---- which format ----


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file so that it can be read twice, which a pipe cannot."""
    with path.open("rb") as file:
        if file.seekable():
            yield file
        else:
            with tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(file, copy)
                copy.flush()
                yield copy


def _unpack(file: BinaryIO) -> BinaryIO:
    """Return a file from its start, decompressed if it is compressed."""
    # A handle of its own: whoever reads it to the end, or drops it, also closes it.
    file = os.fdopen(os.dup(file.fileno()), "rb")
    file.seek(0)
    head = file.read(4)
    file.seek(0)

    # No text in UTF-8 begins like this. Unlike others, pyarrow sees when the end is missing.
    for magic, codec in {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}.items():
        if head.startswith(magic):
            import pyarrow

            return pyarrow.input_stream(file, compression=codec)
    return file


def _reader_of(path: Path, head: bytes) -> Callable[[BinaryIO, Path], Iterator[str | None]]:
    """Return the function that reads a file, by its name or else by its first bytes.

    Raises FlashLMError for what is no text.
    """
    suffix = suffix_of(path)
    if suffix not in READERS:
        suffix = _sniff(head)
    if suffix == ".parquet":
        return _read_parquet

    # What is no text says so before anything tries to make words of it.
    known = [kind for magic, kind in _OTHERS.items() if head.startswith(magic)]
    if known or b"\0" in head:
        kind = known[0] if known else "a binary file"
        raise FlashLMError(f"{path} is {kind}, not text: give stories, such as a .txt or .jsonl")
    read = READERS[suffix]
    return lambda file, path: read(io.TextIOWrapper(file, encoding="utf-8-sig"), path)


def suffix_of(path: Path) -> str:
    """Return the end of a name that tells the format, in small letters."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    return Path(name).suffix


def _sniff(head: bytes) -> str:
    """Return the suffix that a file should have, by its first bytes."""
    if head.startswith(b"PAR1"):
        return ".parquet"

    # JSON begins with an object, or with an array of objects or strings.
    start = head.decode("utf-8-sig", "ignore")
    if re.match(r'\s*(\[\s*"|\[?\s*\{\s*")', start):
        return ".json"

    # A first line of nothing but names, that of a field for text among them, begins a table.
    names = re.split("[,;\t] ?", start.partition("\n")[0].rstrip())
    names = [name.strip('"') for name in names]
    if all(re.fullmatch(r"[\w.-]+", name) for name in names) and set(names) & set(FIELDS):
        return ".csv"
    return ".txt"


# ---- the formats: each yields texts, or None for a record that has none ----


def _read_text(file: TextIO, path: Path) -> Iterator[str]:
    parts = []  # of the story that has not ended yet
    size = 0
    while block := file.read(1 << 20):
        if "\0" in block:
            raise FlashLMError(f"{path} is a binary file, not text: give a plain UTF-8 file")

        # Only what is new is searched, so that a long story takes no more time than short ones. A
        # separator across two blocks is left to read_stories(), which splits what it gets again.
        *ended, rest = block.split(SEPARATOR)
        for story in ended:
            yield "".join([*parts, story])
            parts = []
            size = 0
        parts.append(rest)

        # Memory is for stories, not for a whole library.
        size += len(rest)
        if size > LONGEST_STORY:
            problem = f"{path} goes on for {size:,} characters without a line {SEPARATOR}"
            raise FlashLMError(f"{problem}: put one after each story")
    yield "".join(parts)


def _read_json(file: TextIO, path: Path) -> Iterator[str | None]:
    """Read one record per line, or an array of them."""
    for number, line in enumerate(file, 1):
        if line.lstrip().startswith("["):
            yield from _read_array(line + file.read(), path, number)
        elif line.strip():
            record, _ = _decode(line, 0, path, number)
            yield _text_of(record, f"{path}, line {number}")


def _read_array(content: str, path: Path, line: int) -> Iterator[str | None]:
    """Read a JSON array, record by record; line: the one in which it begins."""
    # Only the text is in memory as a whole, not what it decodes to.
    at = 0
    opening = re.compile(r"\s*\[\s*")
    between = re.compile(r"\s*,?\s*")
    start = opening.match(content).end()
    while not content.startswith("]", start):
        line += content.count("\n", at, start)
        at = start
        record, end = _decode(content, at, path, line)
        yield _text_of(record, f"{path}, line {line}")
        start = between.match(content, end).end()

    # An array is all there is.
    if content[start + 1 :].strip():
        raise FlashLMError(f"{path} goes on after its JSON array: put everything into one")


def _decode(content: str, at: int, path: Path, line: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a character, and where it ends."""
    try:
        record, end = json.JSONDecoder().raw_decode(content, at)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", one_line(error))
        problem = f"{path}, line {line} is not JSON that can be read ({reason})"
        raise FlashLMError(f"{problem}: write one object per line") from error
    return record, end


def _read_csv(file: TextIO, path: Path) -> Iterator[str | None]:
    """Read rows below a line with the names of their fields."""
    # A story may be longer than the 128 KiB that are usual. Some programs write ; or tabs.
    csv.field_size_limit(2**31 - 1)
    header = file.readline()
    delimiter = max(",;\t", key=header.count)
    lines = itertools.chain([header], file)
    rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    line = 2  # in which the row begins, and text may go on over several
    try:
        for row in rows:
            place = f"{path}, line {line}"
            line = rows.line_num + 1
            if None in row:
                problem = f"{place} has more fields than the first line"
                raise FlashLMError(f"{problem}: put quotes around text that has commas in it")

            # This format has no other way to say that there is nothing.
            yield _text_of({name: value or None for name, value in row.items()}, place)
    except csv.Error as error:
        problem = f"{path}, line {line} is not CSV ({one_line(error)})"
        raise FlashLMError(f'{problem}: write "" for a quote within quotes') from error


def _read_parquet(file: BinaryIO, path: Path) -> Iterator[str | None]:
    # Only this kind of file needs it, and it takes time to import.
    import pyarrow
    import pyarrow.parquet

    # A batch of rows at a time, and nothing but the fields for text, so memory stays flat.
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in FIELDS if name in table.schema_arrow.names]
        for rows in table.iter_batches(batch_size=1024, columns=columns):
            for record in rows.to_pylist():
                number += 1
                yield _text_of(record, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        problem = f"{path} is not a parquet file, or is damaged"
        raise FlashLMError(f"{problem}: {one_line(error)}") from error


def _text_of(record: Any, place: str) -> str | None:
    """Return the text of a record, or None if it is null."""
    found = [record]
    if isinstance(record, dict):
        found = [record[name] for name in FIELDS if name in record]
    for value in found:
        if isinstance(value, str):
            return value

    # A gap is no mistake, but another name or another kind of value is.
    if found and all(value is None for value in found):
        return None
    names = " or ".join(f"`{name}`" for name in FIELDS)
    raise FlashLMError(f"{place} has no string field {names}: name the field so")


READERS = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
