"""What a model copies word for word: found exactly, beside what stories share anyway."""

import itertools
import json
from dataclasses import asdict

import pytest
from conftest import lively, quiet
from hypothesis import given
from hypothesis import strategies as st
from test_cli import refused, said, said_json

from flashlm_helpers import builtin
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.experiments import verbatim
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.experiments.verbatim import (
    PROMPT_WORDS,
    longest_runs,
    measure_overlap,
    training_stories,
)
from flashlm_helpers.generation import Story
from flashlm_helpers.sources.overlap import RUN, words_of
from flashlm_helpers.tokens import prepare, tokenize


@pytest.fixture(autouse=True)
def kept_apart(home):
    """Every test here has a FLASHLM_HOME of its own."""


class Parrot:
    """A model that goes on with each prompt as it was told to, whatever is sampled."""

    runtime = "torch"
    source = None

    def __init__(self, vocabulary, endings):
        self.vocabulary = vocabulary
        self.endings = endings

    def write(self, prompts, sampling):
        stories = []
        for _, ending in zip(prompts, itertools.cycle(self.endings), strict=False):
            stories.append(Story(ids=self.vocabulary.encode(ending)[: sampling.tokens]))
        return stories


# ---- the search ----


def plain_search(text, training):
    """Try every run that ends at each word."""
    lengths = []
    for end in range(1, len(text) + 1):
        runs = [text[start:end] for start in range(end)]
        known = [
            run
            for run in runs
            if any(
                story[at : at + len(run)] == run for story in training for at in range(len(story))
            )
        ]
        lengths.append(max(map(len, known), default=0))
    return lengths


TEXTS = st.lists(st.lists(st.sampled_from("abc"), max_size=12), max_size=4)


@given(TEXTS, TEXTS)
def test_the_runs_are_those_of_a_plain_search(texts, training):
    found = longest_runs(texts, training)
    assert [lengths.tolist() for lengths in found] == [
        plain_search(text, training) for text in texts
    ]


def test_the_search_takes_a_text_that_is_as_repetitive_as_can_be():
    """Time and depth do not grow with the square of its length, and nothing recurses."""
    text = ["so"] * 20_000
    lengths = longest_runs([text], [["so"] * 15_000])[0]
    assert lengths.tolist() == [min(n, 15_000) for n in range(1, 20_001)]


def test_training_stories_are_read_once_and_one_at_a_time():
    read = []

    def stories():
        for number in range(5):
            read.append(number)
            yield ["once", "upon", str(number)]

    longest_runs([["upon"]], stories())
    assert read == list(range(5))


# ---- the measurement ----

TRAIN = list(itertools.islice(builtin.stories("train"), 30))
VALID = [story for story in builtin.stories("valid", count=40) if len(words_of(story)) > 40]


def test_who_recites_is_told_from_who_does_not(vocabulary):
    copy = words_of(TRAIN[3])[5:30]
    reciting = measure_overlap(Parrot(vocabulary, [" " + " ".join(copy)]), VALID, TRAIN, 5)
    silent = measure_overlap(Parrot(vocabulary, [" xyzzy plugh"]), VALID, TRAIN, 5)

    # All that was written is one run of the training text; nothing but its own words is in it.
    assert reciting.written.longest >= 25 and reciting.written.share == 1
    assert " ".join(copy) in reciting.written.run
    assert reciting.n_words == 5 * 25 and reciting.n_stories == 5
    assert (silent.written.longest, silent.written.run, silent.written.share) == (0, "", 0)
    assert silent.written.median_longest == 0 and silent.n_words == 10

    # The yardstick is as long as what was written, and does not depend on the model otherwise.
    assert silent.held_out.longest <= 2 < reciting.held_out.longest


def test_case_and_punctuation_do_not_count(vocabulary):
    words = words_of(TRAIN[0])[:20]
    shouted = ", ".join(words).upper() + "!"
    found = measure_overlap(Parrot(vocabulary, [f" {shouted}"]), VALID, TRAIN, 3)
    assert found.written.run == " ".join(words) and found.written.share == 1


def test_the_prompt_does_not_count(vocabulary):
    """A held-out story that was trained on gives a prompt that is a run of the training text."""
    found = measure_overlap(Parrot(vocabulary, [" xyzzy xyzzy xyzzy"]), VALID, VALID, 5)
    assert found.written.longest == 0
    assert found.held_out.longest == 3


def test_the_share_counts_words_of_long_runs_once(vocabulary):
    words = [f"w{n}" for n in range(40)]
    training = [" ".join(words[:20]), " ".join(words[10:30])]
    held_out = ["one " * PROMPT_WORDS + "two " * 60]
    written = " ".join(["", *words[:30], "x", *words[: RUN - 1]])
    found = measure_overlap(Parrot(vocabulary, [written]), held_out, training)
    assert found.n_words == 31 + RUN - 1
    assert found.written.share == pytest.approx(30 / found.n_words)
    assert found.written.longest == 20


def test_longest_runs_are_summed_up_by_story(vocabulary):
    words = words_of(TRAIN[0])
    endings = [" " + " ".join(words[:count]) for count in (2, 4, 9)]
    found = measure_overlap(Parrot(vocabulary, endings), VALID, [TRAIN[0]], 3)
    assert found.written.median_longest == 4
    assert found.written.run == " ".join(words[:9])


def test_a_real_model_writes_the_same_every_time(vocabulary):
    model = lively(vocabulary)
    one = measure_overlap(model, VALID, TRAIN, 3)
    assert one == measure_overlap(model, VALID, iter(TRAIN), 3)
    assert json.loads(json.dumps(asdict(one))) == asdict(one)
    assert f"{one.written.longest} words" in str(one) and one.written.run in str(one)


@pytest.mark.parametrize("texts", [[], ["Short."], ["word " * (PROMPT_WORDS + RUN - 1)]])
def test_stories_that_are_too_short_are_refused(vocabulary, texts):
    with pytest.raises(FlashLMError, match="no story of this text has 21 words"):
        measure_overlap(Parrot(vocabulary, ["x"]), texts, TRAIN)


# ---- the training text ----


@pytest.mark.parametrize("block", [50, 1 << 20])
def test_training_stories_are_what_the_tokens_are_of(tmp_path, monkeypatch, block):
    """Whatever a block holds: parts of a story, or all of them. Copies were not trained on."""
    monkeypatch.setattr(verbatim, "_BLOCK", block)
    corpus = open_corpus({"train": [*TRAIN, VALID[0], "x"], "valid": VALID})
    vocabulary = prepare(corpus, 400).vocabulary
    assert list(training_stories(corpus, vocabulary)) == [*TRAIN, "x"]
    tokens = tokenize(corpus, "train", vocabulary)
    assert tokens.n_stories == len(TRAIN) + 1


def test_a_training_text_that_is_not_at_hand_is_one_line(vocabulary, tmp_path):
    for text, complaint in [(None, "does not say which"), (tmp_path / "gone", "not at hand")]:
        with pytest.raises(FlashLMError, match=complaint) as caught:
            training_stories(text, vocabulary)
        assert "\n" not in str(caught.value)


# ---- the command ----


@pytest.fixture
def run(text_dir, tmp_path):
    """A run of a few steps."""
    recipe = TrainConfig(epochs=0.02, batch=2, validation_stories=5)
    Experiment(text_dir, "tiny", recipe).run(tmp_path / "run", on_step=quiet)
    return tmp_path / "run"


def test_the_command_reports_the_overlap(run, text_dir, capsys):
    command = ["eval-bpc", "--checkpoint", run, "--text", text_dir / "valid.txt", "--no-baselines"]
    result, _ = said_json(capsys, *command, "--overlap")
    overlap = result["overlap"]
    assert overlap["n_stories"] == 20
    assert overlap["written"].keys() == {"longest", "run", "median_longest", "share"}
    assert overlap["held_out"]["longest"] > 0

    out = said(capsys, *command, "--overlap")
    assert f"{overlap['held_out']['longest']} words" in out and "20 held out" in out
    assert "overlap" not in said_json(capsys, *command)[0]


def test_what_cannot_be_compared_is_one_line(run, text_dir, tmp_path, capsys):
    packed = tmp_path / "m.flashlm"
    said(capsys, "export", "--checkpoint", run, "--format", "packed", "--out", packed)
    (tmp_path / "short.txt").write_text("A story.\n")
    (tmp_path / "empty.txt").write_text("\n")
    for checkpoint, text, complaint in [
        (packed, text_dir / "valid.txt", "does not say which"),
        (run, tmp_path / "short.txt", "no story of this text has 21 words"),
        (run, tmp_path / "empty.txt", "holds no story"),
    ]:
        command = ["eval-bpc", "--checkpoint", checkpoint, "--text", text, "--runtime", "torch"]
        assert complaint in refused(capsys, *command, "--overlap")
