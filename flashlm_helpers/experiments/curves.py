"""The figures of experiments: races, curricula, scaling laws, scores and stories."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from flashlm_helpers.checkpoint import ValidPoint
from flashlm_helpers.evaluation import BPCReport
from flashlm_helpers.experiments.scaling import (
    Extrapolation,
    ScalingFit,
    ScalingRun,
    compute_frontier,
    fit_power_law,
)
from flashlm_helpers.generation import Story
from flashlm_helpers.plots import BLACK, BLUE, COLOURS, GREEN, MARKS, ORANGE, RED, SKY, column


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


def plot_scaling(fit: ScalingFit, held_out: Sequence[ScalingRun] = ()) -> Figure:
    """Plot bits per byte over parameters and over tokens: runs, and the law fitted to them.

    held_out: runs that the law was not fitted to, drawn as rings. Bands hold 95 % of the resampled
    laws. Both axes are logarithmic.
    """
    figure, (by_size, by_tokens) = plt.subplots(
        1, 2, figsize=(10, 4.8), sharey=True, layout="constrained"
    )
    _draw_scaling(by_size, fit, held_out, "parameters", "tokens")
    _draw_scaling(by_tokens, fit, held_out, "tokens", "parameters")
    by_size.set_ylabel("held-out bits per byte")
    by_size.set_xlabel("parameters (M)")
    by_tokens.set_xlabel("tokens seen (M)")
    by_size.legend(fontsize=8, title="tokens seen")
    by_tokens.legend(fontsize=8, title="parameters")
    return figure


def _draw_scaling(
    panel: Axes, fit: ScalingFit, held_out: Sequence[ScalingRun], name: str, other: str
) -> None:
    """Draw runs and the law over one quantity, with a colour and a mark per value of the other."""
    runs = [*fit.runs, *held_out]
    x = column(runs, name)
    curve = np.geomspace(0.9 * x.min(), 1.1 * x.max(), 60)

    for number, value in enumerate(sorted(set(column(runs, other)))):
        colour = COLOURS[number % len(COLOURS)]
        mark = MARKS[number % len(MARKS)]
        points = {"color": colour, "marker": mark, "linestyle": "", "markersize": 5}
        for group, face in ((fit.runs, colour), (held_out, "none")):
            shown = [run for run in group if getattr(run, other) == value]
            panel.plot(
                column(shown, name, 1e6), column(shown, "bpb"), markerfacecolor=face, **points
            )

        # The law for this value, from the smallest run to the largest.
        def law(one, value=value):
            return one.bpb(**{name: curve, other: value})

        panel.plot(
            curve / 1e6, law(fit.law), color=colour, linewidth=1, label=f"{value / 1e6:.2g} M"
        )
        if fit.resampled:
            panel.fill_between(curve / 1e6, *fit.band(law), color=colour, alpha=0.15, linewidth=0)
    _set_logarithmic(panel)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())


def _set_logarithmic(panel: Axes) -> None:
    """Make both axes logarithmic, with plain numbers for the bits per byte."""
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)


def plot_compute(fit: ScalingFit, beyond: Sequence[Extrapolation] = ()) -> Figure:
    """Plot bits per byte over compute: runs, and what two laws promise the best of them.

    beyond: extrapolations, drawn as crosses with their intervals. The grey part is where nothing
    was measured. Both axes are logarithmic.
    """
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    measured = column(fit.runs, "flops")
    largest = max(measured.max(), *column(beyond, "flops"), 0)
    curve = np.geomspace(measured.min(), 1.5 * largest, 100)
    best = compute_frontier(fit.runs)

    # Every run, and those that none with less compute equals.
    axes.plot(measured, column(fit.runs, "bpb"), ".", color=SKY, label="runs")
    axes.plot(column(best, "flops"), column(best, "bpb"), "o", color=BLUE, label="the best of them")

    # A law with an end, and one without.
    axes.plot(curve, fit.law.frontier(curve), color=ORANGE, label="the law E + A/N^α + B/T^β")
    if fit.resampled:
        band = fit.band(lambda law: law.frontier(curve))
        axes.fill_between(curve, *band, color=ORANGE, alpha=0.2, linewidth=0)
    straight = fit_power_law(best, "flops")
    axes.plot(curve, straight.bpb(curve), "--", color=GREEN, label="a straight line")

    for number, one in enumerate(beyond):
        label = "extrapolated" if number == 0 else None
        bar = [[one.bpb.value - one.bpb.low], [one.bpb.high - one.bpb.value]]
        axes.errorbar(one.flops, one.bpb.value, bar, fmt="x", color=RED, capsize=3, label=label)

    axes.axvspan(measured.max(), curve[-1], color=BLACK, alpha=0.06, linewidth=0)
    axes.set_xlim(0.8 * curve[0], curve[-1])
    axes.set_xlabel("compute (operations, 6 per parameter and token; grey: nothing was measured)")
    axes.set_ylabel("held-out bits per byte")
    axes.legend(fontsize=8)
    _set_logarithmic(axes)
    return figure


# ---- one model: its score, and its doubts ----


def plot_bpc(
    reports: dict[str, BPCReport], compressors: dict[str, dict[str, float]], highlight: str
) -> Figure:
    """Plot the BPC of models and compressors as bars, the best on top, with their intervals.

    compressors: {name: {"bpc": ...}}. highlight: the name that has another colour.
    """
    bpc = {name: report.bpc for name, report in reports.items()}
    for name, found in compressors.items():
        bpc[name] = found["bpc"]

    # Bars are drawn from the bottom up, so the worst comes first.
    names = sorted(bpc, key=bpc.get, reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1), layout="constrained")

    for row, name in enumerate(names):
        axes.barh(name, bpc[name], color=BLUE if name == highlight else SKY)

        # The number goes behind the interval; compressors have none, nor has a single story.
        high = bpc[name]
        interval = reports[name].interval if name in reports else None
        if interval:
            low, high = interval["bpc"]
            axes.plot([low, high], [row, row], color=BLACK, linewidth=2)
        _write_beside(axes, f"{bpc[name]:.2f}", high, row)

    axes.set_xlabel("bits per character (lower is better; black: 95 % interval over stories)")
    axes.set_xlim(0, max(bpc.values()) * 1.12)
    return figure


def _write_beside(axes: Axes, text: str, x: float, row: int) -> None:
    """Write a text a little to the right of a bar that ends at x."""
    axes.annotate(text, (x, row), xytext=(6, 0), textcoords="offset points", va="center")


def plot_entropy(story: Story, pieces: Sequence[str]) -> Figure:
    """Plot, in bits, a model's entropy before each token it wrote, and the surprise of the token.

    pieces: the text of each token, written below its place.
    """
    width = max(7, 0.2 * len(pieces))
    figure, axes = plt.subplots(figsize=(width, 3.6), layout="constrained")
    places = np.arange(len(pieces))

    # A choice above its bar was less likely than the model's choices are on average.
    axes.bar(places, story.entropy, color=SKY, label="entropy before the choice")
    axes.plot(places, story.surprise, "o", color=RED, markersize=4, label="surprise of the choice")

    # Unescaped, \n would break the line, and text between two $ would become a formula.
    labels = [piece.replace("\n", "\\n").replace("$", r"\$") for piece in pieces]
    axes.set_xticks(places, labels, rotation=90, fontsize=8)
    axes.set_xlim(-1, len(pieces))
    axes.set_xlabel("generated token")
    axes.set_ylabel("bits")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
