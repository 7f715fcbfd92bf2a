"""The cross-entropy of a tied head, without ever holding the logits of a whole batch."""

import torch
from torch import Tensor

ROWS = 512  # positions whose logits exist at the same time


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows: the backward pass only scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
        head = weight.to(dtype)
        keep = targets != ignore_index
        count = keep.sum().clamp(min=1)
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        for rows in torch.arange(len(hidden)).split(ROWS):
            rows = slice(int(rows[0]), int(rows[-1]) + 1)
            h, kept = hidden[rows].to(dtype), keep[rows, None]
            target = torch.where(keep[rows], targets[rows], 0)[:, None]
            logits = (h @ head.T).float()
            normalizer = logits.logsumexp(1, keepdim=True)
            total += ((normalizer - logits.gather(1, target)) * kept).sum()
            gradient = logits.sub_(normalizer).exp_()  # softmax
            gradient.scatter_add_(1, target, torch.full_like(normalizer, -1.0))
            gradient = gradient.mul_(kept / count).to(dtype)
            hidden_gradient[rows] = gradient @ head
            weight_gradient += gradient.T @ h
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total / count

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, weight_gradient * gradient, None, None, None


def head_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """F.cross_entropy(hidden @ weight.T, targets), with 512 rows of logits in memory at a time.

    hidden: (N, D) float32. weight: (V, D) float32. targets: (N,) int64. Returns the mean in nats over the targets
    that are not ignore_index (0 if there is none). Under CPU autocast the three products are made in its dtype;
    softmax, loss and the sums over chunks stay float32.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    with torch.autocast("cpu", enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, ignore_index, dtype)
