"""FlashLM v3, the model before "Bolt": one block, applied twice, ternary without a scale.

It is a FlashLM whose only block is a RecursiveBlock, so everything works with it that works with
a FlashLM, except for bolt.c. Explained in notebook 10.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.loss import tied_cross_entropy
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import BitLinear

PASSES = 2  # of the one block
DILATIONS = (1, 4, 64)  # tokens between two taps of a convolution, per layer
GROUPS = 16  # channels of a convolution meet in so many groups
COUNTED = 4  # in training, one position in so many counts
PIECES = (8, 4, 2, 1)  # that windows are cut into, in each quarter of a run


# ---- ternary weights without a scale ----


def ternarize_by_sign(weight: Tensor) -> Tensor:
    """Round a weight to {-1, 0, +1}: its sign where it is larger than the average, or else 0.

    weight: (D_out, D_in) latent float weight. Returns int8 of its shape.
    """
    large = weight.abs() > weight.abs().mean()
    return (weight.sign() * large).to(torch.int8)


class _StraightThrough(torch.autograd.Function):
    """Forward: the ternary weight. Backward: the gradient as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        return ternarize_by_sign(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class SignLinear(BitLinear):
    """A linear layer as BitLinear, by v3's rule: what comes out grows with the width of the input.

    At the start, a BitLinear multiplies the size of its input by about 0.66, and this layer by
    0.65 times the square root of D_in.
    """

    def ternarized(self) -> tuple[Tensor, Tensor]:
        """Return the ternary weight (D_out, D_in), int8, and a scale of 1."""
        return ternarize_by_sign(self.weight.detach()), torch.ones(())

    @property
    def effective_weight(self) -> Tensor:
        """Return the weight (D_out, D_in) that the layer computes with."""
        return _StraightThrough.apply(self.weight) if self.ternary else self.weight


# ---- the block ----


class ConvLayer(nn.Module):
    """RMSNorm -> causal convolution times sigmoid of another one -> residual.

    Both have K taps, `dilation` tokens apart, in groups of channels, without bias.
    """

    def __init__(self, config: ModelConfig, dilation: int):
        super().__init__()
        D = config.width
        K = config.kernel_size
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.gate = nn.Conv1d(D, D, K, dilation=dilation, groups=GROUPS, bias=False)
        self.value = nn.Conv1d(D, D, K, dilation=dilation, groups=GROUPS, bias=False)
        self.reach = (K - 1) * dilation

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map x (B, T, D) and the normalized inputs before it, (B, reach, D), to both after it."""
        new = self.norm(x)
        if past is None:
            past = new.new_zeros(len(x), self.reach, x.shape[2])
        window = torch.cat([past.to(new.dtype), new], dim=1)

        # Convolutions want channels before time.
        channels = window.transpose(1, 2)
        mixed = torch.sigmoid(self.gate(channels)) * self.value(channels)
        return x + mixed.transpose(1, 2), window[:, x.shape[1] :].clone()


class SquaredReluGLU(nn.Module):
    """v3's feed-forward half: relu(gate) ** 2 * up, D -> H -> D. Source: arXiv:2109.08668."""

    def __init__(self, config: ModelConfig, linear: type[BitLinear]):
        super().__init__()
        self.gate = linear(config.width, config.hidden, config.ternary)
        self.up = linear(config.width, config.hidden, config.ternary)
        self.down = linear(config.hidden, config.width, config.ternary)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to (B, T, D), each position by itself."""
        return self.down(F.relu(self.gate(x)).square() * self.up(x))


class RecursiveBlock(nn.Module):
    """v3's block, applied twice with the same weights: convolutions, then a GLU, each added to x.

    The public description counts a router and does not say what it does when the number of passes
    is fixed. Our reading: for each position, its sigmoid is the share of the second pass that
    counts. Raises FlashLMError if the width does not divide into groups.
    """

    is_block = True  # it takes the place of a whole BoltBlock
    linear: type[BitLinear] = SignLinear

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.width
        if D % GROUPS:
            raise FlashLMError(f"v3 has {GROUPS} groups of channels, which do not divide {D}")
        self.mixer_norm = nn.RMSNorm(D, eps=1e-6)
        self.layers = nn.ModuleList(ConvLayer(config, dilation) for dilation in DILATIONS)
        self.project_out = self.linear(D, D, config.ternary)
        self.glu_norm = nn.RMSNorm(D, eps=1e-6)
        self.glu = SquaredReluGLU(config, self.linear)
        self.router = nn.Linear(D, 1)

    @staticmethod
    def reach(config: ModelConfig) -> int:
        """Return how many positions before its own the block reads."""
        return PASSES * (config.kernel_size - 1) * sum(DILATIONS)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map x (B, T, D) and the state before it to x and the state after it.

        state: for each pass and layer the normalized inputs before x, (B, (K-1) * dilation, D).
        """
        before = list(state) if state else [None] * (PASSES * len(DILATIONS))
        after = []
        for number in range(PASSES):
            # How much of the pass counts is decided before it.
            share = torch.sigmoid(self.router(x)) if number else 1.0
            passed = self._pass(x, before, after)
            x = x + share * (passed - x)
        return x, tuple(after)

    def _pass(self, x: Tensor, before: list, after: list[Tensor]) -> Tensor:
        """Apply the block once, from the states `before`; adds the new ones to `after`."""
        mixed = self.mixer_norm(x)
        for layer in self.layers:
            mixed, past = layer(mixed, before[len(after)])
            after.append(past)
        x = x + self.project_out(mixed)
        return x + self.glu(self.glu_norm(x))


class ScaledBlock(RecursiveBlock):
    """The same with v4's ternary layers, to see what their scale brings."""

    linear = BitLinear


# ---- the recipe ----


class FlashLMv3(FlashLM):
    """A FlashLM that trains as v3 did; pass it as build_model.

    In training, a random quarter of the positions counts, so the head, which is nearly all of the
    model, has a quarter of the work. Sequences grow: windows are cut into 8 pieces in the first
    quarter of the budget, then into 4, then into 2 (of 512 tokens: 64, 128, 256), and stay whole
    in the last one. Where the quarters end is our choice.
    """

    def loss(self, ids: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
        """Compute the mean cross-entropy in nats; in training, of a quarter of the targets (B, T).

        Targets that are `ignore_index` do not count.
        """
        if not self.training:
            return super().loss(ids, targets, ignore_index)

        # Every piece begins as if nothing stood before it.
        pieces = PIECES[min(int(len(PIECES) * self.spent), len(PIECES) - 1)]
        if ids.shape[1] % pieces == 0:
            length = ids.shape[1] // pieces
            ids = ids.reshape(-1, length)
            targets = targets.reshape(-1, length)

        # The head computes the logits of the positions that count, and no others.
        hidden, _ = self.hidden(ids)
        rows = hidden.flatten(0, 1)
        counted = torch.randperm(len(rows))[: max(1, len(rows) // COUNTED)]
        wanted = targets.flatten()[counted]
        weight = self.embedding.weight
        return tied_cross_entropy(rows[counted], weight, wanted, ignore_index, False, self._softmax)
