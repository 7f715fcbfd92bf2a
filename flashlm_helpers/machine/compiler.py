"""The C++ compiler behind torch.compile, and the folder where it keeps what it built."""

import os
import re
import shutil
from contextlib import suppress

from flashlm_helpers.machine.files import one_line, project_dir

CXX_COMPILERS = ("g++", "clang++", "c++", "cl")


def has_cxx_compiler() -> bool:
    """Return whether there is a C++ compiler, without which torch.compile cannot work."""
    names = (os.environ.get("CXX") or "g++", *CXX_COMPILERS)
    return any(shutil.which(name) for name in names)


def use_compile_cache() -> None:
    """Keep in data/compiled what torch.compile builds, so that later runs start sooner.

    Call it before the first optimizer is made: that loads the compiler, which looks for its
    folder only once. PyTorch's own choice, a temporary folder, stays where ours cannot be
    written, or has a space in its name, which breaks the compiler's commands.
    """
    folder = (project_dir() / "data" / "compiled").resolve()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)

    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if writable and " " not in str(folder):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def compile_failure(error: Exception) -> str:
    """Return one line on why torch.compile failed."""
    cause = re.search(r"\berror: (.+)", str(error))  # a compiler says it below its long command
    reason = cause[1] if cause else one_line(error)
    return f"torch.compile failed: {reason[:160]}"
