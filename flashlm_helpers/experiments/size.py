"""How large a model is: its parameters, its bytes, and how far back it sees."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from flashlm_helpers.config import ModelConfig
from flashlm_helpers.model import BoltBlock, FlashLM
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.registry import find_mixer


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has, by kind."""

    total: int = 0
    ternary: int = 0  # inside BitLinear layers
    embedding: int = 0  # shared with the head
    convolution: int = 0  # taps
    norm: int = 0  # RMSNorm, and layer scales
    other: int = 0  # of mixers that are not built in


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Count the parameters of a model by kind, without making them.

    Raises FlashLMError for a config that no model can have, such as one with an unknown mixer.
    """
    # On the "meta" device tensors have shapes, but no memory.
    with torch.device("meta"):
        network = FlashLM(config)

    # Each module counts the parameters that are its own, not those of its parts.
    counts = dict.fromkeys(ParameterCount.__dataclass_fields__, 0)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            counts[_kind_of(module, name)] += parameter.numel()
            counts["total"] += parameter.numel()
    return ParameterCount(**counts)


def _kind_of(module: nn.Module, name: str) -> str:
    if isinstance(module, BitLinear):
        return "ternary"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.RMSNorm | BoltBlock):
        return "norm"
    if name == "taps" or isinstance(module, nn.Conv1d):
        return "convolution"
    return "other"


def packed_bytes(config: ModelConfig) -> int:
    """Estimate the bytes of a packed model: what a preset costs to store.

    Five ternary weights per byte, the embedding at 8 bits with a 16-bit scale per row and 16-bit
    token ids, and the rest as float32. All linear layers of a float twin are float32.
    """
    counts = count_parameters(config)
    linear = math.ceil(counts.ternary / 5) if config.ternary else 4 * counts.ternary
    embedding = counts.embedding + 4 * config.vocabulary_size
    return linear + embedding + 4 * (counts.convolution + counts.norm + counts.other)


def receptive_field(config: ModelConfig) -> int | None:
    """Return how many tokens, itself included, a position's logits depend on.

    None means without end, or unknown: a mixer says it by a static method `reach(config)`.
    """
    # Every block reaches farther back, through the positions that it reads.
    total = 1
    for name in config.block_mixers:
        reach = getattr(find_mixer(name), "reach", None)
        if reach is None:
            return None
        total += reach(config)
    return total
