"""Mixers, the part of a block in which tokens meet: v4's gated convolution, attention, your own.

A mixer is a module made from a ModelConfig. It maps a stream x (B, T, D) and its state to the
mixed stream (B, T, D) and the state after x:

    class MyMixer(nn.Module):
        def __init__(self, config: ModelConfig): ...
        def forward(self, x, state=None): ...
            return mixed, state

The state is all that position T needs of the positions before it: a tensor or a tuple of tensors,
each with the batch first, zeros at the start of a text, and of one size however long the text.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.quantization import BitLinear

State = Tensor | tuple[Tensor, ...]


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Apply a function to every tensor of a state, or of several states side by side."""
    # A state is one tensor, or several in a tuple of any kind.
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    parts = [function(*tensors) for tensors in zip(*states, strict=True)]
    return first._make(parts) if hasattr(first, "_make") else tuple(parts)


# ---- v4's mixer: a gated convolution ----


class _CausalConvolution(torch.autograd.Function):
    """Shifted multiply-adds, forward and backward: several times as fast as conv1d on a CPU.

    The gradient is written out because the one that PyTorch derives for a sum of slices scatters
    every slice into zeros.
    """

    @staticmethod
    def forward(ctx, value: Tensor, past: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        time = value.shape[1]
        window = torch.cat([past, value], dim=1)  # (B, K-1 + T, D)
        ctx.save_for_backward(window, taps)

        mixed = sum(window[:, k : k + time] * taps[k] for k in range(len(taps)))
        past = window[:, time:].clone()
        ctx.mark_non_differentiable(past)
        return mixed, past

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None, Tensor]:
        window, taps = ctx.saved_tensors
        time = gradient.shape[1]
        last = len(taps) - 1

        # A value at t reaches the outputs at t ... t + K-1, so its gradient looks ahead.
        future = F.pad(gradient.to(window.dtype), (0, 0, 0, last))
        shifts = range(last + 1)
        of_value = sum(future[:, last - k : last - k + time] * taps[k] for k in shifts)
        of_taps = torch.stack([(gradient * window[:, k : k + time]).sum((0, 1)) for k in shifts])
        return of_value.to(window.dtype), None, of_taps.to(taps.dtype)


def causal_convolution(value: Tensor, past: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own filter: position t sums over its K values at t-K+1 ... t.

    value: (B, T, D). past: the K-1 values before them, (B, K-1, D). taps: (K, D), the last row
    weighs the present. Returns the mixed values (B, T, D), and `past` for the position after them.
    No gradient flows through `past`.
    """
    # Writing token by token needs no gradient and takes a tenth of the operations.
    writing = value.shape[1] == 1 and not torch.is_grad_enabled()
    if writing:
        window = torch.cat([past, value], dim=1)
        return (window * taps).sum(1, keepdim=True), window[:, 1:]

    # Whole texts, and training, which needs the gradient.
    return _CausalConvolution.apply(value, past, taps)


class GatedConvMixer(nn.Module):
    """Mix each position with the K-1 before it, by a causal depthwise convolution with a gate.

    One BitLinear D -> 2D gives gate and value. The value passes the convolution (K taps per
    channel, no bias), is multiplied by sigmoid(gate), and a BitLinear D -> D ends the branch.
    """

    def __init__(self, config: ModelConfig):
        # The taps keep the size of their inputs at the start.
        super().__init__()
        D = config.width
        K = config.kernel_size
        self.project_in = BitLinear(D, 2 * D, config.ternary)
        self.taps = nn.Parameter(torch.randn(K, D) * K**-0.5)
        self.project_out = BitLinear(D, D, config.ternary)

    @staticmethod
    def reach(config: ModelConfig) -> int:
        """Return how many positions before its own the mixer reads."""
        return config.kernel_size - 1

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix x (B, T, D); past: the K-1 values before x, (B, K-1, D), zeros at the start.

        Returns the mixed stream (B, T, D), and `past` for the position after x.
        """
        # Gate and value are made from each position by itself.
        gate, value = self.project_in(x).chunk(2, dim=-1)
        if past is None:
            past = value.new_zeros(x.shape[0], len(self.taps) - 1, value.shape[-1])

        # The value looks back K-1 positions, and the gate decides how much of it passes.
        mixed, past = causal_convolution(value, past, self.taps)
        return self.project_out(mixed * torch.sigmoid(gate)), past


# ---- attention, which v4 does not have ----


class AttentionState(NamedTuple):
    """The state of an AttentionMixer; W is its window, K its kernel size."""

    recent: Tensor  # (B, K-1, 3D), the last inputs of the convolution
    keys: Tensor  # (B, W-1, D)
    values: Tensor  # (B, W-1, D)
    count: Tensor  # (B, 1), how many of the keys belong to tokens; the first ones may be empty


class AttentionMixer(nn.Module):
    """Mix each position with the `window` tokens up to it, by causal softmax attention with a gate.

    One BitLinear D -> 4D gives query, key, value and gate. The first three pass a causal
    depthwise convolution, so a key can describe the tokens before its own. Queries and keys are
    normalized, and each head subtracts a fixed slope times the distance from its scores, so
    nothing depends on absolute positions and the state keeps its size.
    Source: arXiv:1706.03762 (attention), arXiv:2108.12409 (slopes), arXiv:2010.04245 (norms).
    Raises FlashLMError if the heads do not divide the width.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.width
        K = config.kernel_size
        self.heads = config.heads
        self.window = config.window
        if D % self.heads:
            raise FlashLMError(f"a width of {D} does not divide into {self.heads} heads")

        # The taps start near the identity: the present counts fully, the past a little.
        self.project_in = BitLinear(D, 4 * D, config.ternary)
        self.taps = nn.Parameter(0.5 * K**-0.5 * torch.randn(K, 3 * D))
        with torch.no_grad():
            self.taps[-1] += 1
        self.project_out = BitLinear(D, D, config.ternary)

    @staticmethod
    def reach(config: ModelConfig) -> int:
        """Return how many positions before its own the mixer reads, directly and by its taps."""
        return config.window - 1 + config.kernel_size - 1

    def forward(
        self, x: Tensor, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Mix x (B, T, D), given the state before it; returns (B, T, D) and the state after it."""
        # One matmul for everything that is made from a position by itself.
        B, T, D = x.shape
        W = self.window
        projected, gate = self.project_in(x).split([3 * D, D], dim=-1)
        if state is None:
            recent = projected.new_zeros(B, len(self.taps) - 1, 3 * D)
        else:
            recent = state.recent.to(projected.dtype)

        # Query, key and value, with short memories of their own; (B, T, heads, D / heads) each.
        mixed, recent = causal_convolution(projected, recent, self.taps)
        query, key, value = mixed.to(projected.dtype).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query = F.rms_norm(query.float(), query.shape[-1:]).to(value.dtype)
        key = F.rms_norm(key.float(), key.shape[-1:]).to(value.dtype)

        # Attend to the tokens that the state holds and to the new ones.
        keys = key.flatten(2)
        values = value.flatten(2)
        empty = None
        count = x.new_zeros(B, 1)
        if state is not None:
            keys = torch.cat([state.keys.to(keys.dtype), keys], dim=1)
            values = torch.cat([state.values.to(values.dtype), values], dim=1)
            count = state.count
            empty = W - 1 - count
        attended = self._attend(query, keys, values, empty)

        # Keep the last W-1 of them; at the start of a text, zeros stand for the missing ones.
        keys = F.pad(keys, (0, 0, W - 1, 0))[:, keys.shape[1] :]
        values = F.pad(values, (0, 0, W - 1, 0))[:, values.shape[1] :]
        state = AttentionState(recent, keys, values, (count + T).clamp(max=W - 1))
        return self.project_out(attended * torch.sigmoid(gate)), state

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, empty: Tensor | None) -> Tensor:
        """Attend from query (B, T, heads, d), the last T of S positions, to keys and values.

        keys, values: (B, S, D), of which the first `empty` (B, 1) belong to no token.
        Returns (B, T, D). Takes `window` queries at a time, so that memory grows with T and not
        with its square.
        """
        # One batch of matmuls per head; each head has its own slope.
        earlier = keys.shape[1] - query.shape[1]
        query = query.transpose(1, 2)  # (B, heads, T, d)
        keys = keys.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, S, d)
        values = values.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        slopes = 2.0 ** -torch.linspace(1, 8, self.heads)[:, None, None]

        results = []
        for start in range(earlier, keys.shape[2], self.window):
            stop = min(start + self.window, keys.shape[2])
            first = max(0, start - self.window + 1)

            # What these queries may see, and how much its distance costs.
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
            seen = (distance >= 0) & (distance < self.window)
            if empty is not None:
                seen = seen & (torch.arange(first, stop) >= empty)[:, None, None]
            bias = torch.where(seen, -slopes * distance, -math.inf).to(query.dtype)

            attended = F.scaled_dot_product_attention(
                query[:, :, start - earlier : stop - earlier],
                keys[:, :, first:stop],
                values[:, :, first:stop],
                bias.expand(len(query), -1, -1, -1),
            )
            results.append(attended)
        return torch.cat(results, dim=2).transpose(1, 2).flatten(2)
