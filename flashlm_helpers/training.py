"""Train to a deadline on a CPU: end on time or on request, and resume to the last bit."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch
from torch import nn

from flashlm_helpers.autotune import DEFAULT_BATCH, autotune
from flashlm_helpers.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    Progress,
    TrainPoint,
    ValidPoint,
    save_checkpoint,
)
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.evaluation import bits_report, encode_stories, token_nats
from flashlm_helpers.machine.notices import notice
from flashlm_helpers.machine.signals import stop_requests
from flashlm_helpers.machine.stopwatch import Stopwatch
from flashlm_helpers.machine.threads import FOLLOWER, follow
from flashlm_helpers.optimization import learning_rate, microbatch_size, optimizer_step
from flashlm_helpers.tokens import PreparedText
from flashlm_helpers.vocab import PAD

NON_FINITE_STEPS = 10  # skipped steps in a row after which a run gives up
SLOW_FLOPS = 4e11  # per second, of an eager run on two cores: tells minutes from hours
HISTORY_ROWS = 500  # points of the training curve, whatever the budget

# A validation costs about as much as training on its tokens. These limits keep all of them
# together below a tenth of a run.
MAX_VALIDATIONS = 40
MIN_SECONDS_BETWEEN = 60.0
MAX_TOKEN_SHARE = 0.05
MAX_TIME_SHARE = 0.1  # with their saves, of the extra ones after every epoch of a small text


class StopReason(StrEnum):
    """Why a run ended."""

    BUDGET = "budget"
    PATIENCE = "patience"
    INTERRUPT = "interrupt"


def train(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    text: PreparedText,
    folder: str | Path,
    source: TextSource | None = None,
    resume: Checkpoint | None = None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Progress, StopReason, TrainConfig]:
    """Train a network to the budget of `config`; leaves best.pt and last.pt in `folder`.

    source: how to open the text again, for the checkpoints. resume: a checkpoint to go on from;
    with the same config the run is then bit for bit what it would have been without the stop.
    on_step: called after every step, to show the progress. clock: monotonic seconds.
    Returns where the run ended, why, and the config with nothing left open.
    It draws from PyTorch's global random numbers; Experiment.run() gives them a seed.
    Raises FlashLMError for what a person can mend: a model that cannot fit, a folder that cannot
    be written, a checkpoint of another model, a loss that stays non-finite.
    """
    trainer = Trainer(network, optimizer, config, text, Path(folder), source, clock)

    # A resumed run continues with the weights, the optimizer and the clock of its checkpoint.
    if resume is not None:
        trainer.restore(resume)
    progress, stopped_by = trainer.run(on_step)
    return progress, stopped_by, trainer.config


@dataclass
class Trainer:
    """One run: network, optimizer, recipe and text. run() trains until the budget ends."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    config: TrainConfig
    text: PreparedText
    folder: Path
    source: TextSource | None = None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self):
        # Refuse before anything starts what cannot work.
        microbatch_size(self.network.config)
        for tokens in (self.text.train, self.text.valid):
            self.text.vocabulary.check_matches(tokens.vocabulary_hash, str(tokens.path))

        # What the recipe says of the network's way to train.
        self.network.dropout = self.config.dropout
        self.network.sampled_softmax = self.config.sampled_softmax

        # Whole stories, the same ones at every validation; several texts share their number.
        sources = list(self.text.sources) or [None]
        count = max(1, self.config.validation_stories // len(sources))
        self.valid_stories = {}
        self.valid_tokens = 0
        for name in sources:
            stories = self.text.held_out(count, name)
            ids = encode_stories(self.text.vocabulary, stories)
            self.valid_stories[name] = (stories, ids)
            self.valid_tokens += sum(len(story) - 2 for story in ids)  # without BOS and EOS

        # The clock starts in run().
        self.progress = Progress(next_validation=self._validation_gap())
        self._saved = True  # whether every save of the latest step succeeded

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over weights, optimizer, progress and random state of a checkpoint.

        Raises FlashLMError if it is of another architecture or vocabulary, or has no optimizer.
        """
        # Refuse what could not continue exactly.
        self.text.vocabulary.check_matches(checkpoint.vocabulary.hash, "the checkpoint")
        model = checkpoint.network.config
        if model != self.network.config:
            raise FlashLMError(
                f"the checkpoint holds a {model.name} and this run is to train a "
                f"{self.network.config.name} of another shape: leave out the preset"
            )
        if checkpoint.optimizer is None:
            problem = "this checkpoint holds no optimizer state"
            raise FlashLMError(f"{problem}: resume from {LAST} of the same run")

        # With another budget, other ways to compute may pay; with the same one, the run must go
        # on in the same way, to the last bit.
        before = checkpoint.train_config
        same_budget = (self.config.hours, self.config.epochs) == (before.hours, before.epochs)
        kept = ("batch", "bfloat16", "compile") if same_budget else ("batch",)
        for name in kept:
            if getattr(self.config, name) is None:
                self.config = replace(self.config, **{name: getattr(before, name)})

        # Weights, optimizer and random numbers; the batches need nothing but the step. The run
        # changes copies, so that it can be resumed from the same checkpoint again.
        self.network.load_state_dict(checkpoint.network.state_dict())
        try:
            self.optimizer.load_state_dict(copy.deepcopy(checkpoint.optimizer))
        except (ValueError, KeyError) as error:
            raise FlashLMError(
                "the checkpoint's optimizer is of another kind than this run's: resume with the "
                "one it had (if that was Muon, which is gone, train anew)"
            ) from error
        torch.set_rng_state(checkpoint.random_state)

        # Progress, with its marks on the budget.
        self.progress = copy.deepcopy(checkpoint.progress)
        if not (self.folder / BEST).is_file():
            self.progress.best = None  # its weights are elsewhere, so the mark is set anew

        # What was due at a share of the old budget is due at another share of the new one.
        spent = self._spent(self.progress.step, self.progress.elapsed)
        if not same_budget:
            self.progress.next_validation = spent + self._validation_gap()
            self.progress.next_point = spent
        if spent >= 1:
            advice = "give a larger --hours or --epochs to train on"
            raise FlashLMError(f"this run has spent its budget: {advice}")

    def run(self, on_step: Callable[[Progress], None]) -> tuple[Progress, StopReason]:
        """Train, validate and save until the budget or the patience ends, or someone interrupts.

        Ctrl-C, a notebook's stop button, a closed terminal and SIGTERM let the step end, and save
        the run; an error, also of on_step, saves it on its way out.
        on_step: called after every step. Raises FlashLMError if the loss stays non-finite, or the
        end of the run cannot be saved.
        """
        p = self.progress
        self._watch = Stopwatch(self.clock)
        with stop_requests(self._rescue) as requests, FOLLOWER.hold(self._fixed_threads()):
            # Decide how to compute on this machine: number format, compilation, batch.
            parts = (self.network, self.optimizer, self.config, self.text.train)
            self.config = autotune(*parts, self._expected_seconds())
            self._record_time("prepare")

            # Step until the budget is spent, or somebody asks to stop.
            stopped_by = None
            while stopped_by is None:
                self._step()
                if p.fraction >= 1:
                    stopped_by = StopReason.BUDGET
                elif requests:
                    stopped_by = StopReason.INTERRUPT

                # Once in a while, and at the end of the budget: validate.
                self._saved = True
                due = self._validation_due()
                if due:
                    self._validate()
                    if p.validations_since_best >= self.config.patience:
                        stopped_by = stopped_by or StopReason.PATIENCE

                # last.pt is written after a validation, so that a resumed run need not repeat it.
                if due or stopped_by:
                    self._save(LAST)

                on_step(p)
                self._record_time("display")

            # A run that was stopped early has a best model, too. This validation comes after
            # last.pt is written: a resumed run must not see it.
            if p.best is None:
                self._validate()
        if not self._saved:
            raise FlashLMError(f"the run's end could not be saved: make room in {self.folder}")
        return p, stopped_by

    def _fixed_threads(self) -> int | None:
        """Return the number of threads of the whole run; None if it follows the machine."""
        if self.config.hours is not None:
            return None

        # A budget in epochs promises the same run again, to the last bit, whatever else runs here.
        return self.progress.threads[-1][1] if self.progress.threads else FOLLOWER.most

    # ---- the budget ----

    def _spent(self, step: int, elapsed: float) -> float:
        """Return the share of the budget that is spent after `step` steps and `elapsed` seconds.

        The time that preparing took counts neither as spent nor as budget.
        """
        shares = []

        # Wall-clock time: the same share on a fast machine and on a slow one.
        if self.config.hours is not None:
            prepared = self.progress.seconds["prepare"]
            budget = self.config.hours * 3600 - prepared
            shares.append((elapsed - prepared) / max(budget, 1e-9))

        # Passes over the text, in whole steps.
        if self.config.epochs is not None:
            windows = self.text.train.windows(self.network.config.sequence_length)
            batch = self.config.batch or DEFAULT_BATCH
            shares.append(step / math.ceil(self.config.epochs * windows / batch))

        # Whichever ends first.
        return max(shares)

    def _expected_seconds(self) -> float:
        """Estimate how long the rest of the run takes, to decide which preparations pay."""
        seconds = math.inf
        if self.config.hours is not None:
            seconds = self.config.hours * 3600 - self.progress.elapsed

        # Training takes about 6 floating-point operations per parameter and token.
        if self.config.epochs is not None:
            tokens = self.config.epochs * self.text.train.n_tokens - self.progress.tokens_seen
            parameters = sum(p.numel() for p in self.network.parameters())
            seconds = min(seconds, tokens * 6 * parameters / SLOW_FLOPS)
        return seconds

    def _validation_gap(self) -> float:
        """Return the share of the budget between two validations."""
        gap = 1 / MAX_VALIDATIONS

        # A budget in hours is limited by the clock, one in epochs by the tokens that are scored.
        if self.config.hours is not None:
            gap = max(gap, MIN_SECONDS_BETWEEN / (self.config.hours * 3600))
        if self.config.epochs is not None:
            train_tokens = self.config.epochs * self.text.train.n_tokens
            gap = max(gap, self.valid_tokens / (MAX_TOKEN_SHARE * train_tokens))
        return gap

    def _validation_due(self) -> bool:
        """Say whether to validate now: by the budget, or because a small text was read again."""
        p = self.progress
        looks = p.history.valid

        # By the clock alone, a timed run on a small text would be overfit before its first look.
        seen = p.tokens_seen - (looks[-1].tokens if looks else 0)
        epoch = self.config.hours is not None and seen >= self.text.train.n_tokens

        # One more must be cheap; the first will cost about as much as training on its tokens.
        spent = p.seconds["validate"] + p.seconds["save"]
        one = spent / len(looks) if looks else self.valid_tokens / p.tokens_per_second
        extra = epoch and spent + one <= MAX_TIME_SHARE * p.seconds["train"]
        return extra or p.fraction >= min(p.next_validation, 1.0)

    def _record_time(self, activity: str) -> float:
        """Count the seconds since the last call as spent on `activity`, and return them."""
        p = self.progress
        seconds = self._watch.lap(p.step_seconds if activity == "train" else 0.0)

        # Both are kept: the sum is what the budget counts, the parts are for people.
        p.seconds[activity] += seconds
        p.elapsed += seconds
        return seconds

    # ---- one step, one validation, one save ----

    def _step(self) -> None:
        p = self.progress
        config = self.config

        # The rate of a step is that of the moment it ends, so the last one is at the floor.
        p.fraction = min(1.0, self._spent(p.step + 1, p.elapsed + p.step_seconds))
        p.lr = learning_rate(p.fraction, config.lr, config.warmup, config.decay, config.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = p.lr
        self.network.spent = p.fraction  # for networks whose way to train changes on the way

        # Sums depend on the threads that share them, in their last bits, so changes are noted down.
        threads = follow()
        if not p.threads or p.threads[-1][1] != threads:
            p.threads.append((p.step, threads))

        # One optimizer step, which is skipped if it would do harm.
        length = self.network.config.sequence_length
        tokens = self.text.read_at(p.fraction)
        inputs, targets = tokens.batch(p.step, config.batch, length, config.seed)
        p.loss, norm = optimizer_step(self.network, self.optimizer, inputs, targets, config)
        if math.isfinite(p.loss) and math.isfinite(norm):
            p.skipped_in_a_row = 0
            p.pending.append(p.loss)
        else:
            p.skipped += 1
            p.skipped_in_a_row += 1

        # Count, and draw a point of the curve when it is due.
        p.step += 1
        p.tokens_seen += int((targets != PAD).sum())
        seconds = self._record_time("train")
        p.step_seconds = 0.9 * p.step_seconds + 0.1 * seconds if p.step_seconds else seconds
        if p.pending and p.fraction >= min(p.next_point, 1.0):
            self._add_point(norm)

        # A loss that stays infinite will not recover by itself.
        if p.skipped_in_a_row >= NON_FINITE_STEPS:
            raise FlashLMError(
                f"loss or gradient was not finite in {NON_FINITE_STEPS} steps in a row "
                f"(step {p.step}): train again with a smaller --lr than {config.lr:g}"
            )

    def _add_point(self, norm: float) -> None:
        p = self.progress
        loss = sum(p.pending) / len(p.pending)
        point = TrainPoint(p.step, p.elapsed, p.tokens_seen, p.lr, loss, norm)
        p.history.train.append(point)
        p.next_point += 1 / HISTORY_ROWS
        p.pending = []

    def _validate(self) -> None:
        p = self.progress

        # Score whole stories with the whole vocabulary, as eval-bpc does. What a curriculum ends
        # with is what its model is for, and comes last.
        for name, (stories, ids) in self.valid_stories.items():
            nats = token_nats(self.network, ids, self.config.bfloat16)
            report = bits_report(stories, nats)
            scores = (report.nats_per_token, report.bpc, report.bpb)
            point = ValidPoint(p.step, p.elapsed, p.tokens_seen, *scores)
            if name:
                p.history.sources.setdefault(name, []).append(point)
        p.history.valid.append(point)
        self._record_time("validate")

        # Patience counts the validations of the budget, not the extra ones, in the last stage.
        last_stage = self.text.read_at(p.fraction) is self.text.read_at(1.0)
        if p.fraction >= p.next_validation:
            p.next_validation = p.fraction + self._validation_gap()
            p.validations_since_best += 1 if last_stage else 0

        # Keep the best weights; what could not be kept is not the best.
        if p.best is None or report.nats_per_token < p.best.nats_per_token:
            before = (p.best, p.best_step)
            p.validations_since_best = 0
            p.best = report
            p.best_step = p.step
            self._save(BEST)
            if not self._saved:
                p.best, p.best_step = before

    def _save(self, name: str) -> None:
        """Save the run; if that fails, what stood before stays, and the next save tries again."""
        vocabulary = self.text.vocabulary
        parts = (self.network, self.config, vocabulary, self.source, self.progress)
        optimizer = self.optimizer.state_dict() if name == LAST else None
        checkpoint = Checkpoint(*parts, optimizer, torch.get_rng_state())
        try:
            save_checkpoint(self.folder / name, checkpoint)
        except FlashLMError as error:
            self._saved = False
            notice(f"\n{error}; what was saved before stays")
        self._record_time("save")

    def _rescue(self) -> None:
        """Save what there is: an exception is about to end the run."""
        if self.progress.step:
            self._save(LAST)
