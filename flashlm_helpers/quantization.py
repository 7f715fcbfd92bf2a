"""Ternary weights: absmean rounding, the straight-through estimator, and the linear layer built on them."""

import copy

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


def freeze_ternary(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, in which each BitLinear is a plain linear layer of its ternary weights.

    The outputs are the same to the last bit; the rounding is done once instead of at every call.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    for parent in list(frozen.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, BitLinear):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(layer.effective_weight, requires_grad=False)
                setattr(parent, name, linear)
    return frozen
