"""One optimizer step: the gradient of a batch, in as many parts as memory asks for, and AdamW."""

import functools
import math

import torch
from torch import Tensor

from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.hardware import GIB, products, usable_memory
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.vocab import PAD

MICROBATCH_TOKENS = 8192  # larger parts are no faster and take more memory


def make_optimizer(model: FlashLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the latent ternary weights only: none on norms, embedding and convolutions.

    Source: arXiv:1711.05101.
    """
    decayed = {id(layer.weight) for layer in model.modules() if isinstance(layer, BitLinear)}
    groups = [{"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def step_memory(model: ModelConfig, sequences: int) -> int:
    """Bytes of memory a run needs, about, with so many sequences in the model at once; measured without compiling."""
    activations = model.blocks * (85 * model.width + 40 * model.hidden)
    return sequences * model.sequence_length * activations + GIB // 2


@functools.lru_cache  # limits of memory may change while a run goes on; its last bits must not
def microbatch(model: ModelConfig) -> int:
    """How many sequences pass the model at once: as many as are fast, and fit in half of the memory.

    Raises FlashLMError if not even one fits.
    """
    usable = usable_memory()
    if step_memory(model, 1) > usable:
        raise FlashLMError(f"training {model.name} needs about {step_memory(model, 1) / GIB:.1f} GiB and "
                           f"{usable / GIB:.1f} GiB are usable: try --small, or a machine with more memory")
    most = max(1, MICROBATCH_TOKENS // model.sequence_length)
    return next(n for n in range(most, 0, -1) if n == 1 or step_memory(model, n) <= usable / 2)


def accumulate_gradient(model: FlashLM, inputs: Tensor, targets: Tensor, bfloat16: bool) -> float:
    """Add the gradient of a batch's mean loss to those of the parameters; returns that loss, in nats/token.

    inputs, targets: (B, T) ids; targets that are PAD do not count. bfloat16: how matrix products are made.
    """
    size, count, loss = microbatch(model.config), (targets != PAD).sum().clamp(min=1), 0.0
    for part, wanted in zip(inputs.split(size), targets.split(size), strict=True):
        with products(bfloat16):
            share = model.loss(part, wanted, ignore_index=PAD) * ((wanted != PAD).sum() / count)
        share.backward()
        loss += share.item()
    return loss


def optimizer_step(model: FlashLM, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor,
                   config: TrainConfig) -> tuple[float, float]:
    """One step on a batch, left out if loss or gradient is not finite; returns both: nats/token, norm before clipping.

    inputs, targets: (B, T) ids.
    """
    optimizer.zero_grad(set_to_none=True)
    loss = accumulate_gradient(model, inputs, targets, config.bfloat16)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    return loss, norm
