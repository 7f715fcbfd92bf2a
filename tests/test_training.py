import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same_run, fresh, interrupt_at, quiet, run_training, timeless
from hypothesis import given
from hypothesis import strategies as st

from flashlm_helpers import optimization, training
from flashlm_helpers.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    Progress,
    load_checkpoint,
    save_checkpoint,
)
from flashlm_helpers.config import PRESETS, FlashLMError, TrainConfig
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.generation import generate
from flashlm_helpers.loss import sample_negatives
from flashlm_helpers.machine import files, threads
from flashlm_helpers.machine.threads import FOLLOWER
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer, learning_rate
from flashlm_helpers.runtime.compact import save_compact
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.training import NON_FINITE_STEPS, StopReason, Trainer
from flashlm_helpers.vocab import Vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- the recipe ----


@given(st.floats(0.001, 0.4), st.floats(0.001, 0.6), st.floats(0, 0.5), st.floats(1e-5, 1))
def test_the_learning_rate_rises_stays_and_falls_to_its_floor(warmup, decay, floor, peak):
    rates = [learning_rate(i / 1000, peak, warmup, decay, floor) for i in range(1001)]
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(peak * floor)
    top = rates.index(max(rates))
    assert max(rates) <= peak * (1 + 1e-9)
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert learning_rate((warmup + 1 - decay) / 2, peak, warmup, decay, floor) == peak
    steepest = peak / min(warmup, decay) / 1000
    for before, after in zip(rates, rates[1:], strict=False):
        assert abs(after - before) <= steepest * 1.001


def test_nothing_but_ternary_weights_is_decayed(model_config):
    network = FlashLM(replace(model_config, layer_scale=True))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(network, TrainConfig(hours=1, weight_decay=0.3))
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)

    ternary = ("project_in", "project_out", "glu.gate", "glu.up", "glu.down")
    for parameter in decayed["params"]:
        assert any(part in names[id(parameter)] for part in ternary)
    kinds = set()
    for parameter in others["params"]:
        name = names[id(parameter)].removesuffix(".weight")
        kinds.add(name.split(".")[-1])
    assert kinds == {"embedding", "norm", "mixer_norm", "glu_norm", "taps", "layer_scale"}
    assert len(decayed["params"]) + len(others["params"]) == len(names)


# ---- a run ----


@pytest.fixture
def often(monkeypatch):
    """Validate in the middle of the shortest run, too: here about every third step."""
    monkeypatch.setattr(training, "MAX_TOKEN_SHARE", 2.0)


@pytest.fixture
def whole_run(prepared, model_config, train_config, tmp_path, few_candidates, often):
    _, targets = prepared.train.batch(0, train_config.batch, 32, 0)
    assert sample_negatives(targets.flatten(), len(prepared.vocabulary))
    run_training(model_config, train_config, prepared, tmp_path / "whole")
    checkpoint = load_checkpoint(tmp_path / "whole", LAST)
    assert len(checkpoint.progress.history.valid) > 2
    return checkpoint


@pytest.fixture
def make_trainer(prepared, model_config, tmp_path):
    """Make a Trainer of a recipe, in a folder of its own."""

    def make(recipe, folder="other", config=model_config, text=prepared, **arguments):
        network, optimizer = fresh(config, recipe, text.vocabulary)
        return Trainer(network, optimizer, recipe, text, tmp_path / folder, **arguments)

    return make


def resume(checkpoint, text, folder, **arguments):
    """Go on from a checkpoint with its own recipe, in a fresh network."""
    config = checkpoint.network.config
    recipe = checkpoint.train_config
    return run_training(config, recipe, text, folder, resume=checkpoint, **arguments)


def test_training_learns_and_leaves_a_full_report(prepared, text_dir, model_config, tmp_path, home):
    recipe = TrainConfig(epochs=3, batch=4, lr=1e-2, validation_stories=5)
    limited = replace(model_config, vocabulary_size=1_000)
    report = Experiment(text_dir, limited, recipe).run(tmp_path / "run", on_step=quiet)

    uniform = math.log(len(prepared.vocabulary))
    trained = report.history.train
    assert trained[0].nats_per_token == pytest.approx(uniform, abs=0.2)
    assert report.val_nats_per_token < uniform - 1.5
    assert trained[-1].lr == 0
    assert report.stopped_by == StopReason.BUDGET
    assert report.tokens_seen == 3 * (prepared.train.n_tokens - 1)
    assert sum(report.seconds_by_activity.values()) == pytest.approx(report.seconds, rel=0.05)
    assert report.peak_memory_bytes > 10**8
    assert report.source == TextSource(None, str(text_dir), None)

    # The same as a file.
    written = json.loads((tmp_path / "run" / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert written.keys() >= {
        "tokens_per_second",
        "tokens_seen",
        "seconds",
        "val_nats_per_token",
        "train_nats_per_token",
        "bpc",
        "bpb",
        "config",
        "hardware",
        "steps",
        "peak_memory_bytes",
    }
    assert written["config"]["model"]["mixers"] == ["conv"]
    assert written["config"]["training"]["batch"] == 4
    assert written["stopped_by"] == "budget"

    # What is best scores as it did when it was validated.
    best = load_checkpoint(tmp_path / "run")
    for model in (PyTorchModel(best.network.eval(), best.vocabulary), report.model):
        score = evaluate(model, prepared.held_out(5))
        assert score.nats_per_token == pytest.approx(report.val_nats_per_token, abs=1e-6)
    assert best.source == report.source
    assert best.progress.step == report.best_step


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    prepared, model_config, train_config, tmp_path, whole_run, stop
):
    folder = tmp_path / "half"
    _, progress, stopped_by = run_training(
        model_config, train_config, prepared, folder, on_step=interrupt_at(stop)
    )
    assert stopped_by == StopReason.INTERRUPT
    assert progress.step == stop + 1
    assert progress.history.valid

    torch.randn(100)  # the random state must come from the checkpoint
    _, _, stopped_by = resume(load_checkpoint(folder, LAST), prepared, folder)
    assert stopped_by == StopReason.BUDGET
    assert_same_run(whole_run, load_checkpoint(folder, LAST))


def test_a_checkpoint_can_be_resumed_from_twice(
    prepared, model_config, train_config, tmp_path, whole_run
):
    folder = tmp_path / "half"
    run_training(model_config, train_config, prepared, folder, on_step=interrupt_at(4))
    half = load_checkpoint(folder, LAST)
    before = copy.deepcopy(half)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / BEST).write_bytes((folder / BEST).read_bytes())
        resume(half, prepared, tmp_path / name)
        assert_same_run(whole_run, load_checkpoint(tmp_path / name, LAST))
    assert_same_run(before, half)


def test_an_experiment_is_the_same_run_and_resumes_from_its_folder(
    text_dir, model_config, train_config, tmp_path, whole_run, home
):
    experiment = Experiment(text_dir, replace(model_config, vocabulary_size=1_000), train_config)
    stopped = experiment.run(tmp_path / "half", on_step=interrupt_at(5))
    assert stopped.stopped_by == StopReason.INTERRUPT
    report = experiment.run(tmp_path / "half", resume=tmp_path / "half", on_step=quiet)
    assert report.stopped_by == StopReason.BUDGET
    assert_same_run(whole_run, load_checkpoint(tmp_path / "half", LAST))


def test_a_run_resumed_elsewhere_sets_its_mark_anew(prepared, model_config, train_config, tmp_path):
    run_training(model_config, train_config, prepared, tmp_path / "half", on_step=interrupt_at(5))
    half = load_checkpoint(tmp_path / "half", LAST)
    half.progress.best = replace(evaluate_nothing(prepared), nats_per_token=0.0)
    _, progress, _ = resume(half, prepared, tmp_path / "elsewhere")
    assert progress.best.nats_per_token > 1
    assert load_checkpoint(tmp_path / "elsewhere").progress.step == progress.best_step


def evaluate_nothing(text):
    torch.manual_seed(0)
    network = FlashLM(replace(PRESETS["tiny"], vocabulary_size=len(text.vocabulary)))
    return evaluate(PyTorchModel(network, text.vocabulary), text.held_out(1))


def test_a_run_resumed_to_a_larger_budget_validates_saves_and_records_on_its_way(
    prepared, model_config, tmp_path, whole_run
):
    before = whole_run.train_config
    recipe = replace(before, epochs=40 * before.epochs)
    folder = tmp_path / "whole"
    steps = whole_run.progress.step
    saved = set()

    def look(progress):
        if progress.step % 20 == 0:
            saved.add(load_checkpoint(folder, LAST).progress.step)

    _, progress, _ = run_training(
        model_config, recipe, prepared, folder, resume=whole_run, on_step=look
    )
    assert progress.step > 30 * steps
    for rows in (progress.history.train, progress.history.valid):
        between = [row.step for row in rows if steps < row.step < progress.step]
        assert between and min(between) < progress.step / 2
    assert any(steps < step < progress.step for step in saved)


def test_a_timed_run_resumes_bit_for_bit_too(prepared, make_trainer, tmp_path):
    recipe = TrainConfig(hours=20 / 3600, batch=4, validation_stories=3)

    def run(folder, resume=None, on_step=quiet):
        trainer = make_trainer(recipe, folder)
        # Each step takes a second, everything else nothing.
        trainer.clock = lambda: float(trainer.progress.step)
        if resume:
            trainer.restore(resume)
        return trainer.run(on_step)

    progress, _ = run("whole")
    assert progress.step == 20
    assert progress.elapsed == 20
    run("half", on_step=interrupt_at(12))
    run("half", resume=load_checkpoint(tmp_path / "half", LAST))
    whole = load_checkpoint(tmp_path / "whole", LAST)
    assert_same_run(whole, load_checkpoint(tmp_path / "half", LAST))


def test_a_timed_run_ends_on_time_with_its_rate_at_the_floor(prepared, model_config, tmp_path):
    start = time.monotonic()
    recipe = TrainConfig(hours=3 / 3600, batch=2, validation_stories=2)
    _, progress, stopped_by = run_training(model_config, recipe, prepared, tmp_path)
    assert 2.5 < time.monotonic() - start < 8
    assert stopped_by == StopReason.BUDGET
    assert progress.history.train[-1].lr < 0.01 * recipe.lr


def test_patience_ends_a_run_that_no_longer_improves(prepared, model_config, monkeypatch, tmp_path):
    real = training.bits_report
    worse = iter(range(1, 100))

    def report(*arguments):
        return replace(real(*arguments), nats_per_token=float(next(worse)))

    monkeypatch.setattr(training, "bits_report", report)
    recipe = TrainConfig(epochs=30, batch=8, patience=3, validation_stories=2)
    _, progress, stopped_by = run_training(model_config, recipe, prepared, tmp_path)
    valid = progress.history.valid
    assert stopped_by == StopReason.PATIENCE
    assert len(valid) == 4
    assert progress.best.nats_per_token == 1.0
    assert load_checkpoint(tmp_path, BEST).progress.step == valid[0].step == progress.best_step


# ---- what goes wrong in a run ----


def test_non_finite_steps_are_skipped_and_change_nothing(train_config, monkeypatch, make_trainer):
    trainer = make_trainer(train_config)
    network = trainer.network
    loss = network.loss
    factors = {2: math.nan, 3: math.inf}

    def spoiled(*arguments, **named):
        return loss(*arguments, **named) * factors.get(trainer.progress.step, 1.0)

    monkeypatch.setattr(network, "loss", spoiled)
    weights = {}

    def keep(progress):
        weights[progress.step] = network.embedding.weight.detach().clone()

    progress, stopped_by = trainer.run(keep)
    assert progress.skipped == 2
    assert stopped_by == StopReason.BUDGET
    assert torch.equal(weights[2], weights[4])
    assert not torch.equal(weights[4], weights[5])
    assert all(math.isfinite(row.nats_per_token) for row in progress.history.train)


def test_a_non_finite_gradient_is_skipped_as_well(train_config, make_trainer):
    trainer = make_trainer(train_config)

    def spoil(gradient):
        return gradient * (math.inf if trainer.progress.step == 2 else 1)

    trainer.network.norm.weight.register_hook(spoil)
    progress, _ = trainer.run(quiet)
    assert progress.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.network.parameters())


def test_a_loss_that_stays_non_finite_stops_the_run_in_one_line(
    monkeypatch, make_trainer, tmp_path
):
    trainer = make_trainer(TrainConfig(epochs=9))

    def spoiled(*arguments, **named):
        return torch.tensor(math.nan, requires_grad=True)

    monkeypatch.setattr(trainer.network, "loss", spoiled)
    with pytest.raises(FlashLMError, match="smaller --lr") as caught:
        trainer.run(quiet)
    assert "\n" not in str(caught.value)
    assert trainer.progress.step == NON_FINITE_STEPS
    assert load_checkpoint(tmp_path / "other", LAST).progress.step == NON_FINITE_STEPS


def test_a_model_that_cannot_fit_is_refused_before_anything_starts(prepared, tmp_path, monkeypatch):
    optimization.microbatch_size.cache_clear()
    monkeypatch.setattr(optimization, "usable_memory", lambda: 10**8)
    with pytest.raises(FlashLMError, match="GiB are usable"):
        run_training(PRESETS["v4-large"], TrainConfig(hours=1), prepared, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_seed_decides_the_first_weights_and_the_random_state_is_restored(
    text_dir, model_config, train_config, make_trainer, tmp_path, whole_run, home
):
    # The weights that an experiment starts from: a rate of nearly nothing leaves them.
    recipe = replace(train_config, lr=1e-30)
    limited = replace(model_config, vocabulary_size=1_000)
    Experiment(text_dir, limited, recipe).run(tmp_path / "run", on_step=interrupt_at(1))
    started = load_checkpoint(tmp_path / "run", LAST).network
    torch.manual_seed(train_config.seed)
    first = FlashLM(model_config)
    for one, other in zip(started.parameters(), first.parameters(), strict=True):
        assert torch.equal(one, other)

    state = torch.Generator().manual_seed(123).get_state()
    progress = replace(whole_run.progress, step=3)
    make_trainer(train_config).restore(replace(whole_run, random_state=state, progress=progress))
    assert torch.equal(torch.get_rng_state(), state)


def test_tokens_of_another_vocabulary_are_refused(prepared, model_config, train_config, tmp_path):
    other = prepared._replace(vocabulary=Vocabulary.build(["other words entirely"], 300))
    with pytest.raises(FlashLMError, match="another vocabulary"):
        run_training(model_config, train_config, other, tmp_path)


def test_signal_handlers_are_put_back(prepared, model_config, train_config, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_training(model_config, train_config, prepared, tmp_path, on_step=interrupt_at(2))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# ---- checkpoints ----


def test_resuming_refuses_another_model_vocabulary_or_file(
    prepared, model_config, train_config, make_trainer, tmp_path, whole_run
):
    other = Vocabulary.build(["other words entirely"], 300)
    with pytest.raises(FlashLMError, match="another shape"):
        make_trainer(train_config, config=replace(model_config, width=20)).restore(whole_run)

    trainer = make_trainer(train_config)
    with pytest.raises(FlashLMError, match="another vocabulary"):
        trainer.restore(replace(whole_run, vocabulary=other))
    with pytest.raises(FlashLMError, match="no optimizer state"):
        trainer.restore(load_checkpoint(tmp_path / "whole", BEST))
    with pytest.raises(FlashLMError, match="larger --hours or --epochs"):
        trainer.restore(whole_run)


def test_a_compact_checkpoint_scores_the_same_and_holds_nothing_to_resume(
    prepared, make_trainer, train_config, tmp_path, whole_run
):
    save_compact(tmp_path / "compact.pt", whole_run)
    compact = load_checkpoint(tmp_path / "compact.pt")
    assert compact.network.config == whole_run.network.config
    assert compact.vocabulary.hash == whole_run.vocabulary.hash
    assert timeless(compact.progress) | {"loss": 0} == timeless(Progress()) | {"loss": 0}
    assert (compact.source, compact.optimizer, compact.random_state) == (None, None, None)

    scores = []
    for checkpoint in (compact, whole_run):
        model = PyTorchModel(checkpoint.network, checkpoint.vocabulary, bfloat16=False)
        scores.append(evaluate(model, prepared.held_out(5)).nats_per_token)
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)
    with pytest.raises(FlashLMError, match="no optimizer state"):
        make_trainer(train_config).restore(compact)


def test_damaged_and_foreign_checkpoints_are_one_clear_line(tmp_path, whole_run):
    path = tmp_path / "x.pt"
    whole = (tmp_path / "whole" / BEST).read_bytes()
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

    for name in ("flashlm-checkpoint-1", "flashlm-checkpoint-3"):
        torch.save({"format": name}, path)
        with pytest.raises(FlashLMError, match="not a FlashLM checkpoint of this version"):
            load_checkpoint(path)
    foreign = ({"weights": torch.ones(2)}, [1, 2], torch.ones(3))
    for content in (*foreign, {"format": "flashlm-checkpoint-2"}):
        torch.save(content, path)
        with pytest.raises(FlashLMError) as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FlashLMError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path, whole_run):
    with torch.no_grad():
        whole_run.network.norm.weight[3] = math.nan
    save_checkpoint(tmp_path / "x.pt", whole_run)
    with pytest.raises(FlashLMError, match="not finite"):
        load_checkpoint(tmp_path / "x.pt")


def test_loading_runs_no_code_from_the_file(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"format": "flashlm-checkpoint-2", "model": Attack()}, tmp_path / "x.pt")
    with pytest.raises(FlashLMError):
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "attacked").exists()


# ---- checkpoints of earlier versions ----


def to_old_layout(path, very_old=False, optimizer="adamw"):
    """Rewrite a checkpoint in the layout that version 0.1 saved."""
    content = torch.load(path, weights_only=True)
    model = content["model_config"]
    pattern = model.pop("mixers")
    blocks = range(model["blocks"])
    model["attention"] = [n for n in blocks if pattern[n % len(pattern)] == "attention"]

    recipe = content["train_config"]
    recipe["optimizer"] = optimizer
    content["optimizer"] = [content["optimizer"]]
    if optimizer == "muon":
        content["optimizer"] *= 2
    if very_old:  # before there was a choice
        [content["optimizer"]] = content["optimizer"]
        for name in ("optimizer", "dropout", "sampled_softmax"):
            del recipe[name]

    progress = content["progress"]
    best_step = progress.pop("best_step")
    progress["best"] = progress["best"] | {"step": best_step} if progress["best"] else {}
    content["source"] |= {"dataset": "builtin", "text_dir": None, "limit": None}
    content["source"]["vocabulary_size"] = 1_000
    torch.save(content, path)


@pytest.mark.parametrize("stop", [1, 5])
@pytest.mark.parametrize("very_old", [False, True], ids=["old", "very old"])
def test_a_checkpoint_of_the_old_layout_resumes_bit_for_bit(
    prepared, hybrid_config, train_config, tmp_path, few_candidates, often, very_old, stop
):
    recipe = replace(train_config, sampled_softmax=not very_old)
    run_training(hybrid_config, recipe, prepared, tmp_path / "whole")
    folder = tmp_path / "half"
    run_training(hybrid_config, recipe, prepared, folder, on_step=interrupt_at(stop))
    as_saved = load_checkpoint(folder, LAST)
    for name in (LAST, BEST):
        to_old_layout(folder / name, very_old)

    half = load_checkpoint(folder, LAST)
    assert half.network.config == hybrid_config
    assert half.train_config == as_saved.train_config
    assert asdict(half.progress).keys() == asdict(as_saved.progress).keys()
    assert half.source == TextSource("builtin")
    assert (half.progress.best is None) == (stop == 1)
    assert_same_run(half, as_saved)
    resume(half, prepared, folder)
    whole = load_checkpoint(tmp_path / "whole", LAST)
    assert_same_run(whole, load_checkpoint(folder, LAST))


def test_a_run_with_muon_loads_for_use_and_is_refused_for_resuming(
    prepared, make_trainer, hybrid_config, train_config, tmp_path
):
    run_training(hybrid_config, train_config, prepared, tmp_path, on_step=interrupt_at(3))
    as_saved = load_checkpoint(tmp_path, LAST)
    to_old_layout(tmp_path / LAST, optimizer="muon")
    old = load_checkpoint(tmp_path, LAST)
    scores = []
    for checkpoint in (old, as_saved):
        model = PyTorchModel(checkpoint.network, checkpoint.vocabulary)
        scores.append(evaluate(model, prepared.held_out(3)))
    assert scores[0] == scores[1]
    assert generate(model, "Once", tokens=3)[0].ids

    with pytest.raises(FlashLMError, match="optimizer is of another kind") as caught:
        make_trainer(train_config, config=hybrid_config).restore(old)
    assert "\n" not in str(caught.value)


def test_the_committed_checkpoint_loads_and_writes_a_story():
    path = Path(__file__).parent.parent / "checkpoints" / "hybrid-large.pt"
    before = torch.get_rng_state()
    checkpoint = load_checkpoint(path)
    assert torch.equal(before, torch.get_rng_state())
    preset = PRESETS["hybrid-large"]
    assert checkpoint.network.config == preset
    assert checkpoint.network.config.block_mixers == ("attention", "conv") * 2
    assert len(checkpoint.vocabulary) == preset.vocabulary_size
    assert checkpoint.train_config.dropout == 0.1
    assert (checkpoint.source, checkpoint.optimizer) == (None, None)

    model = PyTorchModel(checkpoint.network.eval(), checkpoint.vocabulary)
    [story] = generate(model, "Once upon a time", tokens=40, seed=1)
    assert story.text.startswith("Once upon a time")
    assert len(story.ids) == 40 or story.finished
    assert sum(story.surprise) / len(story.surprise) < 4  # bits per token: it has learned


# ---- files ----

KILLED = """
import os, signal, sys
from flashlm_helpers import checkpoint
from flashlm_helpers.checkpoint import Progress
from flashlm_helpers.machine import files
loaded = checkpoint.load_checkpoint(sys.argv[1])
if sys.argv[2] == "fsync":  # die with the file complete but not yet in its place
    files.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
print("saving", flush=True)
for step in range(100_000):
    loaded.progress = Progress(step=step)
    checkpoint.save_checkpoint(sys.argv[1], loaded)
"""


def untrained(model_config, vocabulary, step=0):
    network = FlashLM(model_config)
    progress = Progress(step=step)
    return Checkpoint(network, TrainConfig(hours=1), vocabulary, progress=progress)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["fsync", "any", "any", "any"])
def test_a_kill_during_saving_leaves_a_loadable_checkpoint(
    tmp_path, vocabulary, model_config, moment
):
    path = tmp_path / "run" / LAST
    save_checkpoint(path, untrained(model_config, vocabulary, step=-1))
    command = [sys.executable, "-c", KILLED, str(path), moment]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "saving\n"
    if moment == "any":
        time.sleep(random.uniform(0.05, 0.5))
        process.kill()
    assert process.wait() == -signal.SIGKILL
    step = load_checkpoint(path).progress.step
    assert step == -1 if moment == "fsync" else step >= -1


def test_a_file_is_replaced_in_one_move_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    for call in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, call, fail)
            with pytest.raises(FlashLMError, match="No space left"):
                with files.atomic_write(path) as file:
                    file.write(b"new")
        assert path.read_text() == "old"
        assert [left.name for left in tmp_path.iterdir()] == ["file"]

    with files.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, vocabulary, model_config):
    (tmp_path / "file").touch()
    with pytest.raises(FlashLMError, match="cannot write"):
        save_checkpoint(tmp_path / "file" / LAST, untrained(model_config, vocabulary))


# ---- threads ----


@pytest.fixture
def crowded(monkeypatch):
    """A machine of two cores, both of them free until a test calls this."""
    now = threads.Usage(0.0, 0.0, 0.0)
    others = 0.0

    def usage():
        nonlocal now
        now = threads.Usage(now.clock + 1.0, now.everyone + 1.0 + others, now.ours + 1.0)
        return now

    def crowd():
        nonlocal others
        others = 1.0

    monkeypatch.setattr(threads, "allowed_cores", lambda: [0, 1])
    monkeypatch.setattr(threads, "LOOK_SECONDS", -1e9)  # at every call
    monkeypatch.setattr(FOLLOWER, "_usage", usage)
    FOLLOWER.limit(2)
    return crowd


def test_a_timed_run_follows_what_others_leave_and_notes_it(
    prepared, model_config, tmp_path, crowded, capsys
):
    def on_step(progress):
        if progress.step == 3:
            crowded()
        if progress.step == 10:
            signal.raise_signal(signal.SIGINT)

    recipe = TrainConfig(hours=1, batch=8, compile=False, validation_stories=5)
    run_training(model_config, recipe, prepared, tmp_path, on_step=on_step)
    (first, all_of_them), (later, fewer) = load_checkpoint(tmp_path, LAST).progress.threads
    assert (first, all_of_them, fewer) == (0, 2, 1)
    assert 3 <= later <= 5
    assert capsys.readouterr().err.count("computing with 1 thread") == 1


def test_a_run_in_epochs_keeps_its_threads_and_so_does_resuming_it(
    prepared, model_config, train_config, tmp_path, crowded
):
    def on_step(progress):
        crowded()
        interrupt_at(4)(progress)

    torch.set_num_threads(1)
    run_training(model_config, train_config, prepared, tmp_path, on_step=on_step)
    stopped = load_checkpoint(tmp_path, LAST)
    assert stopped.progress.threads == [(0, 2)]  # the limit, whatever was there before

    # Another machine, or another day: the number is that of the run.
    stopped.progress.threads = [(0, 1)]
    run_training(model_config, train_config, prepared, tmp_path, resume=stopped)
    assert load_checkpoint(tmp_path, LAST).progress.threads == [(0, 1)]
