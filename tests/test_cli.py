import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import write_stories

from flashlm_helpers import autotune, corpus
from flashlm_helpers.checkpoint import load_checkpoint
from flashlm_helpers.cli.common import choose_preset, stories_for
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.machine.hardware import GIB
from flashlm_helpers.machine.profile import active_profile
from flashlm_helpers.runtime import load
from flashlm_helpers.runtime.bolt import COMPILERS, SOURCE
from flashlm_helpers.sources import hub
from flashlm_helpers.sources.files import SEPARATOR

QUICK = ["--small", "--epochs", "0.02", "--batch", "2"]
TINY = ["--preset", "tiny", "--epochs", "0.02", "--batch", "2"]

# A mixer of one's own, in a module of one's own.
MINE = '''
import torch
from torch import nn


class Mean(nn.Module):
    """Mix in the mean of the text so far."""

    def __init__(self, config):
        super().__init__()
        self.project = nn.Linear(config.width, config.width)

    def forward(self, x, state=None):
        B, T, D = x.shape
        total, count = state or (x.new_zeros(B, D), x.new_zeros(B, 1))
        sums = total[:, None] + x.cumsum(1)
        counts = count + torch.arange(1, T + 1)
        return self.project(sums / counts[..., None]), (sums[:, -1], counts[:, -1:])


class Stubborn(Mean):
    """Look at the numbers themselves, which no exporter can follow."""

    def forward(self, x, state=None):
        if float(x.abs().sum()) < 0:
            x = -x
        return super().forward(x, state)
'''

# Several commands in one process, which takes a while to start.
COMMANDS = """
import json
import sys
from flashlm_helpers.cli.main import main

for command in json.loads(sys.argv[1]):
    print("status", main(command))
    print("----", file=sys.stderr)
"""


def run_process(*arguments, cwd=None, **environment):
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "flashlm_helpers", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_dir):
    """A finished run of a few steps, made by the command line in a process of its own."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "run"
    done = run_process(
        "train",
        *QUICK,
        "--text-dir",
        text_dir.name,
        "--save-dir",
        folder,
        "--json",
        cwd=text_dir.parent,
        FLASHLM_HOME=str(home),
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


@pytest.fixture(autouse=True)
def kept_apart(home):
    """Every test here has a FLASHLM_HOME of its own."""


def said_json(capsys, *arguments):
    """Run a command with --json that must succeed; return its one object and its notices."""
    assert main([*map(str, arguments), "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def said(capsys, *arguments):
    """Run a command that must succeed; return what it printed."""
    assert main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """Run a command that must fail; returns its one line."""
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(list(map(str, arguments))))
    said = capsys.readouterr()
    assert caught.value.code == 2 and said.out == ""
    *notices, line = said.err.strip().split("\n")
    assert line.startswith("error: ") and "Traceback" not in said.err
    assert not any(notice.startswith("error") for notice in notices)
    return line


# ---- training ----


def test_train_writes_a_run_and_prints_one_json_object(run):
    folder, result, notices = run
    assert {"best.pt", "last.pt", "report.json"} == {p.name for p in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert result["bpb"] == report["bpb"] and result["story"].startswith("Once upon a time")
    assert report["config"]["model"]["name"] == "v4-small" and report["hardware"]["cores"] >= 1
    assert "tokens/s" in notices and "Traceback" not in notices
    assert result == report | {"story": result["story"], "save_dir": str(folder)}


def test_the_report_has_the_keys_that_others_read(run):
    report = json.loads((run[0] / "report.json").read_text())
    assert report.keys() >= {
        "stopped_by", "steps", "tokens_seen", "tokens_per_second", "epochs", "seconds",
        "seconds_by_activity", "skipped_steps", "train_nats_per_token", "val_nats_per_token",
        "bpc", "bpb", "validation", "peak_memory_bytes", "config", "vocabulary", "source",
        "hardware", "history",
    }  # fmt: skip
    activities = {"prepare", "train", "validate", "save", "display"}
    assert report["seconds_by_activity"].keys() == activities
    assert report["validation"].keys() >= {
        "bpc", "bpb", "nats_per_token", "n_stories", "n_tokens", "n_chars", "n_bytes",
        "end_nats_per_story", "interval",
    }  # fmt: skip
    assert report["config"]["model"].keys() == {
        "name", "width", "blocks", "hidden", "sequence_length", "kernel_size", "vocabulary_size",
        "mixers", "heads", "window", "layer_scale", "ternary",
    }  # fmt: skip
    assert report["config"]["training"].keys() == {
        "hours", "epochs", "batch", "lr", "seed", "warmup", "decay", "floor", "weight_decay",
        "dropout", "sampled_softmax", "clip", "patience", "validation_stories", "bfloat16",
        "compile",
    }  # fmt: skip
    assert report["vocabulary"].keys() == {"hash", "size", "coverage"}
    assert report["source"].keys() >= {"dataset", "text_dir", "limit"}
    assert report["hardware"].keys() >= {
        "processor", "cores", "memory_gib", "matmul", "system", "python", "torch",
    }  # fmt: skip
    point = {"step", "seconds", "tokens", "nats_per_token"}
    history = report["history"]
    assert history["train"][0].keys() == point | {"lr", "gradient_norm"}
    assert history["valid"][0].keys() == point | {"bpc", "bpb"}


def test_train_in_plain_words(text_dir, tmp_path, capsys):
    folder = tmp_path / "run"
    out = said(capsys, "train", *QUICK, "--text-dir", text_dir, "--save-dir", folder, "--seed", 7)
    assert "BPC" in out and "Once upon a time" in out and str(folder) in out
    assert load_checkpoint(folder).train_config.seed == 7


def test_a_preset_keeps_its_vocabulary_size_and_flags_change_it(text_dir, tmp_path, capsys):
    """--vocab-size limits the vocabulary; the recipe's flags arrive in the recipe."""
    flags = ["--vocab-size", 500, "--lr", 0.002, "--dropout", 0.1, "--patience", 3, "--seed", 9]
    result, _ = said_json(
        capsys, "train", *TINY, *flags, "--text-dir", text_dir, "--save-dir", tmp_path / "run"
    )
    assert result["vocabulary"]["size"] == result["config"]["model"]["vocabulary_size"] == 500
    recipe = result["config"]["training"]
    found = [recipe[name] for name in ("lr", "dropout", "patience", "seed", "batch", "epochs")]
    assert found == [0.002, 0.1, 3, 9, 2, 0.02]


def test_the_default_is_a_preset_for_this_machine_and_two_hours():
    assert choose_preset(8, 32 * GIB) == "v4-large"
    assert choose_preset(8, 32 * GIB - 1) == choose_preset(7, 64 * GIB) == "v4-small"
    assert choose_preset() in ("v4-small", "v4-large")


def test_a_run_is_never_overwritten(run, text_dir, capsys):
    before = (run[0] / "last.pt").read_bytes()
    line = refused(capsys, "train", *QUICK, "--text-dir", text_dir, "--save-dir", run[0])
    assert "holds a run already" in line
    assert (run[0] / "last.pt").read_bytes() == before


@pytest.mark.parametrize("flags, compilations", [([], 1), (["--eager"], 0)])
def test_eager_turns_compiling_off(text_dir, home, monkeypatch, flags, compilations):
    calls = []

    def compile_network(network, bfloat16):
        calls.append(network)
        return "not in this test"

    monkeypatch.setattr(autotune, "MIN_SECONDS_TO_COMPILE", 0.0)
    monkeypatch.setattr(autotune, "compile_network", compile_network)
    command = ["train", *QUICK, *flags, "--text-dir", str(text_dir)]
    assert main([*command, "--save-dir", str(home / "run")]) == 0
    assert len(calls) == compilations


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_a_run_that_can_go_on(text_dir, tmp_path):
    """An interrupted run keeps what it has, and says how it ended."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "flashlm_helpers", "train", "--preset", "tiny", "--hours", "1"]
    command += ["--batch", "2", "--eager", "--text-dir", text_dir, "--save-dir", folder, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if ", batch 2" in line:  # training is about to start
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert json.loads(out)["stopped_by"] == "interrupt"
    assert {"best.pt", "last.pt", "report.json"} == {p.name for p in folder.iterdir()}


def test_timed_runs_take_as_much_text_as_they_can_read():
    assert stories_for(None) is None
    assert stories_for(0.01) == 20_000
    assert stories_for(2) >= 100_000 and stories_for(2) % 20_000 == 0


# ---- resuming ----


def test_resume_goes_on_with_the_same_text_from_anywhere(run, tmp_path, capsys, monkeypatch):
    further = tmp_path / "further"
    monkeypatch.chdir(tmp_path)
    result, _ = said_json(
        capsys, "train", "--resume", run[0], "--epochs", 0.04, "--save-dir", further
    )
    assert result["steps"] > run[1]["steps"] and result["source"] == run[1]["source"]
    before = run[1]["history"]["train"]
    assert result["history"]["train"][: len(before)] == before
    assert (further / "best.pt").is_file() and result["bpb"] <= run[1]["bpb"]
    assert result["config"]["training"]["epochs"] == 0.04


def test_resume_is_refused_where_it_cannot_be_exact(run, tmp_path, capsys):
    folder = run[0]
    resume = ["train", "--resume", folder]
    assert "larger --hours or --epochs" in refused(capsys, *resume)
    assert "holds a v4-small" in refused(capsys, *resume, "--large")
    assert "--vocab-size" in refused(capsys, *resume, "--vocab-size", 500)
    assert "--mixers" in refused(capsys, *resume, "--mixers", "conv")
    write_stories(tmp_path / "train.txt", ["other words", "entirely different", "than before"])
    write_stories(tmp_path / "valid.txt", ["and others here"])
    line = refused(capsys, *resume, "--epochs", 1, "--text-dir", tmp_path)
    assert "another vocabulary" in line
    assert "there is no checkpoint" in refused(capsys, "train", "--resume", tmp_path)
    line = refused(capsys, *resume, "--epochs", 1, "--save-dir", folder / "last.pt" / "run")
    assert "cannot write" in line


def test_resume_says_where_the_text_was(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    content = torch.load(run[0] / "last.pt", weights_only=True)
    content["source"]["text_dir"] = str(tmp_path / "gone")
    torch.save(content, moved / "last.pt")
    line = refused(capsys, "train", "--resume", moved, "--epochs", 1)
    assert f"no longer in {tmp_path / 'gone'}" in line and "--text-dir" in line


def test_resume_takes_another_copy_of_the_same_text(run, text_dir, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in text_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    command = ["train", "--resume", run[0], "--epochs", 0.03, "--text-dir", copy]
    result, _ = said_json(capsys, *command, "--save-dir", tmp_path / "further")
    assert result["steps"] > run[1]["steps"]
    assert result["source"]["text_dir"] == str(copy)


# ---- scoring and writing ----


def test_eval_bpc_agrees_with_the_package(run, text_dir, capsys):
    text = text_dir / "valid.txt"
    texts = [story.strip() for story in text.read_text().split(SEPARATOR)]
    expected = evaluate(load(run[0]), [story for story in texts if story])
    result, _ = said_json(capsys, "eval-bpc", "--checkpoint", run[0], "--text", text)
    for name, value in asdict(expected).items():
        assert result[name] == value
    assert result["checkpoint"] == str(run[0]) and result["text"] == str(text)
    assert result["runtime"] == "torch" and result["products"] in ("bfloat16", "float32")
    names = {"uniform", "unigram", "trigram (Kneser-Ney)", "xz -9e", "zstd -19"}
    assert names == result["baselines"].keys()
    for baseline in result["baselines"].values():
        assert baseline.keys() == {"bpc", "bpb"}

    out = said(capsys, "eval-bpc", "--checkpoint", run[0] / "best.pt", "--text", text)
    assert f"{expected.bpc:.4f}" in out and "trigram" in out


def test_eval_bpc_works_where_the_training_text_is_gone(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "flashlm_helpers.cli.eval_bpc.open_corpus",
        lambda *arguments: corpus.open_corpus(tmp_path / "gone"),
    )
    (tmp_path / "one.txt").write_text("A single story.")
    result, notices = said_json(
        capsys, "eval-bpc", "--checkpoint", run[0], "--text", tmp_path / "one.txt"
    )
    assert result["interval"] is None and "unigram" not in result["baselines"]
    assert "not at hand" in notices

    # A single story has no interval.
    out = said(capsys, "eval-bpc", "--checkpoint", run[0], "--text", tmp_path / "one.txt")
    assert "nan" not in out and "1 stories" not in out


def test_generate_is_reproducible_and_survives_unknown_characters(run, capsys):
    command = ["generate", "--checkpoint", run[0]]
    texts = [said(capsys, *command, "--prompt", "Żółw 🐢", "--tokens", "9") for _ in range(2)]
    assert texts[0] == texts[1] and texts[0].startswith("Żółw 🐢")
    result, _ = said_json(capsys, *command, "--tokens", "5")
    assert result["prompt"] == "Once upon a time"
    assert result.keys() >= {
        "prompt", "text", "ids", "surprise", "entropy", "finished", "runtime",
    }  # fmt: skip
    assert len(result["ids"]) == 5 and result["text"].startswith(result["prompt"])


def test_a_prompt_is_what_was_typed_whatever_the_locale(run):
    command = ["generate", "--checkpoint", run[0], "--tokens", 2, "--json"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_process(*command, "--prompt", os.fsdecode("Żółw 🐢".encode()), **plain)
    assert json.loads(done.stdout)["prompt"] == "Żółw 🐢"

    # What is not UTF-8 gets the same words from the program in C.
    line = "the prompt is not UTF-8: check the encoding of the terminal"
    assert line in SOURCE.read_text()
    for environment in (plain, {}):
        done = run_process(*command, "--prompt", os.fsdecode(b"caf\xe9"), **environment)
        assert (done.returncode, done.stderr) == (2, f"error: {line}\n")


def test_every_runtime_refuses_a_prompt_that_is_not_utf8(run, capsys):
    for runtime in ("torch", "c", "onnx"):
        command = ["generate", "--checkpoint", run[0], "--runtime", runtime, "--prompt"]
        for prompt in ("\udcff", "a\ud83d"):
            assert "the prompt is not UTF-8" in refused(capsys, *command, prompt)


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_folders_may_have_names_that_are_not_utf8(text_dir, tmp_path, capsys):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    for path in text_dir.iterdir():
        (odd / path.name).write_bytes(path.read_bytes())
    text = ["--text-dir", odd, "--save-dir", odd / "run"]
    result, _ = said_json(capsys, "train", *QUICK, *text)
    assert result["source"]["text_dir"] == str(odd)
    assert json.loads((odd / "run" / "report.json").read_text())["source"] == result["source"]
    command = ["eval-bpc", "--checkpoint", odd / "run", "--text"]
    result, _ = said_json(capsys, *command, odd / "valid.txt")
    assert "unigram" in result["baselines"]
    assert "cannot read" in refused(capsys, *command, odd / "gone.txt")


# ---- exporting ----


def test_a_compact_model_is_small_and_scores_and_tells_as_the_whole_one(
    run, text_dir, tmp_path, capsys
):
    folder = run[0]
    text = text_dir / "valid.txt"
    out = tmp_path / "sub" / "compact.pt"
    result, _ = said_json(
        capsys, "export", "--checkpoint", folder, "--format", "compact", "--out", out
    )
    assert result["bytes"] == out.stat().st_size < (folder / "best.pt").stat().st_size / 3
    assert result.keys() == {"checkpoint", "format", "out", "bytes"}

    # It scores and writes as before.
    scores = []
    stories = []
    for checkpoint in (folder, out):
        command = ["eval-bpc", "--checkpoint", checkpoint, "--text", text, "--no-baselines"]
        scores.append(said_json(capsys, *command)[0]["bpb"])
        command = ["generate", "--checkpoint", checkpoint, "--temperature", 0, "--tokens", 20]
        stories.append(said(capsys, *command))
    assert scores[0] == pytest.approx(scores[1], abs=2e-3) and stories[0] == stories[1]

    # It is no run that can go on, and nothing is overwritten.
    line = refused(capsys, "train", "--resume", out, "--hours", "1")
    assert "without the optimizer state" in line
    for taken in (folder / "last.pt", tmp_path):
        line = refused(capsys, "export", "--checkpoint", folder, "--out", taken)
        assert "is there already" in line

    # What is handed around does not tell about folders.
    assert str(text_dir).encode() not in out.read_bytes()
    _, notices = said_json(capsys, "eval-bpc", "--checkpoint", out, "--text", text)
    assert "does not say which text" in notices

    # Nor can it be trained further, or read as a text.
    for path in (out, run[0] / "best.pt"):
        line = refused(capsys, "train", "--resume", path, "--text-dir", text_dir)
        assert "without the optimizer state" in line and "last.pt" in line
    assert "checkpoint" in refused(capsys, "eval-bpc", "--checkpoint", out, "--text", out)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler")
def test_an_exported_model_is_used_as_a_checkpoint_is(run, text_dir, tmp_path, capsys):
    """Packed and ONNX files score and write; the bytes are those of the file."""
    text = text_dir / "valid.txt"
    command = ["eval-bpc", "--text", text, "--no-baselines", "--checkpoint"]
    whole, _ = said_json(capsys, *command, run[0])
    for name, runtime, flags in [
        ("model.flashlm", "c", ["--format", "packed"]),
        ("exact.flashlm", "c", ["--format", "packed", "--exact"]),
        ("model.onnx", "onnx", ["--format", "onnx"]),
    ]:
        out = tmp_path / name
        result, _ = said_json(capsys, "export", "--checkpoint", run[0], "--out", out, *flags)
        assert result["bytes"] == out.stat().st_size and result["format"] == flags[1]
        score, _ = said_json(capsys, *command, out)
        assert score["runtime"] == runtime and "products" not in score
        assert score["bpb"] == pytest.approx(whole["bpb"], rel=0.01)
        story, _ = said_json(capsys, "generate", "--checkpoint", out, "--tokens", 5)
        assert story["runtime"] == runtime and len(story["ids"]) == 5

    # Where a checkpoint is asked for, an exported model is refused in one line.
    packed = tmp_path / "model.flashlm"
    info, _ = said_json(capsys, "info", "--checkpoint", packed)
    assert info["bytes"]["checkpoint"] == packed.stat().st_size and info["name"] == "v4-small"
    onnx = tmp_path / "model.onnx"
    for arguments, complaint in (
        (["train", "--resume", packed], "packed model, which was exported"),
        (["train", "--resume", onnx], "ONNX model, which was exported"),
        (["generate", "--checkpoint", onnx, "--runtime", "torch"], "only --runtime onnx"),
        (["export", "--checkpoint", onnx, "--out", tmp_path / "a.pt"], "ONNX model, which"),
        (["export", "--checkpoint", packed, "--out", tmp_path / "a.pt"], "packed model, which"),
        (["export", "--checkpoint", onnx, "--out", tmp_path / "a", "--format", "packed"], "ONNX"),
        (["export", "--checkpoint", run[0], "--out", tmp_path / "a", "--format", "onnx"], ".onnx"),
        (["export", "--checkpoint", run[0], "--out", tmp_path / "a", "--exact"], "--exact"),
        (["info", "--checkpoint", onnx], "ONNX model, which was exported"),
        (["eval-bpc", "--checkpoint", run[0], "--text", packed], "packed model, not text"),
        (["eval-bpc", "--checkpoint", run[0], "--text", onnx], "not text"),
    ):
        assert complaint in refused(capsys, *arguments)


def test_info_counts(run, capsys):
    info, _ = said_json(capsys, "info", "--preset", "v4-small")
    assert info["parameters"]["total"] == 4_364_736 and info["receptive_field"] == 43
    share = info["parameters"]["ternary"] / 4_364_736
    assert info["ternary_share"] == pytest.approx(share)
    assert info.keys() == {
        "name", "config", "parameters", "ternary_share", "receptive_field", "bytes",
    }  # fmt: skip
    assert info["bytes"].keys() == {"float32", "ternary_at_1.6_bits_rest_float32", "checkpoint"}
    kinds = {"total", "ternary", "embedding", "convolution", "norm"}
    assert info["parameters"].keys() >= kinds and info["bytes"]["checkpoint"] is None

    assert "receptive field: 43 tokens" in said(capsys, "info", "--checkpoint", run[0])
    assert "parameters" in said(capsys, "info")
    twin, _ = said_json(capsys, "info", "--preset", "v4-small-float")
    assert twin["ternary_share"] == 0


# ---- the open door ----


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory, text_dir):
    """A run with a mixer of one's own, in a folder that also holds its module."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_mixers.py").write_text(MINE)
    done = run_process(
        "train",
        *TINY,
        "--mixers",
        "conv,mean",
        "--mixer",
        "mean=my_mixers:Mean",
        "--text-dir",
        text_dir,
        "--save-dir",
        "run",
        "--json",
        cwd=folder,
        FLASHLM_HOME=str(folder / "home"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["model"]["mixers"] == ["conv", "mean"]
    return folder


def run_commands(folder, commands):
    """Run commands one after another in a fresh process; return (status, stdout, stderr) each."""
    texts = [list(map(str, command)) for command in commands]
    arguments = [sys.executable, "-c", COMMANDS, json.dumps(texts)]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    outs = re.split(r"^status (\d+)\n", done.stdout, flags=re.M)
    errs = done.stderr.split("----\n")
    assert len(errs) == len(texts) + 1
    return list(zip(map(int, outs[1::2]), outs[::2], errs, strict=False))


def test_a_mixer_of_ones_own_works_in_every_command(mixed_run, text_dir):
    """A process knows the mixer only by the flag."""
    text = text_dir / "valid.txt"
    mixer = ["--mixer", "mean=my_mixers:Mean"]
    commands = [
        ["eval-bpc", "--checkpoint", "run", "--text", text, "--no-baselines"],
        ["generate", "--checkpoint", "run", "--tokens", 5],
        ["info", "--checkpoint", "run"],
        ["export", "--checkpoint", "run", "--out", "compact.pt"],
        ["export", "--checkpoint", "run", "--out", "mean.onnx", "--format", "onnx"],
        ["train", "--resume", "run", "--epochs", 0.04, "--save-dir", "further"],
        ["generate", "--checkpoint", "compact.pt", "--tokens", 5],
    ]
    results = run_commands(mixed_run, [[*command, *mixer, "--json"] for command in commands])
    for (status, out, err), command in zip(results, commands, strict=True):
        assert status == 0, (command, err)
        assert isinstance(json.loads(out), dict) and out.count("\n") == 1
    assert main(["generate", "--checkpoint", str(mixed_run / "mean.onnx"), "--tokens", "5"]) == 0


def test_what_a_runtime_cannot_compute_is_one_line_that_names_the_mixer(
    mixed_run, text_dir, capsys, monkeypatch
):
    stubborn = ["--mixer", "stubborn=my_mixers:Stubborn"]
    train = ["train", *TINY, "--mixers", "conv,stubborn", "--text-dir", text_dir]
    export = ["export", "--out", "model.onnx", "--format"]
    results = run_commands(
        mixed_run,
        [
            [*train, "--save-dir", "stubborn", *stubborn],
            [*export, "packed", "--checkpoint", "stubborn", *stubborn],
            [*export, "onnx", "--checkpoint", "stubborn", *stubborn],
            ["generate", "--checkpoint", "stubborn", "--runtime", "onnx", *stubborn],
        ],
    )
    assert results[0][0] == 0
    for status, out, err in results[1:]:
        assert status == 2 and out == "" and err.count("\n") == 1
        assert err.startswith("error: ") and "'stubborn'" in err
    assert not (mixed_run / "model.onnx").exists()

    # C says so, too; where there is no compiler, PyTorch computes instead.
    monkeypatch.chdir(mixed_run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if any(map(shutil.which, COMPILERS)):
        generate = ["generate", "--checkpoint", "stubborn", "--runtime", "c", *stubborn]
        assert "'stubborn'" in refused(capsys, *generate)


def test_a_checkpoint_with_an_unknown_mixer_is_one_line(mixed_run, text_dir, tmp_path, capsys):
    folder = mixed_run / "run"
    for arguments in (
        ["eval-bpc", "--checkpoint", folder, "--text", text_dir / "valid.txt"],
        ["generate", "--checkpoint", folder],
        ["generate", "--checkpoint", folder, "--runtime", "c"],
        ["info", "--checkpoint", folder],
        ["export", "--checkpoint", folder, "--out", tmp_path / "a.pt"],
        ["train", "--resume", folder, "--epochs", 1],
        ["train", *TINY, "--mixers", "conv,mean", "--text-dir", text_dir],
        ["race", "--presets", "tiny:mixers=[conv,mean]", "--minutes", 1],
    ):
        line = refused(capsys, *arguments)
        assert "'mean' is not registered" in line and "--mixer mean=module:Class" in line


def test_a_mixer_races_in_a_process_of_its_own(mixed_run, text_dir):
    entrant = "tiny:width=16:hidden=16:compile=false:batch=2:validation_stories=5"
    command = ["race", "--presets", f"{entrant}:mixers=[conv,mean]", "--minutes", 0.01]
    command += ["--seeds", 0, "--results", "race.jsonl", "--text-dir", text_dir, "--json"]
    done = run_process(*command, "--mixer", "mean=my_mixers:Mean", cwd=mixed_run)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)["records"][0]
    assert record["config"]["model"]["mixers"] == ["conv", "mean"]
    assert record["parameters"]["other"] == 16 * 16 + 16


def test_bad_mixers_are_one_line(tmp_path, text_dir, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("broken_mixer.py").write_text("def (")
    Path("failing_mixer.py").write_text("raise RuntimeError('no such luck')")
    Path("other_mixer.py").write_text("Mean = 3\nfrom flashlm_helpers.vocab import Vocabulary")
    for text, complaint in [
        ("mean", "NAME=MODULE:CLASS"),
        ("=m:C", "NAME=MODULE:CLASS"),
        ("mean=", "NAME=MODULE:CLASS"),
        ("mean=nothing_such:Mean", "nothing_such"),
        ("mean=nothing_such", "NAME=MODULE:CLASS"),
        ("mean=json:Mean", "json:Mean"),
        ("mean=other_mixer:Mean", "not a mixer"),
        ("mean=other_mixer:Vocabulary", "not a mixer"),
        ("mean=broken_mixer:Mean", "broken_mixer"),
        ("mean=failing_mixer:Mean", "no such luck"),
        ("mean=.relative:Mean", "relative"),
        ("a-b=json:Mean", "'a-b'"),
        ("conv=torch.nn:Identity", "'conv' belongs to"),
    ]:
        assert complaint in refused(capsys, "info", "--preset", "tiny", "--mixer", text)
    for mixers in ("", "conv,", "conv,nothing", "conv,conv,conv", "attention conv"):
        refused(capsys, "train", *TINY, "--mixers", mixers, "--text-dir", text_dir)


# ---- texts of the hub, and what the environment says ----


def test_an_unreachable_hub_trains_on_the_builtin_corpus(tmp_path, capsys, monkeypatch):
    def refuse(*arguments):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(hub, "_ask_hub", refuse)
    monkeypatch.setattr(corpus, "BUILTIN_STORIES", {"train": 60, "valid": 20})
    result, notices = said_json(capsys, "train", *QUICK, "--save-dir", tmp_path / "r")
    assert "using the built-in corpus" in notices
    assert result["source"]["dataset"] == "builtin"
    for name in ("tinystories", "owner/name", "owner/name:config:field"):
        command = ["train", "--dataset", name, "--hours", 1, "--save-dir", tmp_path / "s"]
        assert "cannot be read from the hub" in refused(capsys, *command)


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub, "HUB_PATIENCE", 0.2)
    monkeypatch.setattr(hub, "_ask_hub", lambda path: time.sleep(30))
    began = time.monotonic()
    line = refused(capsys, "train", "--dataset", "owner/name", "--save-dir", tmp_path / "r")
    assert "did not answer" in line and time.monotonic() - began < 15


def test_unknown_names_of_texts_and_profiles_are_one_line(tmp_path, capsys, monkeypatch):
    for name in ("nonsense", "a/b/c", "./nowhere", "owner/", "/nowhere"):
        line = refused(capsys, "train", "--dataset", name, "--save-dir", tmp_path / "r")
        assert "there is no text" in line
        refused(capsys, "race", "--presets", "tiny", "--minutes", 1, "--dataset", name)

    monkeypatch.setenv("FLASHLM_DATASET", "nonsense")
    with pytest.raises(FlashLMError, match="there is no text 'nonsense'"):
        corpus.open_corpus(active_profile().dataset)
    monkeypatch.setenv("FLASHLM_PROFILE", "nonsense")
    assert "FLASHLM_PROFILE" in refused(capsys, "train", *QUICK, "--dataset", "builtin")


# ---- mistakes ----


def make_text(folder, train=None, valid="One.\n<|endoftext|>\n"):
    folder.mkdir(exist_ok=True)
    if train is not None:
        content = train if isinstance(train, bytes) else train.encode()
        (folder / "train.txt").write_bytes(content)
        (folder / "valid.txt").write_text(valid)
    return folder


@pytest.mark.parametrize(
    "train, complaint",
    [
        (None, "is empty"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "UTF-8|binary"),
        (b"na\xefve", "not valid UTF-8"),
        (b"a\x00b", "binary"),
        ("only one story", "one story only"),
        ("", "text is empty"),
        ("\n<|endoftext|>\n", "text is empty"),
    ],
)
def test_bad_text_is_one_line(tmp_path, capsys, train, complaint):
    folder = make_text(tmp_path / "text", train)
    line = refused(capsys, "train", *QUICK, "--text-dir", folder, "--save-dir", tmp_path / "r")
    assert re.search(complaint, line)
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_training_arguments_are_one_line(text_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    text = ["--text-dir", text_dir]
    for arguments, complaint in [
        (["--text-dir", tmp_path], "holds no text"),
        (["--text-dir", tmp_path / "none"], "not a folder"),
        ([*text, "--hours", 0], "hours must be greater than 0"),
        ([*text, "--hours", "nan"], "hours must be greater than 0"),
        ([*text, "--hours", "soon"], "invalid float"),
        ([*text, "--batch", 0], "batch must be at least 1"),
        ([*text, "--batch", 2.5], "invalid int"),
        ([*text, "--lr", 0], "lr must be greater than 0"),
        ([*text, "--dropout", 1], "dropout must be"),
        ([*text, "--patience", 0], "patience must be at least 1"),
        ([*text, "--seed", -1], "seed must be"),
        ([*text, "--seed", 10**30], "seed must be"),
        ([*text, "--batch", 10_000_000], "try --batch"),
        ([*text, "--save-dir", tmp_path / "file" / "run"], "cannot write"),
        ([*text, "--vocab-size", 9_999], "supports a vocabulary of"),
        ([*text, "--vocab-size", 12], "260 and"),
        ([*text, "--vocab-size", 0], "vocabulary"),
        ([*text, "--vocab-size", 10**9], "260 and"),
        ([*text, "--small", "--large"], "not allowed with"),
        ([*text, "--preset", "v5"], "invalid choice"),
        ([*text, "--dataset", "builtin"], "not allowed with"),
        (["--dataset", "nonsense"], "there is no text 'nonsense'"),
        (["--epochs", "1e308"], "epochs must be"),
        (["--hours", "1e306"], "hours must be"),
        (["--resume", ""], "--resume is empty"),
        (["--text-dir", ""], "--text-dir is empty"),
        (["--dataset", ""], "--dataset is empty"),
    ]:
        assert complaint in refused(capsys, "train", *arguments)


def test_bad_arguments_are_one_line(tmp_path, run, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes.md").touch()
    for arguments, complaint in [
        (["generate", "--checkpoint", run[0], "--prompt", ""], "prompt is empty"),
        (["generate", "--checkpoint", run[0], "--temperature", "-1"], "temperature"),
        (["generate", "--checkpoint", run[0], "--temperature", "nan"], "temperature"),
        (["generate", "--checkpoint", run[0], "--tokens", "0"], "tokens"),
        (["generate", "--checkpoint", run[0], "--top-p", "1.5"], "top-p"),
        (["generate", "--checkpoint", run[0], "--top-k", "-1"], "top-k"),
        (["generate", "--checkpoint", run[0], "--seed", 10**30], "seed must be"),
        (["generate", "--checkpoint", run[0], "--runtime", "compiled"], "invalid choice"),
        (["generate", "--checkpoint", tmp_path / "file"], "cannot be loaded"),
        (["generate", "--checkpoint", tmp_path / "none.pt"], "there is no checkpoint"),
        (["generate"], "--checkpoint"),
        (["eval-bpc", "--checkpoint", run[0], "--text", tmp_path / "none.txt"], "cannot read"),
        (["eval-bpc", "--checkpoint", run[0], "--text", tmp_path / "notes.md"], "holds no story"),
        (["eval-bpc", "--checkpoint", run[0], "--text", tmp_path], "cannot read"),
        (["info", "--checkpoint", tmp_path / "file"], "is no checkpoint"),
        (["info", "--checkpoint", tmp_path], "no checkpoint in"),
        (["generate", "--checkpoint", tmp_path], "no checkpoint in"),
        (["generate", "--checkpoint", "x" * 5_000], "too long"),
        (["info", "--checkpoint", ""], "--checkpoint is empty"),
        (["export", "--checkpoint", run[0], "--out", ""], "--out is empty"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ]:
        assert complaint in refused(capsys, *arguments)


def test_a_truncated_checkpoint_is_one_line(run, tmp_path, capsys):
    whole = (run[0] / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    line = refused(capsys, "generate", "--checkpoint", tmp_path / "cut.pt")
    assert "cannot be loaded" in line


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_gets_no_traceback(run):
    command = [sys.executable, "-m", "flashlm_helpers", "generate"]
    command += ["--checkpoint", str(run[0]), "--tokens", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_the_console_script_is_the_same_program(capsys):
    assert "(see flashlm train --help)" in refused(capsys, "train", "--hours")
    script = Path(sys.executable).with_name("flashlm")
    if not script.exists():
        pytest.skip("the package is not installed here")
    done = subprocess.run([script, "info", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["name"].startswith("v4-")
