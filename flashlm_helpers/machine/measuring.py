"""Speeds, measured so that a disturbed moment does not decide."""

import time
from collections.abc import Callable, Sequence


def measure_batches(
    step: Callable[[int], object],
    batches: Sequence[int],
    limit: float,
    repeats: int = 4,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Measure the sequences per second of step(batch) for each batch, at its best of `repeats`.

    Other programs can only make a step slower, so the best time is the one they disturbed least.
    limit: seconds after which no further step begins. The result is empty if by then not every
    batch was measured, after a first step that only warms up.
    """
    began = clock()
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}

    # In turns, so that a slow moment of the machine does not fall on one batch alone.
    for _ in range(repeats + 1):
        for batch, taken in seconds.items():
            if clock() - began < limit:
                start = clock()
                step(batch)
                taken.append(clock() - start)

    # The first step of each is left out.
    if any(len(taken) < 2 for taken in seconds.values()):
        return {}
    return {batch: batch / min(taken[1:]) for batch, taken in seconds.items()}
