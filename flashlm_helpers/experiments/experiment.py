"""One experiment: text, model, recipe and seed in; a trained model and its report out."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from flashlm_helpers.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    History,
    Progress,
    load_checkpoint,
)
from flashlm_helpers.config import ModelConfig, TrainConfig, find_preset
from flashlm_helpers.corpus import Corpus, TextSource, open_corpus
from flashlm_helpers.evaluation import BPCReport
from flashlm_helpers.experiments.size import count_parameters
from flashlm_helpers.experiments.terminal import TerminalLine
from flashlm_helpers.machine.files import hold_folder, write_json
from flashlm_helpers.machine.hardware import describe_hardware, peak_memory
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.tokens import PreparedText, prepare
from flashlm_helpers.training import StopReason, train

Text = str | Path | TextSource | Corpus | Iterable[str]


@dataclass(frozen=True)
class Experiment:
    """A training run, described in full; run() carries it out.

    text: whatever open_corpus() takes: a name, a folder, a data set of the hub, strings.
    model: a preset's name or a config, whose vocabulary_size limits the vocabulary that is cut.
    recipe: budget, seed and all else. build_model: makes the network from a ModelConfig; a class
    of your own needs the methods of FlashLM. build_optimizer: makes the optimizer from network
    and recipe.
    Raises FlashLMError for a preset that does not exist, or text that cannot be used.
    """

    text: Text
    model: str | ModelConfig
    recipe: TrainConfig
    build_model: Callable[[ModelConfig], nn.Module] = FlashLM
    build_optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer] = build_optimizer

    def __post_init__(self):
        if isinstance(self.model, str):
            object.__setattr__(self, "model", find_preset(self.model))
        # A generator reads only once, and "auto" must stay what it became.
        named = isinstance(self.text, str | Path | TextSource | Corpus)
        if not named or self.text == "auto":
            object.__setattr__(self, "text", open_corpus(self.text))

    def prepare(self) -> PreparedText:
        """Cut the vocabulary and tokenize the text; what was done before is reused."""
        return prepare(open_corpus(self.text), self.model.vocabulary_size)

    def run(
        self,
        folder: str | Path,
        resume: str | Path | Checkpoint | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> "RunReport":
        """Train in `folder`, and leave best.pt, last.pt and report.json there.

        resume: a checkpoint, a file or a run's folder to go on from. on_step: shows the progress,
        for example fl.LiveLossCurve(); by default it is a line in the terminal.
        PyTorch's random numbers are seeded for the run and restored after it.
        Raises FlashLMError for what a person can mend, as train() does, and if another run is in
        the folder.
        """
        folder = Path(folder)
        with hold_folder(folder):
            return self._run(folder, resume, on_step)

    def _run(
        self,
        folder: Path,
        resume: str | Path | Checkpoint | None,
        on_step: Callable[[Progress], None] | None,
    ) -> "RunReport":
        # Refuse what cannot work before any text is read.
        if self.build_model is FlashLM:
            count_parameters(self.model)

        # Text to token ids; what an earlier run prepared is reused.
        corpus = open_corpus(self.text)
        text = prepare(corpus, self.model.vocabulary_size)
        if resume is not None and not isinstance(resume, Checkpoint):
            resume = load_checkpoint(resume, LAST, self.build_model)

        # What the tokens are of, whatever the hub has by now.
        source = corpus.source
        if source is not None and source.stages:
            parts = zip(source.stages, text.train.parts, strict=True)
            stages = [replace(stage, revision=part.revision) for stage, part in parts]
            source = replace(source, stages=tuple(stages))
        elif source is not None:
            source = replace(source, revision=text.train.revision)

        # All random numbers of the run come from its seed, and none of the caller's are used up. A
        # notebook that only reads models may have switched gradients off.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.recipe.seed)
            network = self.build_model(replace(self.model, vocabulary_size=len(text.vocabulary)))
            optimizer = self.build_optimizer(network, self.recipe)
            progress, stopped_by, decided = train(
                network,
                optimizer,
                self.recipe,
                text,
                folder,
                source,
                resume,
                on_step or TerminalLine(text.train.n_tokens),
            )
        recipe = RunConfig(network.config, decided)
        return self._report(folder, text, progress, stopped_by, recipe, source)

    def _report(
        self,
        folder: Path,
        text: PreparedText,
        progress: Progress,
        stopped_by: StopReason,
        config: "RunConfig",
        source: TextSource | None,
    ) -> "RunReport":
        last = progress.history.train[-1].nats_per_token if progress.history.train else None
        best = load_checkpoint(folder / BEST, build_model=self.build_model)

        # Facts of the run, then how good its best weights are, then on what and with what.
        report = RunReport(
            stopped_by=stopped_by,
            steps=progress.step,
            tokens_seen=progress.tokens_seen,
            tokens_per_second=progress.tokens_per_second,
            epochs=progress.tokens_seen / text.train.n_tokens,
            seconds=progress.elapsed,
            seconds_by_activity=progress.seconds,
            skipped_steps=progress.skipped,
            train_nats_per_token=last,
            val_nats_per_token=progress.best.nats_per_token,
            bpc=progress.best.bpc,
            bpb=progress.best.bpb,
            validation=progress.best,
            best_step=progress.best_step,
            peak_memory_bytes=peak_memory(),
            config=config,
            vocabulary=VocabularySummary.of(text.vocabulary),
            source=source,
            hardware=describe_hardware(),
            history=progress.history,
            folder=folder,
            model=PyTorchModel(best.network.eval(), text.vocabulary, source),
        )
        write_json(folder / "report.json", report.as_dict())
        return report


@dataclass(frozen=True)
class RunConfig:
    """What was trained and how, with everything decided that a recipe leaves open."""

    model: ModelConfig
    training: TrainConfig


@dataclass(frozen=True)
class VocabularySummary:
    """Which vocabulary a run used."""

    hash: str
    size: int
    coverage: float | None

    @classmethod
    def of(cls, vocabulary) -> "VocabularySummary":
        """Summarize a Vocabulary."""
        return cls(vocabulary.hash, len(vocabulary), vocabulary.coverage)


@dataclass(frozen=True)
class RunReport:
    """What came out of a run; report.json holds it, except for the last two fields.

    model: the best weights, ready for generate() and evaluate(). folder: where the files are.
    """

    stopped_by: StopReason
    steps: int
    tokens_seen: int
    tokens_per_second: float  # without validating, saving and displaying
    epochs: float
    seconds: float
    seconds_by_activity: dict[str, float]
    skipped_steps: int  # their loss or gradient was not finite
    train_nats_per_token: float | None  # the last point of the training curve
    val_nats_per_token: float  # of the best validation, as the next three
    bpc: float
    bpb: float
    validation: BPCReport
    best_step: int
    peak_memory_bytes: int
    config: RunConfig
    vocabulary: VocabularySummary
    source: TextSource | None
    hardware: dict
    history: History
    folder: Path = field(compare=False)
    model: PyTorchModel = field(compare=False, repr=False)

    def as_dict(self) -> dict:
        """Return the report in plain values, for JSON."""
        plain = {}
        for name, value in vars(self).items():
            if name not in ("folder", "model"):
                plain[name] = asdict(value) if hasattr(value, "__dataclass_fields__") else value
        return plain
