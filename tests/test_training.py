import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_run, interrupt_at, quiet
from hypothesis import given
from hypothesis import strategies as st

from flashlm_helpers import files, optimization, training
from flashlm_helpers.checkpoint import BEST, LAST, load_checkpoint, load_model, save_checkpoint
from flashlm_helpers.config import PRESETS, FlashLMError, TrainConfig
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.head import draw_candidates
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import make_optimizer
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.schedule import learning_rate
from flashlm_helpers.training import NON_FINITE_STEPS, Trainer, train
from flashlm_helpers.vocab import Vocabulary

# Schedule


@given(st.floats(0.001, 0.4), st.floats(0.001, 0.6), st.floats(0, 0.5), st.floats(1e-5, 1))
def test_the_learning_rate_rises_stays_and_falls_to_its_floor(warmup, decay, floor, peak):
    rates = [learning_rate(i / 1000, peak, warmup, decay, floor) for i in range(1001)]
    assert rates[0] == 0 and rates[-1] == pytest.approx(peak * floor)
    top = rates.index(max(rates))
    assert max(rates) <= peak * (1 + 1e-9)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate((warmup + 1 - decay) / 2, peak, warmup, decay, floor) == peak
    steepest = peak / min(warmup, decay) / 1000
    assert all(abs(b - a) <= steepest * 1.001 for a, b in zip(rates, rates[1:], strict=False))


def test_nothing_but_ternary_weights_is_decayed(model_config):
    model = FlashLM(model_config)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in
                     make_optimizer(model, TrainConfig(hours=1)).param_groups)
    assert all("project" in name or "glu.gate" in name or "glu.up" in name or "glu.down" in name for name in decayed)
    assert {n.split(".")[-1] if "taps" in n else n.split(".")[-2] for n in free} == {
        "embedding", "norm", "mixer_norm", "glu_norm", "taps"}
    assert len(decayed) + len(free) == len(names)


# A run


@pytest.fixture
def whole_run(prepared, model_config, train_config, tmp_path, few_candidates):
    assert draw_candidates(prepared[1].batch(0, train_config.batch or 8, 32, 0)[1].flatten(), len(prepared[0]))
    train(model_config, train_config, *prepared, tmp_path / "whole", on_step=quiet)
    return load_checkpoint(tmp_path / "whole", LAST)


def test_training_learns_and_leaves_a_full_report(prepared, model_config, tmp_path):
    config = TrainConfig(epochs=3, batch=4, lr=1e-2, validation_stories=5)
    result = train(model_config, config, *prepared, tmp_path, on_step=quiet)
    uniform = math.log(len(prepared[0]))
    assert result.history["train"][0]["nats_per_token"] == pytest.approx(uniform, abs=0.2)
    assert result.report["val_nats_per_token"] < uniform - 1.5
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert {"tokens_per_second", "tokens_seen", "seconds", "val_nats_per_token", "train_nats_per_token", "bpc", "bpb",
            "config", "hardware", "steps", "peak_memory_bytes"} <= report.keys()
    assert report["tokens_seen"] == 3 * (prepared[1].n_tokens - 1)
    assert result.history["train"][-1]["lr"] == 0
    assert sum(report["seconds_by_activity"].values()) == pytest.approx(report["seconds"], rel=0.05)
    stories = [prepared[0].decode(ids) for ids in prepared[2].sample_stories(5)]
    model, vocabulary = load_model(tmp_path)
    assert evaluate(model, vocabulary, stories).nats_per_token == pytest.approx(report["val_nats_per_token"], abs=1e-6)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
        prepared, model_config, train_config, tmp_path, whole_run, stop):
    stopped = train(model_config, train_config, *prepared, tmp_path / "half", on_step=interrupt_at(stop))
    assert stopped.stopped_by == "interrupt" and stopped.report["steps"] == stop + 1
    assert stopped.history["valid"]
    torch.randn(100)  # the random state must come from the checkpoint
    half = load_checkpoint(tmp_path / "half", LAST)
    result = train(half["model_config"], half["train_config"], *prepared, tmp_path / "half", resume=half, on_step=quiet)
    assert result.stopped_by == "budget"
    assert_same_run(whole_run, load_checkpoint(tmp_path / "half", LAST))


def test_a_run_saved_before_there_was_muon_goes_on_with_adamw(prepared, model_config, train_config, tmp_path):
    config = replace(train_config, optimizer="adamw", sampled_softmax=False)
    train(model_config, config, *prepared, tmp_path / "whole", on_step=quiet)
    train(model_config, config, *prepared, tmp_path / "half", on_step=interrupt_at(4))
    path = tmp_path / "half" / LAST
    saved = torch.load(path, weights_only=True)
    for field in ("optimizer", "dropout", "sampled_softmax"):
        del saved["train_config"][field]
    saved["optimizer"] = saved["optimizer"][0]
    torch.save(saved, path)
    half = load_checkpoint(path)
    train(half["model_config"], half["train_config"], *prepared, tmp_path / "half", resume=half, on_step=quiet)
    assert_same_run(load_checkpoint(tmp_path / "whole", LAST), load_checkpoint(path))


def test_muon_moves_the_ternary_weights_and_adamw_the_rest(model_config):
    model = FlashLM(model_config)
    muon, adamw = make_optimizer(model, TrainConfig(epochs=1, weight_decay=0.3, optimizer="muon")).parts
    names = {parameter: name for name, parameter in model.named_parameters()}
    moved = {names[p] for group in muon.param_groups for p in group["params"]}
    assert moved == {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, BitLinear)}
    assert moved.isdisjoint(names[p] for group in adamw.param_groups for p in group["params"])
    assert len(names) == sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups)
    assert [g["weight_decay"] for o in (muon, adamw) for g in o.param_groups] == [0.3, 0.0]


def test_a_run_resumed_to_a_larger_budget_validates_saves_and_records_on_its_way(
        prepared, model_config, tmp_path, whole_run):
    config = replace(whole_run["train_config"], epochs=40 * whole_run["train_config"].epochs)
    steps, saved = whole_run["progress"]["step"], []
    result = train(model_config, config, *prepared, tmp_path / "whole", resume=whole_run,
                   on_step=lambda p: saved.append(load_checkpoint(tmp_path / "whole", LAST)["progress"]["step"]))
    assert result.report["steps"] > 30 * steps
    for name in ("train", "valid"):
        between = [row["step"] for row in result.history[name] if steps < row["step"] < result.report["steps"]]
        assert between and min(between) < result.report["steps"] / 2
    assert any(steps < step < result.report["steps"] for step in saved)


def test_a_timed_run_resumes_bit_for_bit_too(prepared, model_config, tmp_path):
    config = TrainConfig(hours=20 / 3600, batch=4, validation_stories=3)

    def run(folder, resume=None, on_step=quiet):
        trainer = Trainer(model_config, config, *prepared, folder)
        trainer.clock = lambda: float(trainer.progress.step)  # each step takes a second, everything else nothing
        if resume:
            trainer.restore(resume)
        return trainer.run(on_step)

    whole = run(tmp_path / "whole")
    assert whole.report["steps"] == 20 and whole.report["seconds"] == 20
    run(tmp_path / "half", on_step=interrupt_at(12))
    run(tmp_path / "half", resume=load_checkpoint(tmp_path / "half", LAST))
    assert_same_run(load_checkpoint(tmp_path / "whole", LAST), load_checkpoint(tmp_path / "half", LAST))


def test_a_timed_run_ends_on_time_with_its_rate_at_the_floor(prepared, model_config, tmp_path):
    start = time.monotonic()
    result = train(model_config, TrainConfig(hours=3 / 3600, batch=2, validation_stories=2), *prepared, tmp_path,
                   on_step=quiet)
    assert 2.5 < time.monotonic() - start < 8
    assert result.stopped_by == "budget" and result.history["train"][-1]["lr"] < 0.01 * result.report["config"][
        "training"]["lr"]


def test_patience_ends_a_run_that_no_longer_improves(prepared, model_config, monkeypatch, tmp_path):
    real = evaluate
    worse = iter(range(1, 100))
    monkeypatch.setattr(training, "evaluate", lambda *a: replace(real(*a), nats_per_token=float(next(worse))))
    config = TrainConfig(epochs=30, batch=8, patience=3, validation_stories=2)
    result = train(model_config, config, *prepared, tmp_path, on_step=quiet)
    assert result.stopped_by == "patience" and len(result.history["valid"]) == 4
    assert result.report["val_nats_per_token"] == 1.0
    assert load_checkpoint(tmp_path, BEST)["progress"]["step"] == result.history["valid"][0]["step"]


def test_non_finite_steps_are_skipped_and_change_nothing(prepared, model_config, train_config, monkeypatch, tmp_path):
    trainer = Trainer(model_config, train_config, *prepared, tmp_path)
    loss, bad = trainer.model.loss, {2: math.nan, 3: math.inf}
    monkeypatch.setattr(trainer.model, "loss", lambda *a, **k: loss(*a, **k) * bad.get(trainer.progress.step, 1.0))
    weights = {}
    result = trainer.run(lambda p: weights.update({p.step: trainer.model.embedding.weight.detach().clone()}))
    assert result.report["skipped_steps"] == 2 and result.stopped_by == "budget"
    assert torch.equal(weights[2], weights[4]) and not torch.equal(weights[4], weights[5])
    assert all(math.isfinite(row["nats_per_token"]) for row in result.history["train"])


def test_a_non_finite_gradient_is_skipped_as_well(prepared, model_config, train_config, tmp_path):
    trainer = Trainer(model_config, train_config, *prepared, tmp_path)
    trainer.model.norm.weight.register_hook(lambda g: g * (math.inf if trainer.progress.step == 2 else 1))
    result = trainer.run(quiet)
    assert result.report["skipped_steps"] == 1
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_a_loss_that_stays_non_finite_stops_the_run_in_one_line(prepared, model_config, monkeypatch, tmp_path):
    trainer = Trainer(model_config, TrainConfig(epochs=9), *prepared, tmp_path)
    monkeypatch.setattr(trainer.model, "loss", lambda *a, **k: torch.tensor(math.nan, requires_grad=True))
    with pytest.raises(FlashLMError, match="smaller --lr") as caught:
        trainer.run(quiet)
    assert "\n" not in str(caught.value) and trainer.progress.step == NON_FINITE_STEPS
    assert load_checkpoint(tmp_path, LAST)["progress"]["step"] == NON_FINITE_STEPS


def test_a_model_that_cannot_fit_is_refused_before_anything_starts(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(optimization, "usable_memory", lambda: 10**8)
    with pytest.raises(FlashLMError, match="GiB are usable"):
        train(PRESETS["v4-large"], TrainConfig(hours=1), *prepared, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_random_state_is_restored_and_the_seed_decides_the_first_weights(
        prepared, model_config, train_config, tmp_path, whole_run):
    trainer = Trainer(model_config, train_config, *prepared, tmp_path / "other")
    torch.manual_seed(train_config.seed)
    first = FlashLM(model_config)
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), first.parameters(), strict=True))
    state = torch.Generator().manual_seed(123).get_state()
    progress = whole_run["progress"] | {"step": 3}
    trainer.restore(whole_run | {"random_state": state, "progress": progress})
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_of_another_vocabulary_are_refused(prepared, model_config, train_config, tmp_path):
    other = Vocabulary.build(["other words entirely"], 300)
    with pytest.raises(FlashLMError, match="another vocabulary"):
        train(model_config, train_config, other, *prepared[1:], tmp_path, on_step=quiet)


def test_signal_handlers_are_put_back(prepared, model_config, train_config, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(model_config, train_config, *prepared, tmp_path, on_step=interrupt_at(2))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# Checkpoints


def test_resuming_refuses_another_model_vocabulary_or_file(prepared, model_config, train_config, tmp_path, whole_run):
    trainer = Trainer(replace(model_config, width=20), train_config, *prepared, tmp_path / "other")
    with pytest.raises(FlashLMError, match="another shape"):
        trainer.restore(whole_run)
    other = Vocabulary.build(["other words entirely"], 300)
    trainer = Trainer(model_config, train_config, *prepared, tmp_path / "other")
    with pytest.raises(FlashLMError, match="another vocabulary"):
        trainer.restore(whole_run | {"vocabulary": other})
    with pytest.raises(FlashLMError, match="no optimizer state"):
        trainer.restore(load_checkpoint(tmp_path / "whole", BEST))
    with pytest.raises(FlashLMError, match="larger --hours or --epochs"):
        trainer.restore(whole_run)
    with pytest.raises(FlashLMError, match="another vocabulary"):
        load_model(tmp_path / "whole", other)


def test_damaged_and_foreign_checkpoints_are_one_clear_line(tmp_path, whole_run):
    path, whole = tmp_path / "x.pt", (tmp_path / "whole" / BEST).read_bytes()
    draw = random.Random(0)
    damaged = [b"", b"PK", whole[: len(whole) // 2], whole[:-1], os.urandom(1000)]
    for _ in range(5):
        place = draw.randrange(len(whole) // 2)
        damaged.append(whole[:place] + bytes(64) + whole[place + 32 :])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(FlashLMError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    torch.save({"format": "flashlm-checkpoint-1"}, path)
    with pytest.raises(FlashLMError, match="earlier version"):
        load_checkpoint(path)
    for foreign in ({"weights": torch.ones(2)}, [1, 2], torch.ones(3), {"format": "flashlm-checkpoint-2"}):
        torch.save(foreign, path)
        with pytest.raises(FlashLMError):
            load_checkpoint(path)
    with pytest.raises(FlashLMError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_loading_runs_no_code_from_the_file(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"format": "flashlm-checkpoint-2", "model": Attack()}, tmp_path / "x.pt")
    with pytest.raises(FlashLMError):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "attacked").exists()


KILLED = """
import os, signal, sys
from flashlm_helpers import checkpoint, files
from flashlm_helpers.config import TrainConfig
content = checkpoint.load_checkpoint(sys.argv[1])
def save(step):
    checkpoint.save_checkpoint(sys.argv[1], content["model"], content["train_config"], content["vocabulary"],
                               progress={"step": step})
if sys.argv[2] == "fsync":  # die with the file complete but not yet in its place
    files.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
print("saving", flush=True)
for step in range(100_000):
    save(step)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["fsync", "any", "any", "any"])
def test_a_kill_during_saving_leaves_a_loadable_checkpoint(tmp_path, vocabulary, model_config, moment):
    path = tmp_path / "run" / LAST
    save_checkpoint(path, FlashLM(model_config), TrainConfig(hours=1), vocabulary, progress={"step": -1})
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), moment], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    if moment == "any":
        time.sleep(random.uniform(0.05, 0.5))
        process.kill()
    assert process.wait() == -signal.SIGKILL
    step = load_checkpoint(path)["progress"]["step"]
    assert step == -1 if moment == "fsync" else step >= 0


def test_a_file_is_replaced_in_one_move_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, fail)
            with pytest.raises(FlashLMError, match="No space left"), files.atomic_write(path) as file:
                file.write(b"new")
        assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with files.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, vocabulary, model_config):
    (tmp_path / "file").touch()
    with pytest.raises(FlashLMError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / LAST, FlashLM(model_config), TrainConfig(hours=1), vocabulary)
