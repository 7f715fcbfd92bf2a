"""Memory that is freed in one training step and needed again in the next."""

import ctypes
import platform

_TRIM_THRESHOLD = -1  # mallopt's names of its settings, from glibc's malloc.h
_MMAP_MAX = -4


def disable_malloc_trim() -> None:
    """Let the allocator keep what is freed, instead of returning it to the system.

    Otherwise every step asks for the same pages again, and the system fills each with zeros
    first: up to a third of a step. Only glibc can be told; elsewhere this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_MAX, 0)
