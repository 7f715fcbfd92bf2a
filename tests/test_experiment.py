import json
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from conftest import assert_same_run, interrupt_at, quiet, write_stories

from flashlm_helpers.checkpoint import BEST, LAST, Progress, load_checkpoint
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.corpus import Corpus, TextSource, open_corpus
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.experiments.experiment import Experiment, RunReport
from flashlm_helpers.experiments.terminal import TerminalLine
from flashlm_helpers.generation import generate
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.training import StopReason
from flashlm_helpers.vocab import GPT2_SIZE, gpt2_encoding

MODEL = ModelConfig(
    "small",
    width=16,
    blocks=2,
    hidden=24,
    sequence_length=32,
    kernel_size=4,
    vocabulary_size=1_000,
    mixers=("conv", "attention"),
    heads=2,
    window=12,
)
RECIPE = TrainConfig(epochs=0.11, batch=8, dropout=0.1, validation_stories=5)  # about 8 steps


@pytest.fixture(autouse=True)
def kept_apart(home):
    """Every test here has a FLASHLM_HOME of its own."""


@pytest.fixture
def experiment(text_dir):
    return Experiment(text_dir, MODEL, RECIPE)


@pytest.fixture
def report(experiment, tmp_path):
    return experiment.run(tmp_path / "run", on_step=quiet)


# ---- what goes in ----


@pytest.fixture(scope="module")
def many_words():
    """Stories with more distinct tokens than the vocabulary of a hybrid has."""
    words = []
    for token in range(GPT2_SIZE - 1):
        word = gpt2_encoding().decode_single_token_bytes(token).decode("utf-8", "replace")
        if word[0] == " " and word[1:].isascii() and word[1:].isalpha():
            words.append(word)
    return ["".join(words[start : start + 50]) for start in range(0, 6_000, 50)]


@pytest.mark.parametrize("preset, size", [("hybrid-small", 4_096), ("v4-small", 10_000)])
def test_a_presets_own_vocabulary_size_is_the_limit(many_words, preset, size):
    vocabulary = Experiment(many_words, preset, RECIPE).prepare().vocabulary
    if size == 4_096:
        assert len(vocabulary) == size
    else:
        assert 4_096 < len(vocabulary) < size


def test_a_preset_trains_with_its_own_vocabulary_size(many_words, tmp_path, capsys):
    recipe = TrainConfig(epochs=1e-6, batch=1, validation_stories=1)
    report = Experiment(many_words, "hybrid-small", recipe).run(tmp_path / "run", on_step=quiet)
    assert report.vocabulary.size == report.config.model.vocabulary_size == 4_096
    assert len(report.model.network.embedding.weight) == 4_096

    # From the command line as well, without --vocab-size.
    text = tmp_path / "text"
    text.mkdir()
    write_stories(text / "train.txt", many_words)
    command = ["train", "--preset", "hybrid-small", "--epochs", "1e-6", "--batch", "1", "--json"]
    command += ["--text-dir", str(text), "--save-dir", str(tmp_path / "other")]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["vocabulary"]["size"] == 4_096


def test_text_comes_from_anywhere(text_dir, stories):
    """A folder, its path as a string, an open Corpus, its source and the strings are one text."""
    splits = {"train": stories[:100], "valid": stories[100:]}
    corpus = open_corpus(text_dir)
    texts = [text_dir, str(text_dir), corpus, corpus.source, splits]
    prepared = [Experiment(text, MODEL, RECIPE).prepare() for text in texts]
    for text in prepared:
        assert text.vocabulary.hash == prepared[0].vocabulary.hash
        assert (text.train.ids == prepared[0].train.ids).all()
        assert (text.valid.ids == prepared[0].valid.ids).all()


def test_strings_without_splits_hold_some_stories_out(stories, tmp_path):
    """A list and a generator are read once, however often the experiment is prepared."""
    for text in (stories, tuple(stories), (story for story in stories)):
        experiment = Experiment(text, MODEL, RECIPE)
        first = experiment.prepare()
        assert first.train.n_stories + first.valid.n_stories == len(stories)
        assert 0 < first.valid.n_stories < len(stories) / 5
        again = experiment.prepare()
        assert again.vocabulary.hash == first.vocabulary.hash

    found = first.held_out(1_000) + [first.vocabulary.decode(ids) for ids in _stories(first.train)]
    assert Counter(found) == Counter(stories)
    report = experiment.run(tmp_path / "run", on_step=quiet)
    assert report.source is None and report.model.source is None


def _stories(tokens):
    return tokens.sample_stories(tokens.n_stories)


def test_a_source_keeps_its_limit(text_dir, tmp_path):
    source = TextSource(None, str(text_dir), 40)
    report = Experiment(source, MODEL, RECIPE).run(tmp_path / "run", on_step=quiet)
    assert report.source == source
    assert load_checkpoint(tmp_path / "run", LAST).source == source
    assert Experiment(source, MODEL, RECIPE).prepare().train.n_stories == 40


def test_mistakes_are_one_line(text_dir, tmp_path):
    with pytest.raises(FlashLMError, match="no preset 'v5'"):
        Experiment(text_dir, "v5", RECIPE)
    with pytest.raises(FlashLMError, match="must be a string, not int"):
        Experiment([1, 2], MODEL, RECIPE)
    with pytest.raises(FlashLMError, match="there is no text 'nonsense'"):
        Experiment("nonsense", MODEL, RECIPE).prepare()
    with pytest.raises(FlashLMError, match="text is empty"):
        Experiment([], MODEL, RECIPE).prepare()
    (tmp_path / "file").touch()
    with pytest.raises(FlashLMError, match="cannot write"):
        Experiment(text_dir, MODEL, RECIPE).run(tmp_path / "file" / "run")


# ---- what comes out ----


def test_a_run_leaves_its_files_and_its_report(experiment, report, tmp_path):
    folder = tmp_path / "run"
    assert {"best.pt", "last.pt", "report.json"} == {path.name for path in folder.iterdir()}
    written = json.loads((folder / "report.json").read_text())
    assert written == json.loads(json.dumps(report.as_dict()))
    assert isinstance(report, RunReport) and report.folder == folder
    assert "folder" not in written and "model" not in written

    # The figures belong together.
    assert report.stopped_by == StopReason.BUDGET == "budget" == written["stopped_by"]
    assert report.tokens_seen == report.epochs * experiment.prepare().train.n_tokens
    best = min(report.history.valid, key=lambda point: point.nats_per_token)
    assert report.val_nats_per_token == best.nats_per_token == report.validation.nats_per_token
    assert (report.bpc, report.bpb) == (best.bpc, best.bpb)
    assert report.best_step == best.step
    assert report.train_nats_per_token == report.history.train[-1].nats_per_token
    assert report.seconds == pytest.approx(sum(report.seconds_by_activity.values()), abs=0.1)
    assert report.hardware["cores"] >= 1 and report.peak_memory_bytes > 1e7

    # What the recipe left open is decided.
    assert report.config.training == replace(
        RECIPE, bfloat16=report.config.training.bfloat16, compile=False
    )
    assert report.config.training.bfloat16 in (True, False)
    size = report.vocabulary.size
    assert report.config.model == replace(MODEL, vocabulary_size=size)
    assert written["config"]["model"] == asdict(report.config.model) | {
        "mixers": ["conv", "attention"]
    }


def test_the_report_holds_the_model(experiment, report, tmp_path):
    """The best weights write stories, and score what the last line of the report says."""
    assert isinstance(report.model, PyTorchModel)
    assert report.model.source == open_corpus(experiment.text).source
    story = generate(report.model, "Once upon a time", tokens=5)[0]
    assert story.text.startswith("Once upon a time") and len(story.ids) == 5

    stories = experiment.prepare().held_out(RECIPE.validation_stories)
    assert evaluate(report.model, stories) == report.validation
    best = load_checkpoint(tmp_path / "run", BEST).network.state_dict()
    for name, tensor in report.model.network.state_dict().items():
        assert torch.equal(tensor, best[name])
    assert not report.model.network.training


def test_the_seed_decides_and_other_random_numbers_do_not_matter(experiment, report, tmp_path):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = experiment.run(tmp_path / "again", on_step=quiet)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_run(
        load_checkpoint(tmp_path / "run", LAST), load_checkpoint(tmp_path / "again", LAST)
    )
    assert again.bpb == report.bpb

    other = replace(experiment, recipe=replace(RECIPE, seed=7))
    assert other.run(tmp_path / "other", on_step=quiet).bpb != report.bpb


def test_a_run_trains_also_where_gradients_are_switched_off(experiment, report, tmp_path):
    with torch.no_grad():
        again = experiment.run(tmp_path / "again", on_step=quiet)
        assert not torch.is_grad_enabled()
    assert again.bpb == report.bpb


# ---- going on ----


@pytest.mark.parametrize("how", ["folder", "file", "checkpoint", "elsewhere"])
def test_a_resumed_run_equals_the_uninterrupted_one(experiment, report, tmp_path, how):
    folder = tmp_path / "stopped"
    stopped = experiment.run(folder, on_step=interrupt_at(3))
    assert stopped.stopped_by == "interrupt" and stopped.steps < report.steps
    assert stopped.bpb > 0  # a run that was stopped early has a best model, too
    resume = {
        "folder": folder,
        "file": str(folder / LAST),
        "checkpoint": load_checkpoint(folder, LAST),
        "elsewhere": folder,
    }
    target = tmp_path / "elsewhere" if how == "elsewhere" else folder
    resumed = experiment.run(target, resume=resume[how], on_step=quiet)
    assert resumed.stopped_by == "budget" and resumed.steps == report.steps
    assert_same_run(load_checkpoint(target, LAST), load_checkpoint(tmp_path / "run", LAST))
    assert resumed.bpb == report.bpb


def test_a_run_on_strings_resumes_in_python_and_not_from_the_command_line(
    stories, text_dir, tmp_path, capsys
):
    experiment = Experiment(stories, MODEL, RECIPE)
    whole = experiment.run(tmp_path / "whole", on_step=quiet)
    folder = tmp_path / "run"
    experiment.run(folder, on_step=interrupt_at(3))
    for arguments, complaint in [
        ([], "does not say which text it was trained on"),
        (["--text-dir", str(text_dir)], "another vocabulary"),
    ]:
        capsys.readouterr()
        assert main(["train", "--resume", str(folder), *arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and complaint in line

    resumed = experiment.run(folder, resume=folder, on_step=quiet)
    assert resumed.bpb == whole.bpb
    assert_same_run(load_checkpoint(folder, LAST), load_checkpoint(tmp_path / "whole", LAST))


def test_a_run_does_not_go_on_with_another_vocabulary_or_architecture(
    experiment, report, stories, tmp_path
):
    longer = replace(experiment, recipe=replace(RECIPE, epochs=0.2))
    other = replace(longer, text=[story.upper() for story in stories])
    with pytest.raises(FlashLMError, match="another vocabulary"):
        other.run(tmp_path / "a", resume=report.folder)
    other = replace(longer, model=replace(MODEL, vocabulary_size=400))
    with pytest.raises(FlashLMError, match="another vocabulary"):
        other.run(tmp_path / "b", resume=report.folder)
    other = replace(longer, model=replace(MODEL, hidden=32))
    with pytest.raises(FlashLMError, match="of another shape"):
        other.run(tmp_path / "c", resume=report.folder)
    with pytest.raises(FlashLMError, match="spent its budget"):
        experiment.run(report.folder, resume=report.folder)
    with pytest.raises(FlashLMError, match="there is no checkpoint"):
        longer.run(tmp_path / "d", resume=tmp_path / "none")
    with pytest.raises(FlashLMError, match="no optimizer state"):
        longer.run(tmp_path / "e", resume=report.folder / BEST)


def test_a_run_that_gets_no_better_reports_its_own_recipe(experiment, report):
    """The best weights may be of the run before; the recipe is the one that was carried out."""
    longer = replace(experiment, recipe=replace(RECIPE, epochs=0.15, lr=10.0))
    on = longer.run(report.folder, resume=report.folder, on_step=quiet)
    assert on.config.training.epochs == 0.15 and on.config.training.lr == 10.0
    assert on.steps > report.steps


# ---- parts of one's own ----


class Noted(FlashLM):
    """A model of one's own."""

    built = 0

    def __init__(self, config):
        super().__init__(config)
        type(self).built += 1


def sgd(network, recipe):
    """An optimizer of one's own."""
    return torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=0.9)


def test_model_and_optimizer_are_arguments(text_dir, tmp_path):
    experiment = Experiment(text_dir, MODEL, RECIPE, Noted, sgd)
    whole = experiment.run(tmp_path / "whole", on_step=quiet)
    assert Noted.built and isinstance(whole.model.network, Noted)
    groups = load_checkpoint(tmp_path / "whole", LAST).optimizer["param_groups"]
    assert groups[0]["momentum"] == 0.9

    # It resumes like any other, with the optimizer that it had.
    folder = tmp_path / "run"
    experiment.run(folder, on_step=interrupt_at(3))
    other = replace(experiment, build_optimizer=build_optimizer)
    with pytest.raises(FlashLMError, match="optimizer is of another kind"):
        other.run(tmp_path / "other", resume=folder)
    assert experiment.run(folder, resume=folder, on_step=quiet).bpb == whole.bpb


def test_a_corpus_of_ones_own(stories, tmp_path):
    """Anything that yields stories can be a Corpus."""
    splits = {"train": stories[:100], "valid": stories[100:]}
    corpus = Corpus("mine", "a key", lambda split: iter(splits[split]))
    report = Experiment(corpus, MODEL, RECIPE).run(tmp_path / "run", on_step=quiet)
    assert report.source is None and report.stopped_by == "budget"


def test_the_line_of_a_resumed_run_goes_on(capsys):
    line = TerminalLine(n_tokens=10**9)
    line.interval = 0.0
    early = Progress(tokens_seen=10, elapsed=1.0)
    for step in range(5):
        line(replace(early, fraction=0.74 + step / 1000, loss=step))
    shown = capsys.readouterr().err
    assert [f"loss {step}.000" in shown for step in range(5)] == [True] * 5
