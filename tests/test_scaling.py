"""Scaling laws: what is fitted, how sure it is, and what is refused."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.experiments.curves import plot_compute, plot_scaling
from flashlm_helpers.experiments.scaling import (
    PowerLaw,
    ScalingLaw,
    ScalingRun,
    compute_frontier,
    extrapolate,
    fit_law,
    fit_power_law,
    read_runs,
    split_largest,
)

SIZES = (200_000, 400_000, 800_000, 1_600_000, 3_200_000)
BUDGETS = (500_000, 1_000_000, 2_000_000, 4_000_000)


def law_of(E, size, length, alpha, beta):
    """The law whose two terms are `size` and `length` for a million parameters and tokens."""
    return ScalingLaw(E, size * 1e6**alpha, length * 1e6**beta, alpha, beta)


def grid(law, noise=0.0, seed=0, sizes=SIZES, budgets=BUDGETS):
    random = np.random.default_rng(seed)
    runs = []
    for n in sizes:
        for t in budgets:
            bpb = float(law.bpb(n, t) * np.exp(noise * random.normal()))
            runs.append(ScalingRun(n, t, bpb))
    return runs


LAWS = st.builds(
    law_of,
    E=st.floats(0.1, 1.0),
    size=st.floats(0.05, 1.0),
    length=st.floats(0.05, 1.0),
    alpha=st.floats(0.2, 1.0),
    beta=st.floats(0.2, 1.0),
)
LAW = law_of(0.5, 0.2, 0.3, 0.4, 0.45)


@pytest.fixture(scope="module")
def fit():
    """The fit to a grid whose runs scatter by half a percent."""
    return fit_law(grid(LAW, noise=0.005), draws=60)


# ---- fitting ----


@settings(max_examples=5, deadline=None)
@given(law=LAWS)
def test_runs_on_a_law_give_back_the_law(law):
    found = fit_law(grid(law), draws=0).law
    np.testing.assert_allclose(list(asdict(found).values()), list(asdict(law).values()), rtol=0.02)


@settings(max_examples=4, deadline=None)
@given(law=LAWS, seed=st.integers(0, 1000))
def test_noise_moves_the_law_by_no_more_than_the_noise(law, seed):
    runs = grid(law, noise=0.003, seed=seed)
    found = fit_law(runs, draws=0).law
    for run in runs:
        truth = law.bpb(run.parameters, run.tokens)
        assert abs(found.bpb(run.parameters, run.tokens) / truth - 1) < 0.009


def test_one_bad_run_counts_little():
    runs = grid(LAW)
    runs[7] = replace(runs[7], bpb=runs[7].bpb * 1.5)
    found = fit_law(runs, draws=0).law
    for run in runs[:7] + runs[8:]:
        assert found.bpb(run.parameters, run.tokens) == pytest.approx(run.bpb, rel=0.01)


def test_the_exponents_lie_in_their_intervals(fit):
    for name in ("alpha", "beta", "E"):
        estimate = fit.estimate(lambda law, name=name: getattr(law, name))
        assert getattr(LAW, name) in estimate
        assert estimate.low < estimate.high


def test_more_noise_gives_wider_intervals(fit):
    noisier = fit_law(grid(LAW, noise=0.02), draws=60)
    widths = []
    for one in (fit, noisier):
        estimate = one.estimate(lambda law: law.beta)
        widths.append(estimate.high - estimate.low)
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize(("name", "largest"), [("parameters", SIZES[-1]), ("tokens", BUDGETS[-1])])
def test_the_largest_runs_are_predicted_from_the_others(name, largest):
    runs = grid(LAW, noise=0.005, seed=1)
    others, held_out = split_largest(runs, name)
    assert sorted(others + held_out, key=runs.index) == runs
    assert {getattr(run, name) for run in held_out} == {largest}

    fit = fit_law(others, draws=0).law
    for run in held_out:
        assert fit.bpb(run.parameters, run.tokens) == pytest.approx(run.bpb, rel=0.04)


def test_a_run_is_less_certain_than_its_law(fit):
    law = fit.estimate(lambda law: law.bpb(SIZES[1], BUDGETS[1]))
    run = fit.predict(SIZES[1], BUDGETS[1])
    assert run.high - run.low > law.high - law.low
    assert LAW.bpb(SIZES[1], BUDGETS[1]) in run


def test_draws_follow_their_seed_and_leave_the_callers_random_numbers_alone():
    runs = grid(LAW, noise=0.005)
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    one = fit_law(runs, draws=3, seed=5)
    assert one.resampled == fit_law(runs, draws=3, seed=5).resampled
    assert one.resampled != fit_law(runs, draws=3, seed=6).resampled
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_the_order_of_the_runs_does_not_matter():
    runs = grid(LAW, noise=0.005)
    one = fit_law(runs, draws=0).law
    other = fit_law(runs[::-1], draws=0).law
    np.testing.assert_allclose(list(asdict(one).values()), list(asdict(other).values()), rtol=1e-3)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "0 runs are too few"),
        (grid(LAW, sizes=SIZES[:3], budgets=BUDGETS[:2]), "6 runs are too few"),
        (grid(LAW, sizes=SIZES[:1]) * 5, "4 runs are too few"),
        (grid(LAW, sizes=SIZES[:2]), "too few sizes"),
        (grid(LAW, budgets=BUDGETS[:2]), "too few sizes or budgets"),
        ([*grid(LAW), ScalingRun(0, 10, 1.0)], "leave it out"),
        ([*grid(LAW), ScalingRun(10, 10, float("nan"))], "leave it out"),
        ([*grid(LAW), ScalingRun(10, 10, float("inf"))], "leave it out"),
    ],
)
def test_what_gives_no_law_is_refused(runs, message):
    with pytest.raises(FlashLMError, match=message):
        fit_law(runs, draws=2)


# ---- the law ----


@given(law=LAWS, flops=st.floats(1e10, 1e18), factor=st.floats(0.2, 5.0))
def test_no_other_size_is_better_for_the_compute(law, flops, factor):
    size = law.best_parameters(flops)
    other = law.bpb(factor * size, flops / (6 * factor * size))
    assert law.frontier(flops) <= other * (1 + 1e-9)


@given(law=LAWS, parameters=st.floats(1e4, 1e9), tokens=st.floats(1e4, 1e12))
def test_more_never_hurts_and_nothing_beats_the_end(law, parameters, tokens):
    bpb = law.bpb(parameters, tokens)
    assert law.E < law.bpb(2 * parameters, tokens) < bpb
    assert law.E < law.bpb(parameters, 2 * tokens) < bpb


# ---- one variable ----


@given(scale=st.floats(0.5, 50), exponent=st.floats(0.01, 1))
def test_a_power_law_is_found_again(scale, exponent):
    law = PowerLaw(scale, exponent)
    runs = [ScalingRun(n, 1000, float(law.bpb(n))) for n in SIZES]
    found = fit_power_law(runs, "parameters")
    assert (found.scale, found.exponent) == pytest.approx((scale, exponent), rel=1e-6)


def test_a_power_law_needs_runs_that_differ():
    with pytest.raises(FlashLMError, match="the same tokens"):
        fit_power_law(grid(LAW, budgets=BUDGETS[:1]), "tokens")


@given(seed=st.integers(0, 100))
def test_the_frontier_is_beaten_by_no_run(seed):
    runs = grid(LAW, noise=0.1, seed=seed)
    frontier = compute_frontier(runs)
    assert frontier == sorted(frontier, key=lambda run: run.flops)
    for run in runs:
        best = min(point.bpb for point in frontier if point.flops <= run.flops)
        assert best <= run.bpb


# ---- beyond the grid ----


@settings(max_examples=30, deadline=None)
@given(cores=st.integers(1, 64), hours=st.floats(0.1, 100), text=st.floats(1e5, 1e10))
def test_an_extrapolation_spends_what_it_is_given_and_reads_nothing_too_often(
    fit, cores, hours, text
):
    found = extrapolate(fit, cores, hours, text, flops_per_core=3e11)
    assert 6 * found.parameters * found.tokens == pytest.approx(3e11 * cores * hours * 3600)
    assert found.epochs <= 4 * (1 + 1e-9)
    assert found.epochs == pytest.approx(found.tokens / text)
    assert found.bpb.low <= found.bpb.high

    # Twice the time is never worse.
    later = extrapolate(fit, cores, 2 * hours, text, flops_per_core=3e11)
    assert later.bpb.value <= found.bpb.value
    assert later.beyond == pytest.approx(2 * found.beyond)


@pytest.mark.parametrize("name", ["cores", "hours", "text_tokens", "flops_per_core", "most_epochs"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_an_extrapolation_from_nothing_is_refused(fit, name, value):
    asked = {"cores": 2, "hours": 1, "text_tokens": 1e8, "flops_per_core": 1e11}
    with pytest.raises(FlashLMError, match=name):
        extrapolate(fit, **(asked | {name: value}))


# ---- files ----


def line_of(run, text):
    return {
        "text": text,
        "tokens": run.tokens,
        "parameters": {"total": run.parameters},
        "score": {"bpb": run.bpb},
    }


def test_runs_of_one_text_are_read_in_order(tmp_path):
    path = tmp_path / "scaling.jsonl"
    runs = grid(LAW)
    lines = [line_of(run, "mine") for run in runs[::-1]]
    lines += [line_of(ScalingRun(7, 8, 9.0), "yours")]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_runs(path, "mine") == runs
    assert read_runs(path, "yours") == [ScalingRun(7, 8, 9.0)]
    with pytest.raises(FlashLMError, match="choose one of mine, yours"):
        read_runs(path, "ours")


@pytest.mark.parametrize("content", ['{"text": "mine"}', '{"entrant": "v4-small"}', "[1]", "{"])
def test_lines_that_are_no_runs_are_refused(tmp_path, content):
    path = tmp_path / "scaling.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FlashLMError, match="scaling.jsonl"):
        read_runs(path, "mine")


def test_a_file_that_is_not_there_has_no_runs(tmp_path):
    with pytest.raises(FlashLMError, match="no runs"):
        read_runs(tmp_path / "scaling.jsonl", "mine")


# ---- figures ----


@pytest.mark.parametrize("draws", [0, 5])
def test_the_figures_show_every_run_once(draws):
    runs = grid(LAW, noise=0.005)
    others, held_out = split_largest(runs, "parameters")
    fit = fit_law(others, draws=draws)
    for panel in plot_scaling(fit, held_out).axes:
        points = [line for line in panel.lines if line.get_linestyle() == "None"]
        assert sum(len(line.get_xdata()) for line in points) == len(runs)
        rings = [line for line in points if line.get_markerfacecolor() == "none"]
        assert sum(len(line.get_xdata()) for line in rings) == len(held_out)
        assert panel.get_xscale() == panel.get_yscale() == "log"
        assert "(M)" in panel.get_xlabel()


def test_extrapolations_stand_where_nothing_was_measured(fit):
    beyond = [extrapolate(fit, cores, 8, 5e8, 3e11) for cores in (2, 16)]
    (panel,) = plot_compute(fit, beyond).axes
    grey = panel.patches[0].get_extents().transformed(panel.transData.inverted())
    for one in beyond:
        assert max(run.flops for run in fit.runs) <= grey.x0 * (1 + 1e-9) < one.flops <= grey.x1
