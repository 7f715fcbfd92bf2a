"""The live loss curve of a run, where there is a notebook to draw it in."""

import time

import matplotlib.pyplot as plt

from flashlm_helpers.checkpoint import Progress
from flashlm_helpers.plots import plot_training


class LiveLossCurve:
    """The loss curve of a run in a notebook, drawn while it trains: pass it as `on_step`.

    every: seconds between two drawings; each takes about a tenth of a second.
    """

    def __init__(self, every: float = 3.0):
        self.every = every
        self._drawn = 0.0
        self._display = None
        self._figure = plt.figure(figsize=(7, 4.5), layout="constrained")
        plt.close(self._figure)  # it is shown by its display handle, not once more after the cell

    def __call__(self, progress: Progress) -> None:
        """Draw the curve anew if it is time to, or if the budget is spent."""
        from IPython.display import display

        now = time.monotonic()
        too_soon = now - self._drawn < self.every and progress.fraction < 1
        if too_soon or not progress.history.train:
            return
        self._drawn = now

        plot_training(progress.history, self._figure)
        title = (
            f"{progress.tokens_per_second:,.0f} tokens/s, "
            f"{progress.tokens_seen / 1e6:.2f} M tokens, {progress.seconds_left:.0f} s left"
        )
        self._figure.suptitle(title, fontsize=10)

        # The first drawing makes a place in the notebook, the others replace it.
        if self._display is None:
            self._display = display(self._figure, display_id=True)
        else:
            self._display.update(self._figure)
