"""Validation stories in the training text: left out or counted, and nothing else is changed."""

import itertools
import random

import numpy as np
import pytest
from conftest import times

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.sources import overlap
from flashlm_helpers.sources.overlap import RUN, leave_out_copies
from flashlm_helpers.tokens import prepare

WORDS = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("a", "e", "i", "o", "u", "y")]


def story(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


TRAIN = [story(seed) for seed in range(50)]
VALID = [story(seed) for seed in range(100, 110)]


def test_stories_of_their_own_pass_without_a_word(capfd):
    assert list(leave_out_copies(TRAIN, VALID)) == TRAIN
    assert list(leave_out_copies(["", "...", "one"], [])) == ["", "...", "one"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("write", [str, str.upper, lambda text: f"“{text.replace(' ', ', ')}!”\n"])
def test_a_copy_is_left_out_and_counted(capfd, write):
    stories = [*TRAIN[:20], write(VALID[3]), *TRAIN[20:], write(VALID[0]), "short", write(VALID[3])]
    assert list(leave_out_copies(stories, [*VALID, "Short!"])) == TRAIN
    assert capfd.readouterr().err == "4 copies of validation stories left out of training\n"


def test_shared_runs_are_counted_and_kept(capfd):
    words = VALID[4].split()
    quoting = f"{story(1_000)} {' '.join(words[10 : 10 + RUN])} {story(1_001)}"
    close = f"{story(1_002)} {' '.join(words[10 : 9 + RUN])} {story(1_003)}"
    nearly = f"Now {' '.join(words[:-1])}"
    stories = [*TRAIN, quoting, close, nearly]
    assert list(leave_out_copies(stories, VALID)) == stories
    said = capfd.readouterr().err
    assert said == (
        "2 of 53 training stories share a run of 13 words with 1 of 10 validation stories, "
        "1 of them at least half of their runs\n"
    )


def test_no_run_goes_from_one_story_into_the_next(capfd):
    words = VALID[0].split()
    stories = [" ".join(words[: RUN - 1]), " ".join(words[RUN - 1 : 2 * RUN - 2])]
    assert list(leave_out_copies(stories, VALID)) == stories
    assert capfd.readouterr().err == ""


@pytest.mark.soak
def test_the_count_is_that_of_a_plain_search(monkeypatch):
    """Short runs of few words are often shared; the table is made small, so it is often wrong."""
    monkeypatch.setattr(overlap, "_TABLE_BITS", 4)
    for trial in range(times(10, 500)):
        draw = random.Random(trial)
        groups = []
        for count in (30, 8):
            lengths = [draw.randrange(40) for _ in range(count)]
            groups.append([[draw.choice("ab") for _ in range(length)] for length in lengths])
        train, valid = groups
        held_out = overlap._HeldOut(" ".join(words) for words in valid)
        marked = held_out.mark_shared(train)

        def runs(words):
            return {tuple(words[at : at + RUN]) for at in range(len(words) - RUN + 1)}

        all_train = set(itertools.chain.from_iterable(map(runs, train)))
        all_valid = set(itertools.chain.from_iterable(map(runs, valid)))
        expected = [bool(runs(words) & all_valid) for words in train]
        assert ((marked > 0) == np.array(expected)).all()
        assert held_out.count_shared() == sum(bool(runs(words) & all_train) for words in valid)


def test_prepared_tokens_are_without_copies(tmp_path, capfd):
    clean = prepare(open_corpus({"train": TRAIN, "valid": VALID}), 300, tmp_path)
    mixed = {"train": [*TRAIN, VALID[1]], "valid": VALID}
    text = prepare(open_corpus(mixed), 300, tmp_path)
    assert (text.train.n_stories, text.valid.n_stories) == (50, 10)
    assert "1 copy of validation stories left out of training" in capfd.readouterr().err
    assert clean.train.n_stories == 50


def test_a_text_that_is_all_copies_is_refused(tmp_path):
    corpus = open_corpus({"train": VALID, "valid": VALID})
    with pytest.raises(FlashLMError, match="every training story is a validation story, too"):
        prepare(corpus, 300, tmp_path)
    assert not list(tmp_path.glob("*train*"))
