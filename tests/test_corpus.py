import itertools
import json
import threading
import time

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_stories

from flashlm_helpers import corpus
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import is_held_out, open_corpus, read_stories


def test_a_folder_of_text_gives_its_stories_stripped_and_without_empty_ones(tmp_path):
    (tmp_path / "train.txt").write_bytes(
        b"\xef\xbb\xbfOne.\r\nMore.\r\n<|endoftext|>\r\n\n<|endoftext|>\nTwo.<|endoftext|>Three. \n")
    (tmp_path / "valid.txt").write_text("Four.")
    found = open_corpus(text_dir=tmp_path)
    assert list(found.stories("train")) == ["One.\nMore.", "Two.", "Three."]
    assert list(found.stories("valid")) == ["Four."]


def test_a_separator_across_two_blocks_still_separates(tmp_path):
    stories = ["x" * n for n in ((1 << 20) - 5, 30, 1 << 20, 7)]
    write_stories(tmp_path / "train.txt", stories)
    assert [s.strip() for s in read_stories(tmp_path / "train.txt") if s.strip()] == stories


@pytest.mark.parametrize("field", ["text", "story"])
def test_jsonl_and_parquet_are_read(tmp_path, field):
    records = [{"id": i, field: f"Story {i}."} for i in range(5)]
    (tmp_path / "train-a.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "train-b.parquet")
    (tmp_path / "valid.txt").write_text("Four.")
    assert list(open_corpus(text_dir=tmp_path).stories("train")) == [r[field] for r in records] * 2


def test_without_a_validation_file_one_story_in_twenty_is_held_out(tmp_path):
    stories = [f"This is story number {i}." for i in range(2_000)]
    write_stories(tmp_path / "train.txt", [*stories, *stories[:100]])
    found = open_corpus(text_dir=tmp_path)
    train, valid = set(found.stories("train")), set(found.stories("valid"))
    assert not train & valid and train | valid == set(stories)
    assert 60 < len(valid) < 140
    assert all(is_held_out(f" {story}\n") for story in valid)


def test_the_limit_cuts_training_stories_only(text_dir):
    found = open_corpus(text_dir=text_dir, limit=3)
    assert len(list(found.stories("train"))) == 3 and len(list(found.stories("valid"))) == 20


def test_the_key_follows_the_text(text_dir, tmp_path):
    write_stories(tmp_path / "train.txt", ["one", "two"])
    before = open_corpus(text_dir=tmp_path).key
    assert open_corpus(text_dir=tmp_path).key == before
    write_stories(tmp_path / "train.txt", ["one", "two", "three"])
    assert open_corpus(text_dir=tmp_path).key != before


@pytest.mark.parametrize("name, content, complaint", [
    ("train.txt", b"\xff\xfe\x00broken", "not valid UTF-8|binary"),
    ("train.txt", b"caf\xe9 au lait", "not valid UTF-8"),
    ("train.txt", b"some \x00 zero", "binary"),
    ("train.jsonl", b"{\"text\": \"fine\"}\nnot json", "line 2 is not JSON"),
    ("train.jsonl", b"{\"body\": \"fine\"}", "field `text` or `story`"),
    ("train.jsonl", b"[1, 2]", "field `text` or `story`"),
    ("train.parquet", b"PAR1 not really", "not a parquet file"),
])
def test_bad_files_are_one_clear_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlashLMError, match=complaint) as caught:
        list(open_corpus(text_dir=tmp_path).stories("train"))
    assert "\n" not in str(caught.value)


def test_bad_folders_and_names_are_one_clear_line(tmp_path):
    with pytest.raises(FlashLMError, match="is empty"):
        open_corpus(text_dir=tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(FlashLMError, match="holds no train"):
        open_corpus(text_dir=tmp_path)
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(FlashLMError, match="holds no train"):
        open_corpus(text_dir=tmp_path)
    with pytest.raises(FlashLMError, match="not a folder"):
        open_corpus(text_dir=tmp_path / "missing")
    with pytest.raises(FlashLMError, match="unknown dataset"):
        open_corpus("tinystorys")
    with pytest.raises(FlashLMError, match="unknown split"):
        open_corpus("builtin").stories("test")


# The hub, through a stand-in for datasets.load_dataset


@pytest.fixture
def hub(monkeypatch):
    """Records calls; serves numbered rows with the columns of the real datasets."""
    calls = []

    def load_dataset(path, name=None, *, split, streaming):
        calls.append((path, name, split, streaming))
        field = "story" if "Simple" in path else "text"
        return ({field: f"{path} {split} {i}", "other": i} for i in range(500))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpus, "_hub_answers", lambda: True)
    return calls


@pytest.mark.parametrize("name", ["auto", "tinystories"])
def test_tinystories_is_streamed_from_the_hub(hub, name):
    found = open_corpus(name, limit=10)
    assert found.name == "tinystories"
    assert list(found.stories("train")) == [f"roneneldan/TinyStories train {i}" for i in range(10)]
    assert len(list(found.stories("valid"))) == 500
    assert hub[-2:] == [("roneneldan/TinyStories", None, "train", True),
                        ("roneneldan/TinyStories", None, "validation", True)]


def test_simplestories_has_its_own_column_and_split(hub):
    assert next(open_corpus("simplestories").stories("valid")) == "SimpleStories/SimpleStories test 0"


def test_fineweb_edu_is_split_by_content(hub):
    found = open_corpus("fineweb-edu")
    train, valid = (set(found.stories(split)) for split in corpus.SPLITS)
    assert valid and not train & valid and len(train | valid) == 500
    assert {call[:2] for call in hub} == {("HuggingFaceFW/fineweb-edu", "sample-10BT")}


def test_a_silent_hub_means_the_builtin_corpus_within_seconds(monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: release.wait())
    monkeypatch.setattr(corpus, "_hub_answers", lambda: False)
    monkeypatch.setattr(corpus, "HUB_PATIENCE", 0.3)
    start = time.monotonic()
    assert open_corpus("auto").name == "builtin"
    assert time.monotonic() - start < 3
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FlashLMError, match="did not answer"):
        next(open_corpus("tinystories").stories("train"))
    release.set()


def test_a_hub_that_answers_may_take_longer_for_its_first_story(hub, monkeypatch):
    serve = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: time.sleep(0.6) or serve(*a, **k))
    monkeypatch.setattr(corpus, "HUB_PATIENCE", 0.2)
    assert open_corpus("auto").name == "tinystories"


def test_a_refusing_hub_is_said_in_one_line(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ConnectionError("many\nlines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert open_corpus("auto").name == "builtin"
    assert capsys.readouterr().err.count("\n") == 1


def test_a_download_that_breaks_off_is_no_short_corpus(hub, monkeypatch):
    def rows():
        yield {"text": "one"}
        yield {"text": "two"}
        raise OSError("connection reset")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows())
    stream = open_corpus("tinystories").stories("train")
    assert list(itertools.islice(stream, 2)) == ["one", "two"]
    with pytest.raises(FlashLMError, match="broke off"):
        next(stream)


def test_an_unreachable_address_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert corpus._hub_answers() is False
