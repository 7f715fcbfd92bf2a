"""What this process may use of the machine, how to use it, and which preset suits it."""

import ctypes
import os
import platform
import sys
from pathlib import Path

import psutil
import torch

GIB = 1024**3
LARGE_CORES, LARGE_MEMORY = 8, 32 * GIB


def _cgroup_values(name_v2: str, name_v1: str) -> list[str]:
    """The contents of a cgroup limit file, for this process's group and every group above it."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    values = []
    for group in groups:
        _, controllers, where = group.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), name_v2
        elif name_v1.split(".")[0] in controllers.split(","):
            root, name = Path("/sys/fs/cgroup") / controllers, name_v1
        else:
            continue
        folder = root / where.strip("/")
        for candidate in (folder, *folder.parents):
            if candidate == root.parent:
                break
            try:
                values.append((candidate / name).read_text().strip())
            except OSError:
                continue
    return values


def usable_cores() -> int:
    """Cores this process may use: physical ones, at most its affinity and its cgroup's CPU quota; at least 1."""
    try:
        allowed = len(psutil.Process().cpu_affinity())
    except (AttributeError, psutil.Error):  # macOS has no affinity
        allowed = os.cpu_count() or 1
    limits = [allowed, psutil.cpu_count(logical=False) or allowed]
    for value in _cgroup_values("cpu.max", "cpu.cfs_quota_us"):
        quota, *period = value.split()
        if quota not in ("max", "-1"):
            limits.append(-(-int(quota) // int(period[0] if period else 100_000)))
    return max(1, min(limits))


def usable_memory() -> int:
    """Bytes of memory this process may use: the machine's, or less where a cgroup limits it."""
    limits = [psutil.virtual_memory().total]
    limits += [int(v) for v in _cgroup_values("memory.max", "memory.limit_in_bytes") if v.isdigit()]
    return min(limits)


def choose_preset(cores: int | None = None, memory: int | None = None) -> str:
    """The preset for a machine: v4-large from 8 cores and 32 GiB (bytes in `memory`), otherwise v4-small."""
    cores = usable_cores() if cores is None else cores
    memory = usable_memory() if memory is None else memory
    return "v4-large" if cores >= LARGE_CORES and memory >= LARGE_MEMORY else "v4-small"


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, emulation is slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def products(bfloat16: bool | None = None) -> torch.autocast:
    """The context in which matrix products are made in bfloat16 (None: where the processor has it).

    Weights, norms, the residual stream, softmax and loss stay float32.
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16() if bfloat16 is None else bfloat16)


def keep_freed_memory() -> None:
    """Let the allocator keep what is freed, so that no step asks the system for the same zeroed pages again.

    They cost up to a third of a step. Only glibc can be told.
    """
    if platform.libc_ver()[0] == "glibc":
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def peak_memory() -> int:
    """The largest resident memory this process has had so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_hardware() -> dict:
    """Processor, cores, memory (GiB), number format of the matrix products, and versions, for a report."""
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(usable_memory() / GIB, 1),
        "matmul": "bfloat16" if has_bfloat16() else "float32",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
