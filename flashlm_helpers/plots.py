"""The figures of the series: axes with units, and colours that colour-blind readers tell apart."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashlm_helpers.checkpoint import History
from flashlm_helpers.evaluation import BPCReport
from flashlm_helpers.generation import Story

# The palette of Okabe and Ito.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
RED = "#D55E00"
BLACK = "#000000"

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, BLACK)
MARKS = "os^vDPX*"


def column(rows: Sequence, name: str, unit: float = 1) -> np.ndarray:
    """Return one field of every row as multiples of `unit`: 60 turns seconds into minutes."""
    return np.array([getattr(row, name) for row in rows]) / unit


def plot_training(history: History, figure: Figure | None = None) -> Figure:
    """Plot a run's loss (nats/token, training and validation) and learning rate over minutes.

    Returns the figure: a new one, or `figure`, drawn anew.
    """
    if figure is None:
        figure = plt.figure(figsize=(7, 4.5), layout="constrained")
    figure.clear()

    # The loss above, the learning rate below, over the same minutes.
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])

    trained = column(history.train, "seconds", 60)
    validated = column(history.valid, "seconds", 60)

    # Validations are few, so each is a dot.
    loss.plot(trained, column(history.train, "nats_per_token"), color=SKY, label="training")
    dots = {"color": BLUE, "marker": "o", "linestyle": "", "label": "validation"}
    loss.plot(validated, column(history.valid, "nats_per_token"), **dots)
    loss.set_ylabel("loss (nats/token)")
    loss.legend()

    # The rate belongs to steps, so it has as many points as the training loss.
    rate.plot(trained, column(history.train, "lr"), color=ORANGE)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("time (minutes)")
    rate.set_ylim(bottom=0)
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    return figure


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
