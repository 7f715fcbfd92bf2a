"""The C++ compiler behind torch.compile, and the folder where it keeps what it built."""

import os
import re
import shutil
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

from flashlm_helpers.machine.files import one_line, project_dir

CXX_COMPILERS = ("g++", "clang++", "c++", "cl")


def has_cxx_compiler() -> bool:
    """Return whether there is a C++ compiler, without which torch.compile cannot work."""
    names = (os.environ.get("CXX") or "g++", *CXX_COMPILERS)
    return any(shutil.which(name) for name in names)


def compile_obstacle() -> str | None:
    """Return one line on why torch.compile cannot work here, without trying it; None if it can."""
    if not has_cxx_compiler():
        return "a C++ compiler, such as g++, would make it a third faster"

    # Each command names these.
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    for folder in (Path(torch.__file__).parent, sysconfig.get_path("include"), cache):
        if _breaks_commands(folder):
            return f"torch.compile needs a folder without spaces and quotes in its name: {folder}"
    return None


def _breaks_commands(folder: str | Path) -> bool:
    """Return whether PyTorch, which cuts its commands as a shell does, would cut this name."""
    return re.search(r"""[\s'"\\]""", str(folder)) is not None


def use_compile_cache() -> None:
    """Keep in data/compiled what torch.compile builds, so that later runs start sooner.

    Call it before the first optimizer is made: that loads the compiler, which looks for its
    folder only once. PyTorch's own choice, a temporary folder, stays where ours cannot be
    written, or its name breaks the compiler's commands.
    """
    folder = (project_dir() / "data" / "compiled").resolve()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)

    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if writable and not _breaks_commands(folder):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_failure(error: Exception) -> str:
    """Return one line on why torch.compile failed."""
    return f"torch.compile failed: {complaint(error)}"


def complaint(error: Exception | str) -> str:
    """Return in a line what a compiler complains of, without commands, notes and warnings."""
    cause = re.search(r"\berror: (.+)", str(error))
    reason = cause[1] if cause else one_line(error)
    return reason[:160]
