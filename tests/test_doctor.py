import json

import pytest

from flashlm_helpers.cli import doctor
from flashlm_helpers.cli.main import main
from flashlm_helpers.machine import hardware
from flashlm_helpers.machine.threads import Usage
from flashlm_helpers.runtime.bolt import RuntimeUnavailable

NAMES = "processor cores memory C++-compiler C-runtime versions caches hub".split()


@pytest.fixture(autouse=True)
def offline(monkeypatch, home):
    monkeypatch.setenv("FLASHLM_OFFLINE", "1")


def found(capsys, *flags):
    assert main(["doctor", "--json", *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    return result, {one["name"].replace(" ", "-"): one for one in result["findings"]}


def test_every_finding_says_what_it_implies(capsys):
    result, findings = found(capsys)
    assert list(findings) == NAMES
    assert all(one["found"] and one["implies"] for one in findings.values())
    assert "FLASHLM_OFFLINE" in findings["hub"]["found"]
    assert "measured" not in result

    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(NAMES)


def test_what_is_missing_is_said(capsys, monkeypatch):
    def unavailable():
        raise RuntimeUnavailable("there is no C compiler")

    usage = iter([Usage(0.0, 0.0, 0.0), Usage(1.0, 1.5, 0.5)] + [Usage(9.0, 9.0, 9.0)] * 9)
    monkeypatch.setattr(doctor, "library", unavailable)
    monkeypatch.setattr(doctor, "has_cxx_compiler", lambda: False)
    monkeypatch.setattr(doctor.Usage, "now", lambda: next(usage))
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["numpy==0.0.1"])
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: Memory(1_000))
    _, findings = found(capsys)
    assert findings["C-runtime"]["found"] == "there is no C compiler"
    assert findings["C++-compiler"]["found"] == "not found"
    assert "other programs use 1.0 of" in findings["cores"]["found"]
    assert "fewer" in findings["cores"]["implies"]
    assert "(not 0.0.1)" in findings["versions"]["found"]
    assert findings["memory"]["implies"] == "enough to train no preset"


class Memory:
    def __init__(self, available):
        self.available = available
        self.total = 10 * hardware.GIB


def test_clean_deletes_caches_and_nothing_else(capsys, home):
    data = home / "data"
    (data / "compiled").mkdir(parents=True)
    caches = ["a-train-1.tokens", "a-vocabulary-300-1.json", "compiled/bolt-1.so"]
    others = ["README.md", "my_notes.json", "train.txt"]
    for name in caches + others:
        (data / name).write_text("something")
    run = home / "checkpoints" / "run"
    run.mkdir(parents=True)
    (run / "last.pt").write_text("something")

    found(capsys, "--clean")
    assert not any((data / name).exists() for name in caches)
    assert all((data / name).read_text() == "something" for name in others)
    assert (run / "last.pt").exists()


def test_a_cache_that_is_a_link_keeps_what_it_points_to(capsys, home, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (home / "data").mkdir(parents=True)
    (home / "data" / "matplotlib").symlink_to(elsewhere)
    found(capsys, "--clean")
    assert (elsewhere / "mine.txt").read_text() == "mine"


def test_measuring_tries_threads_and_batches(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "choose_preset", lambda: "tiny")
    monkeypatch.setattr(doctor, "MEASURING_SECONDS", 6.0)
    result, _ = found(capsys, "--measure")
    rows = result["measured"]
    assert {row["threads"] for row in rows} >= {1, hardware.usable_cores()}
    assert len({row["batch"] for row in rows}) == 2
    assert all(row["tokens_per_second"] > 0 for row in rows)
