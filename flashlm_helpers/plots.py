"""The figures of the series: axes with units, and colours that colour-blind readers tell apart."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from flashlm_helpers.checkpoint import History

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
