"""The one place that changes what is global in a process, and says so."""

import torch

from flashlm_helpers.config import FlashLMError, check_seed
from flashlm_helpers.machine.allocator import disable_malloc_trim
from flashlm_helpers.machine.compiler import use_compile_cache
from flashlm_helpers.machine.hardware import describe_hardware, usable_cores
from flashlm_helpers.machine.profile import Profile, active_profile
from flashlm_helpers.machine.threads import FOLLOWER


def check_threads(threads: int) -> None:
    """Raise FlashLMError unless a number of threads is one that can be."""
    if threads < 1:
        raise FlashLMError(f"threads must be at least 1, not {threads}")


def setup(seed: int | None = None, threads: int | None = None, show: bool = True) -> Profile:
    """Prepare this process for training: threads, allocator, compile cache and seed.

    seed: for PyTorch's global random numbers (None leaves them alone). threads: that PyTorch
    computes with at most, all usable cores by default; it takes fewer while other programs need
    them. show: print a table of the profile and the machine.
    Returns the active profile. Raises FlashLMError for a profile, seed or count that cannot be.
    """
    profile = active_profile()
    if threads is not None:
        check_threads(threads)
    if seed is not None:
        check_seed(seed)

    # What is global is set here; compiling a network sets torch.compile's own limits later.
    FOLLOWER.limit(threads or usable_cores())
    disable_malloc_trim()
    use_compile_cache()
    if seed is not None:
        torch.manual_seed(seed)

    if show:
        machine = describe_hardware()
        rows = {
            "profile": f"{profile.name}: {profile.preset} on {profile.dataset!r}",
            "training": f"{profile.train_seconds:g} seconds per run",
            "processor": f"{machine['processor']}, {machine['memory_gib']} GiB of memory",
            "threads": f"{torch.get_num_threads()}, matmuls in {machine['matmul']}",
            "versions": f"Python {machine['python']}, PyTorch {machine['torch']}",
            "seed": "not set" if seed is None else str(seed),
        }
        for name, value in rows.items():
            print(f"{name:<10} {value}")
    return profile
