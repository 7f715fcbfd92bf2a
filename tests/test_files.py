"""Files as people have them: every format gives the same stories, and mistakes are one line."""

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from conftest import times, write_stories
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import SPLITS, _key, open_corpus
from flashlm_helpers.experiments.race import read_records
from flashlm_helpers.machine.files import read_json_lines
from flashlm_helpers.sources import files, folders
from flashlm_helpers.sources.files import SEPARATOR, read_stories
from flashlm_helpers.sources.splits import hold_out, is_held_out
from flashlm_helpers.vocab import Vocabulary


def stories_of(path):
    """What training and scoring see of a file."""
    return [story.strip() for story in read_stories(path) if story.strip()]


# ---- writing a text in every format ----


def as_csv(stories, delimiter=","):
    table = io.StringIO(newline="")
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(stories))
    return table.getvalue().encode()


def as_parquet(stories):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(stories, "string")}), buffer)
    return buffer.getvalue()


def as_lines(stories):
    return "".join(json.dumps({"text": story}) + "\n" for story in stories).encode()


PLAIN = {
    ".txt": lambda stories: f"\n{SEPARATOR}\n".join(stories).encode(),
    ".jsonl": as_lines,
    ".json": lambda stories: json.dumps([{"story": story} for story in stories], indent=1).encode(),
    ".csv": as_csv,
    "-of-strings.json": lambda stories: json.dumps(stories, ensure_ascii=False).encode(),
    "-lines.json": as_lines,
    "-with-a-mark.JSONL": lambda stories: b"\xef\xbb\xbf" + as_lines(stories),
    "-of-Excel.csv": lambda stories: as_csv(stories, ";"),
}
FORMATS = PLAIN | {
    ".parquet": as_parquet,
    ".txt.gz": lambda stories: gzip.compress(PLAIN[".txt"](stories)),
    ".csv.zst": lambda stories: zstandard.compress(as_csv(stories)),
    ".JSON.GZ": lambda stories: gzip.compress(PLAIN[".json"](stories)),
}

STORY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
# What is special somewhere: line ends, quotes, separators, what begins another format.
HARD = st.sampled_from(
    ['"', "\r\n", "\r", "\n", "\u2028", "\x85", "\x1a", ",", ";", "\t", "[", "{"]
)
HARD |= st.sampled_from([SEPARATOR, "<|endof", "null", "\\", "\ufeff", " \n", "text", "PAR1"])
STORIES = st.lists(st.lists(STORY | HARD, max_size=6).map("".join), max_size=6)


@pytest.mark.soak
@given(STORIES)
@settings(max_examples=times(60, 3_000), deadline=None)
def test_every_format_gives_the_same_stories(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("formats")
    whole = SEPARATOR.join(stories).replace("\r\n", "\n").replace("\r", "\n")
    expected = [story.strip() for story in whole.split(SEPARATOR) if story.strip()]

    # A file of text cannot begin with what marks its byte order.
    if stories and stories[0].startswith("\ufeff"):
        stories = ["", *stories]
    for ending, write in FORMATS.items():
        path = folder / f"a{ending}"
        path.write_bytes(write(stories))
        assert stories_of(path) == expected, ending


TWO = ['Tom said "no".\r\nHe ran, and ran.', f"Lily sang.{SEPARATOR}The end."]
TWO_READ = ['Tom said "no".\nHe ran, and ran.', "Lily sang.", "The end."]


@pytest.mark.parametrize("ending", FORMATS)
def test_without_a_name_the_content_tells(tmp_path, ending):
    (tmp_path / "story").write_bytes(FORMATS[ending](TWO))
    assert stories_of(tmp_path / "story") == TWO_READ


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("ending", FORMATS)
def test_a_pipe_may_hold_any_format(tmp_path, ending):
    os.mkfifo(tmp_path / "pipe")
    content = FORMATS[ending](TWO)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    assert stories_of(tmp_path / "pipe") == TWO_READ
    writer.join()


@pytest.mark.parametrize(
    "text", ["[Chorus] la la", "Words, text, and music\nmore", "{curly} is a word", "(text)"]
)
def test_prose_that_looks_like_data_is_prose(tmp_path, text):
    (tmp_path / "song").write_text(text)
    assert stories_of(tmp_path / "song") == [text]
    (tmp_path / "song.txt").write_text('{"text": "what a .txt holds is text"}')
    assert stories_of(tmp_path / "song.txt") == ['{"text": "what a .txt holds is text"}']


def test_separators_are_found_wherever_blocks_end(tmp_path):
    for shift in range(-15, 16):
        stories = ["x" * ((1 << 20) + shift), "y", "z" * (3 << 20)]
        (tmp_path / "a.txt").write_text(SEPARATOR.join(stories))
        assert list(read_stories(tmp_path / "a.txt")) == stories


# ---- records without text, and two fields ----


def test_nulls_are_skipped_and_counted_once(tmp_path, capfd):
    rows = [{"text": "One."}, {"text": None}, {"text": None, "story": None}, {"text": "Two."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, None])))
    (tmp_path / "a.json").write_text(json.dumps([*rows, None]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {}]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,story\nOne.,\n,\n,\nTwo.,\n\n,\n")
    for name in ("a.jsonl", "a.json", "a.parquet", "a.csv"):
        assert stories_of(tmp_path / name) == stories_of(tmp_path / name) == ["One.", "Two."]
        said = capfd.readouterr().err
        assert said == f"{tmp_path / name}: 3 records without text skipped\n"


@pytest.mark.parametrize("number", [None, 5])
def test_story_stands_in_for_a_text_that_is_none(tmp_path, number):
    rows = [{"text": number, "story": "One."}, {"text": number, "story": "Two."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    names = ["a.jsonl", "a.json", "a.parquet"]
    if number is None:
        (tmp_path / "a.csv").write_text("text,story\n,One.\n,Two.\n")
        names.append("a.csv")
    for name in names:
        assert stories_of(tmp_path / name) == ["One.", "Two."]


# ---- what cannot be read ----

DEEP = "[" * 100_000
DIGITS = "7" * 5_000


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("a.jsonl", '{"text": "x"}\n{"n": ' + DIGITS + ', "text": "y"}', "a.jsonl, line 2 is not"),
        ("a.jsonl", '{"text": "x"}\n{"n": ' + DEEP, "a.jsonl, line 2 is not"),
        ("a.json", '[{"text": "x"},\n {"n": ' + DIGITS + "}]", "a.json, line 2 is not"),
        ("a.json", DEEP, "a.json, line 1 is not"),
        ("a.json", '[{"text": "x"},\n {"text": "y"}', "a.json, line 2 is not"),
        ("a.json", '[{"text": "x"}]\n[{"text": "y"}]', "goes on after its JSON array"),
        ("a.json", '{"text": "x"}\n{"text": 5}', "line 2 has no string field"),
        ("a.json", '[{"text": "x"},\n\n{"body": "y"}]', "line 3 has no string field"),
        ("a.jsonl", '{"text": ["x"]}', "line 1 has no string field"),
        ("a.csv", "id,body\n1,x\n", "line 2 has no string field"),
        ("a.csv", "id,text\n1,Tom, the cat\n", "line 2 has more fields"),
        ("a.csv", 'text\n"one"\n"two\nthree\n', "is not CSV"),
        ("a.csv", 'text\n"one" two\n', "line 2 is not CSV"),
        ("a.txt.gz", gzip.compress(b"some words " * 99)[:-9], "[Tt]runcated"),
        ("a.txt.zst", zstandard.compress(os.urandom(9_999))[:-9], "[Tt]runcated"),
        ("a.txt", b"PK\x03\x04 and more", "a checkpoint"),
        ("a", b"FLASHLM\0" + bytes(300), "a packed model"),
        ("a", b"\x08\x0a\x12\x07pytorch\0", "a binary file"),
        ("a.txt", "some text".encode("utf-16"), "not valid UTF-8|binary"),
        ("a.csv", b"text\n\xff\n", "not valid UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}'), "not valid UTF-8"),
    ],
)
def test_what_cannot_be_read_is_one_line_that_names_the_place(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FlashLMError, match=complaint) as caught:
        list(read_stories(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_number_for_text_is_named_by_its_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(FlashLMError, match="row 1 has no string field"):
        list(read_stories(tmp_path / "a.parquet"))


@pytest.mark.parametrize("content", ['{"a": ' + DIGITS + "}", DEEP])
@pytest.mark.parametrize("read", [read_json_lines, read_records, Vocabulary.load])
def test_other_files_of_json_survive_the_same(tmp_path, content, read):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(FlashLMError, match="a.jsonl"):
        read(tmp_path / "a.jsonl")


def test_a_text_without_separators_ends_before_it_fills_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_STORY", 3 << 20)
    (tmp_path / "a.txt").write_text("word " * (1 << 20))
    with pytest.raises(FlashLMError, match=r"without a line <\|endoftext\|>"):
        list(read_stories(tmp_path / "a.txt"))


# ---- folders ----


def test_which_files_are_read_is_said_once(tmp_path, capfd):
    for name in ("train.TXT", "train copy.txt", "Dev.csv", "val.txt", "validation-2.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    for name in ("test.txt", "train.txt.bak", "notes.md", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    found = folders.find_stories(tmp_path)
    assert [path.name for path in found["train"]] == ["train copy.txt", "train.TXT"]
    assert {path.name for path in found["valid"]} == {"Dev.csv", "val.txt", "validation-2.jsonl.gz"}
    folders.find_stories(tmp_path)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "not read: notes.md, test.txt, train.txt.bak" in said
    assert "train copy.txt, train.TXT to train on" in said and ".hidden" not in said


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_that_are_not_utf8_can_be_read_and_said(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    write_stories(folder / "train.txt", ["One.", "Two.", "Three."])
    code = "import sys; from flashlm_helpers.corpus import open_corpus; "
    code += "print(len(open_corpus(sys.argv[1]).key))"
    for settings_ in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        command = [sys.executable, "-c", code, os.fsencode(folder)]
        done = subprocess.run(command, capture_output=True, env={**os.environ, **settings_})
        assert done.stdout == b"16\n", done.stderr


def test_keys_of_folders_of_text_have_not_changed(tmp_path):
    """Otherwise everybody's caches are built anew: change this only on purpose."""
    write_stories(tmp_path / "train.txt", ["one", "two"])
    write_stories(tmp_path / "valid.txt", ["three"])
    states = []
    for name in ("train.txt", "valid.txt"):
        state = (tmp_path / name).stat()
        states.append((str((tmp_path / name).resolve()), state.st_size, state.st_mtime_ns))
    before = hashlib.sha256(repr((states, None)).encode()).hexdigest()[:16]
    assert open_corpus(tmp_path).key == before

    # Records are read otherwise than they were, so their caches are built anew.
    (tmp_path / "train.jsonl").write_text('{"text": "four"}')
    state = (tmp_path / "train.jsonl").stat()
    states.insert(0, (str(tmp_path / "train.jsonl"), state.st_size, state.st_mtime_ns))
    as_before = hashlib.sha256(repr((states, None)).encode()).hexdigest()[:16]
    assert open_corpus(tmp_path).key not in (before, as_before)


# ---- holding out ----


@pytest.mark.soak
@given(st.lists(st.text("ab \n", max_size=4), max_size=40))
@settings(max_examples=times(200, 20_000), deadline=None)
def test_three_different_stories_can_always_be_split(stories):
    train, valid = (list(hold_out(stories, split)) for split in SPLITS)
    assert sorted(train + valid) == sorted(stories)
    different = {story.strip() for story in stories} - {""}
    kept, held_out = ({s.strip() for s in split} - {""} for split in (train, valid))
    assert not kept & held_out
    if len(different) >= 3:
        assert len([story for story in train if story.strip()]) >= 2 and held_out

    # A text that one in twenty is enough for is split so, in the same order.
    old = [story for story in stories if is_held_out(story)]
    rest = [story for story in stories if story.strip() and not is_held_out(story)]
    if any(story.strip() for story in old) and len(rest) >= 2:
        assert valid == old


@pytest.mark.parametrize("count", [3, 5, 20])
def test_small_texts_need_no_validation_file(tmp_path, count):
    stories = [f"Story {number}." for number in range(count)]
    write_stories(tmp_path / "train.txt", stories)
    for text in (tmp_path, stories, iter(stories)):
        found = open_corpus(text)
        train, valid = (list(found.stories(split)) for split in SPLITS)
        assert len(train) >= 2 and valid and sorted(train + valid) == sorted(stories)


def test_caches_of_a_small_text_are_not_those_of_when_it_had_no_split(tmp_path):
    """Its training split held all stories then, also the one that is held out now."""
    write_stories(tmp_path / "train.txt", ["one", "two", "three"])
    state = (tmp_path / "train.txt").stat()
    states = [(str(tmp_path / "train.txt"), state.st_size, state.st_mtime_ns)]
    assert open_corpus(tmp_path).key != _key(states, None)


def test_one_story_is_refused_before_anything_slow(tmp_path):
    (tmp_path / "train.txt").write_text("word " * 1_000)
    with pytest.raises(FlashLMError, match=r"one story only.*<\|endoftext\|>"):
        next(open_corpus(tmp_path).stories("train"))
    write_stories(tmp_path / "train.txt", ["one", "two"])
    with pytest.raises(FlashLMError, match="2 stories only, and training needs 3"):
        next(open_corpus(tmp_path).stories("train"))
    write_stories(tmp_path / "valid.txt", ["one"])
    assert len(list(open_corpus(tmp_path).stories("train"))) == 2
