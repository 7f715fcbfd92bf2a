"""Locks between processes: each dies with the process that holds it."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def hold_lock(path: Path, wait: float = -1) -> Iterator[None]:
    """Hold the lock of this name until the block ends; its file is there no longer than that.

    wait: seconds to wait for another holder (negative: as long as it takes). The thread that
    holds it may hold it again. Where the file system knows no locks, nothing is held.
    Raises filelock.Timeout if another thread or process keeps it.
    """
    lock = FileLock(path.resolve(), is_singleton=True, fallback_to_soft=False)
    try:
        lock.acquire(timeout=wait)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise
    try:
        yield
    finally:
        # Removed while it is held; whoever waits for the file that is gone makes another.
        if lock.lock_counter <= 1:
            with suppress(OSError):  # Windows keeps open files, and removes this one afterwards
                path.unlink()
        lock.release()
