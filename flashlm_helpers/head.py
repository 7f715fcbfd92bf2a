"""The cross-entropy of a tied head, without ever holding the logits of a whole batch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512  # positions whose logits exist at the same time


def row_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each row's target: logits (R, V) of any float dtype, targets (R,) int64; returns (R,) float32."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def power_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A softmax that is not divided yet, so that each power is computed once and stored rounded.

    logits: (R, V) of any float dtype. targets: (R,) int64. Returns (nats, powers, totals): -ln p of the targets, (R,)
    float32; exp(logits - largest of the row), (R, V) in the dtype of logits; their sums before rounding, (R,) float32.
    """
    values = logits.float()
    top = values.amax(1, keepdim=True)
    powers = (values - top).exp_()
    totals = powers.sum(1, keepdim=True)
    nats = top + totals.log() - values.gather(1, targets[:, None])
    return nats.squeeze(1), powers.to(logits.dtype), totals.squeeze(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows: the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, rows: Callable,
                dtype: torch.dtype) -> Tensor:
        head, kept = weight.to(dtype), targets != ignore_index
        targets = torch.where(kept, targets, 0)
        shares = kept / kept.sum().clamp(min=1)
        total = hidden.new_zeros(())
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        pieces = (tensor.split(ROWS) for tensor in (hidden, hidden_gradient, targets, shares))
        for piece, piece_gradient, target, share in zip(*pieces, strict=True):
            nats, gradient, totals = rows(piece.to(dtype) @ head.T, target)
            total += (nats * share).sum()
            # The gradient of a row is share / totals times these powers, less `totals` at the target; the factor goes
            # to the narrow side of both products. At the target: rounded once, as near p = 1 a difference is noise.
            gradient[torch.arange(len(target)), target] = (torch.expm1(-nats) * totals).to(dtype)
            factor = (share / totals)[:, None]
            piece_gradient.copy_((gradient @ head) * factor)
            weight_gradient += gradient.T @ (piece * factor).to(dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, weight_gradient * gradient, None, None, None, None


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
                       rows: Callable = power_rows) -> Tensor:
    """F.cross_entropy(hidden @ weight.T, targets), with 512 rows of logits in memory at a time.

    hidden: (N, D) float32. weight: (V, D) float32. targets: (N,) int64. rows: power_rows, or a compiled form of
    it. Returns the mean in nats over the targets that are not ignore_index (0 if there is none). Under CPU autocast
    the three products are made in its dtype; sums of powers, loss and the sums over chunks stay float32.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    with torch.autocast("cpu", enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, ignore_index, rows, dtype)
