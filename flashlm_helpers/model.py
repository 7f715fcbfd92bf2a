"""FlashLM v4 "Bolt": token ids to logits through BoltBlocks of ternary linear layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers.config import ModelConfig
from flashlm_helpers.head import head_cross_entropy, power_rows, row_nats
from flashlm_helpers.quantization import BitLinear


class _CausalConvolution(torch.autograd.Function):
    """Shifted multiply-adds forward and backward: on a CPU several times as fast as conv1d, and the same sums.

    The gradient is written out because the one derived for sums of slices scatters every slice into zeros.
    """

    @staticmethod
    def forward(ctx, value: Tensor, past: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        time, window = value.shape[1], torch.cat([past, value], dim=1)
        ctx.save_for_backward(window, taps)
        mixed, past = sum(window[:, k : k + time] * taps[k] for k in range(len(taps))), window[:, time:].clone()
        ctx.mark_non_differentiable(past)
        return mixed, past

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor, None, Tensor]:
        window, taps = ctx.saved_tensors
        time, last = gradient.shape[1], len(taps) - 1
        future = F.pad(gradient.to(window.dtype), (0, 0, 0, last))
        value_gradient = sum(future[:, last - k : last - k + time] * taps[k] for k in range(len(taps)))
        taps_gradient = torch.stack([(gradient * window[:, k : k + time]).sum((0, 1)) for k in range(len(taps))])
        return value_gradient.to(window.dtype), None, taps_gradient.to(taps.dtype)


def causal_convolution(value: Tensor, past: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise: each channel of position t becomes a weighted sum of its K values at t-K+1 ... t.

    value: (B, T, D). past: the K-1 values before them, (B, K-1, D). taps: (K, D), the last row weighs the present.
    Returns (mixed, past): (B, T, D), and the `past` of the position after value. No gradient flows through a `past`.
    """
    return _CausalConvolution.apply(value, past, taps)


class GatedConvMixer(nn.Module):
    """Mix each position with the K-1 before it: a causal depthwise convolution, gated.

    One BitLinear D -> 2D gives gate and value; the value passes the convolution (K taps a channel, no bias), is
    multiplied by sigmoid(gate), and a BitLinear D -> D returns to the stream.
    """

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.project_in = BitLinear(width, 2 * width)
        self.taps = nn.Parameter(torch.randn(kernel_size, width) * kernel_size**-0.5)
        self.project_out = BitLinear(width, width)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, D); past: the K-1 values before x, (B, K-1, D), zeros at the start of a text.

        Returns the mixed stream (B, T, D) and the `past` of the position after x.
        """
        gate, value = self.project_in(x).chunk(2, dim=-1)
        if past is None:
            past = value.new_zeros(x.shape[0], len(self.taps) - 1, value.shape[-1])
        mixed, past = causal_convolution(value, past, self.taps)
        return self.project_out(mixed * torch.sigmoid(gate)), past


class TernaryGLU(nn.Module):
    """The feed-forward half of a block: BitLinear D -> H twice, SiLU(gate) * up, BitLinear H -> D.

    Source: arXiv:2002.05202 (gated linear units).
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = BitLinear(width, hidden)
        self.up = BitLinear(width, hidden)
        self.down = BitLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position on its own."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class BoltBlock(nn.Module):
    """RMSNorm -> GatedConvMixer -> residual; RMSNorm -> TernaryGLU -> residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = GatedConvMixer(config.width, config.kernel_size)
        self.glu_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.glu = TernaryGLU(config.width, config.hidden)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, D), past: (B, K-1, D) or None; returns the same two after the block."""
        mixed, past = self.mixer(self.mixer_norm(x), past)
        x = x + mixed
        return x + self.glu(self.glu_norm(x)), past


class FlashLM(nn.Module):
    """The language model: embedding, BoltBlocks, final RMSNorm, and a head tied to the embedding.

    Calling it maps ids (B, T) to logits (B, T, V), in nats before normalization; position t depends on
    ids[:, t - receptive_field + 1 : t + 1] only. Built step by step in notebook 03.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(BoltBlock(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.compiled, self.power_rows, self.row_nats = False, power_rows, row_nats

    def compile(self) -> None:
        """Compile what stands between the matrix products: one program for all blocks, two for rows of logits.

        Same results up to rounding; the programs are built at first use.
        """
        for block in self.blocks:
            block.compile(dynamic=False)
        self.compiled = True
        self.power_rows, self.row_nats = (torch.compile(f, dynamic=False) for f in (power_rows, row_nats))

    def hidden(self, ids: Tensor, past: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """What the head reads, and the state to go on from.

        ids: (B, T); past: one (B, K-1, D) tensor a block, or None at the start of a text.
        Returns (hidden, past): (B, T, D), and the states after the last id.
        """
        x = self.embedding(ids)
        if self.compiled and torch.is_grad_enabled():
            torch._dynamo.mark_dynamic(x, 0)  # one program for every batch
        states = []
        for block, state in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            x, state = block(x, state)
            states.append(state)
        return self.norm(x), states

    def head(self, hidden: Tensor) -> Tensor:
        """hidden (..., D) to logits (..., V)."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) to logits (B, T, V)."""
        return self.head(self.hidden(ids)[0])

    def loss(self, ids: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy in nats over targets (B, T) that are not `ignore_index`."""
        hidden = self.hidden(ids)[0]
        return head_cross_entropy(hidden.flatten(0, 1), self.embedding.weight, targets.flatten(), ignore_index,
                                  self.power_rows)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind: total, ternary (inside BitLinear), embedding, convolution, norm."""
    with torch.device("meta"):
        model = FlashLM(config)
    counts = {"total": 0, "ternary": 0, "embedding": 0, "convolution": 0, "norm": 0}
    kinds = {BitLinear: "ternary", nn.Embedding: "embedding", GatedConvMixer: "convolution", nn.RMSNorm: "norm"}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[kinds[type(module)]] += parameter.numel()
            counts["total"] += parameter.numel()
    return counts
