import json

import pytest

from flashlm_helpers.__main__ import main
from flashlm_helpers.config import PRESETS, FlashLMError
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


@pytest.mark.parametrize("text", ["v5", "", "v4-small:", "v4-small:lr", "v4-small:name=x", "v4-small:hours=3",
                                  "v4-small:seed=1", "v4-small:speed=2", "v4-small:lr=fast", "v4-small:optimizer=sgd",
                                  "v4-small:width=wide", "v4-small:batch=0", "v4-small:dropout=1",
                                  "v4-small:attention=[9]", "v4-small:attention=3", "v4-small:receptive_field=9"])
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


def test_the_command_prints_a_table_and_draws_the_curves(text_dir, home, tmp_path, capsys):
    results = tmp_path / "deep" / "mine.jsonl"
    assert main(["race", "--presets", f"{SMALL}:attention=[0,1],{SMALL}", "--minutes", "0.01", "--seeds", "3",
                 "--text-dir", str(text_dir), "--results", str(results), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [r["entrant"] for r in printed["records"]] == [f"{SMALL}:attention=[0,1]", SMALL]
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments, complaint", [
    (["--presets", "v4-small", "--minutes", "0"], "hours must be greater"),
    (["--presets", "v4-small", "--minutes", "1", "--seeds", "a"], "--seeds must be whole numbers"),
    (["--presets", "nothing", "--minutes", "1"], "no preset 'nothing'"),
    (["--presets", "v4-small", "--minutes", "1", "--seeds", "-1"], "seed must be")])
def test_races_that_cannot_be_are_refused_in_one_line(arguments, complaint, text_dir, home, capsys):
    assert main(["race", "--text-dir", str(text_dir), *arguments]) == 2
    message = capsys.readouterr().err
    assert complaint in message and message.count("\n") == 1
