"""How many threads compute: as many as there are cores that no other program uses.

Threads that share an operation wait for each other at its end. If another program has the core of
one of them, all of them wait until that one has had its turn, hundreds of times per training step:
beside one busy program, two threads on two cores are several times slower than one thread alone.
So whoever computes for long calls follow() now and then, and gets out of the way.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from flashlm_helpers.machine.hardware import allowed_cores
from flashlm_helpers.machine.notices import notice

LOOK_SECONDS = 1.0  # between two looks at who uses the cores
NEWEST = 0.5  # weight of the newest look in the running mean
MARGIN = 0.6  # cores by which the free ones must differ from the threads before these change


@dataclass(frozen=True)
class Usage:
    """Seconds of the clock, and of processor time on the cores that this process may use."""

    clock: float
    everyone: float
    ours: float

    @classmethod
    def now(cls) -> "Usage":
        """Read the clocks of the machine."""
        everyone = 0.0
        per_core = psutil.cpu_times(percpu=True)
        for number in allowed_cores():
            times = per_core[number]
            waiting = times.idle + getattr(times, "iowait", 0.0)
            guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
            everyone += sum(times) - waiting - guests  # guests are in the user's time, too
        return cls(time.monotonic(), everyone, time.process_time())

    def others_since(self, before: "Usage") -> float:
        """Return how many cores other programs have used, on average, since an earlier reading."""
        # Clocks tick coarsely, so it may seem to be less than nothing.
        theirs = (self.everyone - before.everyone) - (self.ours - before.ours)
        return max(0.0, theirs / (self.clock - before.clock))


class Follower:
    """Follows what other programs leave of the cores with PyTorch's number of threads.

    It does nothing before limit() is called. usage: reads the machine's clocks.
    """

    def __init__(self, usage: Callable[[], Usage] = Usage.now):
        self.most: int | None = None
        self._usage = usage
        self._last: Usage | None = None
        self._others = 0.0  # cores that other programs use
        self._told = False

    def limit(self, most: int) -> None:
        """Compute with `most` threads from now on, or fewer while others need the cores."""
        self.most = most
        self._last = self._usage()
        self._others = 0.0
        self._told = False
        torch.set_num_threads(most)

    @contextmanager
    def hold(self, threads: int | None) -> Iterator[None]:
        """Compute with this number of threads in a `with` block; None follows as before."""
        most = self.most
        if most is not None and threads is not None:
            torch.set_num_threads(min(threads, most))
            self.most = None
        try:
            yield
        finally:
            self.most = most

    def follow(self) -> int:
        """Set PyTorch's threads to what other programs leave, and return their number.

        It looks once per second, however often it is called, and says so on stderr the first time
        that others take a core.
        """
        threads = torch.get_num_threads()
        if self.most is None or not self._look():
            return threads

        # A little more or less of a core changes nothing, so that the number does not flutter.
        free = len(allowed_cores()) - self._others
        if abs(free - threads) <= MARGIN:
            return threads
        wanted = max(1, min(self.most, round(free)))
        torch.set_num_threads(wanted)

        # Once is enough: a run of days is not the place for a diary.
        if wanted < threads and not self._told:
            self._told = True
            cores = f"{self._others:.1f} of {len(allowed_cores())} cores"
            count = "1 thread" if wanted == 1 else f"{wanted} threads"
            notice(f"\nother programs use {cores}: computing with {count} while they do")
        return wanted

    def _look(self) -> bool:
        """Measure what others use, if it is time to; return whether it was."""
        if time.monotonic() - self._last.clock < LOOK_SECONDS:
            return False
        now = self._usage()
        self._others += NEWEST * (now.others_since(self._last) - self._others)
        self._last = now
        return True


# The number of threads is one for the whole process, and so is what follows it.
FOLLOWER = Follower()
follow = FOLLOWER.follow
