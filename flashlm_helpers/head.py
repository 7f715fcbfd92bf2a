"""The cross-entropy of a tied head, without ever holding the logits of a whole batch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 512  # positions whose logits exist at the same time
CANDIDATES = 1024  # tokens of a sampled softmax, at least; half as many as there are targets, where that is more


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
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kept: Tensor,
                rows: Callable, dtype: torch.dtype) -> Tensor:
        head, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        shares = kept / kept.sum().clamp(min=1)
        total = hidden.new_zeros(())
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        pieces = (tensor.split(ROWS) for tensor in (hidden, hidden_gradient, targets, shares))
        for piece, piece_gradient, target, share in zip(*pieces, strict=True):
            nats, gradient, totals = rows(F.linear(piece.to(dtype), head, bias), target)
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
        return hidden_gradient * gradient, weight_gradient * gradient, None, None, None, None, None


def draw_candidates(targets: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Tokens that stand for a whole vocabulary in one step: all targets, and a random sample of the others.

    targets: (N,) ids. size: V. Returns (ids, bias), both (M,), where M depends on N alone: with the bias added to its
    logit a sampled token counts for as many as were left out, so that the expected sum of powers is that of the whole
    vocabulary. None if M would be V or more, or if there are too many different targets to sample beside them.
    Source: arXiv:1412.2007 (targets and a sample), with the correction of its section 3 for a uniform one.
    """
    count, wanted = max(CANDIDATES, len(targets) // 2), targets.unique()
    if not len(wanted) < count < size:
        return None
    others = torch.ones(size, dtype=torch.bool).index_fill_(0, wanted, False).nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others))[: count - len(wanted)]]
    bias = torch.zeros(count)
    bias[len(wanted):] = math.log(len(others) / len(drawn))
    return torch.cat([wanted, drawn]), bias


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100,
                       rows: Callable = power_rows, sampled: bool = False) -> Tensor:
    """F.cross_entropy(hidden @ weight.T, targets), with 512 rows of logits in memory at a time.

    hidden: (N, D) float32. weight: (V, D) float32. targets: (N,) int64. rows: power_rows, or a compiled form of
    it. sampled: estimate the loss from draw_candidates() instead of from the whole vocabulary.
    Returns the mean in nats over the targets that are not ignore_index (0 if there is none). Under CPU autocast
    the three products are made in its dtype; sums of powers, loss and the sums over chunks stay float32.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    kept, bias = targets != ignore_index, None
    targets = torch.where(kept, targets, 0)
    if sampled and (candidates := draw_candidates(targets, len(weight))):
        ids, bias = candidates
        targets = torch.empty(len(weight), dtype=torch.long).index_copy_(0, ids, torch.arange(len(ids)))[targets]
        weight = weight[ids]
    with torch.autocast("cpu", enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, kept, rows, dtype)
