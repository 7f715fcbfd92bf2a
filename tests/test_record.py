"""The table of records: its page, and all that one command enters into it."""

import importlib.util
import json
import os
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from conftest import HYBRID, lively, write_stories

import flashlm_helpers as fl
from flashlm_helpers.machine.hardware import allowed_cores
from flashlm_helpers.mixers import GatedConvMixer
from flashlm_helpers.runtime.pytorch import PyTorchModel

path = Path(__file__).parent.parent / "benchmarks" / "record.py"
spec = importlib.util.spec_from_file_location("record", path)
record = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record)

SMALL = (
    "tiny:width=32:blocks=2:hidden=48:vocabulary_size=600:compile=false:batch=2"
    ":validation_stories=5"
)
ROW = record.Row(
    name="mine",
    minutes=20,
    text="tales",
    digests={"train": "aaa", "valid": "bbb"},
    bpb=0.7,
    interval=[0.69, 0.71],
    n_stories=100,
    tokens_seen=12_340_000,
    epochs=3.0,
    peak_memory_bytes=1_080_000_000,
    packed_bytes=2_450_000,
    not_packed=None,
    causal=True,
    other_cores=0.02,
    fewest_threads=2,
    hardware={"processor": "Some CPU", "matmul": "bfloat16"},
    config={"model": {}, "training": {}},
    commit="123456789",
    command="python benchmarks/record.py --minutes 20 --preset tiny --text-dir DIR",
    finished="2026-01-01T00:00:00Z",
)
two_cores_here = pytest.mark.skipif(
    min(len(allowed_cores()), psutil.cpu_count(logical=False) or 2) < 2, reason="one core only"
)


@pytest.fixture(autouse=True)
def kept_apart(home, tmp_path, monkeypatch):
    """No test writes into the clone's records, or is bound by the threads that the shell set."""
    monkeypatch.setattr(record, "RECORDS", tmp_path / "records.jsonl")
    monkeypatch.setattr(record, "TABLE", tmp_path / "RECORDS.md")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


# ---- the page ----


def table_of(page):
    """The cells of all rows below a heading of columns, without those of the heading."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [re.split(r"(?<!\\) \| ", line[2:-2]) for line in lines if "| BPB |" not in line]


def test_a_row_says_all_that_was_measured():
    [cells] = table_of(record.render([ROW]))
    assert cells == [
        "mine", "0.7000 [0.6900, 0.7100]", "12.34", "1.08", "2.45", "yes", "Some CPU, bfloat16",
        "123456789", f"`{ROW.command}`",
    ]  # fmt: skip


def test_the_best_comes_first_and_what_sees_the_future_last():
    rows = [
        replace(ROW, name="cheat", bpb=0.1, causal=False),
        replace(ROW, name="second", bpb=0.72),
        replace(ROW, name="first", bpb=0.71),
    ]
    cells = table_of(record.render(rows))
    assert [row[0] for row in cells] == ["first", "second", "cheat"]
    assert [row[5] for row in cells] == ["yes", "yes", "**no**"]


def test_each_text_and_time_has_a_table_of_its_own():
    other = {"train": "ccc", "valid": "bbb"}
    rows = [ROW, replace(ROW, minutes=5), replace(ROW, digests=other), replace(ROW, name="x")]
    page = record.render(rows)
    headings = [line for line in page.splitlines() if "minutes on" in line]
    assert headings == [
        "## 5 minutes on tales (train `aaa`, valid `bbb`)",
        "## 20 minutes on tales (train `aaa`, valid `bbb`)",
        "## 20 minutes on tales (train `ccc`, valid `bbb`)",
    ]
    assert len(table_of(page)) == 4


def test_what_is_missing_or_disturbed_is_said():
    row = replace(ROW, packed_bytes=None, not_packed="its mixer is unknown", interval=None)
    [cells] = table_of(record.render([row]))
    assert cells[4] == "- (its mixer is unknown)" and cells[1] == "0.7000"
    for noisy in (replace(ROW, other_cores=0.7), replace(ROW, fewest_threads=1)):
        [cells] = table_of(record.render([noisy]))
        assert re.fullmatch(r"mine \(beside programs that used 0.\d cores\)", cells[0])


def test_nothing_in_a_row_can_break_its_table():
    rows = [replace(ROW, name="a|b\n| c", command="x | y")]
    [cells] = table_of(record.render(rows))
    assert len(cells) == 9 and cells[0] == r"a\|b \| c"


def test_the_rules_are_ten_lines_and_an_empty_page_says_so():
    page = record.render([])
    rules = re.findall(r"(?m)^(\d+)\. .*$", page)
    assert rules == [str(number) for number in range(1, 11)]
    assert "No row has been entered yet" in page


def test_the_page_of_the_clone_is_that_of_its_records():
    folder = path.parent
    rows = record.read_rows(folder / "results" / "records.jsonl")
    page = (folder / "RECORDS.md").read_text(encoding="utf-8")
    assert page == record.render(rows), "run python benchmarks/record.py --table"


# ---- the text, the cores, the commit ----


def test_a_digest_is_of_the_stories_whatever_file_has_them(tmp_path, stories):
    for name in ("one", "two", "three", "four"):
        (tmp_path / name).mkdir()
    write_stories(tmp_path / "one" / "train.txt", stories)
    lines = "".join(json.dumps({"text": f" {story}\n"}) + "\n" for story in stories)
    (tmp_path / "two" / "train.jsonl").write_text(lines)
    joined = [" ".join(stories[:2]), *stories[2:]]
    write_stories(tmp_path / "three" / "train.txt", joined)
    write_stories(tmp_path / "four" / "train.txt", [*stories[1:], stories[0]])

    digests = [record.digest(fl.open_corpus(folder), "train") for folder in tmp_path.iterdir()]
    assert len(set(digests)) == 3
    one, two = (record.digest(fl.open_corpus(tmp_path / name), "train") for name in ("one", "two"))
    assert one == two


def test_two_cores_are_two_physical_ones_where_there_are(monkeypatch):
    pairs = {0: {0, 4}, 1: {1, 5}, 4: {0, 4}, 5: {1, 5}}
    monkeypatch.setattr(record, "_siblings", pairs.__getitem__)
    assert record.choose_cores([0, 4, 1, 5]) == [0, 1]
    assert record.choose_cores([4, 0]) == [4, 0]


@two_cores_here
def test_the_bound_holds_in_the_block_and_is_taken_back(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = allowed_cores()
    with pytest.raises(ZeroDivisionError), record.two_cores():
        assert len(allowed_cores()) == 2 or sys.platform == "darwin"
        assert os.environ["OMP_NUM_THREADS"] == "2"
        raise ZeroDivisionError
    assert allowed_cores() == before and os.environ["OMP_NUM_THREADS"] == "3"


def test_a_folder_without_git_has_no_commit(monkeypatch, tmp_path):
    found = record.commit()
    assert found == "-" or re.fullmatch(r"[0-9a-f]{9,}(\+changes)?", found)
    monkeypatch.setattr(record, "HERE", tmp_path / "benchmarks")
    assert record.commit() == "-"


# ---- causality ----


class LooksAhead(GatedConvMixer):
    """Mixes in one position after its own."""

    def forward(self, x, state=None):
        mixed, state = super().forward(x, state)
        return mixed.roll(-1, dims=1), state


class MixesTexts(GatedConvMixer):
    """Mixes in the other texts of the batch."""

    def forward(self, x, state=None):
        return super().forward(x + x.mean(0, keepdim=True), state)


@pytest.mark.parametrize("mixers", ["conv", "hybrid"])
def test_the_models_of_the_package_are_causal(vocabulary, stories, mixers):
    model = lively(vocabulary, **(HYBRID if mixers == "hybrid" else {}))
    assert record.is_causal(model, stories[100:])


@pytest.mark.parametrize("mixer", [LooksAhead, MixesTexts])
def test_a_mixer_that_reads_what_it_must_not_is_noticed(vocabulary, stories, mixer):
    fl.register_mixer(mixer.__name__, mixer)
    model = lively(vocabulary, mixers=("conv", mixer.__name__))
    assert not record.is_causal(model, stories[100:])


def test_a_model_whose_probabilities_sum_to_more_than_one_is_noticed(vocabulary, stories):
    class Boaster(fl.FlashLM):
        def token_nll(self, hidden, targets):
            return super().token_nll(hidden, targets) - 0.5

    network = lively(vocabulary).network
    boaster = Boaster(network.config)
    boaster.load_state_dict(network.state_dict())
    assert not record.is_causal(PyTorchModel(boaster, vocabulary), stories[100:])


# ---- a row ----


@two_cores_here
def test_a_row_is_a_run_and_all_that_was_measured_of_it(text_dir, tmp_path):
    entrant = fl.Entrant.parse(SMALL)
    row = record.make_row(entrant, 0.02, text_dir, tmp_path / "runs", "mine", "a command")
    assert row.name == "mine" and row.command == "a command" and row.minutes == 0.02
    assert row.interval[0] < row.bpb < row.interval[1]
    assert row.n_stories == 20 and row.tokens_seen > 0 and row.causal
    assert row.hardware["cores"] == 2 and row.fewest_threads in (1, 2)
    assert 0 <= row.other_cores <= 2

    # The files that it speaks of are there, and anyone gets its figure from them.
    [packed] = (tmp_path / "runs").glob("*/model.flashlm")
    assert row.packed_bytes == packed.stat().st_size
    stories = list(fl.open_corpus(text_dir).stories("valid"))
    score = fl.evaluate(fl.load(packed.parent), stories)
    assert score.bpb == pytest.approx(row.bpb, rel=1e-6)

    # It comes back from its line.
    line = json.dumps(asdict(row))
    assert record.Row(**json.loads(line)) == row


def test_what_cannot_be_packed_says_why(vocabulary, tmp_path):
    size, reason = record.pack(lively(vocabulary, ternary=False), tmp_path / "m.flashlm")
    assert size is None and "float weights" in reason
    size, reason = record.pack(lively(vocabulary), tmp_path / "m.flashlm")
    assert size == (tmp_path / "m.flashlm").stat().st_size and reason is None


# ---- the command ----


@pytest.fixture
def asked(monkeypatch):
    """What make_row() was asked for; nothing runs."""
    calls = []

    def make_row(*arguments):
        calls.append(arguments)
        entrant, minutes, _, _, name, command = arguments
        return replace(ROW, name=name, minutes=minutes, command=command)

    monkeypatch.setattr(record, "make_row", make_row)
    return calls


def test_the_command_adds_a_row_and_writes_the_page(asked, tmp_path, capsys):
    command = ["--minutes", "5", "--text-dir", str(tmp_path), "--preset"]
    assert record.main([*command, "v4-small:lr=0.002"]) == 0
    assert record.main([*command, "v4-small", "--name", "my model"]) == 0
    rows = record.read_rows(record.RECORDS)
    assert [row.name for row in rows] == ["v4-small:lr=0.002", "my model"]
    assert rows[1].command == (
        "python benchmarks/record.py --minutes 5 --preset v4-small --text-dir DIR --name 'my model'"
    )

    # Where the text is on this machine is nobody else's business.
    page = record.TABLE.read_text()
    assert page == record.render(rows) and str(tmp_path) not in page

    # The page alone can be written, too, and nothing runs for it.
    record.TABLE.unlink()
    assert record.main(["--table"]) == 0
    assert record.TABLE.read_text() == page and len(asked) == 2


def test_a_model_of_ones_own_is_found_where_the_command_runs(asked, tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import flashlm_helpers as fl\n\n\nclass Mine(fl.FlashLM):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["--minutes", "5", "--preset", "tiny", "--text-dir", "x"]
    assert record.main([*command, "--build-model", "my_models:Mine"]) == 0
    assert asked[0][0].build_model.__name__ == "Mine"
    assert record.read_rows(record.RECORDS)[0].command.endswith("--build-model my_models:Mine")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "a row needs --minutes, --preset and --text-dir"),
        (["--minutes", "7", "--preset", "tiny", "--text-dir", "x"], "invalid choice: 7"),
        (["--minutes", "5", "--preset", "none", "--text-dir", "x"], "no preset 'none'"),
        (["--minutes", "5", "--preset", "tiny:seed=3", "--text-dir", "x"], "seed=3"),
        (["--minutes", "5", "--preset", "tiny", "--text-dir", "nowhere"], "nowhere is not a"),
        (
            ["--minutes", "5", "--preset", "tiny", "--text-dir", "x", "--build-model", "no:One"],
            "cannot import the model no:One",
        ),
        (
            ["--minutes", "5", "--preset", "tiny", "--text-dir", "x", "--mixer", "mine"],
            "names no class",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, complaint, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        sys.exit(record.main(arguments))
    said = capsys.readouterr().err
    assert caught.value.code == 2 and complaint in said and said.count("\n") == 1
    assert not record.RECORDS.exists() and not record.TABLE.exists()


def test_one_core_is_refused_before_anything_runs(text_dir, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--minutes", "5", "--preset", "tiny", "--text-dir", str(text_dir)]
    assert record.main(command) == 2
    said = capsys.readouterr().err
    assert "made on 2 cores, and this process may use 1" in said
    assert not record.RECORDS.exists()


def test_records_that_are_none_are_refused_before_the_run(asked, text_dir, capsys):
    record.RECORDS.write_text('{"name": "x"}\n')
    command = ["--minutes", "5", "--preset", "tiny", "--text-dir", str(text_dir)]
    assert record.main(command) == 2
    assert "hold" in capsys.readouterr().err and not asked
