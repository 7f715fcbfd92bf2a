"""Seconds of work, without those in which the computer slept."""

from collections.abc import Callable

LONGEST_PAUSE = 120.0  # seconds; nothing that a run does between its steps takes longer
UNUSUAL = 10  # times what a lap usually takes


class Stopwatch:
    """Count the seconds between one lap and the next, but no more than work can have taken.

    A clock also runs while a laptop is suspended, a virtual machine is paused or a process is
    stopped. What is left out there must not be missing from a budget.
    clock: returns seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self._mark = clock()

    def lap(self, usual: float = 0.0) -> float:
        """Return the seconds since the lap before this one; usual: what such laps take, if known.

        A lap that is longer than ever counts ten times as much as usual, so where work really
        has become slower, a mean of laps soon follows.
        """
        now = self.clock()
        longest = max(1.0, UNUSUAL * usual) if usual else LONGEST_PAUSE
        seconds = min(now - self._mark, longest)
        self._mark = now
        return seconds
