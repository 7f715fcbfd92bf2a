"""The figures of races and of curricula: how fast each run learned, and each of its texts."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashlm_helpers.checkpoint import ValidPoint
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


def plot_sources(
    curves: Mapping[str, Sequence[ValidPoint]],
    changes: Sequence[float] = (),
    axes: Axes | None = None,
) -> Figure:
    """Plot the validation of a run on each of its texts, in bits per byte, over tokens seen.

    curves: History.sources; one without points keeps its colour for another figure. changes:
    shares of the run after which another stage began, drawn as dashed lines. axes: where to draw,
    by default in a new figure. Returns the figure.
    """
    if axes is None:
        _, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    end = 0.0
    for number, (name, points) in enumerate(curves.items()):
        if not points:
            continue
        end = max(end, points[-1].tokens / 1e6)
        axes.plot(
            column(points, "tokens", 1e6),
            column(points, "bpb"),
            color=COLOURS[number % len(COLOURS)],
            marker=MARKS[number % len(MARKS)],
            markersize=4,
            label=name,
        )

    # The last validation is at the end of the run.
    for change in changes:
        axes.axvline(change * end, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, 1.04 * end)
    axes.set_xlabel("tokens seen (M)")
    axes.set_ylabel("validation bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return axes.figure
