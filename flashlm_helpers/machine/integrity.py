"""Files read without trusting them: whole, and no larger in memory than on disk."""

import json
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

_AT_ONCE = 1 << 16  # bytes


def read_tensors(path: Path) -> Any:
    """Read a file of torch.save(): tensors and plain values, without running code from it.

    Raises ValueError, UnpicklingError or nearly any other error if it is damaged, holds anything
    else, or would take more memory than its size warrants.
    """
    # The file is an archive with a checksum for each record, which torch.load() does not look at.
    # Records that are compressed, or share their bytes, could grow to any size.
    room = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            if not stored or sum(record.file_size for record in records) > room:
                raise ValueError("its records are not as torch.save() writes them")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ValueError("it is damaged, or no file of torch.save()") from error
    if damaged:
        raise ValueError(f"it is damaged, in {damaged}")

    # weights_only refuses everything that could run code.
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except UnpicklingError as error:
        raise ValueError("it is damaged or holds more than tensors and plain values") from error

    # A tensor may repeat one value as often as it likes; weights that are tied are there twice.
    if sum(tensor.nbytes for tensor in _tensors(content)) > 2 * room:
        raise ValueError("its tensors are larger than the file")
    return content


def _tensors(content: Any) -> list[Tensor]:
    """Return the tensors in nested dictionaries, lists and tuples, each once."""
    found = {}
    seen = set()
    open_ = [content]
    while open_:
        value = open_.pop()
        if id(value) in seen:
            continue
        if isinstance(value, Tensor):
            found[id(value)] = value
        if isinstance(value, dict | list | tuple):
            seen.add(id(value))
            open_ += value.values() if isinstance(value, dict) else value
    return list(found.values())


# ---- files of ours, with a header that has a checksum of itself and of all that follows ----


def read_header(path: Path, size: int) -> dict:
    """Read the first `size` bytes of a file as JSON, after a check of the whole file.

    Raises ValueError, KeyError, TypeError or AttributeError if anything in it was changed.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(size))
        checksum = header.pop("checksum")
        if checksum != _checksum(header, file):
            raise ValueError("it is damaged")
    return header


def write_header(file: BinaryIO, size: int, header: dict) -> None:
    """Fill in the first `size` bytes of a file whose other bytes are written: JSON, and spaces."""
    file.flush()
    with Path(file.name).open("rb") as written:
        written.seek(size)
        header = header | {"checksum": _checksum(header, written)}
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(size))


def _checksum(header: dict, rest: BinaryIO) -> int:
    """Return the CRC-32 of a header and of the rest of a file."""
    checksum = zlib.crc32(json.dumps(header).encode())
    while piece := rest.read(_AT_ONCE):
        checksum = zlib.crc32(piece, checksum)
    return checksum
