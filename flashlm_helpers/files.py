"""Writing files so that nothing half-written is ever read."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flashlm_helpers.config import FlashLMError


def one_line(error: BaseException) -> str:
    """An exception's message without its line breaks (its type where it has no message)."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when complete and on disk.

    Yields a binary file under a temporary name in the same folder, made if it is missing. After the
    block: fsync, then os.replace. If the block fails, the temporary file is removed and whatever
    stood at `path` is untouched. Raises FlashLMError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FlashLMError(f"cannot write {path} ({error.strerror or one_line(error)}): choose another folder "
                           "or free some space") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


def require_writable(folder: Path) -> None:
    """Raise FlashLMError if no file can be written into the folder, which is made: noticed before anything slow."""
    with atomic_write(folder / ".writable"):
        pass
    (folder / ".writable").unlink(missing_ok=True)  # another process may be trying, too


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, one a line; none if there is no file. Raises FlashLMError if it is no such file."""
    try:
        objects = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise FlashLMError(f"cannot read {path} as JSON lines: {one_line(error)}") from error
    if not all(isinstance(value, dict) for value in objects):
        raise FlashLMError(f"{path} holds something else than one object a line")
    return objects


def append_json_line(path: Path, value: dict) -> None:
    """Add `value` to a .jsonl file as its last line, atomically."""
    lines = [json.dumps(value) for value in (*read_json_lines(path), value)]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
