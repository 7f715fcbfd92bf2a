"""Speeds, measured so that a disturbed moment does not decide."""

import time
from collections.abc import Callable, Sequence
from statistics import median


def measure_batches(
    step: Callable[[int], object],
    batches: Sequence[int],
    limit: float,
    repeats: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Measure the sequences per second of step(batch) for each batch: medians, taken in turns.

    limit: seconds that this may take; if the first step shows that it would take longer, nothing
    is measured and the result is empty.
    """
    # The first step shows about how long all of them will take.
    began = clock()
    step(batches[0])
    per_sequence = (clock() - began) / batches[0]
    if per_sequence * sum(batches) * (repeats + 1) > limit:
        return {}

    # In turns, so that a slow moment of the machine does not fall on one batch alone.
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for _ in range(repeats + 1):
        for batch, taken in seconds.items():
            began = clock()
            step(batch)
            taken.append(clock() - began)
    return {batch: batch / median(taken[1:]) for batch, taken in seconds.items()}  # 1: warmed up
