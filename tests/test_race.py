import json
import signal
import subprocess
import sys

import psutil
import pytest

from flashlm_helpers.__main__ import main
from flashlm_helpers.config import PRESETS, FlashLMError
from flashlm_helpers.files import append_json_line, read_json_lines
from flashlm_helpers.race import Entrant, race, race_table

SMALL = "tiny:width=16:blocks=2:hidden=16:vocabulary_size=600:compile=false:batch=2:validation_stories=5"


@pytest.fixture
def source(text_dir, home):
    return {"dataset": None, "text_dir": str(text_dir), "limit": None}


def test_entrants_change_architecture_and_recipe():
    entrant = Entrant.parse("hybrid-small:attention=[1, 3]:ternary=false:optimizer=adamw:lr=0.002")
    assert entrant.model.attention == (1, 3) and not entrant.model.ternary and entrant.model.name == "hybrid-small"
    assert entrant.recipe == {"optimizer": "adamw", "lr": 0.002}
    assert Entrant.parse("v4-large").model == PRESETS["v4-large"]


@pytest.mark.parametrize("text", [
    "v5", "", *(f"v4-small:{change}" for change in (
        "", "lr", "name=x", "hours=3", "seed=1", "speed=2", "lr=fast", "lr=null", "optimizer=sgd", "width=wide",
        "width=true", "batch=0", "batch=2.5", "dropout=1", "floor=x", "weight_decay=-1", "ternary=False", "compile=no",
        "attention=[9]", "attention=[[0]]", "attention=[1,1]", "attention=3", "receptive_field=9"))])
def test_entrants_that_cannot_run_are_refused_at_once(text):
    with pytest.raises(FlashLMError):
        Entrant.parse(text)


def test_a_race_trains_all_for_the_same_time_and_runs_nothing_twice(source, tmp_path, capfd):
    entrants, results = [Entrant.parse(SMALL), Entrant.parse(f"{SMALL}:ternary=false")], tmp_path / "r.jsonl"
    records = race(entrants, [0, 1], 0.02, source, results, tmp_path / "runs")
    assert [(r["entrant"], r["seed"]) for r in records] == [(e.name, s) for s in (0, 1) for e in entrants]
    for record in records:
        assert record["stopped_by"] == "budget" and record["tokens_seen"] > 0
        assert record["score"]["n_stories"] == 20  # all of the validation split, not only what picked the checkpoint
        assert record["validation"][-1]["bpb"] > 0 and record["validation"][-1]["tokens"] == record["tokens_seen"]
    assert records[0]["packed_bytes"] < records[1]["packed_bytes"]
    # Equal entrants share their runs, whatever they are called.
    renamed = [Entrant.parse(f"{SMALL}:ternary=true"), entrants[1]]
    assert [r["entrant"] for r in race(renamed, [0], 0.02, source, results, tmp_path / "runs")] == [
        e.name for e in renamed]
    before = results.read_bytes()
    assert race(entrants, [0, 1], 0.02, source, results, tmp_path / "elsewhere") == records
    assert results.read_bytes() == before and "run 1 of 4" in capfd.readouterr().err
    assert len(race(entrants[:1], [2], 0.02, source, results, tmp_path / "runs")) == 1
    assert len(results.read_text().splitlines()) == 5
    table, scores = race_table(records).splitlines(), [r["score"]["bpb"] for r in records]
    assert len(table) == 3 and f"{(scores[0] + scores[2]) / 2:.4f}" in "".join(table)


def test_a_run_that_fails_says_why_and_leaves_no_record(source, tmp_path):
    with pytest.raises(FlashLMError, match="not finite"):
        race([Entrant.parse(f"{SMALL}:lr=1e6:clip=1e6:optimizer=adamw:warmup=0")], [0], 0.2, source,
             tmp_path / "r.jsonl", tmp_path / "runs")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_race_leaves_no_run_behind_and_goes_on_anew(text_dir, home, tmp_path, number):
    results = tmp_path / "r.jsonl"
    command = [sys.executable, "-m", "flashlm_helpers", "race", "--presets", SMALL, "--seeds", "0", "--text-dir",
               str(text_dir), "--results", str(results), "--minutes"]
    race = subprocess.Popen([*command, "5"], stderr=subprocess.PIPE, text=True)
    for line in race.stderr:
        if "threads, batch" in line:  # training is about to start
            break
    children = psutil.Process(race.pid).children(recursive=True)
    race.send_signal(number)  # to the race alone, not to its run
    said = race.communicate(timeout=60)[1]
    assert race.returncode == 130 and "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not results.exists()
    assert subprocess.run([*command, "0.02"], capture_output=True).returncode == 0
    assert len(results.read_text().splitlines()) == 1


def test_results_survive_a_lost_newline_and_refuse_what_is_no_record(source, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": "a"}')
    append_json_line(path, {"key": "b\u2028"})
    assert read_json_lines(path) == [{"key": "a"}, {"key": "b\u2028"}]
    for content in ("{", "[1]", "7"):
        path.write_text(content)
        with pytest.raises(FlashLMError, match="r.jsonl"):
            race([Entrant.parse(SMALL)], [0], 0.01, source, path, tmp_path / "runs")
        assert path.read_text() == content


def test_the_command_prints_a_table_and_draws_the_curves(text_dir, home, tmp_path, capsys):
    results = tmp_path / "deep" / "mine.jsonl"
    assert main(["race", "--presets", f"{SMALL}:attention=[0,1],{SMALL}", "--minutes", "0.01", "--seeds", "3",
                 "--text-dir", str(text_dir), "--results", str(results), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [r["entrant"] for r in printed["records"]] == [f"{SMALL}:attention=[0,1]", SMALL]
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, complaint", [
    (["--presets", "v4-small", "--minutes", "0"], "minutes must be greater"),
    (["--presets", "v4-small", "--minutes", "inf"], "minutes must be greater"),
    (["--presets", "v4-small,v4-small:optimizer=adamw", "--minutes", "1"], "would run twice"),
    (["--presets", "v4-small", "--minutes", "1", "--seeds", "1,1"], "would run twice"),
    (["--presets", "v4-small", "--minutes", "1", "--results", "r.png"], "must end in .jsonl"),
    (["--presets", "v4-small", "--minutes", "1", "--seeds", "0,-1"], "seed must be"),
    (["--presets", "v4-small", "--minutes", "1", "--seeds", "a"], "--seeds must be whole numbers"),
    (["--presets", "nothing", "--minutes", "1"], "no preset 'nothing'"),
    (["--presets", "v4-small", "--minutes", "1", "--seeds", "-1"], "seed must be")])
def test_races_that_cannot_be_are_refused_in_one_line(arguments, complaint, text_dir, home, capsys):
    assert main(["race", "--text-dir", str(text_dir), *arguments]) == 2
    message = capsys.readouterr().err
    assert complaint in message and message.count("\n") == 1
