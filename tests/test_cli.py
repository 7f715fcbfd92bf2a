import json
import os
import re
import subprocess
import sys

import pytest
from conftest import write_stories

from flashlm_helpers import corpus, fastpath
from flashlm_helpers.__main__ import main, stories_for
from flashlm_helpers.evaluation import evaluate

QUICK = ["--small", "--epochs", "0.02", "--batch", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_dir):
    """A finished run of a few steps, made by the command line in a process of its own."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "run"
    done = subprocess.run([sys.executable, "-m", "flashlm_helpers", "train", *QUICK, "--text-dir", text_dir.name,
                           "--save-dir", str(folder), "--json"], capture_output=True, text=True, cwd=text_dir.parent,
                          env={**os.environ, "FLASHLM_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


@pytest.fixture(autouse=True)
def kept_apart(home):
    """Every test here has a FLASHLM_HOME of its own."""


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


def test_train_writes_a_run_and_prints_one_json_object(run):
    folder, result, notices = run
    assert {"best.pt", "last.pt", "report.json"} == {p.name for p in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert result["bpb"] == report["bpb"] and result["story"].startswith("Once upon a time")
    assert report["config"]["model"]["name"] == "v4-small" and report["hardware"]["cores"] >= 1
    assert "tokens/s" in notices and "Traceback" not in notices


def test_train_in_plain_words(text_dir, tmp_path, capsys):
    assert main(["train", *QUICK, "--text-dir", str(text_dir), "--save-dir", str(tmp_path / "run"), "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "BPC" in out and "Once upon a time" in out and str(tmp_path / "run") in out


def test_eval_bpc_agrees_with_the_package(run, text_dir, capsys):
    from flashlm_helpers.checkpoint import load_model

    texts = [s.strip() for s in (text_dir / "valid.txt").read_text().split(corpus.SEPARATOR) if s.strip()]
    expected = evaluate(*load_model(run[0]), texts)
    assert main(["eval-bpc", "--checkpoint", str(run[0]), "--text", str(text_dir / "valid.txt"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name, value in expected.as_dict().items():
        assert result[name] == value
    assert {"uniform", "unigram", "trigram (Kneser-Ney)", "xz -9e", "zstd -19"} == result["baselines"].keys()
    assert main(["eval-bpc", "--checkpoint", str(run[0] / "best.pt"), "--text", str(text_dir / "valid.txt")]) == 0
    out = capsys.readouterr().out
    assert f"{expected.bpc:.4f}" in out and "trigram" in out


def test_eval_bpc_works_where_the_training_text_is_gone(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flashlm_helpers.__main__.open_corpus",
                        lambda *a, **k: corpus.open_corpus(text_dir=tmp_path / "gone"))
    (tmp_path / "one.txt").write_text("A single story.")
    assert main(["eval-bpc", "--checkpoint", str(run[0]), "--text", str(tmp_path / "one.txt"), "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["interval"] is None and "unigram" not in result["baselines"] and "not at hand" in said.err


def test_generate_is_reproducible_and_survives_unknown_characters(run, capsys):
    texts = []
    for _ in range(2):
        assert main(["generate", "--checkpoint", str(run[0]), "--prompt", "Żółw 🐢", "--tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("Żółw 🐢")
    assert main(["generate", "--checkpoint", str(run[0]), "--tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Once upon a time"


def test_a_compact_model_is_small_and_scores_and_tells_as_the_whole_one(run, text_dir, tmp_path, capsys):
    folder = run[0]
    out = tmp_path / "sub" / "compact.pt"
    assert main(["export", "--checkpoint", str(folder), "--format", "compact", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == out.stat().st_size < (folder / "best.pt").stat().st_size / 3
    scores, stories = [], []
    for checkpoint in (folder, out):
        assert main(["eval-bpc", "--checkpoint", str(checkpoint), "--text", str(text_dir / "valid.txt"), "--json",
                     "--no-baselines"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["bpb"])
        assert main(["generate", "--checkpoint", str(checkpoint), "--temperature", "0", "--tokens", "20"]) == 0
        stories.append(capsys.readouterr().out)
    assert scores[0] == pytest.approx(scores[1], abs=2e-3) and stories[0] == stories[1]
    assert "does not say which text" in refused(capsys, "train", "--resume", out, "--hours", "1")
    for taken in (folder / "last.pt", tmp_path):
        assert "is there already" in refused(capsys, "export", "--checkpoint", folder, "--out", taken)
    assert str(text_dir).encode() not in out.read_bytes()  # what is handed around does not tell about folders
    assert main(["eval-bpc", "--checkpoint", str(out), "--text", str(text_dir / "valid.txt"), "--json"]) == 0
    assert "does not say which text" in capsys.readouterr().err


def test_info_counts(run, capsys):
    assert main(["info", "--preset", "v4-small", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["parameters"]["total"] == 4_364_736 and info["receptive_field"] == 43
    assert info["ternary_share"] == pytest.approx(info["parameters"]["ternary"] / 4_364_736)
    assert main(["info", "--checkpoint", str(run[0])]) == 0
    assert "receptive field: 43 tokens" in capsys.readouterr().out


def test_resume_goes_on_with_the_same_text_from_anywhere(run, tmp_path, capsys, monkeypatch):
    further = tmp_path / "further"
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--resume", str(run[0]), "--epochs", "0.04", "--save-dir", str(further), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] > run[1]["steps"] and result["source"] == run[1]["source"]
    assert result["history"]["train"][: len(run[1]["history"]["train"])] == run[1]["history"]["train"]
    assert (further / "best.pt").is_file() and result["bpb"] <= run[1]["bpb"]


def test_resume_is_refused_where_it_cannot_be_exact(run, tmp_path, capsys):
    folder = run[0]
    assert "larger --hours or --epochs" in refused(capsys, "train", "--resume", folder)
    assert "holds a v4-small" in refused(capsys, "train", "--resume", folder, "--large")
    assert "--vocab-size" in refused(capsys, "train", "--resume", folder, "--vocab-size", 500)
    write_stories(tmp_path / "train.txt", ["other words", "entirely different", "than before"])
    write_stories(tmp_path / "valid.txt", ["and others here"])
    assert "another vocabulary" in refused(capsys, "train", "--resume", folder, "--epochs", 1, "--text-dir", tmp_path)
    assert "there is no checkpoint" in refused(capsys, "train", "--resume", tmp_path)


def test_a_run_is_never_overwritten(run, text_dir, capsys):
    before = (run[0] / "last.pt").read_bytes()
    assert "holds a run already" in refused(capsys, "train", *QUICK, "--text-dir", text_dir, "--save-dir", run[0])
    assert (run[0] / "last.pt").read_bytes() == before


def make_text(folder, train=None, valid="One.\n<|endoftext|>\n"):
    folder.mkdir(exist_ok=True)
    if train is not None:
        (folder / "train.txt").write_bytes(train if isinstance(train, bytes) else train.encode())
        (folder / "valid.txt").write_text(valid)
    return folder


@pytest.mark.parametrize("train, complaint", [
    (None, "is empty"), (b"\x89PNG\r\n\x1a\n\x00\x00", "UTF-8|binary"), (b"na\xefve", "not valid UTF-8"),
    (b"a\x00b", "binary"), ("only one story", "one story only"), ("", "text is empty"),
    ("\n<|endoftext|>\n", "text is empty")])
def test_bad_text_is_one_line(tmp_path, capsys, train, complaint):
    folder = make_text(tmp_path / "text", train)
    line = refused(capsys, "train", *QUICK, "--text-dir", folder, "--save-dir", tmp_path / "r")
    assert re.search(complaint, line)
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_arguments_are_one_line(text_dir, tmp_path, run, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes.md").touch()
    text = ["--text-dir", text_dir]
    for arguments, complaint in [
        (["--text-dir", tmp_path], "holds no train"),
        (["--text-dir", tmp_path / "none"], "not a folder"),
        ([*text, "--hours", 0], "hours must be greater than 0"),
        ([*text, "--hours", "nan"], "hours must be greater than 0"),
        ([*text, "--hours", "soon"], "invalid float"),
        ([*text, "--batch", 0], "batch must be at least 1"),
        ([*text, "--seed", -1], "seed must be"),
        ([*text, "--seed", 10**30], "seed must be"),
        ([*text, "--batch", 10_000_000], "try --batch"),
        ([*text, "--save-dir", tmp_path / "file" / "run"], "cannot write"),
        ([*text, "--vocab-size", 9_999], "supports a vocabulary of"),
        ([*text, "--vocab-size", 12], "between 260 and"),
        ([*text, "--small", "--large"], "not allowed with"),
        ([*text, "--dataset", "builtin"], "not allowed with"),
        (["--dataset", "nonsense"], "unknown dataset"),
    ]:
        assert complaint in refused(capsys, "train", *arguments)
    for arguments, complaint in [
        (["generate", "--checkpoint", run[0], "--prompt", ""], "prompt is empty"),
        (["generate", "--checkpoint", run[0], "--temperature", "-1"], "temperature"),
        (["generate", "--checkpoint", run[0], "--seed", 10**30], "seed must be"),
        (["generate", "--checkpoint", tmp_path / "file"], "cannot be loaded"),
        (["generate", "--checkpoint", tmp_path / "none.pt"], "there is no checkpoint"),
        (["eval-bpc", "--checkpoint", run[0], "--text", tmp_path / "none.txt"], "cannot read"),
        (["eval-bpc", "--checkpoint", run[0], "--text", tmp_path / "notes.md"], "holds no story"),
        (["eval-bpc", "--checkpoint", run[0], "--text", tmp_path], "cannot read"),
        (["info", "--checkpoint", tmp_path / "file"], "cannot be loaded"),
        (["generate", "--checkpoint", "x" * 5_000], "too long"),
        (["info", "--checkpoint", ""], "--checkpoint is empty"),
        (["train", "--resume", ""], "--resume is empty"),
        (["train", "--epochs", "1e308"], "epochs must be"),
        (["train", "--hours", "1e306"], "hours must be"),
        (["nonsense"], "invalid choice"),
        ([], "required"),
    ]:
        assert complaint in refused(capsys, *arguments)


@pytest.mark.parametrize("flags, compilations", [([], 1), (["--eager"], 0)])
def test_eager_turns_compiling_off(text_dir, home, monkeypatch, flags, compilations):
    calls = []
    monkeypatch.setattr(fastpath, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(fastpath, "compile_model", lambda model, bfloat16: calls.append(model) or "not in this test")
    assert main(["train", *QUICK, *flags, "--text-dir", str(text_dir), "--save-dir", str(home / "run")]) == 0
    assert len(calls) == compilations


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_leaves_early_gets_no_traceback(run):
    command = [sys.executable, "-m", "flashlm_helpers", "generate", "--checkpoint", str(run[0]), "--tokens", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_a_truncated_checkpoint_is_one_line(run, tmp_path, capsys):
    whole = (run[0] / "best.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(capsys, "generate", "--checkpoint", tmp_path / "cut.pt")


def test_timed_runs_take_as_much_text_as_they_can_read():
    assert stories_for(None) is None
    assert stories_for(0.01) == 20_000
    assert stories_for(2) >= 100_000 and stories_for(2) % 20_000 == 0


def test_an_unreachable_hub_trains_on_the_builtin_corpus(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr(corpus, "BUILTIN_STORIES", {"train": 60, "valid": 20})
    assert main(["train", *QUICK, "--save-dir", str(tmp_path / "r"), "--json"]) == 0
    said = capsys.readouterr()
    assert "using the built-in corpus" in said.err
    assert json.loads(said.out)["source"]["dataset"] == "builtin"
    assert "cannot be read from the hub" in refused(capsys, "train", "--dataset", "tinystories", "--hours", "1",
                                                    "--save-dir", tmp_path / "s")
