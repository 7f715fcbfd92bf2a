"""Training to a deadline on a CPU: stops on time, on patience or on request, and resumes to the last bit."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from flashlm_helpers.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.fastpath import DEFAULT_BATCH, decide, keep_programs
from flashlm_helpers.files import write_json
from flashlm_helpers.hardware import describe_hardware, keep_freed_memory, peak_memory, usable_cores
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import Optimizers, make_optimizer, microbatch, optimizer_step
from flashlm_helpers.schedule import learning_rate
from flashlm_helpers.tokens import TokenFile
from flashlm_helpers.vocab import PAD, Vocabulary

NON_FINITE_STEPS = 10  # skipped steps in a row after which a run gives up
SLOW_FLOPS = 4e11  # a second, of an eager run on two cores: only to tell minutes from hours
ACTIVITIES = ("prepare", "train", "validate", "save", "display")
POINTS = 500  # rows of the training history, whatever the budget
# A validation costs about as much as training on its tokens: these keep it below a tenth of a run.
MOST_VALIDATIONS, VALIDATION_GAP, VALIDATION_SHARE = 40, 60.0, 0.05  # a run; seconds between two; share of the tokens


@dataclass
class Progress:
    """Where a run stands: all that a checkpoint must carry besides weights and optimizer.

    seconds: by activity; elapsed: their sum. history: rows of plain numbers, {"train": [...], "valid": [...]}.
    loss: the last step's, in nats/token.
    """

    step: int = 0
    tokens_seen: int = 0
    fraction: float = 0.0
    elapsed: float = 0.0
    step_seconds: float = 0.0
    loss: float = math.nan
    lr: float = 0.0
    seconds: dict = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: dict = field(default_factory=dict)
    validations_since_best: int = 0
    next_validation: float = 0.0
    next_point: float = 0.0
    pending: list = field(default_factory=list)
    history: dict = field(default_factory=lambda: {"train": [], "valid": []})

    @property
    def tokens_per_second(self) -> float:
        """Training speed, without the time for validating, saving and showing progress."""
        return self.tokens_seen / max(self.seconds["train"], 1e-9)

    @property
    def seconds_left(self) -> float:
        """An estimate from the pace since preparing; infinite before the first step."""
        spent = self.elapsed - self.seconds["prepare"]
        return spent * (1 - self.fraction) / self.fraction if self.fraction else math.inf


@dataclass
class TrainResult:
    """What a run leaves: the best model, the full history, the report, and why it stopped."""

    model: FlashLM
    history: dict
    report: dict
    stopped_by: str  # "budget", "patience" or "interrupt"


class Trainer:
    """One run: model, optimizer, text and progress. `run()` trains until the budget ends.

    clock: seconds, monotonic; tests pass their own.
    """

    def __init__(self, model_config: ModelConfig, train_config: TrainConfig, vocabulary: Vocabulary,
                 train_tokens: TokenFile, valid_tokens: TokenFile, save_dir: str | Path,
                 source: dict | None = None, clock: Callable[[], float] = time.monotonic):
        microbatch(model_config)  # refuses what cannot fit before anything starts
        for tokens in (train_tokens, valid_tokens):
            vocabulary.require(tokens.vocabulary_hash, str(tokens.path))
        torch.set_num_threads(usable_cores())
        keep_freed_memory()
        keep_programs()
        torch.manual_seed(train_config.seed)
        self.config, self.vocabulary, self.clock, self.source = train_config, vocabulary, clock, source
        self.tokens, self.save_dir = train_tokens, Path(save_dir)
        self.model = FlashLM(replace(model_config, vocabulary_size=len(vocabulary)))
        self.model.dropout, self.model.sampled_softmax = train_config.dropout, train_config.sampled_softmax
        self.optimizer = make_optimizer(self.model, train_config)
        self.valid_stories = [vocabulary.decode(ids)
                              for ids in valid_tokens.sample_stories(train_config.validation_stories)]
        self.progress = Progress(next_validation=self._validation_gap())
        self._began = self._mark = 0.0

    def restore(self, content: dict) -> None:
        """Take over weights, optimizer, progress and random state from load_checkpoint()'s result.

        Raises FlashLMError if it is of another architecture or vocabulary, or holds no optimizer.
        """
        self.vocabulary.require(content["vocabulary"].hash, "the checkpoint")
        if content["model_config"] != self.model.config:
            raise FlashLMError(f"the checkpoint holds a {content['model_config'].name} and this run is to train a "
                               f"{self.model.config.name} of another shape: leave out the preset")
        if content["optimizer"] is None:
            raise FlashLMError(f"this checkpoint holds no optimizer state: resume from {LAST} of the same run")
        before = content["train_config"]
        same_budget = (self.config.hours, self.config.epochs) == (before.hours, before.epochs)
        # Another budget may well repay compiling; the same one must go on in the same way, to the last bit.
        kept = ("batch", "bfloat16", "compile") if same_budget else ("batch",)
        self.config = replace(self.config, **{n: getattr(before, n) for n in kept if getattr(self.config, n) is None})
        self.model.load_state_dict(content["model"].state_dict())
        self.optimizer.load_state_dict(content["optimizer"])
        self.progress = Progress(**content["progress"])
        torch.set_rng_state(content["random_state"])
        if not (self.save_dir / BEST).is_file():
            self.progress.best = {}  # the best weights stayed elsewhere: the next validation sets the mark anew
        spent = self._fraction(self.progress.step, self.progress.elapsed)
        if not same_budget:
            # What was due at a share of the old budget is due at another share of the new one.
            self.progress.next_validation, self.progress.next_point = spent + self._validation_gap(), spent
        if spent >= 1:
            raise FlashLMError("this run has spent its budget: give a larger --hours or --epochs to train on")

    def run(self, on_step: Callable[[Progress], None] | None = None) -> TrainResult:
        """Train, validate and save until the budget or the patience ends, or someone interrupts.

        Ctrl-C, a notebook's stop button and SIGTERM let the step end, save, and return the history so far.
        on_step: called after every step. Raises FlashLMError if loss or gradient stay non-finite.
        """
        p, stopped_by = self.progress, None
        self._mark = self.clock()
        self._began = self._mark - p.elapsed
        with _stop_requests() as requests:
            self.config = decide(self.model, self.config, self.tokens, self._expected_seconds())
            self._lap("prepare")
            while not stopped_by:
                self._step()
                stopped_by = "budget" if p.fraction >= 1 else "interrupt" if requests else None
                if due := stopped_by == "budget" or p.fraction >= p.next_validation:
                    self._validate()
                    if p.validations_since_best >= self.config.patience:
                        stopped_by = stopped_by or "patience"
                if due or stopped_by:
                    self._save(LAST, self.optimizer)
                if on_step:
                    on_step(p)
                    self._lap("display")
            if not p.best:  # after last.pt is written: a resumed run must not see this extra validation
                self._validate()
            return self._finish(stopped_by)

    def _fraction(self, step: int, elapsed: float) -> float:
        """Share of the budget spent after `step` steps and `elapsed` seconds; what preparing took is taken off both."""
        shares = []
        if self.config.hours is not None:
            prepared = self.progress.seconds["prepare"]
            shares.append((elapsed - prepared) / max(self.config.hours * 3600 - prepared, 1e-9))
        if self.config.epochs is not None:
            windows = self.tokens.windows(self.model.config.sequence_length)
            shares.append(step / math.ceil(self.config.epochs * windows / (self.config.batch or DEFAULT_BATCH)))
        return max(shares)

    def _expected_seconds(self) -> float:
        """How long the rest of the run takes, at most and about: for deciding what preparation pays."""
        seconds = [math.inf if self.config.hours is None else self.config.hours * 3600 - self.progress.elapsed]
        if self.config.epochs is not None:
            left = self.config.epochs * self.tokens.n_tokens - self.progress.tokens_seen
            seconds.append(left * 6 * sum(p.numel() for p in self.model.parameters()) / SLOW_FLOPS)
        return min(seconds)

    def _lap(self, activity: str) -> float:
        """Book the time since the last call under `activity`; returns it in seconds."""
        now = self.clock()
        seconds, self._mark = now - self._mark, now
        self.progress.seconds[activity] += seconds
        self.progress.elapsed = now - self._began
        return seconds

    def _step(self) -> None:
        p, config = self.progress, self.config
        # The rate of a step is that of the moment it ends, so the last one is at the floor.
        p.fraction = min(1.0, self._fraction(p.step + 1, p.elapsed + p.step_seconds))
        p.lr = learning_rate(p.fraction, config.lr, config.warmup, config.decay, config.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = p.lr
        inputs, targets = self.tokens.batch(p.step, config.batch, self.model.config.sequence_length, config.seed)
        p.loss, norm = optimizer_step(self.model, self.optimizer, inputs, targets, config)
        if math.isfinite(p.loss) and math.isfinite(norm):
            p.skipped_in_a_row = 0
            p.pending.append(p.loss)
        else:
            p.skipped += 1
            p.skipped_in_a_row += 1
        p.step += 1
        p.tokens_seen += int((targets != PAD).sum())
        seconds = self._lap("train")
        p.step_seconds = 0.9 * p.step_seconds + 0.1 * seconds if p.step_seconds else seconds
        if p.pending and p.fraction >= min(p.next_point, 1.0):
            p.next_point += 1 / POINTS
            p.history["train"].append({"step": p.step, "seconds": p.elapsed, "tokens": p.tokens_seen, "lr": p.lr,
                                       "nats_per_token": sum(p.pending) / len(p.pending), "gradient_norm": norm})
            p.pending = []
        if p.skipped_in_a_row >= NON_FINITE_STEPS:
            self._save(LAST, self.optimizer)
            raise FlashLMError(f"loss or gradient was not finite in {NON_FINITE_STEPS} steps in a row (step {p.step}): "
                               f"train again with a smaller --lr than {config.lr:g}")

    def _validate(self) -> None:
        p = self.progress
        report = evaluate(self.model, self.vocabulary, self.valid_stories, self.config.bfloat16).as_dict()
        p.history["valid"].append({"step": p.step, "seconds": p.elapsed, "tokens": p.tokens_seen,
                                   "nats_per_token": report["nats_per_token"], "bpc": report["bpc"],
                                   "bpb": report["bpb"]})
        p.next_validation = p.fraction + self._validation_gap()
        better = not p.best or report["nats_per_token"] < p.best["nats_per_token"]
        p.validations_since_best = 0 if better else p.validations_since_best + 1
        self._lap("validate")
        if better:
            p.best = report | {"step": p.step}
            self._save(BEST)

    def _validation_gap(self) -> float:
        """Share of the budget between two validations."""
        gaps = [1 / MOST_VALIDATIONS]
        if self.config.hours is not None:
            gaps.append(VALIDATION_GAP / (self.config.hours * 3600))
        if self.config.epochs is not None:
            tokens = sum(map(len, self.vocabulary.encode_batch(self.valid_stories)))
            gaps.append(tokens / (VALIDATION_SHARE * self.config.epochs * self.tokens.n_tokens))
        return max(gaps)

    def _save(self, name: str, optimizer: Optimizers | None = None) -> None:
        save_checkpoint(self.save_dir / name, self.model, self.config, self.vocabulary, self.source,
                        asdict(self.progress), optimizer)
        self._lap("save")

    def _finish(self, stopped_by: str) -> TrainResult:
        p = self.progress
        best = load_checkpoint(self.save_dir / BEST)["model"]
        report = {
            "stopped_by": stopped_by,
            "steps": p.step,
            "tokens_seen": p.tokens_seen,
            "tokens_per_second": p.tokens_per_second,
            "epochs": p.tokens_seen / self.tokens.n_tokens,
            "seconds": p.elapsed,
            "seconds_by_activity": p.seconds,
            "skipped_steps": p.skipped,
            "train_nats_per_token": p.history["train"][-1]["nats_per_token"] if p.history["train"] else None,
            "val_nats_per_token": p.best["nats_per_token"],
            "bpc": p.best["bpc"],
            "bpb": p.best["bpb"],
            "validation": p.best,
            "peak_memory_bytes": peak_memory(),
            "config": {"model": asdict(self.model.config), "training": asdict(self.config)},
            "vocabulary": {"hash": self.vocabulary.hash, "size": len(self.vocabulary),
                           "coverage": self.vocabulary.coverage},
            "source": self.source,
            "hardware": describe_hardware(),
            "history": p.history,
        }
        write_json(self.save_dir / "report.json", report)
        return TrainResult(best, p.history, report, stopped_by)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second SIGINT raises KeyboardInterrupt at once."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests  # only the main thread may set handlers
        return

    def note(number, frame):
        if requests and number == signal.SIGINT:
            raise KeyboardInterrupt
        requests.append(number)
        print("\nstopping after this step, then saving ...", file=sys.stderr)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class TerminalLine:
    """The live line of a run: loss, learning rate, tokens/s, tokens seen and time left, on stderr."""

    def __init__(self):
        # Where nobody watches (a log file), a line every half minute is enough.
        self.interval = 0.5 if sys.stderr.isatty() else 30.0
        self.bar = None  # made at the first step: until then others write to the terminal

    def __call__(self, p: Progress) -> None:
        """Show the progress after a step."""
        if self.bar is None:
            self.bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar:16}| {postfix}", file=sys.stderr,
                            mininterval=self.interval)
        valid = f", valid {p.history['valid'][-1]['nats_per_token']:.3f}" if p.history["valid"] else ""
        self.bar.set_postfix_str(f"loss {p.loss:.3f}{valid} nats, lr {p.lr:.1e}, {p.tokens_per_second:,.0f} tokens/s, "
                                 f"{p.tokens_seen / 1e6:.2f} M tokens, {p.seconds_left:.0f} s left", refresh=False)
        self.bar.update(p.fraction - self.bar.n)
        if p.fraction >= 1:
            self.bar.close()


def train(model_config: ModelConfig, train_config: TrainConfig, vocabulary: Vocabulary, train_tokens: TokenFile,
          valid_tokens: TokenFile, save_dir: str | Path, source: dict | None = None, resume: dict | None = None,
          on_step: Callable[[Progress], None] | None = None,
          clock: Callable[[], float] = time.monotonic) -> TrainResult:
    """Train a FlashLM to the budget of `train_config`; leaves best.pt, last.pt and report.json in `save_dir`.

    resume: load_checkpoint()'s result to go on from; with the same config the run is then bit for bit what it
    would have been without the stop. on_step: shows progress; a line on the terminal by default.
    Raises FlashLMError for what a person can mend: a batch that cannot fit, a folder that cannot be
    written, a checkpoint of another model, a loss that stays non-finite.
    """
    trainer = Trainer(model_config, train_config, vocabulary, train_tokens, valid_tokens, save_dir, source, clock)
    if resume is not None:
        trainer.restore(resume)
    return trainer.run(on_step or TerminalLine())
