import os
import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
from conftest import write_stories
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers import tokens
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import Corpus, open_corpus
from flashlm_helpers.tokens import TokenFile, prepare, tokenize
from flashlm_helpers.vocab import BOS, EOS, PAD

IDENTITY = {"corpus": "c", "split": "train", "vocabulary": "v"}


def test_the_file_is_what_a_plain_tokenizer_gives(prepared, stories):
    vocabulary = prepared.vocabulary
    train = prepared.train
    plain = [i for story in stories[:100] for i in (BOS, *vocabulary.encode(story), EOS)]
    assert train.ids.tolist() == plain and train.n_stories == 100
    assert train.n_bytes == sum(len(story.encode()) for story in stories[:100])
    for ids, story in zip(train.sample_stories(100), stories, strict=False):
        assert vocabulary.decode(ids) == story


@pytest.fixture(scope="module")
def short(vocabulary, stories, tmp_path_factory):
    """A token file of a few hundred ids."""
    path = tmp_path_factory.mktemp("short") / "a.tokens"
    return TokenFile.build(path, IDENTITY, stories[:5], vocabulary)


@given(length=st.integers(1, 400), batch=st.integers(1, 9), seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_every_token_once_as_a_target(short, length, batch, seed):
    train = short
    count = train.windows(length)
    rows = [train.batch(step, batch, length, seed) for step in range(-(-2 * count // batch))]
    inputs, targets = (torch.cat(part)[: 2 * count] for part in zip(*rows, strict=True))
    for epoch in (targets[:count], targets[count:]):
        seen = np.bincount(epoch[epoch != PAD], minlength=2**16)
        assert (seen == np.bincount(train.ids[1:], minlength=2**16)).all()
    stream = torch.from_numpy(train.ids.astype(np.int64))
    wanted = {tuple(stream[i : i + length + 1].tolist()) for i in range(0, len(stream) - 1, length)}
    whole = torch.cat([inputs, targets[:, -1:]], dim=1)
    assert {tuple(i for i in row if i != PAD) for row in whole.tolist()} == wanted


def test_a_batch_is_a_pure_function_of_seed_and_step(prepared):
    train = prepared.train
    first = train.batch(7, 4, 32, seed=1)
    for other in (0, 100, 3):
        train.batch(other, 4, 32, seed=other)
    again = train.batch(7, 4, 32, seed=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], train.batch(8, 4, 32, seed=1)[0])
    assert not torch.equal(first[0], train.batch(7, 4, 32, seed=2)[0])
    count = train.windows(32)
    epochs = [train.batch(epoch, count, 32, seed=1)[0] for epoch in (0, 1)]
    assert not torch.equal(*epochs)


def test_stories_for_validation_are_spread_over_the_whole_file(prepared, stories):
    vocabulary = prepared.vocabulary
    train = prepared.train
    sample = [vocabulary.decode(ids) for ids in train.sample_stories(5)]
    assert sample == [stories[i] for i in (0, 24, 49, 74, 99)]


def test_token_files_are_reused_and_rebuilt_when_damaged(text_dir, vocabulary, tmp_path, capsys):
    corpus = open_corpus(text_dir)
    path = tokenize(corpus, "train", vocabulary, tmp_path).path
    whole, stamp = path.read_bytes(), path.stat().st_mtime_ns
    assert tokenize(corpus, "train", vocabulary, tmp_path).path.stat().st_mtime_ns == stamp
    for damaged in (whole[:-2], whole[:300], b"", whole + b"\0\0", b"x" * len(whole)):
        path.write_bytes(damaged)
        assert tokenize(corpus, "train", vocabulary, tmp_path).ids.tobytes() == whole[512:]
        assert "building it anew" in capsys.readouterr().err
    # Training stories are compared with those for validation, so these are there, too.
    valid = tokenize(corpus, "valid", vocabulary, tmp_path).path
    assert {found.name for found in tmp_path.iterdir()} == {path.name, valid.name}


def test_a_foreign_file_is_refused(prepared, vocabulary, tmp_path):
    path = TokenFile.build(tmp_path / "a.tokens", IDENTITY, ["some story"], vocabulary).path
    TokenFile(path, IDENTITY)
    for change in ({"corpus": "d"}, {"split": "valid"}, {"vocabulary": "w"}):
        with pytest.raises(FlashLMError, match="holds other text"):
            TokenFile(path, IDENTITY | change)


def test_a_failure_while_tokenizing_leaves_nothing_behind(vocabulary, tmp_path):
    def stories():
        yield "one"
        raise RuntimeError("the network went away")

    with pytest.raises(RuntimeError):
        TokenFile.build(tmp_path / "a.tokens", IDENTITY, stories(), vocabulary)
    assert os.listdir(tmp_path) == []


def test_memory_stays_flat_however_long_the_text(vocabulary, stories, tmp_path, monkeypatch):
    batches = partial(tokens.batches_of_text, characters=1 << 17)
    monkeypatch.setattr(tokens, "batches_of_text", batches)

    def peak(copies):
        tracemalloc.start()
        text = (story for _ in range(copies) for story in stories)
        TokenFile.build(tmp_path / "a.tokens", IDENTITY, text, vocabulary)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(2)  # fills a whole batch once
    assert peak(16) < 1.2 * peak(4)


def test_a_corpus_too_small_to_train_on_is_one_clear_line(tmp_path):
    write_stories(tmp_path / "train.txt", ["the only story"])
    write_stories(tmp_path / "valid.txt", ["another"])
    with pytest.raises(FlashLMError, match="one story only"):
        prepare(open_corpus(tmp_path), 1_000, tmp_path / "data")
    (tmp_path / "train.txt").write_text("  \n<|endoftext|>\n \n")
    with pytest.raises(FlashLMError, match="empty"):
        prepare(open_corpus(tmp_path), 1_000, tmp_path / "data")
    write_stories(tmp_path / "train.txt", ["one", "two"])
    (tmp_path / "valid.txt").write_text("")
    with pytest.raises(FlashLMError, match="valid split holds no story"):
        prepare(open_corpus(tmp_path), 1_000, tmp_path / "data")


def test_everything_prepared_is_reused(text_dir, tmp_path, monkeypatch):
    corpus = open_corpus(text_dir)
    first = prepare(corpus, 1_000, tmp_path)
    monkeypatch.setattr(TokenFile, "build", None)
    monkeypatch.setattr("flashlm_helpers.tokens.Vocabulary.build", None)
    again = prepare(corpus, 1_000, tmp_path)
    assert again.vocabulary.hash == first.vocabulary.hash
    assert again.train.ids.tobytes() == first.train.ids.tobytes()


def test_stories_held_out_are_those_of_the_validation_file(prepared, stories):
    assert prepared.held_out(20) == stories[100:]
    assert prepared.held_out(2) == [stories[100], stories[119]]


def test_a_name_of_the_hub_makes_no_folders(vocabulary, tmp_path):
    own = Corpus("owner/name:config", "v1", {"train": ["one", "two"], "valid": ["three"]}.get)
    assert prepare(own, 300, tmp_path).valid.path.parent == tmp_path
    assert all(path.name.startswith("owner-name-config-") for path in tmp_path.iterdir())
