import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_same_run, interrupt_at, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashlm_helpers import fastpath, optimization
from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.evaluation import encode_stories, evaluate, token_nats
from flashlm_helpers.fastpath import choose_batch, compile_model, decide, measure_batches
from flashlm_helpers.model import FlashLM, causal_convolution
from flashlm_helpers.optimization import accumulate_gradient, make_optimizer, optimizer_step
from flashlm_helpers.training import Trainer, train
from flashlm_helpers.vocab import PAD

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, fastpath.COMPILERS)), reason="no C++ compiler")
spec = importlib.util.spec_from_file_location("plain", Path(__file__).parent.parent / "benchmarks" / "plain.py")
plain = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plain)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() <= tolerance * theirs[name].norm(), name


@pytest.fixture
def batch(prepared):
    inputs, targets = prepared[1].batch(0, 8, 32, 42)
    targets = targets.clone()
    targets[1, 5:] = PAD  # rows of a batch need not count alike
    targets[4] = PAD
    return inputs, targets


@pytest.fixture
def model(model_config):
    torch.manual_seed(3)
    model = FlashLM(model_config)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


# The same model, computed in other ways


@settings(deadline=None)  # the first convolution of a shape is slow
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31))
def test_the_convolution_and_its_gradients_equal_conv1d(batch, time, width, kernel_size, seed):
    draw = torch.Generator().manual_seed(seed)
    past = torch.randn(batch, kernel_size - 1, width, dtype=torch.float64, generator=draw)
    results = []
    for ours in (True, False):
        draw.manual_seed(seed)
        value, taps, weight = (torch.randn(*shape, dtype=torch.float64, generator=draw) for shape in (
            (batch, time, width), (kernel_size, width), (batch, time, width)))
        value.requires_grad_()
        taps.requires_grad_()
        window = torch.cat([past, value], dim=1)
        if ours:
            mixed, state = causal_convolution(value, past, taps)
        else:
            mixed = F.conv1d(window.transpose(1, 2), taps.T.unsqueeze(1), groups=width).transpose(1, 2)
            state = window[:, time:]
        (mixed * weight).sum().backward()
        results.append((mixed.detach(), state.detach(), value.grad, taps.grad))
    torch.testing.assert_close(*results)


def test_the_plain_reference_computes_the_same_model(model, batch):
    inputs, targets = batch
    reference = plain.PlainFlashLM(model.config)
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(inputs), reference(inputs), rtol=1e-4, atol=1e-5)
    losses = [accumulate_gradient(m, inputs, targets, bfloat16=False) for m in (model, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close(gradients(model), gradients(reference), 1e-4)


def test_plain_and_fast_steps_keep_the_same_weights(model, batch):
    config = TrainConfig(epochs=1, lr=1e-3, optimizer="adamw", bfloat16=False)
    reference = plain.PlainFlashLM(model.config)
    reference.load_state_dict(model.state_dict())
    for m, optimizer in ((model, make_optimizer(model, config)), (reference, plain.plain_optimizer(reference, config))):
        for _ in range(3):
            optimizer_step(m, optimizer, *batch, config)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, reference.state_dict()[name], rtol=1e-3, atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("bfloat16, tolerance", [(False, 1e-4), (True, 0.05)])
def test_a_compiled_model_learns_and_scores_as_an_eager_one(model, batch, prepared, stories, bfloat16, tolerance):
    inputs, targets = batch
    eager = copy.deepcopy(model)
    assert compile_model(model, bfloat16) is None
    assert model.compiled and all(block._compiled_call_impl for block in model.blocks)
    losses = [accumulate_gradient(m, inputs, targets, bfloat16) for m in (model, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if not bfloat16 else 5e-3)
    assert_close(gradients(model), gradients(eager), tolerance)
    scores = [evaluate(m, prepared[0], stories[:40], bfloat16).nats_per_token for m in (model, eager)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5 if not bfloat16 else 5e-3)
    assert copy.deepcopy(model).state_dict().keys() == eager.state_dict().keys()


@pytest.mark.parametrize("parts", [1, 3, 5, 8])
def test_microbatches_add_up_to_the_batch(model, batch, monkeypatch, parts):
    whole = copy.deepcopy(model)
    expected = accumulate_gradient(whole, *batch, bfloat16=False)
    monkeypatch.setattr(optimization, "MICROBATCH_TOKENS", 32 * parts)
    optimization.microbatch.cache_clear()
    assert accumulate_gradient(model, *batch, bfloat16=False) == pytest.approx(expected, rel=1e-5)
    assert_close(gradients(model), gradients(whole), 1e-5)


def test_little_memory_makes_small_microbatches_and_too_little_is_refused(model_config, monkeypatch):
    optimization.microbatch.cache_clear()
    usable = 2 * optimization.step_memory(model_config, 3)
    monkeypatch.setattr(optimization, "usable_memory", lambda: usable)
    assert optimization.microbatch(model_config) == 3
    optimization.microbatch.cache_clear()
    monkeypatch.setattr(optimization, "usable_memory", lambda: 10**6)
    with pytest.raises(FlashLMError, match="GiB are usable"):
        optimization.microbatch(model_config)


def test_scores_do_not_depend_on_which_stories_stand_beside(model, vocabulary, stories):
    sequences = encode_stories(vocabulary, [story[: 37 * i + 5] for i, story in enumerate(stories[:70])])
    together = token_nats(model, sequences, bfloat16=False)
    for i in (0, 1, 31, 32, 33, 69):
        alone = token_nats(model, [sequences[i]], bfloat16=False)[0]
        np.testing.assert_allclose(together[i], alone, rtol=1e-4, atol=1e-5)


def test_scores_in_bfloat16_are_close(prepared, model_config, stories, tmp_path):
    result = train(model_config, TrainConfig(epochs=4, batch=4, lr=1e-2, validation_stories=5), *prepared, tmp_path,
                   on_step=quiet)
    exact, rounded = (evaluate(result.model, prepared[0], stories[100:], bfloat16) for bfloat16 in (False, True))
    assert exact.nats_per_token != rounded.nats_per_token
    assert rounded.nats_per_token == pytest.approx(exact.nats_per_token, rel=1e-3)


# What is decided


@pytest.fixture
def eager_only(monkeypatch):
    monkeypatch.setattr(fastpath, "compile_model", lambda model, bfloat16: "not in this test")


@pytest.mark.parametrize("config, seconds, batch", [
    (TrainConfig(hours=1), 3600, 16), (TrainConfig(hours=1), 600, 8), (TrainConfig(hours=1), 60, 8),
    (TrainConfig(epochs=9), 3600, 8), (TrainConfig(hours=1, batch=5), 3600, 5),
    (TrainConfig(hours=1, epochs=1), 3600, 8)])
def test_the_batch_is_measured_when_there_is_time_and_none_is_given(
        model, prepared, monkeypatch, eager_only, config, seconds, batch):
    speeds = {8: 15.0, 16: 19.0}
    monkeypatch.setattr(fastpath, "measure_batches", lambda step, batches, limit: step(2) and speeds)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    decided = decide(model, config, prepared[1], seconds)
    assert decided.batch == batch and decided.compile is False and decided.bfloat16 is not None
    assert all(torch.equal(before[0][name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


@given(st.dictionaries(st.integers(1, 64), st.floats(1, 1e6), min_size=1), st.floats(1, 1e5))
def test_the_chosen_batch_is_fast_enough_and_leaves_enough_steps(speeds, seconds):
    chosen = choose_batch(speeds, seconds)
    fast = {batch for batch, speed in speeds.items() if speed >= fastpath.FAST_ENOUGH * max(speeds.values())}
    fitting = {batch for batch in fast if speeds[batch] * seconds >= batch * fastpath.ENOUGH_STEPS}
    assert chosen in fast
    assert chosen == (max(fitting) if fitting else min(fast))


def test_batches_are_timed_without_their_first_turn():
    now, calls = [0.0], []

    def step(batch):
        calls.append(batch)
        now[0] += 100 if calls.count(batch) == 1 else 1 + batch / 8

    speeds = measure_batches(step, (4, 8, 16), limit=2200, clock=lambda: now[0])  # 100 s x 3 turns x 28 / 4 = 2100
    assert speeds == pytest.approx({batch: batch / (1 + batch / 8) for batch in (4, 8, 16)})
    assert calls[:5] == [4, 4, 8, 16, 4]
    calls.clear()
    assert measure_batches(step, (4, 8, 16), limit=2000, clock=lambda: now[0]) == {} and calls == [4]


def test_without_a_compiler_one_line_says_what_one_would_bring(model, prepared, monkeypatch, capsys):
    monkeypatch.setattr(fastpath.shutil, "which", lambda name: None)
    decided = decide(model, TrainConfig(epochs=1, compile=True), prepared[1], 3600)
    assert decided.compile is False and not model.compiled
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "C++ compiler" in message


def test_the_decision_has_a_line_of_its_own(prepared, model_config, train_config, tmp_path, capsys):
    train(model_config, train_config, *prepared, tmp_path)
    first, *_ = capsys.readouterr().err.splitlines()
    assert "float" in first and "eager" in first and "batch 8" in first and "%" not in first


def test_a_compiler_that_fails_leaves_the_model_eager(model, batch, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError(f"C++ compile error\nCommand:\ng++ {'-I x ' * 500}\nOutput:\n"
                           "x.cpp:1:2: fatal error: Python.h: No such file\ncompilation terminated.")

    monkeypatch.setattr(FlashLM, "compile", lambda self: setattr(self, "loss", broken))
    monkeypatch.setattr(fastpath.shutil, "which", lambda name: "/usr/bin/g++")
    reason = compile_model(model, bfloat16=False)
    assert reason == "torch.compile failed: Python.h: No such file"
    assert not model.compiled and accumulate_gradient(model, *batch, bfloat16=False) > 0


def test_one_long_story_among_short_ones_costs_no_more_than_its_length(model, vocabulary, stories, monkeypatch):
    positions, hidden = [], FlashLM.hidden
    monkeypatch.setattr(FlashLM, "hidden", lambda self, ids, past: positions.append(ids.numel()) or hidden(
        self, ids, past))
    sequences = encode_stories(vocabulary, [" ".join(stories), *stories[:31]])
    together = token_nats(model, sequences, bfloat16=False)
    assert sum(positions) < 2 * sum(map(len, sequences))
    positions.clear()
    token_nats(model, sequences[1:], bfloat16=False)
    assert sum(positions) < 1.5 * sum(map(len, sequences[1:]))
    np.testing.assert_allclose(together[0], token_nats(model, sequences[:1], bfloat16=False)[0], rtol=1e-4, atol=1e-5)
    assert token_nats(model, []) == []


def test_a_run_extended_to_another_budget_is_decided_anew(prepared, model_config, tmp_path):
    config = TrainConfig(epochs=0.05, validation_stories=2)
    train(model_config, config, *prepared, tmp_path, on_step=quiet)
    stopped = load_checkpoint(tmp_path, LAST)
    stopped["train_config"] = replace(stopped["train_config"], batch=5, compile=False, bfloat16=False)
    for epochs, expected in ((0.05, (5, False, False)), (3, (5, None, None))):
        trainer = Trainer(model_config, replace(config, epochs=epochs), *prepared, tmp_path)
        with suppress(FlashLMError):
            trainer.restore(stopped)
        assert (trainer.config.batch, trainer.config.compile, trainer.config.bfloat16) == expected


@pytest.mark.parametrize("obstacle", ["a file", "a space"])
def test_programs_are_kept_elsewhere_where_they_cannot_be_in_data(tmp_path, monkeypatch, obstacle):
    home = tmp_path / ("home" if obstacle == "a file" else "my home")
    (home / "data").mkdir(parents=True)
    if obstacle == "a file":
        (home / "data" / "compiled").write_text("")
    monkeypatch.setenv("FLASHLM_HOME", str(home))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    fastpath.keep_programs()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path / "free"))
    fastpath.keep_programs()
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(tmp_path / "free" / "data" / "compiled")


@needs_compiler
@pytest.mark.parametrize("architecture, dropout, optimizer", [
    ("model_config", 0.0, "adamw"), ("hybrid_config", 0.1, "muon")])
def test_a_compiled_run_records_its_way_and_resumes_bit_for_bit(
        prepared, architecture, dropout, optimizer, tmp_path, request, few_candidates):
    model_config = request.getfixturevalue(architecture)
    config = TrainConfig(epochs=0.11, validation_stories=5, compile=True, dropout=dropout, optimizer=optimizer)
    whole = train(model_config, config, *prepared, tmp_path / "whole", on_step=quiet)
    recorded = whole.report["config"]["training"]
    assert recorded["compile"] is True and recorded["batch"] == 8 and recorded["bfloat16"] in (True, False)
    assert whole.report["seconds_by_activity"]["prepare"] > 0
    train(model_config, config, *prepared, tmp_path / "half", on_step=interrupt_at(5))
    half = load_checkpoint(tmp_path / "half", LAST)
    assert half["train_config"] == replace(config, batch=8, bfloat16=recorded["bfloat16"])
    trainer = Trainer(model_config, replace(config, compile=None), *prepared, tmp_path / "half")
    trainer.restore(half)
    trainer.run(quiet)
    assert trainer.model.compiled
    half = load_checkpoint(tmp_path / "half", LAST)
    assert_same_run(load_checkpoint(tmp_path / "whole", LAST), half)


def test_preparing_takes_nothing_from_the_schedule(prepared, model_config, tmp_path, monkeypatch):
    """A budget of 20 s of which 8 go into preparing: the rate still rises, stays and falls, over 12 steps of 1 s."""
    trainer = Trainer(model_config, TrainConfig(hours=20 / 3600, batch=2, validation_stories=2), *prepared, tmp_path)
    now = [0.0]

    def slow_decide(model, config, tokens, seconds):
        now[0] += 8
        return replace(config, bfloat16=False, compile=False)

    monkeypatch.setattr("flashlm_helpers.training.decide", slow_decide)
    trainer.clock = lambda: now[0] + trainer.progress.step
    rates, left = [], []
    result = trainer.run(lambda p: (rates.append(p.lr), left.append(p.seconds_left)))
    assert result.report["steps"] == 12 and result.report["seconds_by_activity"]["prepare"] == 8
    peak = trainer.config.lr
    assert 3 < left[2] < 10  # after 3 of 12 steps, what preparing took must not be counted on
    assert rates[1:6] == [peak] * 5 and rates[-1] == 0 and rates[6:] == sorted(rates[6:], reverse=True)


FAULTS = """
import resource, torch
from flashlm_helpers.hardware import keep_freed_memory
torch.set_num_threads(1)
keep_freed_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        a, b = torch.ones(12_000_000), torch.ones(9_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(20))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_asking_the_system():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000  # twenty turns of 84 MB are 410,000 pages
