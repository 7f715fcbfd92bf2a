"""Figures of the series: labelled axes with units, colours that colour-blind readers can tell apart."""

import time

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's palette, black last.
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
COLOURS, MARKS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, BLACK), "os^vDPX*"


def plot_training(history: dict, figure: Figure | None = None) -> Figure:
    """Loss (nats/token, training and validation) and learning rate against minutes of a run.

    history: TrainResult.history or the same from report.json. Returns the figure, drawn into `figure` if given.
    """
    figure = figure or plt.figure(figsize=(7, 4.5), layout="constrained")
    figure.clear()
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, style in (("train", {"color": SKY, "label": "training"}),
                        ("valid", {"color": BLUE, "label": "validation", "marker": "o", "linestyle": ""})):
        loss.plot([r["seconds"] / 60 for r in history[name]], [r["nats_per_token"] for r in history[name]], **style)
    loss.set_ylabel("loss (nats/token)")
    loss.legend()
    rate.plot([r["seconds"] / 60 for r in history["train"]], [r["lr"] for r in history["train"]], color=ORANGE)
    rate.set_ylabel("learning rate")
    rate.set_xlabel("time (minutes)")
    rate.set_ylim(bottom=0)
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
    return figure


class LiveLossCurve:
    """The live loss curve of a run in a notebook: pass it to train() as `on_step`.

    every: seconds between two drawings; a drawing costs about a tenth of a second.
    """

    def __init__(self, every: float = 3.0):
        self.every, self._drawn, self._display = every, 0.0, None
        self._figure = plt.figure(figsize=(7, 4.5), layout="constrained")
        plt.close(self._figure)  # shown through its display handle only, not a second time after the cell

    def __call__(self, progress) -> None:
        """Redraw if it is time to, or if the budget is spent; `progress` is training.Progress."""
        from IPython.display import display

        now = time.monotonic()
        if not progress.history["train"] or (now - self._drawn < self.every and progress.fraction < 1):
            return
        self._drawn = now
        plot_training(progress.history, self._figure)
        self._figure.suptitle(f"{progress.tokens_per_second:,.0f} tokens/s, {progress.tokens_seen / 1e6:.2f} M tokens, "
                              f"{progress.seconds_left:.0f} s left", fontsize=10)
        if self._display is None:
            self._display = display(self._figure, display_id=True)
        else:
            self._display.update(self._figure)


def plot_race(records: list[dict]) -> Figure:
    """Validation bits per byte against minutes, and against tokens seen; a line a run, a colour and a mark an entrant.

    records: what race.race() returns. Values more than half above the worst end are cut off.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.5), sharey=True, layout="constrained")
    names = list(dict.fromkeys(record["entrant"] for record in records))
    ends = [record["validation"][-1]["bpb"] for record in records]
    for panel, key, unit, label in zip(panels, ("seconds", "tokens"), (60, 1e6), ("time (minutes)", "tokens seen (M)"),
                                       strict=True):
        for record in records:
            number = names.index(record["entrant"])
            panel.plot([row[key] / unit for row in record["validation"]], [row["bpb"] for row in record["validation"]],
                       color=COLOURS[number % len(COLOURS)], marker=MARKS[number % len(MARKS)], markersize=4, alpha=0.8,
                       label=record["entrant"] if record["seed"] == records[0]["seed"] else None)
        panel.set_xlabel(label)
        panel.set_xlim(0, 1.04 * max(row[key] / unit for record in records for row in record["validation"]))
        panel.set_ylim(min(ends) * 0.97, max(ends) * 1.5)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation bits per byte")
    panels[1].legend(fontsize=8)
    return figure


def plot_bpc(reports: dict, compressors: dict, highlight: str) -> Figure:
    """BPC of models and compressors as horizontal bars, the best on top, with bootstrap intervals.

    reports: {name: BPCReport}; compressors: {name: {"bpc": ...}}; highlight: the name drawn in another colour.
    """
    bars = {name: (report.bpc, report.interval) for name, report in reports.items()}
    bars |= {name: (value["bpc"], None) for name, value in compressors.items()}
    names = sorted(bars, key=lambda name: bars[name][0], reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1), layout="constrained")
    values = np.array([bars[name][0] for name in names])
    axes.barh(names, values, color=[BLUE if name == highlight else SKY for name in names])
    for row, name in enumerate(names):
        value, interval = bars[name]
        low, high = interval["bpc"] if interval else (value, value)
        if interval:
            axes.plot([low, high], [row, row], color=BLACK, linewidth=2)
        axes.annotate(f"{value:.2f}", (high, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_xlabel("bits per character (lower is better; black: 95 % interval over stories)")
    axes.set_xlim(0, values.max() * 1.12)
    return figure


def plot_entropy(story, pieces: list[str]) -> Figure:
    """Bits per generated token: the model's entropy before each choice, and the surprise of what was chosen.

    story: generation.Story. pieces: the text of each generated token, written below its place.
    """
    figure, axes = plt.subplots(figsize=(max(7, 0.2 * len(pieces)), 3.6), layout="constrained")
    places = np.arange(len(pieces))
    axes.bar(places, story.entropy, color=SKY, label="entropy before the choice")
    axes.plot(places, story.surprise, "o", color=RED, markersize=4, label="surprise of the choice")
    axes.set_xticks(places, [piece.replace("\n", "\\n").replace("$", r"\$") for piece in pieces], rotation=90,
                    fontsize=8)
    axes.set_xlim(-1, len(pieces))
    axes.set_ylabel("bits")
    axes.set_xlabel("generated token")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
