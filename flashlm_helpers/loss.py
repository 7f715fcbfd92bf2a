"""The cross-entropy of a tied head, without ever holding the logits of a whole batch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 512  # positions whose logits exist at the same time
NEGATIVES = 1024  # tokens in a sampled softmax, at least; or half as many as there are targets


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return -ln p of each row's target, in nats.

    logits: (R, V) of any float dtype. targets: (R,) int64. Returns (R,) float32.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def unnormalized_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a softmax without its division, so each exponential is computed and stored once.

    logits: (R, V) of any float dtype. targets: (R,) int64.
    Returns -ln p of the targets, (R,) float32; exp(logits - the row's largest), (R, V) in the
    dtype of logits; and the rows' sums of these before they were rounded, (R,) float32.
    """
    # Subtracting the largest logit keeps the exponentials from overflowing.
    values = logits.float()
    top = values.amax(1, keepdim=True)
    exponentials = (values - top).exp_()
    totals = exponentials.sum(1, keepdim=True)

    # -ln p = ln(sum of exponentials) - logit, both relative to the largest.
    nll = top + totals.log() - values.gather(1, targets[:, None])
    return nll.squeeze(1), exponentials.to(logits.dtype), totals.squeeze(1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of rows; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        kept: Tensor,  # (N,) bool: whether a target counts
        softmax: Callable,
        dtype: torch.dtype,
    ) -> Tensor:
        # Matmuls are computed in `dtype`, sums are kept in float32.
        head = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        shares = kept / kept.sum().clamp(min=1)  # of each position in the mean
        loss = hidden.new_zeros(())
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)

        # A chunk's logits are forgotten before the next chunk's are made.
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            piece = hidden[rows]
            target = targets[rows]
            share = shares[rows]
            logits = F.linear(piece.to(dtype), head, bias)
            nll, gradient, totals = softmax(logits, target)
            loss += (nll * share).sum()

            # A row's gradient by its logits is share / totals times its exponentials, less share
            # at the target. Rounded once there: near p = 1, a difference would be noise.
            at_target = torch.expm1(-nll) * totals
            gradient[torch.arange(len(target)), target] = at_target.to(dtype)

            # The factor share / totals goes to the narrow side of both products.
            factor = (share / totals)[:, None]
            hidden_gradient[rows] = (gradient @ head) * factor
            weight_gradient += gradient.T @ (piece * factor).to(dtype)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * gradient, weight_gradient * gradient, *[None] * 5


def sample_negatives(targets: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Choose tokens that represent the whole vocabulary in one step: targets, and random others.

    targets: (N,) token ids. size: V.
    Returns (ids, bias), both (M,), where M depends on N alone. Added to its logit, the bias lets
    each sampled token count for the ones left out, so that the expected sum of exponentials is
    that of the whole vocabulary. Returns None if there is nothing to leave out: M >= V, or too
    many different targets. Source: arXiv:1412.2007, section 3, for a uniform proposal.
    """
    # How many tokens take part: a fixed number, so that compiled programs fit every step.
    count = max(NEGATIVES, len(targets) // 2)
    wanted = targets.unique()
    if not len(wanted) < count < size:
        return None

    # All targets, and a uniform sample of the tokens that are no target.
    absent = torch.ones(size, dtype=torch.bool).index_fill_(0, wanted, False)
    others = absent.nonzero().squeeze(1)
    drawn = others[torch.randperm(len(others))[: count - len(wanted)]]

    # A sampled token counts as often as there are tokens per sampled one.
    bias = torch.zeros(count)
    bias[len(wanted) :] = math.log(len(others) / len(drawn))
    return torch.cat([wanted, drawn]), bias


def tied_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    sampled: bool = False,
    softmax: Callable = unnormalized_softmax,
) -> Tensor:
    """Compute F.cross_entropy(hidden @ weight.T, targets) in chunks of 512 rows of logits.

    hidden: (N, D) float32. weight: (V, D) float32. targets: (N,) int64. sampled: estimate the
    loss from sample_negatives() instead of the whole vocabulary. softmax: unnormalized_softmax,
    or a compiled form of it.
    Returns the mean in nats over the targets that are not ignore_index, 0 if there is none.
    Under CPU autocast the three matmuls use its dtype; everything that is summed stays float32.
    """
    # Autocast decides the number format of the matmuls.
    dtype = hidden.dtype
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    kept = targets != ignore_index
    targets = torch.where(kept, targets, 0)

    # A sampled softmax is the same computation on some rows of the weight, and a bias.
    bias = None
    sample = sample_negatives(targets, len(weight)) if sampled else None
    if sample is not None:
        ids, bias = sample
        place = torch.empty(len(weight), dtype=torch.long)
        place[ids] = torch.arange(len(ids))
        targets = place[targets]
        weight = weight[ids]

    # From here on the formats are chosen by hand.
    with torch.autocast("cpu", enabled=False):
        return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, kept, softmax, dtype)
