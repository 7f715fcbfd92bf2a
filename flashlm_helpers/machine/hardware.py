"""The cores and the memory that this process may use."""

import os
import platform
import sys
from pathlib import Path

import psutil
import torch

from flashlm_helpers.machine.numbers import has_bfloat16

GIB = 1024**3


def allowed_cores() -> list[int]:
    """Return the numbers of the logical cores that this process may run on, by its affinity."""
    try:
        return psutil.Process().cpu_affinity()
    except (AttributeError, psutil.Error):  # macOS has no affinity
        return list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Return how many cores this process may use, at least 1.

    These are physical cores, limited by the process's affinity, its cgroup's CPU quota, and
    OMP_NUM_THREADS, which `--threads` sets.
    """
    allowed = len(allowed_cores())
    limits = [allowed, psutil.cpu_count(logical=False) or allowed]
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit():
        limits.append(int(asked))

    # A quota is "microseconds of processor time per period of so many", rounded up to cores.
    for value in _cgroup_values("cpu.max", "cpu.cfs_quota_us"):
        quota, *period = value.split()
        if quota not in ("max", "-1"):
            microseconds = int(period[0]) if period else 100_000
            limits.append(-(-int(quota) // microseconds))
    return max(1, min(limits))


def usable_memory() -> int:
    """Return how many bytes of memory this process may use, by the machine and its cgroup."""
    limits = [psutil.virtual_memory().total]
    for value in _cgroup_values("memory.max", "memory.limit_in_bytes"):
        if value.isdigit():
            limits.append(int(value))
    return min(limits)


def _cgroup_values(name_v2: str, name_v1: str) -> list[str]:
    """Return the contents of a cgroup's limit file, of this process's group and all above it."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []

    values = []
    for group in groups:
        # "0::/path" is version 2; "4:cpu,cpuacct:/path" is version 1, one tree per controller.
        _, controllers, where = group.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
            name = name_v2
        elif name_v1.split(".")[0] in controllers.split(","):
            root = Path("/sys/fs/cgroup") / controllers
            name = name_v1
        else:
            continue

        # A group is limited by its own file and by that of every group above.
        folder = root / where.strip("/")
        while folder != root.parent:
            try:
                values.append((folder / name).read_text().strip())
            except OSError:
                pass
            folder = folder.parent
    return values


def peak_memory() -> int:
    """Return the largest resident memory this process has had so far, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset

    import resource  # POSIX only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kibibytes = sys.platform != "darwin"
    return peak * 1024 if kibibytes else peak


def describe_hardware() -> dict:
    """Describe the machine for a report: processor, cores, memory, number format, versions."""
    # Where PyTorch knows no name, the system's is taken.
    processor = torch.cpu.get_capabilities().get("cpu_name")
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(usable_memory() / GIB, 1),
        "matmul": "bfloat16" if has_bfloat16() else "float32",
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
