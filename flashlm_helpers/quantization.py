"""Ternary weights: absmean rounding, the straight-through estimator, and a layer built on them."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- three values and a scale ----


def ternarize(weight: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Round a weight to {-1, 0, +1} and return the scale that restores its magnitude.

    weight: (D_out, D_in) latent float weight.
    Returns (ternary, scale): int8 of weight's shape, and mean |weight| as a scalar.
    Built step by step in notebook 02. Source: arXiv:2402.17764, eq. 1-3.
    """
    scale = weight.abs().mean()
    ternary = (weight / (scale + eps)).round().clamp(-1, 1)
    return ternary.to(torch.int8), scale


class _StraightThrough(torch.autograd.Function):
    """Forward: scale * ternary, exactly. Backward: the gradient as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ternary, scale = ternarize(weight)
        return ternary.to(weight.dtype).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def quantize_straight_through(weight: Tensor) -> Tensor:
    """Return the weight that a BitLinear computes with: scale * ternary.

    The gradient passes straight through to the latent weight, (D_out, D_in), as if nothing had
    been rounded. Source: arXiv:1308.3432 (the estimator), arXiv:2402.17764 (its use here).
    """
    return _StraightThrough.apply(weight)


class BitLinear(nn.Linear):
    """A linear layer without bias: ternary weights when it computes, float weights when it learns.

    Input (..., D_in), output (..., D_out). `weight` is the latent float weight, which the
    optimizer moves. ternary=False leaves it as it is, to measure what ternary weights cost.
    Source: arXiv:2402.17764, but activations stay float in FlashLM v4.
    """

    def __init__(self, in_features: int, out_features: int, ternary: bool = True):
        super().__init__(in_features, out_features, bias=False)
        self.ternary = ternary

    def reset_parameters(self) -> None:
        """Draw the latent weight from a normal distribution of standard deviation D_in ** -0.5."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def ternarized(self) -> tuple[Tensor, Tensor]:
        """Return the ternary weight (D_out, D_in), int8, and its scale."""
        return ternarize(self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., D_in) by the ternary weight; returns (..., D_out)."""
        return F.linear(x, self.effective_weight)

    @property
    def effective_weight(self) -> Tensor:
        """Return the weight (D_out, D_in) that the layer computes with."""
        return quantize_straight_through(self.weight) if self.ternary else self.weight


# ---- five weights per byte ----

_DIGIT_VALUES = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)  # of five digits in base 3


def pack_ternary(ternary: Tensor) -> Tensor:
    """Store five ternary weights per byte: 1.6 bits per weight, where 1.58 would be the least.

    ternary: {-1, 0, +1} of any shape. Returns uint8, (ceil(n / 5),).
    """
    digits = (ternary.flatten() + 1).to(torch.uint8)  # -1, 0, +1 become 0, 1, 2
    digits = F.pad(digits, (0, -len(digits) % 5), value=1)  # the last byte is filled up with 0
    return (digits.view(-1, 5) * _DIGIT_VALUES).sum(1, dtype=torch.uint8)


def unpack_ternary(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the weights that pack_ternary() stored, int8 of `shape`.

    packed: uint8, (ceil(n / 5),). Raises ValueError if its length does not fit the shape.
    """
    count = math.prod(shape)
    if len(packed) != -(-count // 5):
        raise ValueError(f"{len(packed)} bytes are not {count} ternary weights")
    digits = packed[:, None] // _DIGIT_VALUES % 3
    ternary = digits.flatten()[:count].to(torch.int8) - 1
    return ternary.view(shape)


def latent_weight(ternary: Tensor, scale: Tensor) -> Tensor:
    """Return a latent weight that ternarize() turns into just this ternary weight and scale.

    ternary: {-1, 0, +1}, (D_out, D_in). scale: a scalar. Returns float32 of ternary's shape.
    """
    # Zeros pull the mean magnitude down, so the other weights are larger by as much.
    share_not_zero = ternary.abs().float().mean()
    return ternary * (scale / share_not_zero.clamp(min=1e-8))


# ---- for inference: round once ----


def freeze_ternary(network: nn.Module) -> nn.Module:
    """Copy a network for inference, with a plain linear layer in place of each BitLinear.

    Its outputs are the same to the last bit, but weights are rounded once instead of at each call.
    """
    if isinstance(network, BitLinear):
        return _frozen_linear(network)

    # The copy shares the latent weights, which would be thrown away in the next step.
    layers = [layer for layer in network.modules() if isinstance(layer, BitLinear)]
    shared = {id(layer.weight): layer.weight for layer in layers}
    frozen = copy.deepcopy(network, shared)

    for parent in list(frozen.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, BitLinear):
                setattr(parent, name, _frozen_linear(layer))
    return frozen.eval().requires_grad_(False)


def _frozen_linear(layer: BitLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = layer.effective_weight.detach().clone()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear.eval()
