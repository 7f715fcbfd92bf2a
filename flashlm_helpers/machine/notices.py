"""Notices and progress bars on stderr, which never end what they are about."""

import sys
from contextlib import suppress
from typing import Any, TextIO


class LenientStream:
    """A text stream that drops what cannot be written: nobody may be reading any more.

    A terminal that was closed, a `tee` that Ctrl-C ended first, a full disk under a log, a write
    that a signal interrupted: no line on stderr is worth a run.
    stream: by default sys.stderr, which is None in a program that was started without one.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr

    def write(self, text: str) -> int:
        """Write `text` if possible; return its length as if it had been."""
        with suppress(Exception):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered, if possible."""
        with suppress(Exception):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether a person may be watching."""
        with suppress(Exception):
            return self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def notice(message: str) -> None:
    """Print one line on stderr for the person watching, if there is one."""
    print(message, file=LenientStream())
