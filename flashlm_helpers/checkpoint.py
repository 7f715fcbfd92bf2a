"""Checkpoints: one file, written atomically, safe to load, and enough to resume exactly."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.evaluation import BPCReport
from flashlm_helpers.machine.files import atomic_write, one_line
from flashlm_helpers.machine.integrity import read_tensors
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import latent_weight, unpack_ternary
from flashlm_helpers.vocab import Vocabulary

_FORMAT = "flashlm-checkpoint-2"
LAST = "last.pt"  # the latest state with the optimizer, to resume from
BEST = "best.pt"  # the weights of the lowest validation loss, to use

# ---- what a run knows of itself ----


@dataclass
class TrainPoint:
    """A point of the training curve: means over the steps since the point before it."""

    step: int
    seconds: float
    tokens: int
    lr: float
    nats_per_token: float
    gradient_norm: float


@dataclass
class ValidPoint:
    """A point of the validation curve."""

    step: int
    seconds: float
    tokens: int
    nats_per_token: float
    bpc: float
    bpb: float


@dataclass
class History:
    """The curves of a run; of a curriculum, also one on each of its texts, by name."""

    train: list[TrainPoint] = field(default_factory=list)
    valid: list[ValidPoint] = field(default_factory=list)
    sources: dict[str, list[ValidPoint]] = field(default_factory=dict)


ACTIVITIES = ("prepare", "train", "validate", "save", "display")


@dataclass
class Progress:
    """Where a run is: all that a checkpoint must hold besides weights and optimizer."""

    step: int = 0
    tokens_seen: int = 0
    fraction: float = 0.0  # of the budget
    elapsed: float = 0.0  # seconds
    step_seconds: float = 0.0  # a running mean
    loss: float = math.nan  # of the last step, in nats per token
    lr: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ACTIVITIES, 0.0))
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    best: BPCReport | None = None  # of all validations
    best_step: int = 0
    validations_since_best: int = 0
    next_validation: float = 0.0  # fractions of the budget
    next_point: float = 0.0
    threads: list[tuple[int, int]] = field(default_factory=list)  # (step, number from there on)
    pending: list[float] = field(default_factory=list)  # losses since the last TrainPoint
    history: History = field(default_factory=History)

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of training, without validating, saving and displaying."""
        return self.tokens_seen / max(self.seconds["train"], 1e-9)

    @property
    def seconds_left(self) -> float:
        """Estimate the time left from the pace so far; infinite before the first step."""
        if not self.fraction:
            return math.inf
        spent = self.elapsed - self.seconds["prepare"]
        return spent * (1 - self.fraction) / self.fraction

    @classmethod
    def from_dict(cls, content: dict) -> "Progress":
        """Make a Progress of what asdict() gave, also in an earlier version."""
        progress = cls(**content)
        rows = {"train": [], "valid": [], "sources": {}} | content.get("history", {})
        sources = {}
        for name, points in rows["sources"].items():
            sources[name] = [ValidPoint(**row) for row in points]
        progress.history = History(
            [TrainPoint(**row) for row in rows["train"]],
            [ValidPoint(**row) for row in rows["valid"]],
            sources,
        )

        # The best validation and its step used to be one dictionary, empty before the first.
        best = dict(content.get("best") or {})
        progress.best_step = best.pop("step", progress.best_step)
        progress.best = BPCReport(**best) if best else None
        return progress


# ---- files ----


@dataclass
class Checkpoint:
    """What a checkpoint holds. Without an optimizer it serves scoring and writing only."""

    network: nn.Module
    train_config: TrainConfig
    vocabulary: Vocabulary
    source: TextSource | None = None  # how to open the text again
    progress: Progress = field(default_factory=Progress)
    optimizer: dict | None = None  # its state_dict()
    random_state: Tensor | None = None


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write everything a run consists of, atomically: a crash leaves the earlier file whole.

    Raises FlashLMError if the file cannot be written.
    """
    # Only tensors and plain values, so that loading need not run code.
    vocabulary = checkpoint.vocabulary
    content = plain_content(checkpoint)

    # A vocabulary is its kept ids; the hash shows whether they are still the same.
    saved = {"hash": vocabulary.hash, "coverage": vocabulary.coverage}
    content["vocabulary"] = saved | {"kept": list(vocabulary.kept)}
    content["model"] = checkpoint.network.state_dict()
    with atomic_write(Path(path)) as file:
        torch.save(content, file)


def plain_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a file holds besides weights and vocabulary, in plain values."""
    source = checkpoint.source

    # Dataclasses become dictionaries; the vocabulary and the weights come on top of these.
    return {
        "format": _FORMAT,
        "model_config": asdict(checkpoint.network.config),
        "train_config": asdict(checkpoint.train_config),
        "source": asdict(source) if source else {},
        "progress": asdict(checkpoint.progress),
        "optimizer": checkpoint.optimizer,
        "random_state": checkpoint.random_state,
    }


def load_checkpoint(
    path: str | Path,
    prefer: str = BEST,
    build_model: Callable[[ModelConfig], nn.Module] = FlashLM,
) -> Checkpoint:
    """Read a checkpoint, or the `prefer` file of a run's folder, without running code from it.

    build_model: makes the network that the weights belong to.
    Raises FlashLMError if it is missing, truncated, damaged, not one of ours, or has a mixer that
    is not registered here.
    """
    # A run's folder holds two checkpoints.
    path = Path(path)
    if path.is_dir():
        path = path / prefer
    if not path.is_file():
        raise FlashLMError(f"there is no checkpoint {path}: give a .pt file or a run's folder")

    try:
        content = read_tensors(path)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise FlashLMError("it is not a FlashLM checkpoint of this version")
        return _rebuild(content, build_model, path)
    except Exception as error:  # damaged content raises nearly anything
        reason = one_line(error)[:200]
        raise FlashLMError(f"{path} cannot be loaded: {reason}") from error


def _rebuild(content: dict, build_model: Callable, path: Path) -> Checkpoint:
    # The vocabulary is the one that was saved, or else the file is damaged.
    saved = content["vocabulary"]
    vocabulary = Vocabulary(saved["kept"], saved["coverage"])
    vocabulary.check_matches(saved["hash"], str(path))

    # A network of the saved architecture, with the saved weights; no memory is taken for sizes
    # that the weights do not have.
    config = ModelConfig.from_dict(content["model_config"])
    weights = {name: _expand(weight) for name, weight in content["model"].items()}
    if build_model is FlashLM:
        _check_sizes(config, weights)
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn in vain
        network = build_model(config)
    network.load_state_dict(weights)

    # The rest turns from dictionaries into dataclasses again.
    recipe = TrainConfig.from_dict(content["train_config"])
    source = TextSource.from_dict(content["source"])
    progress = Progress.from_dict(content["progress"])
    optimizer = _single_optimizer(content["optimizer"])
    random_state = content["random_state"]
    return Checkpoint(network, recipe, vocabulary, source, progress, optimizer, random_state)


def _check_sizes(config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless a FlashLM of this config has as many parameters as the weights."""
    # Every block has some; on the "meta" device, they have shapes and no memory.
    wanted = math.inf
    if config.blocks < len(weights):
        with torch.device("meta"):
            network = FlashLM(config)
        wanted = sum(weight.numel() for weight in network.state_dict().values())
    if wanted != sum(weight.numel() for weight in weights.values()):
        raise ValueError("its weights are not those of its config")


def _expand(weight: Tensor | dict) -> Tensor:
    """Return a weight of a compact checkpoint as the network holds it."""
    if isinstance(weight, dict):
        ternary = unpack_ternary(weight["packed"], tuple(weight["shape"]))
        weight = latent_weight(ternary, weight["scale"].view(()))
    if not weight.isfinite().all():
        raise ValueError("it holds weights that are not finite")
    return weight.float()


def _single_optimizer(state: Any) -> dict | None:
    """Return the optimizer's state; an earlier version kept a list, with Muon of two."""
    if isinstance(state, list):
        return state[0] if len(state) == 1 else {"several": state}
    return state
