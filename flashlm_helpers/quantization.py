"""Ternary weights: absmean rounding, the straight-through estimator, and the linear layer built on them."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def ternarize(weight: Tensor, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Round a weight to {-1, 0, +1} and the scale that restores its magnitude.

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
    """The weight a BitLinear computes with: scale * ternary forward, identity backward.

    weight: (D_out, D_in) latent float weight. Returns the same shape and dtype.
    Source: arXiv:1308.3432 (the estimator), arXiv:2402.17764 (its use here).
    """
    return _StraightThrough.apply(weight)


class BitLinear(nn.Linear):
    """A linear layer without bias whose weights are ternary when it computes, float when it learns.

    Input (..., D_in), output (..., D_out). `weight` is the latent float weight that the optimizer moves.
    ternary: False leaves the weights float in both, for measuring what ternary weights cost.
    Source: arXiv:2402.17764 (weights as there; activations stay float in FlashLM v4).
    """

    def __init__(self, in_features: int, out_features: int, ternary: bool = True):
        super().__init__(in_features, out_features, bias=False)
        self.ternary = ternary

    def reset_parameters(self) -> None:
        """Draw the latent weight from a normal distribution with standard deviation 1 / sqrt(D_in)."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x (..., D_in) by the ternary weight; returns (..., D_out)."""
        return F.linear(x, self.effective_weight)

    @property
    def effective_weight(self) -> Tensor:
        """The weight (D_out, D_in) that the layer computes with."""
        return quantize_straight_through(self.weight) if self.ternary else self.weight


_PLACES = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)  # of the five digits in a byte, base 3


def pack_ternary(ternary: Tensor) -> Tensor:
    """Five ternary weights to a byte, as digits of base 3: 1.6 bits each, where 1.58 would be the least.

    ternary: {-1, 0, +1} of any shape. Returns uint8, (ceil(n / 5),); unused places of the last byte hold 0.
    """
    digits = F.pad((ternary.flatten() + 1).to(torch.uint8), (0, -ternary.numel() % 5), value=1)
    return (digits.view(-1, 5) * _PLACES).sum(1, dtype=torch.uint8)


def unpack_ternary(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What pack_ternary() packed: int8 of `shape`. Raises ValueError if `packed` (uint8) is of another length."""
    count = math.prod(shape)
    if len(packed) != -(-count // 5):
        raise ValueError(f"{len(packed)} bytes are not {count} ternary weights")
    digits = packed[:, None] // _PLACES % 3
    return (digits.flatten()[:count].to(torch.int8) - 1).view(shape)


def latent_weight(ternary: Tensor, scale: Tensor) -> Tensor:
    """A latent weight that ternarize() takes back to just this.

    ternary: {-1, 0, +1}, (D_out, D_in). scale: a scalar. Returns float32: dividing by the share of weights that are not
    0 makes the mean magnitude `scale` again.
    """
    return ternary * (scale / ternary.abs().float().mean().clamp(min=1e-8))


def _linear(layer: BitLinear) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.effective_weight.detach().clone(), requires_grad=False)
    return linear


def freeze_ternary(model: nn.Module, substitute: Callable[[BitLinear], nn.Module] = _linear) -> nn.Module:
    """A copy of `model` for inference, in which each BitLinear is a plain linear layer of its ternary weights.

    The outputs are the same to the last bit; the rounding is done once instead of at every call.
    substitute: makes something else of each BitLinear.
    """
    if isinstance(model, BitLinear):
        return substitute(model).eval().requires_grad_(False)
    layers = [layer for layer in model.modules() if isinstance(layer, BitLinear)]
    frozen = copy.deepcopy(model, {id(layer.weight): layer.weight for layer in layers})  # no copy of what is replaced
    for parent in list(frozen.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, BitLinear):
                setattr(parent, name, substitute(layer))
    return frozen.eval().requires_grad_(False)
