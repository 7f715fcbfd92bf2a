"""The sizes of a model, the recipe of a run, the presets, and the one error a person can cause."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args


class FlashLMError(ValueError):
    """A mistake that a person can mend: one line that says what is wrong and what to do."""


# ---- options: described once, where they are defined ----

# Limits of an option: in words for a complaint, and as a condition.
Limits = tuple[str, Callable[[Any], bool]]
COUNT: Limits = ("at least 1", lambda value: value >= 1)
POSITIVE: Limits = ("greater than 0 and at most a million", lambda value: 0 < value <= 1e6)
NOT_NEGATIVE: Limits = ("from 0 to a million", lambda value: 0 <= value <= 1e6)
SHARE: Limits = ("from 0 to 1", lambda value: 0 <= value <= 1)
BELOW_ONE: Limits = ("at least 0 and below 1", lambda value: 0 <= value < 1)
UP_TO_4096: Limits = ("at least 1 and at most 4,096", lambda value: 1 <= value <= 4096)


def option(default: Any, help: str, limits: Limits | None = None, tip: str = ""):
    """Define a dataclass field together with its help text and its limits.

    check_options() takes the limits from here, and the command line its flags and help texts.
    tip: a value to try, which ends a complaint.
    """
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits, "tip": tip})


def check_options(config: Any) -> None:
    """Raise FlashLMError unless every option() of a dataclass has its type and keeps its limits."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "help" not in field.metadata:
            continue

        # A whole number will do where a float is asked for; True is not a number.
        kinds = get_args(field.type) or (field.type,)
        whole_for_float = type(value) is int and float in kinds
        if type(value) not in kinds and not whole_for_float:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise FlashLMError(f"{field.name} cannot be {value!r}: it must be {names}")

        # None leaves the decision to the machine.
        words, holds = field.metadata["limits"] or ("", bool)
        if words and value is not None and not holds(value):
            advice = field.metadata["tip"] and f": try {field.metadata['tip']}"
            raise FlashLMError(f"{field.name} must be {words}, not {value}{advice}")


def check_seed(seed: int) -> None:
    """Raise FlashLMError unless every random number generator accepts this seed."""
    if not 0 <= seed < 2**62:
        words = "a whole number from 0 to 2**62 - 1"
        raise FlashLMError(f"seed must be {words}, not {seed}: try --seed 42")


# ---- the model ----


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a FlashLM; equal configs make tensors of equal shapes.

    mixers: the names of the blocks' mixers, a pattern that repeats until every block has one:
    ("conv",) is v4, ("conv", "attention") alternates. fl.register_mixer() adds names of your own.
    Raises FlashLMError for a size that is not a positive whole number.
    """

    name: str
    width: int = option(192, "D, channels of the residual stream", COUNT)
    blocks: int = option(6, "number of BoltBlocks", UP_TO_4096)
    hidden: int = option(512, "H, channels inside the GLU", COUNT)
    sequence_length: int = option(256, "T, tokens per training window", COUNT)
    kernel_size: int = option(8, "K, tokens each convolution sees", COUNT)
    vocabulary_size: int = option(10_000, "V, token ids at most", COUNT)
    mixers: tuple[str, ...] = ("conv",)
    heads: int = option(4, "heads of an attention mixer", COUNT)
    window: int = option(256, "tokens attention sees, the current one included", COUNT)
    layer_scale: bool = option(False, "whether a learned factor per channel scales each branch")
    ternary: bool = option(True, "False makes the float twin, whose weights are not rounded")

    def __post_init__(self):
        # Each option by itself, then what must fit together.
        check_options(self)
        named = isinstance(self.mixers, tuple) and self.mixers
        if not named or not all(isinstance(name, str) and name for name in self.mixers):
            raise FlashLMError(f"mixers cannot be {self.mixers!r}: give a tuple of mixers' names")
        if len(self.mixers) > self.blocks:
            raise FlashLMError(f"there are {len(self.mixers)} mixers for {self.blocks} blocks")

        # The shortest pattern, so that two ways to write one architecture compare equal.
        wanted = self.block_mixers
        for length in range(1, self.blocks + 1):
            if wanted == _repeat(wanted[:length], self.blocks):
                object.__setattr__(self, "mixers", wanted[:length])
                break

    @property
    def block_mixers(self) -> tuple[str, ...]:
        """Return the name of every block's mixer, in order."""
        return _repeat(self.mixers, self.blocks)

    @classmethod
    def from_dict(cls, content: dict) -> "ModelConfig":
        """Make a config of what asdict() gave, or an earlier version that listed `attention`.

        Raises FlashLMError for values that no model can have, TypeError for unknown names.
        """
        # Before mixers had names, a config listed the blocks with attention.
        content = dict(content)
        if "attention" in content:
            content["mixers"] = attention_at(content.pop("attention"), content["blocks"])
        content["mixers"] = tuple(content["mixers"])
        return cls(**content)


def attention_at(places: list[int] | tuple[int, ...], blocks: int) -> tuple[str, ...]:
    """Return a mixer name per block: attention in the blocks listed (from 0), "conv" elsewhere.

    Raises FlashLMError unless `places` lists blocks that there are, each once.
    """
    # Blocks that there are, each at most once.
    listed = isinstance(places, list | tuple)
    if not listed or not set(places) <= set(range(blocks)) or len(set(places)) < len(places):
        advice = f"list blocks, each once and from 0 to {blocks - 1}"
        raise FlashLMError(f"attention cannot be {places}: {advice}")

    # Everywhere else a block has v4's convolution.
    names = ["conv"] * blocks
    for place in places:
        names[place] = "attention"
    return tuple(names)


def _repeat(pattern: tuple[str, ...], count: int) -> tuple[str, ...]:
    return (pattern * count)[:count]


# The faithful v4, in two sizes.
_SMALL = ModelConfig("v4-small")
_LARGE = ModelConfig("v4-large", width=384, blocks=8, hidden=1024, sequence_length=512)

# Attention in every other block, layer scales, a smaller vocabulary (see the ablations).
_HYBRID = ModelConfig("hybrid-small", width=256, blocks=4, hidden=640, vocabulary_size=4096)
_HYBRID = replace(_HYBRID, mixers=("conv", "attention"), layer_scale=True)
_WIDE = replace(_HYBRID, name="hybrid-large", width=320, heads=5, mixers=("attention", "conv"))

# The model before v4 (see the archive): its one block is applied twice.
_V3 = ModelConfig("v3", width=256, blocks=1, hidden=683, sequence_length=512, kernel_size=4)
_V3 = replace(_V3, vocabulary_size=50_257, mixers=("v3",))

# Not a v4: small enough for tests, and for notebooks in the smoke profile.
_TINY = ModelConfig("tiny", width=64, blocks=2, hidden=128, sequence_length=128)

PRESETS = {model.name: model for model in (_SMALL, _LARGE, _HYBRID, _WIDE, _V3, _TINY)}

# The float twin of each preset: the difference between the two is the price of ternary weights.
for _name in list(PRESETS):
    PRESETS[f"{_name}-float"] = replace(PRESETS[_name], name=f"{_name}-float", ternary=False)


def find_preset(name: str) -> ModelConfig:
    """Return the preset of this name; raise FlashLMError if there is none."""
    if name not in PRESETS:
        raise FlashLMError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


# ---- the recipe ----


@dataclass(frozen=True)
class TrainConfig:
    """A recipe: the budget and how to spend it.

    The run ends with the first of `hours` and `epochs`; one of them may be None. Where batch,
    bfloat16 or compile is None, autotune() decides it for the machine when training starts.
    Raises FlashLMError for a budget, batch or rate that no run can have.
    """

    hours: float | None = option(None, "time limit in hours", POSITIVE, "--hours 0.05")
    epochs: float | None = option(None, "passes over the text", POSITIVE, "--epochs 1")
    batch: int | None = option(None, "sequences per step", UP_TO_4096, "--batch 32")
    lr: float = option(4e-3, "peak learning rate", POSITIVE, "--lr 0.004")
    seed: int = option(42, "seed of weights and batch order")
    warmup: float = option(0.02, "share of the budget in which the learning rate rises", SHARE)
    decay: float = option(0.5, "share of the budget in which the learning rate falls", SHARE)
    floor: float = option(0.0, "share of the peak learning rate left at the end", SHARE)
    weight_decay: float = option(0.1, "decay of the latent ternary weights", NOT_NEGATIVE)
    dropout: float = option(0.0, "share of activations dropped in training", BELOW_ONE, "0.1")
    sampled_softmax: bool = option(True, "estimate the training loss from a part of the vocabulary")
    clip: float = option(1.0, "largest norm of a gradient", POSITIVE, "1.0")
    patience: int = option(10, "validations without a better loss before stopping", COUNT)
    validation_stories: int = option(256, "stories that each validation scores", COUNT)
    bfloat16: bool | None = option(None, "whether matmuls are computed in bfloat16")
    compile: bool | None = option(None, "whether torch.compile compiles the model")

    def __post_init__(self):
        check_options(self)
        check_seed(self.seed)
        if self.hours is None and self.epochs is None:
            raise FlashLMError("a run needs a budget: give --hours or --epochs")
        if self.warmup + self.decay > 1:
            raise FlashLMError("warmup and decay are shares of the budget, together at most 1")

    @classmethod
    def from_dict(cls, content: dict) -> "TrainConfig":
        """Make a recipe of what asdict() gave, also in an earlier version.

        Raises FlashLMError for values that no run can have, TypeError for unknown names.
        """
        # Earlier versions named their optimizer, and the first ones had no sampled softmax.
        content = {"sampled_softmax": False} | content
        content.pop("optimizer", None)
        return cls(**content)
