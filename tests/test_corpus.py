import itertools
import json
import pickle
import threading
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_stories
from hub import local_hub

from flashlm_helpers import builtin, corpus
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import Corpus, TextSource, open_corpus
from flashlm_helpers.machine.profile import active_profile
from flashlm_helpers.sources import hub as hub_source
from flashlm_helpers.sources.files import read_stories
from flashlm_helpers.sources.splits import is_held_out
from flashlm_helpers.tokens import prepare


def numbered(name, count):
    return [f"{name} {number}" for number in range(count)]


# ---- a folder ----


def test_a_folder_of_text_gives_its_stories_stripped_and_without_empty_ones(tmp_path):
    (tmp_path / "train.txt").write_bytes(
        b"\xef\xbb\xbfOne.\r\nMore.\r\n<|endoftext|>\r\n\n<|endoftext|>\nTwo.<|endoftext|>Three. \n"
    )
    (tmp_path / "valid.txt").write_text("Four.")
    found = open_corpus(tmp_path)
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
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, tmp_path / "train-b.parquet")
    (tmp_path / "valid.txt").write_text("Four.")
    assert list(open_corpus(tmp_path).stories("train")) == [r[field] for r in records] * 2


def test_without_a_validation_file_one_story_in_twenty_is_held_out(tmp_path):
    stories = [f"This is story number {i}." for i in range(2_000)]
    write_stories(tmp_path / "train.txt", [*stories, *stories[:100]])
    found = open_corpus(tmp_path)
    train, valid = (set(found.stories(split)) for split in corpus.SPLITS)
    assert not train & valid and train | valid == set(stories)
    assert 60 < len(valid) < 140
    assert all(is_held_out(f" {story}\n") for story in valid)


def test_the_limit_cuts_training_stories_only(text_dir):
    found = open_corpus(text_dir, limit=3)
    assert len(list(found.stories("train"))) == 3
    assert len(list(found.stories("valid"))) == 20


def test_the_key_follows_the_text(tmp_path):
    write_stories(tmp_path / "train.txt", ["one", "two"])
    before = open_corpus(tmp_path).key
    assert open_corpus(tmp_path).key == before
    write_stories(tmp_path / "train.txt", ["one", "two", "three"])
    assert open_corpus(tmp_path).key != before


def test_a_folder_may_be_a_string_as_flashlm_dataset_gives_it(text_dir, monkeypatch):
    monkeypatch.setenv("FLASHLM_DATASET", str(text_dir))
    found = open_corpus(active_profile().dataset)
    assert found.key == open_corpus(text_dir).key

    # A path from here means the folder, although it looks like a data set of the hub.
    monkeypatch.chdir(text_dir.parent.parent)
    assert open_corpus(f"{text_dir.parent.name}/{text_dir.name}").key == found.key


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("train.txt", b"\xff\xfe\x00broken", "not valid UTF-8|binary"),
        ("train.txt", b"caf\xe9 au lait", "not valid UTF-8"),
        ("train.txt", b"some \x00 zero", "binary"),
        ("train.jsonl", b'{"text": "fine"}\nnot json', "line 2 is not JSON"),
        ("train.jsonl", b'{"body": "fine"}', "field `text` or `story`"),
        ("train.jsonl", b"[1, 2]", "field `text` or `story`"),
        ("train.parquet", b"PAR1 not really", "not a parquet file"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlashLMError, match=complaint) as caught:
        list(open_corpus(tmp_path).stories("train"))
    assert "\n" not in str(caught.value)


def test_a_folder_of_texts_by_any_name_is_one_to_train_on(tmp_path, capsys):
    books = [f"This is book number {n}. It has {n} pages." for n in range(30)]
    for n, book in enumerate(books):
        (tmp_path / f"book{n:02}.txt").write_text(book)
    (tmp_path / "cover.png").write_bytes(b"not a text")
    corpus = open_corpus(tmp_path)
    assert "not read: cover.png" in capsys.readouterr().err
    train, valid = (list(corpus.stories(split)) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(books)
    assert valid and len(train) > len(valid)

    # With a file for training, only such files are read; one for validation stays apart.
    (tmp_path / "valid.txt").write_text("Another book.")
    assert list(open_corpus(tmp_path).stories("train")) == books
    (tmp_path / "train.txt").write_text("A story.\n<|endoftext|>\nA second one.")
    assert list(open_corpus(tmp_path).stories("train")) == ["A story.", "A second one."]


def test_bad_folders_are_one_clear_line(tmp_path):
    with pytest.raises(FlashLMError, match="is empty"):
        open_corpus(tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(FlashLMError, match="holds no text"):
        open_corpus(tmp_path)
    (tmp_path / "train.txt").mkdir()
    with pytest.raises(FlashLMError, match="holds no text"):
        open_corpus(tmp_path)
    with pytest.raises(FlashLMError, match="not a folder"):
        open_corpus(tmp_path / "missing")


# ---- names, and texts that are opened again ----


LONG = pytest.param("x" * 5_000, id="long")


@pytest.mark.parametrize("name", ["tinystorys", "", "../gone", "/gone/a/b", "a/b:c:d:e", LONG])
def test_an_unknown_name_says_what_there_is(name):
    with pytest.raises(FlashLMError, match="there is no text") as caught:
        open_corpus(name)
    for way in ("builtin", "tinystories", "fineweb-edu", "owner/name", "folder"):
        assert way in str(caught.value)


def test_keys_of_known_texts_have_not_changed():
    """Otherwise everybody's caches are built anew: change these values only on purpose."""
    assert open_corpus("tinystories").key == "8b6cca76505c9aa9"
    assert open_corpus("tinystories", 7).key == "aac5f014091fc5c1"
    assert open_corpus("simplestories").key == "0f27aba56b41e2c6"
    assert open_corpus("fineweb-edu", 40_000).key == "d7ad8abbe1e1262d"
    counts = {"train": 20_000, "valid": 1_000}
    assert open_corpus("builtin").key == corpus._key("builtin", builtin.VERSION, counts)


def test_the_builtin_corpus_makes_as_many_stories_as_the_limit_says():
    found = open_corpus("builtin", limit=30)
    assert list(found.stories("train")) == list(itertools.islice(builtin.stories("train"), 30))
    assert found.source == TextSource("builtin", None, 30)
    with pytest.raises(FlashLMError, match="unknown split"):
        found.stories("test")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_of_no_stories_is_refused(limit):
    with pytest.raises(FlashLMError, match="at least 1"):
        open_corpus("builtin", limit)


@pytest.mark.parametrize("text", ["folder", "builtin", "tinystories", "owner/name:config:field"])
def test_a_source_opens_the_same_text_again_from_anywhere(text, text_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(text_dir)
    found = open_corpus(Path(".") if text == "folder" else text, limit=5)
    monkeypatch.chdir(tmp_path)
    again = open_corpus(TextSource.from_dict(asdict(found.source)))
    assert (again.name, again.key, again.source) == (found.name, found.key, found.source)


def test_sources_of_earlier_versions_are_read(text_dir):
    old = {"dataset": None, "text_dir": str(text_dir), "limit": 3, "vocabulary_size": 4096}
    assert TextSource.from_dict(old) == TextSource(None, str(text_dir), 3)
    assert TextSource.from_dict({}) is None
    assert open_corpus(TextSource.from_dict(old)).key == open_corpus(text_dir, 3).key
    with pytest.raises(FlashLMError, match="not a folder"):
        open_corpus(TextSource(None, str(text_dir / "gone")))


def test_a_corpus_is_returned_as_it_is():
    own = Corpus("mine", "v1", {"train": ["one", " "], "valid": ["two"]}.__getitem__)
    assert open_corpus(own) is own
    assert list(own.stories("train")) == ["one"]
    for text in (own, TextSource("builtin")):
        with pytest.raises(FlashLMError, match="has its limits already"):
            open_corpus(text, limit=3)


# ---- strings in memory ----


def test_any_iterable_of_strings_is_a_text():
    stories = numbered("Story", 400)
    found = open_corpus(stories)
    train, valid = (list(found.stories(split)) for split in corpus.SPLITS)
    assert sorted(train + valid) == sorted(stories)
    assert valid == [story for story in stories if is_held_out(story)] and valid
    assert found.source is None

    # A generator can be read once, but its corpus again and again.
    once = open_corpus(story for story in stories)
    assert once.key == found.key
    for _ in range(2):
        assert list(once.stories("train")) == train


def test_the_key_of_strings_is_their_content():
    one = open_corpus(["ab", "c"])
    assert one.key == open_corpus(("ab", "c")).key
    others = [["a", "bc"], ["abc"], ["ba", "c"], ["ab"], ["ab", "c", ""], ["ab", "\ud800"]]
    others += [["one", "two", "three"], ["three", "two", "one"]]
    keys = {open_corpus(stories).key for stories in others}
    assert len(keys) == len(others) and one.key not in keys


def test_the_limit_ends_an_endless_generator():
    endless = (f"Story {number}" for number in itertools.count())
    found = open_corpus(endless, limit=100)
    assert len(list(found.stories("train"))) == 100
    assert 0 < len(list(found.stories("valid"))) < 20


def test_a_dictionary_says_which_stories_are_held_out():
    found = open_corpus({"train": iter(["one", "two", "three"]), "valid": ["four"]}, limit=2)
    assert list(found.stories("train")) == ["one", "two"]
    assert list(found.stories("valid")) == ["four"]
    with pytest.raises(FlashLMError, match="train and valid"):
        open_corpus({"train": ["one"], "validation": ["two"]})


@pytest.mark.parametrize(
    "text", [[b"bytes"], [None], [{"text": "a row"}], {"train": [1], "valid": []}]
)
def test_stories_that_are_no_strings_are_refused(text):
    with pytest.raises(FlashLMError, match="must be a string"):
        open_corpus(text)


def test_a_corpus_can_be_sent_to_another_process(text_dir):
    for text in (text_dir, "builtin", "owner/name", ["one", "two"]):
        found = open_corpus(text, limit=2)
        copy = pickle.loads(pickle.dumps(found))
        assert copy.key == found.key
        if text != "owner/name":
            assert list(copy.stories("train")) == list(found.stories("train"))


# ---- the hub: its real client, and a hub on this machine ----


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(autouse=True)
def nothing_prepared(home):
    """No text has been prepared here before."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Data sets as people lay them out, with a name that says what is special about each."""
    folder = tmp_path_factory.mktemp("hub")
    rows = [{"id": i, "text": text} for i, text in enumerate(numbered("train", 60))]
    held = [{"id": i, "text": text} for i, text in enumerate(numbered("validation", 5))]
    write_parquet(folder / "roneneldan/TinyStories/data/train-00000-of-00001.parquet", rows)
    write_parquet(folder / "roneneldan/TinyStories/data/validation-00000-of-00001.parquet", held)

    told = [{"story": row["text"], "title": "A title"} for row in rows]
    write_jsonl(folder / "own/told/train.jsonl", told)
    write_jsonl(folder / "own/told/test.jsonl", told[:3])

    one_column = [{"id": row["id"], "body": row["text"]} for row in rows]
    one_column[1]["body"] = None
    write_parquet(folder / "own/only-train/train.parquet", one_column)
    write_jsonl(folder / "own/two-columns/train.jsonl", [{"name": "a", "body": "b", "n": 1}])
    write_jsonl(folder / "own/no-train/test.jsonl", told)

    for config in ("red", "blue"):
        texts = [{"text": text} for text in numbered(config, 30)]
        write_jsonl(folder / f"own/configs/{config}/train.jsonl", texts)
    (folder / "own/configs/README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: red, data_files: red/*.jsonl}\n"
        "- {config_name: blue, data_files: blue/*.jsonl}\n---\n"
    )

    (folder / "own/empty").mkdir()
    for place in folder.glob("*/*"):
        (place / "README.md").touch()
    with local_hub(folder):
        yield folder


@pytest.mark.parametrize(
    "name", ["auto", "tinystories", "roneneldan/TinyStories", "roneneldan/TinyStories::text"]
)
def test_tinystories_is_streamed_from_the_hub(hub, name, tmp_path):
    found = open_corpus(name, limit=10)
    assert found.source == TextSource("tinystories" if name == "auto" else name, None, 10)
    assert list(found.stories("train")) == numbered("train", 10)
    assert list(found.stories("valid")) == numbered("validation", 5)

    # Its caches have names that every system can write.
    train = prepare(found, 300, tmp_path).train
    assert train.n_stories == 10 and train.path.parent == tmp_path


def test_the_field_and_the_split_are_found_by_their_names(hub):
    found = open_corpus("own/told")
    assert list(found.stories("train")) == numbered("train", 60)
    assert list(found.stories("valid")) == numbered("train", 3)
    assert set(open_corpus("own/told::title").stories("train")) == {"A title"}


def test_a_data_set_with_one_split_and_one_column_of_text_needs_no_more_words(hub):
    found = open_corpus("own/only-train")
    train, valid = (list(found.stories(split)) for split in corpus.SPLITS)
    assert sorted(train + valid) == sorted(set(numbered("train", 60)) - {"train 1"})
    assert valid and all(map(is_held_out, valid))


def test_a_config_is_chosen_by_name(hub):
    for config in ("red", "blue"):
        found = open_corpus(f"own/configs:{config}")
        stories = {*found.stories("train"), *found.stories("valid")}
        assert stories == set(numbered(config, 30))


@pytest.mark.parametrize(
    "name, complaint",
    [
        ("own/missing", "no public data set 'own/missing'.* check the name"),
        ("own/empty", "own/empty cannot be read"),
        ("own/no-train", "no split train, only test"),
        ("own/configs", "has the configs red, blue: name one of them, as in own/configs:red"),
        ("own/configs:green", "has the configs red, blue"),
        ("own/told:green", "has the configs default"),
        ("own/told::body", r"no text in body: .*\(story, title\), as in own/told::story"),
        ("own/only-train::id", r"no text in id: .*\(id, body\), as in own/only-train::body"),
        ("own/two-columns", r"no text in text or story: .*\(name, body, n\)"),
    ],
)
def test_what_is_not_on_the_hub_is_said_in_one_line(hub, name, complaint):
    with pytest.raises(FlashLMError, match=complaint) as caught:
        next(open_corpus(name).stories("train"))
    assert "\n" not in str(caught.value)


# ---- the hub when it is slow, silent or gone, through a stand-in for its client ----


@pytest.fixture
def client(monkeypatch):
    """Replaces load_dataset() by one that the test may replace again; the hub always answers."""
    calls = []

    def load_dataset(path, name=None, *, revision, streaming):
        calls.append((path, name))
        return {"train": [{"text": text} for text in numbered(path, 500)]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub_source, "_ask_hub", lambda path: None)
    return calls


def test_fineweb_edu_is_one_sample_of_it_split_by_content(client):
    found = open_corpus("fineweb-edu")
    train, valid = (set(found.stories(split)) for split in corpus.SPLITS)
    assert valid and not train & valid and len(train | valid) == 500
    assert set(client) == {("HuggingFaceFW/fineweb-edu", "sample-10BT")}


def test_a_silent_hub_means_the_builtin_corpus_within_seconds(client, monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(hub_source, "_ask_hub", lambda path: release.wait())
    monkeypatch.setattr(hub_source, "HUB_PATIENCE", 0.3)
    start = time.monotonic()
    found = open_corpus("auto", limit=9)
    assert time.monotonic() - start < 3
    assert found.source == TextSource("builtin", None, 9)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(FlashLMError, match="did not answer within 0.3 seconds"):
        next(open_corpus("tinystories").stories("train"))
    release.set()


def test_a_hub_that_answers_may_take_longer_for_its_first_story(client, monkeypatch):
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: time.sleep(0.6) or load(*a, **k))
    monkeypatch.setattr(hub_source, "HUB_PATIENCE", 0.2)
    assert open_corpus("auto").name == "tinystories"
    monkeypatch.setattr(hub_source, "DOWNLOAD_PATIENCE", 0.2)
    with pytest.raises(FlashLMError, match="sent no story within 0.2 seconds"):
        next(open_corpus("tinystories").stories("train"))


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert open_corpus("auto").name == "builtin"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot be read from the hub" in error


def test_a_client_that_fails_is_said_in_one_short_line(client, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ConnectionError("many\nlines\n" * 100)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert open_corpus("auto").name == "builtin"
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 400


def test_a_download_that_breaks_off_is_no_short_corpus(client, monkeypatch):
    def rows():
        yield {"text": "one"}
        yield {"text": "two"}
        raise OSError("connection reset")

    parts = {"train": rows(), "validation": []}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: parts)
    stream = open_corpus("tinystories").stories("train")
    assert list(itertools.islice(stream, 2)) == ["one", "two"]
    with pytest.raises(FlashLMError, match="broke off"):
        next(stream)


def test_rows_that_turn_out_not_to_be_text_are_refused(client, monkeypatch):
    parts = {"train": [{"text": None}, {"text": ["a", "list"]}], "validation": []}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: parts)
    with pytest.raises(FlashLMError, match="holds a list in text"):
        list(open_corpus("tinystories").stories("train"))


def test_the_hub_is_asked_only_when_a_story_is_wanted(client):
    open_corpus("tinystories")
    open_corpus("owner/name")
    assert not client
