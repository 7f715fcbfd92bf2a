"""The figure of a race: how fast each of its runs learned."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashlm_helpers.plots import COLOURS, MARKS, column


def plot_race(records: Sequence) -> Figure:
    """Plot validation bits per byte over minutes and over tokens seen, one line per run.

    records: the RaceRecords of race(). Each entrant has a colour and a mark. Values more than
    half above the worst end are cut off.
    """
    figure, (by_time, by_tokens) = plt.subplots(
        1, 2, figsize=(10, 4.5), sharey=True, layout="constrained"
    )
    _draw_race(by_time, records, "seconds", 60)
    _draw_race(by_tokens, records, "tokens", 1e6)

    # The panels share their y axis, which leaves out how bad all were at the start.
    ends = [record.validation[-1].bpb for record in records]
    by_time.set_ylim(min(ends) * 0.97, max(ends) * 1.5)
    by_time.set_ylabel("validation bits per byte")
    by_time.set_xlabel("time (minutes)")
    by_tokens.set_xlabel("tokens seen (M)")
    by_tokens.legend(fontsize=8)
    return figure


def _draw_race(panel: Axes, records: Sequence, name: str, unit: float) -> None:
    """Draw a line per run over a field of its validations, in units of `unit`."""
    entrants = []
    furthest = 0.0
    for record in records:
        # Only the first run of an entrant appears in the legend.
        label = None
        if record.entrant not in entrants:
            entrants.append(record.entrant)
            label = record.entrant
        number = entrants.index(record.entrant)

        # Its runs have one colour and one mark.
        x = column(record.validation, name, unit)
        furthest = max(furthest, x.max())
        panel.plot(
            x,
            column(record.validation, "bpb"),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKS[number % len(MARKS)],
            markersize=4,
            alpha=0.8,
            label=label,
        )
    panel.set_xlim(0, 1.04 * furthest)
    panel.grid(alpha=0.3)
