"""Files that are never half written, and never read half written."""

import io
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
from filelock import Timeout

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.locks import hold_lock


def one_line(error: BaseException | str) -> str:
    """Return an exception's message without line breaks, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class _NotedFile(io.FileIO):
    """A file that keeps why it could not be written, whatever its writer makes of the error."""

    failure: OSError | None = None

    def write(self, data) -> int:
        """Write bytes, as any file does; note the error if that fails."""
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it is complete and on disk.

    Yields a binary file with a temporary name in the same folder, which is made if missing. If
    the block fails, the temporary file is removed and the file at `path` stays as it was. What
    processes that were killed have left behind in the folder is removed, too.
    Raises FlashLMError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    noted = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        noted = _NotedFile(temporary, "wb")
        with io.BufferedWriter(noted) as file:
            yield file
            if noted.failure:
                raise noted.failure
            file.flush()
            os.fsync(file.fileno())

        # From here on a reader sees all of it; until here, nothing.
        os.replace(temporary, path)
    except Exception as error:
        # torch.save tells of a full disk in words of its own.
        failure = noted and noted.failure or error
        if not isinstance(failure, OSError):
            raise
        raise FlashLMError(
            f"cannot write {path} ({failure.strerror or one_line(failure)}): "
            "choose another folder or free some space"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes of this machine that are no longer there."""
    for path in folder.glob(f".*.{platform.node()}.*.partial"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            with suppress(OSError):
                path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    # Half a character, as a path that is not UTF-8 has it, is escaped as JSON escapes it.
    content = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(content.encode("utf-8", "backslashreplace"))


def require_writable(folder: Path) -> None:
    """Make the folder and raise FlashLMError if nothing can be written there.

    Call it before anything slow, whose result would be lost.
    """
    probe = folder / ".writable"
    with atomic_write(probe):
        pass
    probe.unlink(missing_ok=True)  # another process may be trying, too


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep a folder for one living run until the block ends, and make it if it is missing.

    Raises FlashLMError if another run is in it, or nothing can be written there.
    """
    require_writable(folder)
    try:
        with hold_lock(folder / ".lock", wait=0):
            yield
    except Timeout as error:
        raise FlashLMError(
            f"another run is training in {folder}: let it end, or choose another --save-dir"
        ) from error


def read_json_lines(path: Path) -> list[dict]:
    """Read the objects of a .jsonl file, one per line; none if there is no file.

    Raises FlashLMError if it holds something else.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        objects = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError) as error:
        raise FlashLMError(f"cannot read {path} as JSON lines: {one_line(error)}") from error

    if not all(isinstance(value, dict) for value in objects):
        raise FlashLMError(f"{path} holds lines that are not JSON objects")
    return objects


def append_json_line(path: Path, value: dict) -> None:
    """Add `value` to a .jsonl file as its last line, atomically, one process after another."""
    with hold_lock(path.with_name(f".{path.name}.lock")):
        objects = [*read_json_lines(path), value]
        with atomic_write(path) as file:
            for one in objects:
                file.write(f"{json.dumps(one)}\n".encode())


def project_dir() -> Path:
    """Return the folder of data/ and checkpoints/.

    It is FLASHLM_HOME if set, or else the clone, or the working folder if there is no clone.
    """
    if home := os.environ.get("FLASHLM_HOME"):
        return Path(home)
    clone = Path(__file__).resolve().parent.parent.parent
    return clone if (clone / "pyproject.toml").is_file() else Path.cwd()


def find_in_clone(place: str) -> Path:
    """Return the path of a file of the clone, whatever folder a notebook runs in.

    place: such as benchmarks/results/path.jsonl, or a full path. It is looked for around the
    package, and in the working folder and those above it.
    Raises FlashLMError if it is in none of them.
    """
    here = Path.cwd()
    for folder in (Path(__file__).resolve().parent.parent.parent, here, *here.parents):
        if (folder / place).exists():
            return folder / place
    raise FlashLMError(f"there is no {place} around {here}: run this in a clone of the project")
