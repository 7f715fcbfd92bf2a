import functools
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import psutil
import pytest
import torch
from test_cli import MINE

from flashlm_helpers.cli.main import main
from flashlm_helpers.config import PRESETS, FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.experiments.race import (
    Entrant,
    RaceRecord,
    race,
    race_table,
    read_records,
    split_entrants,
)
from flashlm_helpers.experiments.size import packed_bytes
from flashlm_helpers.machine.files import append_json_line, read_json_lines
from flashlm_helpers.mixers import GatedConvMixer
from flashlm_helpers.model import FlashLM
from flashlm_helpers.registry import register_mixer

SMALL = (
    "tiny:width=16:blocks=2:hidden=16:vocabulary_size=600:compile=false:batch=2"
    ":validation_stories=5"
)
QUICK = 0.01  # minutes


@pytest.fixture(autouse=True)
def kept_apart(home):
    """Every test here has a FLASHLM_HOME of its own."""


# ---- who takes part ----


def test_entrants_change_architecture_and_recipe():
    entrant = Entrant.parse("hybrid-small:mixers=[conv, conv, attention]:ternary=false:lr=0.002")
    assert entrant.model.block_mixers == ("conv", "conv", "attention", "conv")
    assert not entrant.model.ternary and entrant.model.name == "hybrid-small"
    assert entrant.recipe == {"lr": 0.002}
    assert Entrant.parse("v4-large").model == PRESETS["v4-large"]


def test_entrants_are_read_as_before_mixers_had_names():
    entrant = Entrant.parse("hybrid-small:attention=[1, 3]:ternary=false:lr=0.002")
    assert entrant.model.block_mixers == ("conv", "attention", "conv", "attention")
    assert Entrant.parse("hybrid-small:attention=[]").model.block_mixers == ("conv",) * 4
    for text in ("v4-small:attention=[1,4]", "v4-small:mixers=[conv,attention,conv]"):
        mixers = Entrant.parse(text).model.block_mixers
        assert mixers == ("conv", "attention", "conv", "conv", "attention", "conv")


def test_the_order_of_the_changes_does_not_matter():
    for more in ("attention=[0]:blocks=8", "blocks=8:attention=[0]"):
        mixers = Entrant.parse(f"v4-small:{more}").model.block_mixers
        assert mixers == ("attention", *["conv"] * 7)
    for fewer in ("mixers=[conv,conv,attention]:blocks=3", "blocks=3:mixers=[conv,conv,attention]"):
        assert Entrant.parse(f"tiny:{fewer}").model.block_mixers == ("conv", "conv", "attention")


def test_lists_do_not_end_entrants():
    assert split_entrants("a,b:mixers=[x, y]:lr=1,c") == ["a", "b:mixers=[x, y]:lr=1", "c"]


CHANGES = [
    "", "lr", "name=x", "hours=3", "seed=1", "speed=2", "lr=fast", "lr=null", "optimizer=adamw",
    "width=wide", "width=true", "batch=0", "batch=2.5", "dropout=1", "floor=x", "weight_decay=-1",
    "ternary=False", "compile=no", "attention=[9]", "attention=[[0]]", "attention=[1,1]",
    "attention=3", "attention=null", "mixers=conv", "mixers=[]", "mixers=[conv", "mixers=[nothing]",
    "mixers=[conv,7]", "mixers=[conv,conv,conv,conv,conv,conv,conv]", "blocks=x:attention=[0]",
    "receptive_field=9", "mixers=[attention]:heads=5",
]  # fmt: skip


@pytest.mark.parametrize("text", ["v5", "", *(f"v4-small:{change}" for change in CHANGES)])
def test_entrants_that_cannot_run_are_refused_at_once(text):
    with pytest.raises(FlashLMError) as caught:
        Entrant.parse(text)
    assert "\n" not in str(caught.value)


def test_what_the_race_sets_is_no_entrants_choice():
    with pytest.raises(FlashLMError, match="the race sets hours"):
        Entrant("mine", PRESETS["tiny"], {"hours": 2.0})


# ---- running ----


def test_a_race_trains_all_for_the_same_time_and_runs_nothing_twice(text_dir, tmp_path, capfd):
    entrants = [Entrant.parse(SMALL), Entrant.parse(f"{SMALL}:ternary=false")]
    results = tmp_path / "r.jsonl"
    kept = {"text": text_dir, "results": results, "folder": tmp_path / "runs"}

    # The race is stopped after the first seed and continued, in processes of its own and in ours.
    first = race(entrants, [0], 0.02, **kept)
    records = race(entrants, [0, 1], 0.02, **kept, apart=False)
    assert records[:2] == first
    said = capfd.readouterr().err
    assert "run 2 of 2" in said and "run 4 of 4" in said and "run 2 of 4" not in said

    # Every run took its time, and is scored.
    expected = [(entrant.name, seed) for seed in (0, 1) for entrant in entrants]
    assert [(record.entrant, record.seed) for record in records] == expected
    for record in records:
        assert record.stopped_by == "budget" and record.tokens_seen > 0
        # All of the validation split, not only what picked the checkpoint.
        assert record.score.n_stories == 20
        assert record.validation[-1].bpb > 0
        assert record.validation[-1].tokens == record.tokens_seen
    assert records[0].packed_bytes < records[1].packed_bytes

    # Each left its weights, without the large file that no run goes on from.
    for record in records:
        files = {path.name for path in (tmp_path / "runs" / record.key).iterdir()}
        assert files == {"best.pt", "report.json"}
        assert record.hardware["cores"] >= 1
        model = ModelConfig.from_dict(record.config["model"])
        assert record.packed_bytes == packed_bytes(model)
        assert record.config["training"]["hours"] == pytest.approx(0.02 / 60)

    # Equal entrants share their runs, whatever they are called.
    renamed = [Entrant.parse(f"{SMALL}:ternary=true"), entrants[1]]
    again = race(renamed, [0], 0.02, **kept)
    assert [record.entrant for record in again] == [entrant.name for entrant in renamed]
    before = results.read_bytes()
    elsewhere = kept | {"folder": tmp_path / "elsewhere"}
    assert race(entrants, [0, 1], 0.02, **elsewhere) == records
    assert results.read_bytes() == before and "run" not in capfd.readouterr().err

    # Another seed adds a run, and the table has a line for each entrant.
    assert len(race(entrants[:1], [2], 0.02, **kept, apart=False)) == 1
    assert len(results.read_text().splitlines()) == 5
    table = race_table(records).splitlines()
    mean = (records[0].score.bpb + records[2].score.bpb) / 2
    assert len(table) == 3 and f"{mean:.4f}" in "".join(table)


def test_a_record_comes_back_from_its_line(text_dir, tmp_path):
    results = tmp_path / "r.jsonl"
    records = race(SMALL, minutes=QUICK, text=str(text_dir), results=results, apart=False)
    assert read_records(results) == records
    assert all(isinstance(record, RaceRecord) for record in records)
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_run_that_fails_says_why_and_leaves_no_record(text_dir, tmp_path):
    results = tmp_path / "r.jsonl"
    hopeless = Entrant.parse(f"{SMALL}:lr=1e6:clip=1e6:warmup=0")
    with pytest.raises(FlashLMError, match="not finite"):
        race([hopeless], [0], 0.2, text_dir, results=results)
    assert not results.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_race_leaves_no_run_behind_and_goes_on_anew(text_dir, tmp_path, number):
    results = tmp_path / "r.jsonl"
    command = ["race", "--presets", SMALL, "--seeds", "0"]
    command += ["--text-dir", str(text_dir), "--results", str(results), "--minutes"]
    program = [sys.executable, "-m", "flashlm_helpers"]
    process = subprocess.Popen([*program, *command, "5"], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if ", batch " in line:  # training is about to start
            break

    # The signal is for the race alone, not for its run.
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not results.exists()

    # The same command runs it from its start.
    assert main([*command, "0.02"]) == 0
    assert len(results.read_text().splitlines()) == 1


def test_results_survive_a_lost_newline_and_refuse_what_is_no_record(text_dir, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": "a"}')
    append_json_line(path, {"key": "b\u2028"})
    assert read_json_lines(path) == [{"key": "a"}, {"key": "b\u2028"}]
    for content in ("{", "[1]", "7", '{"key": "a"}', '{"validation": 3}', '{"score": []}'):
        path.write_text(content)
        with pytest.raises(FlashLMError, match="r.jsonl"):
            race(SMALL, [0], QUICK, text_dir, results=path)
        assert path.read_text() == content


# ---- parts of one's own ----


class LocalModel(FlashLM):
    """A model of this module."""


def plain_sgd(network, recipe, momentum=0.0):
    """An optimizer of this module."""
    return torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=momentum)


def test_own_parts_race_in_this_process(stories, tmp_path):
    class Inner(FlashLM):
        """A class that no other process can import."""

    model = Entrant.parse(SMALL)
    mine = replace(model, name="mine", build_model=Inner)
    with pytest.raises(FlashLMError, match="Inner is defined in this program.*apart=False"):
        race([model, mine], minutes=QUICK, text="builtin", limit=50)
    with pytest.raises(FlashLMError, match="strings.*apart=False"):
        race([model], minutes=QUICK, text=stories)

    # In this process they run, on strings as well, and own parts are another run.
    records = race([model, mine], minutes=QUICK, text=stories, apart=False)
    assert [record.entrant for record in records] == [SMALL, "mine"]
    assert records[0].key != records[1].key
    assert records[0].corpus == "stories"


def test_functions_without_a_name_of_their_own_can_race(stories):
    """Parts may be lambdas or partial functions; the entrants' names tell them apart."""
    model = Entrant.parse(SMALL)
    entrants = [
        replace(model, name="one", build_optimizer=lambda *both: plain_sgd(*both, momentum=0.1)),
        replace(model, name="two", build_optimizer=lambda *both: plain_sgd(*both, momentum=0.9)),
        replace(model, name="three", build_optimizer=functools.partial(plain_sgd, momentum=0.5)),
        replace(model, name="four", build_model=functools.partial(LocalModel)),
    ]
    assert len(race(entrants, minutes=QUICK, text=stories, apart=False)) == 4
    with pytest.raises(FlashLMError, match="apart=False"):
        race(entrants[0], minutes=QUICK, text="builtin")


MY_PARTS = """
from flashlm_helpers.model import FlashLM


class Quiet(FlashLM):
    pass


def plain_sgd(network, recipe):
    return torch.optim.SGD(network.parameters(), lr=recipe.lr)
"""


def test_importable_parts_race_in_processes_of_their_own(tmp_path, monkeypatch, text_dir):
    (tmp_path / "my_parts.py").write_text(MINE + MY_PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    import my_parts

    register_mixer("raced", my_parts.Mean)
    mixed = Entrant.parse(f"{SMALL}:mixers=[conv,raced]")
    mine = Entrant("mine", mixed.model, mixed.recipe, my_parts.Quiet, my_parts.plain_sgd)
    record = race(mine, minutes=QUICK, text=text_dir)[0]
    assert record.config["model"]["mixers"] == ["conv", "raced"] and record.entrant == "mine"


def test_a_mixer_that_cannot_be_imported_races_in_this_process(text_dir):
    class Hidden(GatedConvMixer):
        """A class that no other process can import."""

    register_mixer("hidden", Hidden)
    hidden = f"{SMALL}:mixers=[hidden]"
    with pytest.raises(FlashLMError, match="hidden is defined in this program"):
        race([SMALL, hidden], minutes=QUICK, text=text_dir)
    assert len(race([hidden], minutes=QUICK, text=text_dir, apart=False)) == 1


PROGRAM = """
import sys
import flashlm_helpers as fl

if __name__ == "__main__":
    entrant, text = sys.argv[1:]
    fl.register_mixer("mine", Mean)
    try:
        fl.race(entrant, minutes=0.01, text=text)
    except fl.FlashLMError as error:
        print(error)
    print(fl.race(entrant, minutes=0.01, text=text, apart=False)[0].stopped_by)
"""


def test_a_class_of_the_program_itself_cannot_race_apart(tmp_path, text_dir):
    """What is defined in __main__, as in a notebook, cannot be imported by other processes."""
    program = tmp_path / "program.py"
    program.write_text(MINE + PROGRAM)
    command = [sys.executable, str(program), f"{SMALL}:mixers=[mine]", str(text_dir)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    refusal, result = done.stdout.splitlines()
    assert "mine is defined in this program" in refusal and "apart=False" in refusal
    assert result == "budget"


# ---- results of earlier versions ----

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"

# As the version that ran these races printed it.
OLD_TABLE = """
entrant                                                    BPB (spread)  nats/token M tokens
hybrid-small:batch=16                              0.7370 (0.0014)   2.0303     6.75    19,313
hybrid-small:optimizer=muon:batch=16               0.7417 (-)        2.0434     6.03    17,246
hybrid-small:optimizer=muon:sampled_softmax=false  0.7560 (-)        2.0828     5.22    15,490
hybrid-small:optimizer=muon                        0.7628 (-)        2.1015     5.15    15,059
hybrid-large:optimizer=muon:sampled_softmax=false  0.7716 (-)        2.1257     3.98    11,917
v4-small:optimizer=muon:batch=16                   0.8397 (0.0026)   2.3618     8.96    25,356
v4-small:batch=16                                  0.8415 (0.0011)   2.3668    10.84    30,695
v4-small:optimizer=muon                            0.8549 (-)        2.4045     8.53    24,353
v4-small:optimizer=muon:sampled_softmax=false      0.8899 (-)        2.5030     5.49    15,889
"""


def test_results_of_earlier_versions_are_read():
    """They name optimizers that are gone, and list attention; the table stays the same."""
    for name in ("builtin-2min", "path", "slice-20min", "slice-48s", "slice-6min"):
        path = RESULTS / f"{name}.jsonl"
        records = read_records(path)
        assert len(records) == len(path.read_text().splitlines())
        assert len(race_table(records).splitlines()) > 1
        for record in records:
            ModelConfig.from_dict(record.config["model"])
            TrainConfig.from_dict(record.config["training"])

    table = race_table(read_records(RESULTS / "slice-6min.jsonl")).splitlines()
    for found, expected in zip(table, OLD_TABLE.strip().splitlines(), strict=True):
        assert found.split()[:5] == expected.split()[:5]
    assert table[1].split()[-2:] == ["1.75", "3"]


def test_the_table_is_sorted_by_bits_per_byte_and_averages_over_seeds():
    records = read_records(RESULTS / "slice-6min.jsonl")
    runs = [record for record in records if record.entrant == "v4-small:batch=16"]
    bpb = [run.score.bpb for run in runs]
    assert len(bpb) == 3
    line = race_table(runs).splitlines()[1].split()
    assert line[1] == f"{mean(bpb):.4f}" and line[2] == f"({stdev(bpb):.4f})"
    assert line[-1] == "3"


# ---- the command ----


def test_the_command_prints_a_table_and_draws_the_curves(text_dir, tmp_path, capsys):
    results = tmp_path / "deep" / "mine.jsonl"
    entrants = [f"{SMALL}:attention=[0,1]", SMALL]
    command = ["race", "--presets", ",".join(entrants), "--minutes", "0.01", "--seeds", "3"]
    command += ["--text-dir", str(text_dir), "--results", str(results)]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [record["entrant"] for record in printed["records"]] == entrants
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert printed.keys() == {"results", "figure", "records"}
    assert printed["records"] == read_json_lines(results)

    # In plain words; nothing is run again.
    assert main(command) == 0
    said = capsys.readouterr()
    assert race_table(read_records(results)) in said.out and "run 1" not in said.err


def test_a_record_has_the_keys_that_others_read(text_dir, tmp_path):
    """All of what earlier versions recorded is there."""
    results = tmp_path / "r.jsonl"
    race(SMALL, minutes=QUICK, text=text_dir, results=results, apart=False)
    new = read_json_lines(results)[0]
    old = read_json_lines(RESULTS / "slice-6min.jsonl")[0]
    assert new.keys() == old.keys()
    for part in ("score", "hardware", "seconds_by_activity"):
        assert new[part].keys() == old[part].keys()
    assert new["parameters"].keys() == old["parameters"].keys() | {"other"}
    assert new["validation"][0].keys() == old["validation"][0].keys()
    model = old["config"]["model"].keys() - {"attention"} | {"mixers"}
    assert new["config"]["model"].keys() == model
    assert new["config"]["training"].keys() == old["config"]["training"].keys() - {"optimizer"}


ONE = ["--presets", "v4-small"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([*ONE, "--minutes", "0"], "minutes must be greater"),
        ([*ONE, "--minutes", "inf"], "minutes must be greater"),
        ([*ONE, "--minutes", "nan"], "minutes must be greater"),
        (["--presets", "v4-small,v4-small:lr=0.004", "--minutes", "1"], "would run twice"),
        ([*ONE, "--minutes", "1", "--seeds", "1,1"], "would run twice"),
        ([*ONE, "--minutes", "1", "--results", "r.png"], "must end in .jsonl"),
        ([*ONE, "--minutes", "1", "--seeds", "0,-1"], "seed must be"),
        ([*ONE, "--minutes", "1", "--seeds", "a"], "--seeds must be whole numbers"),
        ([*ONE, "--minutes", "1", "--seeds", ""], "--seeds must be whole numbers"),
        ([*ONE, "--minutes", "1", "--seeds", "-1"], "seed must be"),
        (["--presets", "nothing", "--minutes", "1"], "no preset 'nothing'"),
        (["--presets", "", "--minutes", "1"], "no preset ''"),
        (["--presets", "v4-small:optimizer=muon", "--minutes", "1"], "'optimizer=muon' in"),
        (["--presets", "tiny:mixers=[mine]", "--minutes", "1"], "'mine' is not registered"),
    ],
)
def test_races_that_cannot_be_are_refused_in_one_line(arguments, complaint, text_dir, capsys):
    assert main(["race", "--text-dir", str(text_dir), *arguments]) == 2
    message = capsys.readouterr().err
    assert complaint in message and message.count("\n") == 1


def test_races_of_nobody_are_refused(text_dir):
    for entrants, seeds in (([], [0]), ([SMALL], [])):
        with pytest.raises(FlashLMError, match="nobody races"):
            race(entrants, seeds, QUICK, text_dir)
