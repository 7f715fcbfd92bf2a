"""One optimizer step: the learning rate, AdamW, and the gradient of a batch that fits memory."""

import functools
import math

import torch
from torch import Tensor, nn

from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.machine.hardware import GIB, usable_memory
from flashlm_helpers.machine.numbers import matmul_autocast
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.vocab import PAD

MICROBATCH_TOKENS = 8192  # larger parts are no faster, and take more memory


def learning_rate(
    fraction: float, peak: float, warmup: float = 0.02, decay: float = 0.5, floor: float = 0.0
) -> float:
    """Compute warmup-stable-decay: linear up to `peak`, constant, linear down to `peak * floor`.

    fraction: share of the budget (time or steps) that is spent when the step ends, 0 to 1.
    warmup, decay: shares of the budget. Because the rate follows the budget and not a number of
    steps, it reaches the floor exactly when the time is up, on any machine.
    Source: arXiv:2404.06395.
    """
    fraction = min(max(fraction, 0.0), 1.0)

    # Up, level, down.
    if fraction < warmup:
        return peak * fraction / warmup
    if fraction <= 1 - decay:
        return peak
    return peak * (floor + (1 - floor) * (1 - fraction) / decay)


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Make AdamW for all parameters of a network; weight decay for latent ternary weights only.

    Norms, embedding, convolutions and layer scales do not decay. Source: arXiv:1711.05101.
    """
    # The latent weights of ternary layers, and everything else, each once.
    layers = [module for module in network.modules() if isinstance(module, BitLinear)]
    ternary = {id(layer.weight) for layer in layers}
    decayed = []
    others = []
    for parameter in network.parameters():
        group = decayed if id(parameter) in ternary else others
        group.append(parameter)

    # fused=True touches each weight once per step, and not once per operation.
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def step_memory(model: ModelConfig, sequences: int) -> int:
    """Estimate the bytes of memory that training needs with so many sequences in it at once.

    Fitted to measurements without compiling.
    """
    # Activations that the backward pass needs, and half a GiB for all else.
    per_token = model.blocks * (85 * model.width + 40 * model.hidden)
    return sequences * model.sequence_length * per_token + GIB // 2


@functools.lru_cache  # memory limits may change during a run, but its last bits must not
def microbatch_size(model: ModelConfig) -> int:
    """Return how many sequences pass the model at once: what is fast and fits half the memory.

    Raises FlashLMError if not even one fits.
    """
    # Refuse early what would be killed later.
    usable = usable_memory()
    if step_memory(model, 1) > usable:
        raise FlashLMError(
            f"training {model.name} needs about {step_memory(model, 1) / GIB:.1f} GiB and "
            f"{usable / GIB:.1f} GiB are usable: try --small, or a machine with more memory"
        )

    # As many as are fast, and fewer where memory is short.
    size = max(1, MICROBATCH_TOKENS // model.sequence_length)
    while size > 1 and step_memory(model, size) > usable / 2:
        size -= 1
    return size


def accumulate_gradient(
    network: nn.Module, inputs: Tensor, targets: Tensor, bfloat16: bool | None
) -> float:
    """Add the gradient of a batch's mean loss to the parameters' gradients; returns that loss.

    inputs, targets: (B, T) token ids; targets that are PAD do not count. The loss is in nats per
    token. bfloat16: the number format of matmuls, as in matmul_autocast().
    """
    # PAD fills the last window of a text, and is no target.
    size = microbatch_size(network.config)
    count = (targets != PAD).sum().clamp(min=1)
    loss = 0.0
    for part, wanted in zip(inputs.split(size), targets.split(size), strict=True):
        # A part counts by its share of the targets, so that the parts add up to the batch.
        share = (wanted != PAD).sum() / count
        with matmul_autocast(bfloat16):
            part_loss = network.loss(part, wanted, ignore_index=PAD) * share
        part_loss.backward()
        loss += part_loss.item()
    return loss


def optimizer_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    config: TrainConfig,
) -> tuple[float, float]:
    """Make one step on a batch (B, T), unless loss or gradient are not finite.

    Returns the loss in nats per token, and the norm of the gradient before it was clipped.
    """
    # The gradient of this batch alone, no longer than config.clip.
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradient(network, inputs, targets, config.bfloat16)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip).item()

    # A step in a direction that is not a number would destroy the weights.
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    return loss, norm
