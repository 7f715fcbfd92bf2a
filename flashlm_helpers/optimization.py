"""One optimizer step: the gradient of a batch, in as many parts as memory asks for, and AdamW or Muon."""

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
NEWTON_SCHULZ_STEPS = 3  # of Muon: with five a step is 6 % slower, and hardly better


class Optimizers:
    """Optimizers of different parameters, handled as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all parts."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> list[dict]:
        """The state of each, in order."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict] | dict) -> None:
        """Take over what state_dict() gave; a single optimizer's is that of one part."""
        for part, state in zip(self.parts, states if isinstance(states, list) else [states], strict=True):
            part.load_state_dict(state)


def make_optimizer(model: FlashLM, config: TrainConfig) -> Optimizers:
    """AdamW for all parameters, or Muon for the latent ternary weights and AdamW for the rest: config.optimizer.

    Only the latent ternary weights decay: norms, embedding and convolutions do not. Muon's steps are scaled to the
    size of AdamW's, so both share one learning rate. Source: arXiv:1711.05101 (AdamW), arXiv:2502.16982 (Muon, scaled).
    """
    ternary = {id(layer.weight) for layer in model.modules() if isinstance(layer, BitLinear)}
    decayed = [p for p in model.parameters() if id(p) in ternary]
    others = [p for p in model.parameters() if id(p) not in ternary]
    if config.optimizer == "adamw":
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return Optimizers(torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True))
    return Optimizers(
        torch.optim.Muon(decayed, lr=config.lr, weight_decay=config.weight_decay, ns_steps=NEWTON_SCHULZ_STEPS,
                         adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True))


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


def optimizer_step(model: FlashLM, optimizer: Optimizers | torch.optim.Optimizer, inputs: Tensor, targets: Tensor,
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
