"""Scaling laws: how the loss falls with parameters and tokens, and how far that can be trusted.

The law is that of "Training Compute-Optimal Large Language Models" (arXiv:2203.15556, eq. 2):
what no model of this kind can know, what so few parameters cannot hold, and what so few tokens
cannot teach, added up. It is fitted as there (approach 3), and its uncertainty comes from
fitting it again to runs drawn from the runs. Built step by step in notebook 09.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line, read_json_lines
from flashlm_helpers.plots import column

FLOPS_PER_PARAMETER = 6  # and token: 2 forward, 4 backward (arXiv:2001.08361, section 2.1)
HUBER = 1e-2  # relative errors up to this count squared: seeds make a difference of 5e-3
MOST_EPOCHS = 4.0  # a text that is read more often teaches less and less (arXiv:2305.16264)
LEVEL = 0.95  # of intervals

UNKNOWNS = 5  # of the law
_LEAST_LEVELS = 3  # of sizes, and of budgets: fewer leave it open how a curve bends
_LEAST_RUNS = 8
_LOWEST = (-12.0, -12.0, -12.0, 0.02, 0.02)  # log E, log A, log B, alpha, beta
_HIGHEST = (6.0, 6.0, 6.0, 3.0, 3.0)


# ---- what was measured ----


@dataclass(frozen=True)
class ScalingRun:
    """The end of one run: a model of so many parameters after so many tokens.

    bpb: bits per byte of held-out text. The learning rate must have reached its end, or the loss
    is that of a longer run which was stopped too early.
    """

    parameters: int
    tokens: int
    bpb: float

    @property
    def flops(self) -> float:
        """Return the additions and multiplications of the run: 6 per parameter and token."""
        return float(FLOPS_PER_PARAMETER * self.parameters * self.tokens)


def read_runs(path: Path, text: str) -> list[ScalingRun]:
    """Read the runs on one text that benchmarks/scaling.py recorded, the smallest model first.

    Raises FlashLMError if the file holds other lines, or no run on this text.
    """
    lines = read_json_lines(path)
    try:
        found = [_run_of(line) for line in lines if line["text"] == text]
    except (KeyError, TypeError) as error:
        raise FlashLMError(
            f"{path} holds lines that are no runs of a grid ({one_line(error)}): name another file"
        ) from error
    if not found:
        texts = sorted({str(line["text"]) for line in lines})
        raise FlashLMError(f"{path} has no runs on {text!r}: choose one of {', '.join(texts)}")
    return sorted(found, key=lambda run: (run.parameters, run.tokens))


def _run_of(line: dict) -> ScalingRun:
    return ScalingRun(line["parameters"]["total"], line["tokens"], line["score"]["bpb"])


def split_largest(
    runs: Sequence[ScalingRun], name: str
) -> tuple[list[ScalingRun], list[ScalingRun]]:
    """Split runs into all others and those with the largest "parameters" or "tokens"."""
    largest = max(getattr(run, name) for run in runs)
    others = [run for run in runs if getattr(run, name) < largest]
    held_out = [run for run in runs if getattr(run, name) == largest]
    return others, held_out


# ---- the law ----


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, T) = E + A / N^alpha + B / T^beta, in bits per byte (arXiv:2203.15556, eq. 2).

    N: parameters. T: tokens seen in training.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def bpb(self, parameters: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
        """Return the bits per byte of models of this size after so many tokens."""
        size = self.A * np.asarray(parameters, dtype=float) ** -self.alpha
        length = self.B * np.asarray(tokens, dtype=float) ** -self.beta
        return self.E + size + length

    def best_parameters(self, flops: float | np.ndarray) -> np.ndarray:
        """Return the size of the best model for so much compute (arXiv:2203.15556, eq. 4).

        Larger models see too few tokens, smaller ones hold too little.
        """
        total = self.alpha + self.beta
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / total)
        return balance * (np.asarray(flops) / FLOPS_PER_PARAMETER) ** (self.beta / total)

    def frontier(self, flops: float | np.ndarray) -> np.ndarray:
        """Return the bits per byte of the best model for so much compute."""
        parameters = self.best_parameters(flops)
        return self.bpb(parameters, flops / (FLOPS_PER_PARAMETER * parameters))


@dataclass(frozen=True)
class Estimate:
    """A value with the interval that holds it at LEVEL, as far as the form of the law is right."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class ScalingFit:
    """A law, the runs it was fitted to, and the laws that other draws of the runs gave."""

    law: ScalingLaw
    runs: tuple[ScalingRun, ...]
    resampled: tuple[ScalingLaw, ...]

    @property
    def residuals(self) -> np.ndarray:
        """Return ln(measured / law) of every run, (runs,)."""
        return _residuals(self.law, self.runs)

    def estimate(self, quantity: Callable[[ScalingLaw], float]) -> Estimate:
        """Return any number of the law, such as its alpha, with its interval."""
        values = [float(quantity(law)) for law in self.resampled]
        return Estimate(float(quantity(self.law)), *_interval(values).tolist())

    def band(self, curve: Callable[[ScalingLaw], np.ndarray]) -> np.ndarray:
        """Return the lower and the upper end of a curve of the law, (2, points)."""
        return _interval([curve(law) for law in self.resampled])

    def predict(self, parameters: float, tokens: float, seed: int = 0) -> Estimate:
        """Predict the bits per byte of one more run.

        Its interval is wider than that of the law, as a run does not lie on the law exactly: each
        resampled law is moved by the residual of one of the runs. With few runs it is too narrow:
        from 15 or 16 made-up runs with a noise of 0.5 %, it held 89 % of runs of twice the size,
        and 78 % of runs with twice the tokens, not 95 %.
        """
        # The law was fitted to these runs, which makes their residuals look small.
        n = len(self.runs)
        residuals = self.residuals * np.sqrt(n / (n - UNKNOWNS))
        noise = np.random.default_rng(seed).choice(residuals, size=len(self.resampled))
        laws = np.array([law.bpb(parameters, tokens) for law in self.resampled])
        ends = _interval(laws * np.exp(noise)).tolist()
        return Estimate(float(self.law.bpb(parameters, tokens)), *ends)


def _interval(values: Sequence) -> np.ndarray:
    """Return the ends of the interval that holds a share LEVEL of the values, (2, ...)."""
    outside = (1 - LEVEL) / 2
    return np.quantile(np.asarray(values, dtype=float), [outside, 1 - outside], axis=0)


def _residuals(law: ScalingLaw, runs: Sequence[ScalingRun]) -> np.ndarray:
    predicted = law.bpb(column(runs, "parameters"), column(runs, "tokens"))
    return np.log(column(runs, "bpb") / predicted)


# ---- fitting ----


def fit_law(runs: Sequence[ScalingRun], draws: int = 100, seed: int = 0) -> ScalingFit:
    """Fit the law to runs, by robust least squares of ln(bits per byte), with its uncertainty.

    draws: how often it is fitted anew, each time to as many runs, drawn from the runs with
    replacement (the bootstrap). seed: of the draws. Source: arXiv:2203.15556, approach 3; but for
    runs as short as ours, Huber's loss counts relative errors squared up to 1e-2, not 1e-3.
    Raises FlashLMError for fewer than eight runs, three sizes or three budgets.
    """
    _require_enough(runs)
    runs = tuple(runs)

    # The error has several minima, so the first fit starts in many places.
    ends = [_minimize(runs, start) for start in _starts(runs)]
    error, law = min(ends, key=lambda end: end[0])

    # The other fits start from it. Draws that leave a number of the law open are drawn again.
    random = np.random.default_rng(seed)
    resampled: list[ScalingLaw] = []
    while len(resampled) < draws:
        drawn = [runs[place] for place in random.integers(len(runs), size=len(runs))]
        if len(set(drawn)) > UNKNOWNS and _levels(drawn) >= _LEAST_LEVELS:
            resampled.append(_minimize(drawn, law)[1])
    return ScalingFit(law, runs, tuple(resampled))


def _levels(runs: Sequence[ScalingRun]) -> int:
    """Return how many sizes or how many budgets there are, whichever are fewer."""
    return min(len(set(column(runs, name))) for name in ("parameters", "tokens"))


def _require_enough(runs: Sequence[ScalingRun]) -> None:
    """Raise FlashLMError if no law can be told from these runs."""
    for run in runs:
        if not all(0 < value < np.inf for value in vars(run).values()):
            raise FlashLMError(f"{run} is not the end of a run: leave it out")
    if len(set(runs)) < _LEAST_RUNS:
        raise FlashLMError(f"{len(set(runs))} runs are too few for a law: give {_LEAST_RUNS}")
    if _levels(runs) < _LEAST_LEVELS:
        raise FlashLMError(
            "the runs have too few sizes or budgets: "
            f"give at least {_LEAST_LEVELS} of each, all different"
        )


def _starts(runs: Sequence[ScalingRun]) -> list[ScalingLaw]:
    """Return laws to start from: a share of the lowest loss stays, the rest is half and half."""
    lowest = column(runs, "bpb").min()
    starts = []
    for share, alpha, beta in itertools.product((0.1, 0.5, 0.9), (0.2, 0.8), (0.2, 0.8)):
        half = (1 - share) * lowest / 2
        A = half * column(runs, "parameters").max() ** alpha
        B = half * column(runs, "tokens").max() ** beta
        starts.append(ScalingLaw(share * lowest, A, B, alpha, beta))
    return starts


def _minimize(runs: Sequence[ScalingRun], start: ScalingLaw) -> tuple[float, ScalingLaw]:
    """Return the error of the best law near `start`, and the law."""
    from scipy.optimize import least_squares  # slow to import, and the curves of races need none

    # In units of typical runs, and as logarithms, the unknowns are of one order of magnitude.
    n = column(runs, "parameters")
    t = column(runs, "tokens")
    n_typical = np.exp(np.log(n).mean())
    t_typical = np.exp(np.log(t).mean())
    measured = np.log(column(runs, "bpb"))

    def residuals(unknowns: np.ndarray) -> np.ndarray:
        E, A, B = np.exp(unknowns[:3])
        alpha, beta = unknowns[3:]
        predicted = E + A * (n / n_typical) ** -alpha + B * (t / t_typical) ** -beta
        return np.log(predicted) - measured

    # Huber's loss counts an outlier by its size, not by the square.
    size = start.A * n_typical**-start.alpha
    length = start.B * t_typical**-start.beta
    guess = np.array([*np.log([start.E, size, length]), start.alpha, start.beta])
    guess = guess.clip(np.add(_LOWEST, 1e-6), np.subtract(_HIGHEST, 1e-6))
    bounds = (_LOWEST, _HIGHEST)
    found = least_squares(residuals, guess, bounds=bounds, loss="huber", f_scale=HUBER)

    # Back to parameters and tokens.
    E, size, length = np.exp(found.x[:3]).tolist()
    alpha, beta = found.x[3:].tolist()
    A = float(size * n_typical**alpha)
    B = float(length * t_typical**beta)
    return float(found.cost), ScalingLaw(E, A, B, alpha, beta)


# ---- one variable ----


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = scale / x^exponent, a straight line on logarithmic axes (arXiv:2001.08361, eq. 1.1).

    It has no end: it promises any loss, however low, to whoever pays for it.
    """

    scale: float
    exponent: float

    def bpb(self, x: float | np.ndarray) -> np.ndarray:
        """Return the bits per byte at x parameters, tokens or operations."""
        return self.scale * np.asarray(x, dtype=float) ** -self.exponent


def fit_power_law(runs: Sequence[ScalingRun], name: str) -> PowerLaw:
    """Fit a power law in "parameters", "tokens" or "flops" by least squares of the logarithms.

    Only this one should limit the runs: give runs of the largest budget for a law in parameters,
    of the largest model for one in tokens, and compute_frontier() for one in operations.
    Raises FlashLMError unless the runs differ in it.
    """
    x = np.log(column(runs, name))
    if len(set(x)) < 2:
        raise FlashLMError(f"all runs have the same {name}: give runs that differ in it")
    slope, height = np.polyfit(x, np.log(column(runs, "bpb")), 1)
    return PowerLaw(float(np.exp(height)), float(-slope))


def compute_frontier(runs: Sequence[ScalingRun]) -> list[ScalingRun]:
    """Return the runs that none with less compute equals, the cheapest first."""
    frontier: list[ScalingRun] = []
    for run in sorted(runs, key=lambda run: (run.flops, run.bpb)):
        if not frontier or run.bpb < frontier[-1].bpb:
            frontier.append(run)
    return frontier


# ---- beyond the grid ----


@dataclass(frozen=True)
class Extrapolation:
    """What a law says of a run that nobody has made: never to be quoted as a result."""

    flops: float
    parameters: float
    tokens: float
    epochs: float
    bpb: Estimate
    beyond: float  # times the compute of the largest run that was measured


def extrapolate(
    fit: ScalingFit,
    cores: float,
    hours: float,
    text_tokens: float,
    flops_per_core: float,
    most_epochs: float = MOST_EPOCHS,
) -> Extrapolation:
    """Say what the best model for so many cores, hours and tokens of text should reach.

    flops_per_core: operations per core and second, 6 per parameter and token, as measured; it is
    taken to hold for every core. A text is read most_epochs times at most, because the law was
    fitted to runs that read nothing often (see arXiv:2305.16264): a larger model takes what
    compute is left. The interval knows nothing of a law that bends outside of the grid.
    Raises FlashLMError for a quantity that is not above 0.
    """
    asked = {"cores": cores, "hours": hours, "text_tokens": text_tokens}
    asked |= {"flops_per_core": flops_per_core, "most_epochs": most_epochs}
    for name, value in asked.items():
        if not 0 < value < np.inf:
            raise FlashLMError(f"{name} must be above 0, not {value}")

    # The best size for the compute, or the one for which the text lasts.
    flops = flops_per_core * cores * hours * 3600
    per_token = FLOPS_PER_PARAMETER * float(fit.law.best_parameters(flops))
    tokens = min(flops / per_token, most_epochs * text_tokens)
    parameters = flops / (FLOPS_PER_PARAMETER * tokens)

    bpb = fit.predict(parameters, tokens)
    beyond = flops / max(run.flops for run in fit.runs)
    return Extrapolation(flops, parameters, tokens, tokens / text_tokens, bpb, beyond)
