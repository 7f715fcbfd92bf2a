"""What a model and a run consist of, the presets, the speed profiles, and the error a person can cause."""

import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args


class FlashLMError(ValueError):
    """Something a person can mend: the message says in one line what is wrong and what to do."""


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one FlashLM; two models with equal configs have tensors of equal shapes.

    width: D, the residual stream. blocks: number of BoltBlocks. hidden: H, inside the GLU.
    kernel_size: K, tokens each convolution sees. sequence_length: T, tokens in a training window.
    attention: which blocks, counted from 0, mix by attention (model.AttentionMixer) and not by a convolution alone.
    heads, window: of that attention; how many tokens, itself included, a position attends to.
    layer_scale: whether what a block adds to the stream passes a learned factor a channel, 0 at the start.
    ternary: False makes the float twin, the same model with float weights.
    Raises FlashLMError if any size is not a positive whole number, or if they do not fit together.
    """

    name: str
    width: int
    blocks: int
    hidden: int
    sequence_length: int
    kernel_size: int = 8
    vocabulary_size: int = 10_000
    attention: tuple[int, ...] = ()
    heads: int = 4
    window: int = 256
    layer_scale: bool = False
    ternary: bool = True

    def __post_init__(self):
        for field in ("width", "blocks", "hidden", "sequence_length", "kernel_size", "vocabulary_size", "heads",
                      "window"):
            size = getattr(self, field)
            if type(size) is not int or size < 1:
                raise FlashLMError(f"{field} must be a positive whole number, not {size!r}")
        for field in ("layer_scale", "ternary"):
            if type(getattr(self, field)) is not bool:
                raise FlashLMError(f"{field} must be true or false, not {getattr(self, field)!r}")
        blocks = self.attention if type(self.attention) is tuple else (None,)
        if not all(block in range(self.blocks) for block in blocks) or len(set(blocks)) != len(blocks):
            raise FlashLMError(f"attention cannot be {self.attention}: it must list blocks, each once and "
                               f"from 0 to {self.blocks - 1}")
        if self.attention and self.width % self.heads:
            raise FlashLMError(f"a width of {self.width} cannot be shared by {self.heads} heads: choose a divisor")

    @property
    def receptive_field(self) -> int:
        """How many tokens, itself included, a position's logits depend on."""
        return self.blocks * (self.kernel_size - 1) + len(self.attention) * (self.window - 1) + 1


PRESETS = {
    "v4-small": ModelConfig("v4-small", width=192, blocks=6, hidden=512, sequence_length=256),
    "v4-large": ModelConfig("v4-large", width=384, blocks=8, hidden=1024, sequence_length=512),
    # With attention in every other block, layer scales and fewer tokens in the vocabulary (notebook 11).
    "hybrid-small": ModelConfig("hybrid-small", width=256, blocks=4, hidden=640, sequence_length=256,
                                vocabulary_size=4096, attention=(1, 3), layer_scale=True),
    "hybrid-large": ModelConfig("hybrid-large", width=320, blocks=4, hidden=640, sequence_length=256,
                                vocabulary_size=4096, attention=(0, 2), heads=5, layer_scale=True),
    # Not a v4: small enough for tests and for notebooks in the smoke profile.
    "tiny": ModelConfig("tiny", width=64, blocks=2, hidden=128, sequence_length=128),
}


# The float twin of each: what ternary weights cost is the difference.
PRESETS |= {f"{name}-float": replace(config, name=f"{name}-float", ternary=False) for name, config in PRESETS.items()}


def find_preset(name: str) -> ModelConfig:
    """The preset of that name; raises FlashLMError if there is none."""
    if name not in PRESETS:
        raise FlashLMError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


LARGEST_BATCH = 4096  # a million tokens a step, far beyond what two CPU cores can use


def check_seed(seed: int) -> None:
    """Raise FlashLMError unless every generator of random numbers takes this seed."""
    if not 0 <= seed < 2**62:
        raise FlashLMError(f"seed must be a whole number from 0 to 2**62 - 1, not {seed}: try --seed 42")


@dataclass(frozen=True)
class TrainConfig:
    """How to train: the budget and the recipe.

    hours: wall-clock budget; epochs: passes over the text; whichever ends first (one may be None).
    batch: sequences a step. lr: peak learning rate. warmup, decay: shares of the budget spent rising
    to the peak and falling to lr * floor. optimizer: of the ternary weights, "adamw" or "muon". dropout: share of
    activations left out while training, which helps where a text is read many times. sampled_softmax:
    whether the loss of a step is estimated from a part of a large vocabulary (head.py). clip: largest gradient norm.
    patience: validations without a better loss before stopping early. validation_stories: how many stories each
    validation scores. bfloat16: the number format of matrix products. compile: by torch.compile. What is None of
    batch, bfloat16 and compile is decided for the machine when training starts (fastpath.py).
    Raises FlashLMError for a budget, batch or rate that no run can have.
    """

    hours: float | None = None
    epochs: float | None = None
    batch: int | None = None
    lr: float = 4e-3
    seed: int = 42
    warmup: float = 0.02
    decay: float = 0.5
    floor: float = 0.0
    weight_decay: float = 0.1
    optimizer: str = "adamw"
    dropout: float = 0.0
    sampled_softmax: bool = True
    clip: float = 1.0
    patience: int = 10
    validation_stories: int = 256
    bfloat16: bool | None = None
    compile: bool | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kinds, value = get_args(field.type) or (field.type,), getattr(self, field.name)
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                raise FlashLMError(f"{field.name} cannot be {value!r}: it must be "
                                   f"{' or '.join(kind.__name__ for kind in kinds)}")
        if self.hours is None and self.epochs is None:
            raise FlashLMError("a run needs a budget: give --hours or --epochs")
        for field in ("hours", "epochs", "lr", "clip"):
            value = getattr(self, field)
            if value is not None and not 0 < value <= 1e6:
                raise FlashLMError(f"{field} must be greater than 0 and at most a million, not {value}: "
                                   f"try {_EXAMPLES[field]}")
        for field in ("batch", "patience", "validation_stories"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise FlashLMError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.batch is not None and self.batch > LARGEST_BATCH:
            raise FlashLMError(f"batch must be at most {LARGEST_BATCH:,} sequences, not {self.batch:,}: try --batch 32")
        check_seed(self.seed)
        if self.optimizer not in ("adamw", "muon"):
            raise FlashLMError(f"optimizer must be adamw or muon, not {self.optimizer!r}")
        if not 0 <= self.dropout < 1:
            raise FlashLMError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not (0 <= self.weight_decay <= 1e6 and 0 <= self.floor <= 1):
            raise FlashLMError("weight_decay must be at least 0, and floor a share of lr, from 0 to 1")
        if not (0 <= self.warmup and 0 <= self.decay and self.warmup + self.decay <= 1):
            raise FlashLMError("warmup and decay are shares of the budget: each at least 0, together at most 1")


_EXAMPLES = {"hours": "--hours 0.05", "epochs": "--epochs 1", "lr": "--lr 0.004", "clip": "1.0"}


@dataclass(frozen=True)
class Profile:
    """Numbers that decide how long a notebook takes; the cells are the same in every profile."""

    name: str
    dataset: str  # what corpus.open_corpus is asked for
    preset: str  # which model the notebooks train
    stories: int  # stories taken from the corpus
    train_seconds: float  # each training run in a notebook
    evaluation_stories: int  # stories scored for a BPC
    sample_tokens: int  # tokens generated for a story


PROFILES = {
    "smoke": Profile("smoke", "builtin", "tiny", 1_500, 8.0, 60, 60),
    "full": Profile("full", "auto", "v4-small", 20_000, 100.0, 400, 200),
}


def active_profile() -> Profile:
    """The profile named by FLASHLM_PROFILE ("smoke" or "full"; full when unset).

    Raises FlashLMError for any other name.
    """
    name = os.environ.get("FLASHLM_PROFILE") or "full"
    if name not in PROFILES:
        raise FlashLMError(f"FLASHLM_PROFILE is {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def project_dir() -> Path:
    """The folder that holds data/ and checkpoints/.

    FLASHLM_HOME if it is set, otherwise the clone, or the working folder where the package was installed without one.
    """
    if home := os.environ.get("FLASHLM_HOME"):
        return Path(home)
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "pyproject.toml").is_file() else Path.cwd()
