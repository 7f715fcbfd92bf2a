"""The hub's real client, and a hub that is slow, broken, gated, changed or gone."""

import json
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import quiet
from hub import COMMIT, local_hub
from huggingface_hub.utils import _http

from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.corpus import TextSource, open_corpus, open_curriculum
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.machine.network import is_offline
from flashlm_helpers.tokens import prepare

NEXT_COMMIT = "decade" * 6 + "beef"
PAGE = b"<html><body>Something went wrong</body></html>"
STORIES = [f"Story {number} is about a cat that counts to {number}." for number in range(900)]
HELD_OUT = [f"Tale {number} is about a dog that runs for {number} miles." for number in range(30)]
FORMATS = ("jsonl", "txt", "parquet")


def write_dataset(place, kind, stories=STORIES):
    """Two files for training and one for validation, as people lay them out."""
    (place / "data").mkdir(parents=True)
    (place / "README.md").touch()
    half = len(stories) // 2
    parts = {"train-0": stories[:half], "train-1": stories[half:], "validation-0": HELD_OUT}
    for name, part in parts.items():
        path = place / "data" / f"{name}.{kind}"
        if kind == "txt":
            path.write_text("".join(f"{story}\n<|endoftext|>\n" for story in part))
        elif kind == "jsonl":
            path.write_text("".join(json.dumps({"text": story}) + "\n" for story in part))
        else:
            rows = pyarrow.Table.from_pylist([{"text": story} for story in part])
            pyarrow.parquet.write_table(rows, path)


@pytest.fixture
def hub(tmp_path, home, monkeypatch):
    """A hub with own/jsonl, own/txt, own/parquet and TinyStories, and a client in a hurry."""
    folder = tmp_path / "hub"
    for kind in FORMATS:
        write_dataset(folder / "own" / kind, kind)
    write_dataset(folder / "roneneldan/TinyStories", "jsonl")

    # All that waits is the client, between its attempts.
    hurry = {name: getattr(_http.time, name) for name in ("time", "monotonic", "perf_counter")}
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, **hurry))
    for name in ("READ", "OPEN"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0.01)
    name = "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL"
    monkeypatch.setattr(datasets.config, name, 0.01)
    with local_hub(folder) as hub:
        yield hub


def refused(name, complaint=""):
    """Try to prepare a data set that cannot be read; return the one line it gives."""
    with pytest.raises(FlashLMError, match=complaint) as caught:
        prepare(open_corpus(name), 300)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_right(name, home):
    """The tokens of a data set are those of its stories, and nothing half-written is left."""
    text = prepare(open_corpus(name), 300)
    right = prepare(open_corpus({"train": STORIES, "valid": HELD_OUT}), 300)
    assert (text.train.ids == right.train.ids).all()
    assert (text.valid.ids == right.valid.ids).all()
    assert not list((home / "data").glob(".*.partial"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_data_set_of_several_files_is_read_in_order(hub, home, kind):
    hub.delay = 0.02
    assert_right(f"own/{kind}", home)


def test_text_files_without_separators_hold_a_story_in_each_line(hub):
    lines = [f"A line {number}." for number in range(30)]
    write_dataset(hub.folder / "own/lines", "txt")
    (hub.folder / "own/lines/data/train-0.txt").write_text("\n".join(lines))
    (hub.folder / "own/lines/data/train-1.txt").unlink()
    assert list(open_corpus("own/lines").stories("train")) == lines


ILLS = {
    "cut": {"cut": 3_000},
    "page": {"page_for_files": (200, PAGE)},
    "busy": {"page_for_files": (503, PAGE)},
    "no-hub": {"page": (200, PAGE)},
    "busy-hub": {"page": (503, PAGE)},
    "gone": {"gone": True},
    "gated": {"gated": 403},
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("ill", ILLS)
def test_a_hub_that_fails_is_one_line_and_leaves_no_tokens(hub, home, kind, ill):
    for name, value in ILLS[ill].items():
        setattr(hub, name, value)
    line = refused(f"own/{kind}", f"own/{kind} (broke off|cannot be read)")
    assert ill != "gated" or "ask for access" in line
    assert not list((home / "data").glob("*.tokens"))

    # The hub is well again.
    for name in ILLS[ill]:
        delattr(hub, name)
    assert_right(f"own/{kind}", home)


@pytest.mark.parametrize("status, code", [(401, "GatedRepo"), (403, "GatedRepo")])
def test_a_gated_data_set_says_where_to_ask(hub, monkeypatch, status, code):
    monkeypatch.setattr(hub, "gated", status)
    line = refused("own/jsonl", "gated or private: ask for access")
    assert "hf auth login" in line


@pytest.mark.parametrize("kind", FORMATS)
def test_a_hub_that_goes_away_after_the_first_story(hub, home, monkeypatch, kind):
    stories = STORIES + [f"{story} {'And then more. ' * 900}" for story in STORIES]
    write_dataset(hub.folder / "own/long", kind, stories)
    stream = open_corpus("own/long").stories("train")
    assert next(stream).strip() == STORIES[0]
    monkeypatch.setattr(hub, "gone", True)
    with pytest.raises(FlashLMError, match="own/long broke off"):
        list(stream)


def test_all_of_a_text_is_read_from_one_revision(hub, home):
    corpus = open_corpus("own/jsonl")
    list(corpus.stories("train"))
    hub.commit = NEXT_COMMIT
    hub.asked = []
    list(corpus.stories("valid"))
    files = [path for path in hub.asked if "/resolve/" in path and "/data/" in path]
    assert files and all(COMMIT in path for path in files)


def test_a_run_says_which_revision_its_tokens_are_of(hub, home, tmp_path, model_config):
    recipe = TrainConfig(epochs=0.02, batch=8, validation_stories=5)
    experiment = Experiment("own/jsonl", model_config, recipe)
    first = experiment.run(tmp_path / "first", on_step=quiet)
    assert first.source == TextSource("own/jsonl", None, None, COMMIT)

    # The hub has moved on; the tokens have not.
    hub.commit = NEXT_COMMIT
    hub.asked = []
    again = experiment.run(tmp_path / "again", on_step=quiet)
    assert not hub.asked and again.source == first.source
    plain = json.loads((tmp_path / "again" / "report.json").read_text())
    assert plain["source"]["revision"] == COMMIT
    assert load_checkpoint(tmp_path / "again", LAST).source.revision == COMMIT

    # Without them, the newest are read.
    for path in (home / "data").iterdir():
        path.unlink()
    new = experiment.run(tmp_path / "new", on_step=quiet)
    assert new.source.revision == NEXT_COMMIT


# ---- without a network ----


def test_auto_is_tinystories_when_it_was_prepared_before(hub, capsys, monkeypatch):
    prepare(open_corpus("auto", 100), 300)
    assert "using TinyStories: the hub answers\n" in capsys.readouterr().err
    monkeypatch.setattr(hub, "gone", True)
    hub.asked = []
    text = prepare(open_corpus("auto", 100), 300)
    assert text.train.n_stories == 100 and not hub.asked
    line = f"using TinyStories (revision {COMMIT[:12]} of the hub): it was prepared here before\n"
    assert capsys.readouterr().err == line

    # Another limit is another text, of which there are no tokens.
    assert open_corpus("auto", 101).name == "builtin"
    assert capsys.readouterr().err.count("\n") == 1


def test_half_prepared_is_not_prepared(hub, home, monkeypatch):
    prepare(open_corpus("auto", 100), 300)
    monkeypatch.setattr(hub, "gone", True)
    valid = next((home / "data").glob("tinystories-valid-*.tokens"))
    content = valid.read_bytes()
    valid.unlink()
    assert open_corpus("auto", 100).name == "builtin"
    valid.write_bytes(content)
    (home / "data" / "tinystories-other.tokens").write_bytes(b"no token file")
    assert open_corpus("auto", 100).name == "tinystories"


def test_what_a_curriculum_has_prepared_is_not_the_text_alone(hub, monkeypatch):
    stages = [(open_corpus("tinystories", 100), 0.5), ("builtin", 0.5)]
    text = prepare(open_curriculum(stages), 300)
    assert text.sources.keys() == {"tinystories", "builtin"}

    # Its tokens are of the mix's vocabulary, so a run on the text alone would ask the hub.
    monkeypatch.setenv("FLASHLM_OFFLINE", "1")
    assert open_corpus("auto", 100).name == "builtin"


@pytest.mark.parametrize("variable", ["FLASHLM_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked(hub, monkeypatch, capsys, variable):
    prepare(open_corpus("own/jsonl"), 300)
    monkeypatch.setenv(variable, "1")
    hub.asked = []
    assert prepare(open_corpus("own/jsonl"), 300).train.n_stories == len(STORIES)
    assert "not prepared here, and FLASHLM_OFFLINE" in refused("own/txt")
    assert open_corpus("auto").name == "builtin"
    assert not hub.asked


@pytest.mark.parametrize("value", ["", "0", "false", "no", "OFF"])
def test_offline_can_be_switched_off(monkeypatch, value):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("FLASHLM_OFFLINE", value)
    assert not is_offline()
