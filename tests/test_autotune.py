import copy
import importlib.util
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, fresh, interrupt_at, quiet, run_training
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashlm_helpers import autotune, optimization, training
from flashlm_helpers.autotune import choose_batch, compile_network, measure_batches
from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.evaluation import encode_stories, evaluate, token_nats
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.machine import compiler
from flashlm_helpers.machine.compiler import has_cxx_compiler
from flashlm_helpers.mixers import causal_convolution
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import accumulate_gradient, build_optimizer, optimizer_step
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.training import Trainer
from flashlm_helpers.vocab import PAD

needs_compiler = pytest.mark.skipif(not has_cxx_compiler(), reason="no C++ compiler")

# The model written in the plainest way, which benchmarks are measured against.
path = Path(__file__).parent.parent / "benchmarks" / "plain.py"
spec = importlib.util.spec_from_file_location("plain", path)
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


def gradients(network):
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


@pytest.fixture
def batch(prepared):
    inputs, targets = prepared.train.batch(0, 8, 32, 42)
    targets = targets.clone()
    targets[1, 5:] = PAD  # rows of a batch need not count alike
    targets[4] = PAD
    return inputs, targets


@pytest.fixture
def network(model_config):
    torch.manual_seed(3)
    network = FlashLM(model_config)
    with torch.no_grad():
        network.embedding.weight.mul_(20)
    return network


@pytest.fixture
def twin(network):
    """The same network in the plain way, with the same weights."""
    twin = plain.PlainFlashLM(network.config)
    twin.load_state_dict(network.state_dict())
    return twin


@pytest.fixture
def microbatches():
    """Forget the sizes that were chosen for the memory there is, before and after a test."""
    optimization.microbatch_size.cache_clear()
    yield
    optimization.microbatch_size.cache_clear()


# ---- the same model, computed in other ways ----


@settings(deadline=None)  # the first convolution of a shape is slow
@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 12),
    width=st.integers(1, 5),
    kernel_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
)
def test_the_convolution_and_its_gradients_equal_conv1d(batch, time, width, kernel_size, seed):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    generator = torch.Generator().manual_seed(seed)
    past = draw(batch, kernel_size - 1, width)
    value = draw(batch, time, width).requires_grad_()
    taps = draw(kernel_size, width).requires_grad_()
    weight = draw(batch, time, width)

    def results(mixed, state):
        inputs = (value, taps)
        return mixed, state, *torch.autograd.grad((mixed * weight).sum(), inputs)

    ours = results(*causal_convolution(value, past, taps))
    window = torch.cat([past, value], dim=1)
    kernels = taps.T.unsqueeze(1)
    mixed = F.conv1d(window.transpose(1, 2), kernels, groups=width).transpose(1, 2)
    expected = results(mixed, window[:, time:])
    torch.testing.assert_close(ours, expected)

    # One token, when no gradient is wanted, takes a way of its own.
    with torch.no_grad():
        parts = []
        for token in value.split(1, dim=1):
            mixed, past = causal_convolution(token, past, taps)
            parts.append(mixed)
    torch.testing.assert_close((torch.cat(parts, dim=1), past), expected[:2])


def test_the_plain_reference_computes_the_same_model(network, twin, batch):
    inputs, targets = batch
    torch.testing.assert_close(network(inputs), twin(inputs), rtol=1e-4, atol=1e-5)
    losses = []
    for one in (network, twin):
        losses.append(accumulate_gradient(one, inputs, targets, bfloat16=False))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close(gradients(network), gradients(twin), 1e-4)


def test_plain_and_fast_steps_keep_the_same_weights(network, twin, batch):
    config = TrainConfig(epochs=1, lr=1e-3, bfloat16=False)
    pairs = (
        (network, build_optimizer(network, config)),
        (twin, plain.plain_optimizer(twin, config)),
    )
    for one, optimizer in pairs:
        for _ in range(3):
            optimizer_step(one, optimizer, *batch, config)
    expected = twin.state_dict()
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("bfloat16, tolerance", [(False, 1e-4), (True, 0.05)])
def test_a_compiled_model_learns_and_scores_as_an_eager_one(
    network, batch, vocabulary, stories, bfloat16, tolerance
):
    eager = copy.deepcopy(network)
    assert compile_network(network, bfloat16) is None
    assert network.compiled
    assert all(block._compiled_call_impl for block in network.blocks)

    losses = []
    scores = []
    for one in (network, eager):
        losses.append(accumulate_gradient(one, *batch, bfloat16))
        model = PyTorchModel(one, vocabulary, bfloat16=bfloat16)
        scores.append(evaluate(model, stories[:40]).nats_per_token)
    relative = 5e-3 if bfloat16 else 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=relative)
    assert scores[0] == pytest.approx(scores[1], rel=relative)
    assert_close(gradients(network), gradients(eager), tolerance)
    assert copy.deepcopy(network).state_dict().keys() == eager.state_dict().keys()


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
def test_microbatches_add_up_to_the_batch(network, batch, monkeypatch, microbatches, parts):
    whole = copy.deepcopy(network)
    expected = accumulate_gradient(whole, *batch, bfloat16=False)
    monkeypatch.setattr(optimization, "MICROBATCH_TOKENS", 32 * parts)
    optimization.microbatch_size.cache_clear()
    loss = accumulate_gradient(network, *batch, bfloat16=False)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_close(gradients(network), gradients(whole), 1e-5)


def test_little_memory_makes_small_microbatches_and_too_little_is_refused(
    model_config, monkeypatch, microbatches
):
    usable = 2 * optimization.step_memory(model_config, 3)
    monkeypatch.setattr(optimization, "usable_memory", lambda: usable)
    assert optimization.microbatch_size(model_config) == 3

    optimization.microbatch_size.cache_clear()
    monkeypatch.setattr(optimization, "usable_memory", lambda: 10**6)
    with pytest.raises(FlashLMError, match="GiB are usable"):
        optimization.microbatch_size(model_config)


# ---- scoring ----


def test_scores_do_not_depend_on_which_stories_are_beside(network, vocabulary, stories):
    texts = [story[: 37 * i + 5] for i, story in enumerate(stories[:70])]
    sequences = encode_stories(vocabulary, texts)
    together = token_nats(network, sequences, bfloat16=False)
    for i in (0, 1, 31, 32, 33, 69):
        [alone] = token_nats(network, [sequences[i]], bfloat16=False)
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_scores_in_bfloat16_are_close(prepared, model_config, stories, tmp_path, one_thread):
    recipe = TrainConfig(epochs=4, batch=4, lr=1e-2, validation_stories=5)
    network, *_ = run_training(model_config, recipe, prepared, tmp_path)
    scores = []
    for bfloat16 in (False, True):
        model = PyTorchModel(network, prepared.vocabulary, bfloat16=bfloat16)
        scores.append(evaluate(model, stories[100:]).nats_per_token)
    exact, rounded = scores
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=1e-3)


def test_one_long_story_among_short_ones_costs_no_more_than_its_length(
    network, vocabulary, stories, monkeypatch, one_thread
):
    positions = []
    hidden = FlashLM.hidden

    def counted(self, ids, states):
        positions.append(ids.numel())
        return hidden(self, ids, states)

    monkeypatch.setattr(FlashLM, "hidden", counted)
    sequences = encode_stories(vocabulary, [" ".join(stories), *stories[:31]])
    together = token_nats(network, sequences, bfloat16=False)
    assert sum(positions) < 2 * sum(map(len, sequences))
    positions.clear()
    token_nats(network, sequences[1:], bfloat16=False)
    assert sum(positions) < 1.5 * sum(map(len, sequences[1:]))

    [alone] = token_nats(network, sequences[:1], bfloat16=False)
    np.testing.assert_allclose(together[0], alone, rtol=1e-4, atol=1e-5)
    assert token_nats(network, []) == []


# ---- what is decided ----


@pytest.fixture
def eager_only(monkeypatch):
    reason = "not in this test"
    monkeypatch.setattr(autotune, "compile_network", lambda network, bfloat16: reason)


@pytest.mark.parametrize(
    "config, seconds, batch",
    [
        (TrainConfig(hours=1), 3600, 16),
        (TrainConfig(hours=1), 600, 8),
        (TrainConfig(hours=1), 60, 8),
        (TrainConfig(epochs=9), 3600, 8),
        (TrainConfig(hours=1, batch=5), 3600, 5),
        (TrainConfig(hours=1, epochs=1), 3600, 8),
    ],
)
def test_the_batch_is_measured_when_there_is_time_and_none_is_given(
    network, prepared, monkeypatch, eager_only, config, seconds, batch
):
    speeds = {8: 15.0, 16: 19.0}
    measured = []

    def measure(step, batches, limit):
        measured.append(batches)
        step(2)
        return speeds

    monkeypatch.setattr(autotune, "measure_batches", measure)
    optimizer = build_optimizer(network, config)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
    random_state = torch.get_rng_state()
    decided = autotune.autotune(network, optimizer, config, prepared.train, seconds)
    assert decided.batch == batch
    assert decided.compile is False
    assert decided.bfloat16 is not None
    timed = config.batch is None and config.epochs is None
    assert measured == ([[64, 128]] if timed and seconds >= 120 else [])

    # Nothing of the run itself has moved.
    for name, weight in network.state_dict().items():
        assert torch.equal(before[0][name], weight)
    assert optimizer.state_dict() == before[1]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in network.parameters())


@given(st.dictionaries(st.integers(1, 64), st.floats(1, 1e6), min_size=1), st.floats(1, 1e5))
def test_the_chosen_batch_is_fast_enough_and_leaves_enough_steps(speeds, seconds):
    chosen = choose_batch(speeds, seconds)
    threshold = autotune.FAST_ENOUGH * max(speeds.values())
    fast = {batch for batch, speed in speeds.items() if speed >= threshold}
    fitting = {n for n in fast if speeds[n] * seconds >= n * autotune.ENOUGH_STEPS}
    assert chosen in fast
    assert chosen == (max(fitting) if fitting else min(fast))


@pytest.mark.parametrize("disturbed", [None, 3, 7, 11])
def test_batches_are_timed_without_their_first_turn_and_at_their_best(disturbed):
    now = [0.0]
    calls = []

    def step(batch):
        calls.append(batch)
        slow = calls.count(batch) == 1 or len(calls) == disturbed
        now[0] += 100 if slow else 1 + batch / 8

    # One disturbed step, whichever it is, decides nothing.
    batches = (4, 8, 16)
    speeds = measure_batches(step, batches, limit=2200, clock=lambda: now[0])
    assert speeds == pytest.approx({batch: batch / (1 + batch / 8) for batch in batches})
    assert calls[:4] == [4, 8, 16, 4]

    # Without time for a second turn there is nothing to go by.
    calls.clear()
    begin = now[0]
    assert measure_batches(step, batches, limit=250, clock=lambda: now[0]) == {}
    assert now[0] - begin <= 250 + 100


def test_without_a_compiler_one_line_says_what_one_would_bring(
    network, prepared, monkeypatch, capsys
):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    config = TrainConfig(epochs=1, compile=True)
    optimizer = build_optimizer(network, config)
    decided = autotune.autotune(network, optimizer, config, prepared.train, 3600)
    assert decided.compile is False
    assert not network.compiled
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "C++ compiler" in message


def test_the_decision_has_a_line_of_its_own(
    text_dir, model_config, train_config, tmp_path, home, capsys
):
    limited = replace(model_config, vocabulary_size=1_000)
    experiment = Experiment(text_dir, limited, train_config)
    experiment.prepare()
    capsys.readouterr()
    experiment.run(tmp_path / "run")  # shows its own line, with a bar
    first, *_ = capsys.readouterr().err.splitlines()
    assert "float" in first and "eager" in first and "batch 8" in first
    assert "%" not in first


def test_a_compiler_that_fails_leaves_the_network_eager(network, batch, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError(
            f"C++ compile error\nCommand:\ng++ {'-I x ' * 500}\nOutput:\n"
            "x.cpp:1:2: fatal error: Python.h: No such file\ncompilation terminated."
        )

    monkeypatch.setattr(FlashLM, "compile", lambda self: setattr(self, "loss", broken))
    monkeypatch.setattr(compiler.shutil, "which", lambda name: "/usr/bin/g++")
    reason = compile_network(network, bfloat16=False)
    assert reason == "torch.compile failed: Python.h: No such file"
    assert not network.compiled
    assert accumulate_gradient(network, *batch, bfloat16=False) > 0


def test_a_run_extended_to_another_budget_is_decided_anew(prepared, model_config, tmp_path):
    config = TrainConfig(epochs=0.05, validation_stories=2)
    run_training(model_config, config, prepared, tmp_path)
    stopped = load_checkpoint(tmp_path, LAST)
    decided = replace(stopped.train_config, batch=5, compile=False, bfloat16=False)
    stopped = replace(stopped, train_config=decided)
    for epochs, expected in ((0.05, (5, False, False)), (3, (5, None, None))):
        recipe = replace(config, epochs=epochs)
        network, optimizer = fresh(model_config, recipe, prepared.vocabulary)
        trainer = Trainer(network, optimizer, recipe, prepared, tmp_path)
        with suppress(FlashLMError):
            trainer.restore(stopped)
        recipe = trainer.config
        assert (recipe.batch, recipe.compile, recipe.bfloat16) == expected


# ---- compiled runs, and the time that preparing takes ----


@needs_compiler
@pytest.mark.parametrize("architecture, dropout", [("model_config", 0.0), ("hybrid_config", 0.1)])
def test_a_compiled_run_records_its_way_and_resumes_bit_for_bit(
    prepared, architecture, dropout, tmp_path, request, few_candidates
):
    model_config = request.getfixturevalue(architecture)
    config = TrainConfig(epochs=0.11, validation_stories=5, compile=True, dropout=dropout)
    folder = tmp_path / "half"
    _, progress, _ = run_training(model_config, config, prepared, tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole", LAST)
    recorded = whole.train_config
    assert recorded.compile is True
    assert recorded.batch == 8
    assert recorded.bfloat16 in (True, False)
    assert progress.seconds["prepare"] > 0

    run_training(model_config, config, prepared, folder, on_step=interrupt_at(5))
    half = load_checkpoint(folder, LAST)
    assert half.train_config == replace(config, batch=8, bfloat16=recorded.bfloat16)
    undecided = replace(config, compile=None)
    network, *_ = run_training(model_config, undecided, prepared, folder, resume=half)
    assert network.compiled
    assert_same_run(whole, load_checkpoint(folder, LAST))


def test_a_report_names_what_was_decided(text_dir, model_config, tmp_path, home):
    config = TrainConfig(epochs=0.11, validation_stories=5)
    limited = replace(model_config, vocabulary_size=1_000)
    report = Experiment(text_dir, limited, config).run(tmp_path / "run", on_step=quiet)
    recorded = report.as_dict()["config"]["training"]
    assert recorded["compile"] is False  # too short a run
    assert recorded["batch"] == 8
    assert recorded["bfloat16"] in (True, False)
    assert report.seconds_by_activity["prepare"] > 0


def test_preparing_takes_nothing_from_the_schedule(prepared, model_config, tmp_path, monkeypatch):
    """Of 20 s, 8 go into preparing: the rate still rises, stays and falls over 12 steps of 1 s."""
    recipe = TrainConfig(hours=20 / 3600, batch=2, validation_stories=2)
    network, optimizer = fresh(model_config, recipe, prepared.vocabulary)
    trainer = Trainer(network, optimizer, recipe, prepared, tmp_path)
    now = [0.0]

    def slow(network, optimizer, config, tokens, seconds):
        now[0] += 8
        return replace(config, bfloat16=False, compile=False)

    monkeypatch.setattr(training, "autotune", slow)
    trainer.clock = lambda: now[0] + trainer.progress.step
    rates = []
    left = []

    def record(progress):
        rates.append(progress.lr)
        left.append(progress.seconds_left)

    progress, _ = trainer.run(record)
    assert progress.step == 12
    assert progress.seconds["prepare"] == 8
    assert 3 < left[2] < 10  # after 3 of 12 steps, what preparing took must not be counted on
    assert rates[1:6] == [recipe.lr] * 5
    assert rates[-1] == 0
    assert rates[6:] == sorted(rates[6:], reverse=True)
