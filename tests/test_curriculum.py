"""Several texts in one run: in stages, or shuffled together; and the easy part of a text."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import (
    assert_same_run,
    fresh,
    interrupt_at,
    quiet,
    run_training,
    write_stories,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.corpus import TextSource, open_corpus, open_curriculum
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.sources.readability import reading_grade
from flashlm_helpers.tokens import SLOTS, Mixture, prepare
from flashlm_helpers.training import StopReason, Trainer

EASY = ["The cat sat on the mat. It was {}.", "A dog ran to Tom. Tom had {} hats."]
HARD = ["Notwithstanding considerable administrative uncertainty, {} committees deliberated."]


def many(patterns, count):
    return [patterns[n % len(patterns)].format(f"number {n}") for n in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An easy text and a hard one, with validation stories of their own."""
    root = tmp_path_factory.mktemp("texts")
    for name, patterns in (("easy", EASY), ("hard", HARD)):
        (root / name).mkdir()
        stories = many(patterns, 90)
        write_stories(root / name / "train.txt", stories[:80])
        write_stories(root / name / "valid.txt", stories[80:])
    return root


@pytest.fixture
def staged(folders, tmp_path):
    corpus = open_curriculum([(folders / "easy", 0.6), (folders / "hard", 0.4)])
    return prepare(corpus, 400, tmp_path / "data")


@pytest.fixture
def shuffled(folders, tmp_path):
    corpus = open_curriculum([(folders / "easy", 0.6), (folders / "hard", 0.4)], shuffled=True)
    return prepare(corpus, 400, tmp_path / "data")


class Rows:
    """Stands for a token file: a row says which one it is of, and which of its rows."""

    n_tokens = 1
    n_stories = 1
    vocabulary_hash = ""

    def __init__(self, number):
        self.number = number
        self.path = str(number)

    def batch(self, step, batch, length, seed):
        assert batch == 1
        row = torch.tensor([[self.number, step]])
        return row, row


shares_of = st.lists(st.integers(1, 30), min_size=1, max_size=5)


@given(shares_of, st.integers(0, 5), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_a_mixture_deals_its_rows_by_shares_and_leaves_out_none(weights, turns, batch, seed):
    shares = np.array(weights) / sum(weights)
    mixture = Mixture([Rows(n) for n in range(len(weights))], shares)

    # Whole turns, in batches of any size, are the same rows.
    steps = (turns + 1) * SLOTS // batch + 1
    rows = torch.cat([mixture.batch(step, batch, 1, seed)[0] for step in range(steps)])
    rows = rows[: (turns + 1) * SLOTS]
    for part, share in enumerate(shares):
        own = rows[rows[:, 0] == part, 1]
        assert abs(len(own) - share * len(rows)) <= turns + 1
        turn_of = torch.arange(len(rows))[rows[:, 0] == part] // SLOTS
        for turn in range(turns + 1):
            per_turn = len(own) // (turns + 1)
            wanted = torch.arange(turn * per_turn, (turn + 1) * per_turn)
            assert torch.equal(own[turn_of == turn].sort().values, wanted)


def test_a_step_reads_from_the_stage_that_it_ends_in(staged):
    (easy, first_end), (hard, last_end) = staged.stages
    assert (first_end, last_end) == (0.6, pytest.approx(1.0))
    for fraction, wanted in ((0.0, easy), (0.6, easy), (0.6001, hard), (1.0, hard)):
        assert staged.read_at(fraction) is wanted
    assert staged.valid is staged.sources["hard"]

    # As any prepared text, it is three things.
    vocabulary, train, valid = staged
    assert (vocabulary, valid) == (staged.vocabulary, staged.valid)
    assert train.n_tokens == easy.n_tokens + hard.n_tokens


def test_the_vocabulary_is_counted_from_the_mix(folders, tmp_path):
    # The hard text is a hundredth of all characters, but half of what is read.
    large = tmp_path / "large"
    large.mkdir()
    write_stories(large / "train.txt", many(EASY, 4_000))
    write_stories(large / "valid.txt", many(EASY, 9))

    counted = {}
    for share in (0.001, 0.5):
        corpus = open_curriculum([(large, 1 - share), (folders / "hard", share)])
        vocabulary = prepare(corpus, 300, tmp_path / f"data{share}").vocabulary
        counted[share] = len(vocabulary.encode(" committees deliberated"))
    assert counted[0.5] < counted[0.001]


def test_what_one_text_validates_with_is_not_trained_on_in_another(folders, tmp_path):
    copying = tmp_path / "copying"
    copying.mkdir()
    stories = (folders / "hard" / "valid.txt").read_text() + (
        folders / "hard" / "train.txt"
    ).read_text()
    (copying / "train.txt").write_text(stories)
    write_stories(copying / "valid.txt", ["Something else altogether."])
    corpus = open_curriculum([(copying, 0.5), (folders / "hard", 0.5)])
    text = prepare(corpus, 400, tmp_path / "data")
    assert text.stages[0][0].n_stories == 80


@pytest.mark.parametrize("kind", ["staged", "shuffled"])
@pytest.mark.parametrize("stop", [3, 20])
def test_a_run_resumed_inside_a_stage_is_the_same_to_the_last_bit(
    kind, stop, request, model_config, one_thread, tmp_path
):
    text = request.getfixturevalue(kind)
    recipe = TrainConfig(epochs=1.5, batch=8, validation_stories=6)
    model = replace(model_config, sequence_length=16)
    run_training(model, recipe, text, tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole" / LAST)
    assert whole.progress.step > 22
    assert set(whole.progress.history.sources) == {"easy", "hard"}

    # Stopped in the first stage, or in the last one.
    *_, stopped = run_training(model, recipe, text, tmp_path / "cut", on_step=interrupt_at(stop))
    assert stopped == StopReason.INTERRUPT
    half = load_checkpoint(tmp_path / "cut" / LAST)
    assert half.progress.step == stop + 1
    run_training(model, recipe, text, tmp_path / "cut", resume=half)
    assert_same_run(whole, load_checkpoint(tmp_path / "cut" / LAST))


def test_stages_are_read_one_after_another(staged, model_config, one_thread, tmp_path):
    recipe = TrainConfig(epochs=1, batch=4, validation_stories=4)
    model = replace(model_config, sequence_length=16)
    network, optimizer = fresh(model, recipe, staged.vocabulary)
    trainer = Trainer(network, optimizer, recipe, staged, tmp_path)
    read = []
    for number, (tokens, _) in enumerate(staged.stages):
        batch = tokens.batch

        def noted(*arguments, batch=batch, number=number):
            read.append(number)
            return batch(*arguments)

        tokens.batch = noted
    trainer.run(quiet)
    assert read == sorted(read)
    assert sum(read) / len(read) == pytest.approx(0.4, abs=1 / len(read) + 0.01)


def test_patience_waits_for_the_last_stage(staged, model_config, one_thread, tmp_path, monkeypatch):
    # Nothing ever gets better after the first look.
    recipe = TrainConfig(epochs=6, batch=4, validation_stories=2, patience=1, lr=1e-9)
    model = replace(model_config, sequence_length=16)
    monkeypatch.setattr("flashlm_helpers.training.MAX_TOKEN_SHARE", 10.0)
    network, optimizer = fresh(model, recipe, staged.vocabulary)
    trainer = Trainer(network, optimizer, recipe, staged, tmp_path)
    monkeypatch.setattr(trainer, "_save", lambda name: None)
    monkeypatch.setattr(
        "flashlm_helpers.training.token_nats",
        lambda network, ids, bfloat16: [np.full(len(one) - 1, 1.0) for one in ids],
    )
    progress, stopped_by = trainer.run(quiet)
    assert stopped_by == StopReason.PATIENCE
    assert 0.6 < progress.fraction < 0.75


def test_a_curriculum_is_opened_again_from_what_a_checkpoint_holds(folders):
    stages = [(open_corpus(folders / "easy", max_grade=5), 0.25), ("builtin", 0.75)]
    corpus = open_curriculum(stages, shuffled=True)
    again = TextSource.from_dict(json.loads(json.dumps(asdict(corpus.source))))
    assert again == corpus.source
    opened = open_corpus(again)
    assert (opened.key, opened.shuffled) == (corpus.key, True)
    assert [share for _, share in opened.stages] == [0.25, 0.75]


def test_an_experiment_trains_and_reports_on_every_text(folders, home, model_config, tmp_path):
    corpus = open_curriculum([(folders / "easy", 0.5), (folders / "hard", 0.5)])
    recipe = TrainConfig(epochs=1, batch=4, validation_stories=6)
    report = Experiment(corpus, replace(model_config, vocabulary_size=400), recipe).run(tmp_path)
    curves = report.history.sources
    assert list(curves) == ["easy", "hard"]
    assert curves["hard"] == report.history.valid
    assert report.source == corpus.source
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["history"]["sources"]["easy"][-1]["bpb"] == curves["easy"][-1].bpb


# ---- mistakes ----


@pytest.mark.parametrize(
    "shares, words",
    [
        ((0.5, 0.4), "0.5 \\+ 0.4 = 0.9"),
        ((1.0, 0.0), "at least 0.001 to each"),
        ((1.5, -0.5), "at least 0.001 to each"),
        ((float("nan"), 0.5), "nan"),
        ((), "= 0"),
    ],
)
def test_shares_that_cannot_be_are_refused(folders, shares, words):
    with pytest.raises(FlashLMError, match=words):
        open_curriculum([(folders / "easy", share) for share in shares])


MISTAKES = {
    "{easy}:0.5,{hard}:0.4": "0.5 + 0.4 = 0.9",
    "{easy}:0.5,{hard}": "is no stage of a curriculum",
    "{easy}:0.5,": "is no stage of a curriculum",
    ":1": "is no stage of a curriculum",
    "{easy}:0.5,{hard}:half": "is no stage of a curriculum",
    "{easy}:0.5,{root}/nothing:0.5": "there is no text",
    "{easy}:0.5,{empty}:0.5": "is empty",
    "{easy}:0.5,{blank}:0.5": "blank has no story",
}


@pytest.mark.parametrize("curriculum", MISTAKES)
def test_a_mistake_in_a_curriculum_is_one_line(curriculum, folders, home, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "train.txt").write_text("\n\n")
    (tmp_path / "blank" / "valid.txt").write_text("\n\n")
    places = {"easy": folders / "easy", "hard": folders / "hard", "root": tmp_path}
    places |= {"empty": tmp_path / "empty", "blank": tmp_path / "blank"}
    arguments = ["train", "--preset", "tiny", "--epochs", "1", "--eager"]
    status = main([*arguments, "--curriculum", curriculum.format(**places)])
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert last.startswith("error: ") and MISTAKES[curriculum] in last


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--shuffled"], "--shuffled needs several texts"),
        (["--curriculum", "builtin:1", "--shuffled", "--max-grade", "-40"], "the easiest is for"),
        (["--curriculum", "builtin:1", "--dataset", "builtin"], "leave out"),
        (["--dataset", "builtin", "--max-grade", "-40"], "the easiest is for"),
    ],
)
def test_flags_that_do_not_fit_together_are_one_line(flags, words, home, capsys):
    assert main(["train", "--preset", "tiny", "--epochs", "0.01", *flags]) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_unset_variable_is_noticed(home, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--curriculum", ""])
    assert ended.value.code == 2
    assert "--curriculum is empty" in capsys.readouterr().err


def test_train_and_resume_from_the_command_line(folders, home, tmp_path, capsys):
    curriculum = f"{folders / 'easy'}:0.5,{folders / 'hard'}:0.5"
    arguments = ["train", "--preset", "tiny", "--batch", "4", "--eager", "--json"]
    folder = str(tmp_path / "run")
    budget = ["--epochs", "1", "--save-dir", folder]
    assert main([*arguments, *budget, "--curriculum", curriculum, "--shuffled"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["source"]["shuffled"] and len(first["source"]["stages"]) == 2

    # A resumed run knows its texts.
    assert main(["train", "--resume", folder, "--epochs", "2", "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["source"] == first["source"]
    assert second["steps"] > first["steps"]


# ---- easy texts ----


def test_hard_texts_have_higher_grades():
    easy = reading_grade("The cat sat on the mat. It was a fat cat.")
    story = reading_grade("Once upon a time, there was a little girl who had a red ball.")
    hard = reading_grade(HARD[0])
    assert easy < story < 10 < hard
    assert reading_grade("... --- ...") == float("inf")


@given(st.lists(st.sampled_from(["a", "dog", "garden", "elephants"]), min_size=1, max_size=20))
def test_longer_words_and_longer_sentences_are_harder(words):
    text = " ".join(words) + "."
    assert reading_grade(text.replace("dog", "dogmatic")) >= reading_grade(text)
    assert reading_grade(f"{text} {text}") == pytest.approx(reading_grade(text))
    assert reading_grade(" ".join(words * 2) + ".") > reading_grade(text)


def test_a_text_up_to_a_grade_has_no_harder_stories(folders, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    write_stories(mixed / "train.txt", [*many(HARD, 9), *many(EASY, 9)])
    write_stories(mixed / "valid.txt", [*many(HARD, 9), *many(EASY, 9)])
    corpus = open_corpus(mixed, 5, max_grade=6)
    assert list(corpus.stories("train")) == many(EASY, 9)[:5]
    assert list(corpus.stories("valid")) == many(EASY, 9)
    keys = {open_corpus(mixed, 5, grade).key for grade in (None, 6, 7)}
    assert len(keys) == 3
    with pytest.raises(FlashLMError, match="limits already"):
        open_corpus(corpus, max_grade=3)
