"""FlashLM v4 "Bolt", and what was built on it: token ids to logits through BoltBlocks of ternary linear layers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers.config import ModelConfig
from flashlm_helpers.head import head_cross_entropy, power_rows, row_nats
from flashlm_helpers.quantization import BitLinear

OUTPUT_START = 0.05  # a block's output at the start, against that of a linear layer that keeps its input's size


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
    if value.shape[1] == 1 and not torch.is_grad_enabled():  # a tenth of the operations, for writing token by token
        window = torch.cat([past, value], dim=1)
        return (window * taps).sum(1, keepdim=True), window[:, 1:]
    return _CausalConvolution.apply(value, past, taps)


class GatedConvMixer(nn.Module):
    """Mix each position with the K-1 before it: a causal depthwise convolution, gated.

    One BitLinear D -> 2D gives gate and value; the value passes the convolution (K taps a channel, no bias), is
    multiplied by sigmoid(gate), and a BitLinear D -> D returns to the stream.
    """

    def __init__(self, width: int, kernel_size: int, ternary: bool = True):
        super().__init__()
        self.project_in = BitLinear(width, 2 * width, ternary)
        self.taps = nn.Parameter(torch.randn(kernel_size, width) * kernel_size**-0.5)
        self.project_out = BitLinear(width, width, ternary)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, D); past: the K-1 values before x, (B, K-1, D), zeros at the start of a text.

        Returns the mixed stream (B, T, D) and the `past` of the position after x.
        """
        gate, value = self.project_in(x).chunk(2, dim=-1)
        if past is None:
            past = value.new_zeros(x.shape[0], len(self.taps) - 1, value.shape[-1])
        mixed, past = causal_convolution(value, past, self.taps)
        return self.project_out(mixed * torch.sigmoid(gate)), past


class AttentionMixer(nn.Module):
    """Mix each position with the `window` tokens up to it: causal softmax attention, gated.

    One BitLinear D -> 4D gives query, key, value and gate; the first three pass a causal depthwise convolution as in
    GatedConvMixer, so that a key can stand for what came before its value. Queries and keys are normalized; distance
    counts by a fixed slope a head instead of by positions, so nothing depends on where in a text a window lies. The
    state has one size for good: the last window - 1 keys and values.
    Source: arXiv:1706.03762 (attention), arXiv:2108.12409 (slopes), arXiv:2010.04245 (normalized queries and keys).
    """

    def __init__(self, width: int, heads: int, window: int, kernel_size: int, ternary: bool = True):
        super().__init__()
        self.heads, self.window = heads, window
        self.project_in = BitLinear(width, 4 * width, ternary)
        # Near the identity: the present counts fully, the past a little.
        self.taps = nn.Parameter(0.5 * kernel_size**-0.5 * torch.randn(kernel_size, 3 * width))
        with torch.no_grad():
            self.taps[-1] += 1
        self.project_out = BitLinear(width, width, ternary)

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, D); past: the state before x, (B, 3D(K-1) + 2D(window-1) + 1), zeros at the start of a text.

        The state is what the convolution still needs, the keys and values, and how many of these there are.
        Returns the mixed stream (B, T, D) and the state after x.
        """
        (batch, time, width), kept, before = x.shape, self.window - 1, len(self.taps) - 1
        projected, gate = self.project_in(x).split([3 * width, width], dim=-1)
        if past is None:
            recent, rows, count = projected.new_zeros(batch, before, 3 * width), None, x.new_zeros(batch, 1)
        else:
            recent, rows, count = past.split([before * 3 * width, kept * 2 * width, 1], dim=1)
            recent = recent.unflatten(1, (before, 3 * width)).to(projected.dtype)
        mixed, recent = causal_convolution(projected, recent, self.taps)
        query, key, value = mixed.to(projected.dtype).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = (F.rms_norm(part.float(), part.shape[-1:]).to(value.dtype) for part in (query, key))
        new = torch.cat([key, value], dim=-1).flatten(2)
        rows = new if rows is None else torch.cat([rows.unflatten(1, (kept, 2 * width)).to(new.dtype), new], dim=1)
        attended = self._attend(query, rows, None if past is None else kept - count)
        rows = F.pad(rows, (0, 0, kept, 0))[:, -kept:] if kept else rows[:, :0]
        state = torch.cat([recent.flatten(1), rows.flatten(1), (count + time).clamp(max=kept)], dim=1)
        return self.project_out(attended * torch.sigmoid(gate)), state

    def _attend(self, query: Tensor, rows: Tensor, absent: Tensor | None) -> Tensor:
        """query: (B, T, H, d), of the last T of rows (B, S, 2D); the first `absent` (B, 1) of rows are of no token.

        Returns (B, T, D). Takes `window` queries at a time, so that memory grows with T and not with its square.
        """
        earlier, results = rows.shape[1] - query.shape[1], []
        rows = rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        slopes = 2.0 ** -torch.linspace(1, 8, self.heads)
        for start in range(earlier, rows.shape[2], self.window):
            stop, first = min(start + self.window, rows.shape[2]), max(0, start - self.window + 1)
            distance = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
            seen = (distance >= 0) & (distance < self.window)
            if absent is not None:
                seen = seen & (torch.arange(first, stop) >= absent)[:, None, None]
            bias = torch.where(seen, -slopes[:, None, None] * distance, -math.inf).to(query.dtype)
            key, value = rows[:, :, first:stop].chunk(2, dim=-1)
            results.append(F.scaled_dot_product_attention(query[:, start - earlier : stop - earlier].transpose(1, 2),
                                                          key, value, bias.expand(len(query), -1, -1, -1)))
        return torch.cat(results, dim=2).transpose(1, 2).flatten(2)


class TernaryGLU(nn.Module):
    """The feed-forward half of a block: BitLinear D -> H twice, SiLU(gate) * up, BitLinear H -> D.

    Source: arXiv:2002.05202 (gated linear units).
    """

    def __init__(self, width: int, hidden: int, ternary: bool = True):
        super().__init__()
        self.gate = BitLinear(width, hidden, ternary)
        self.up = BitLinear(width, hidden, ternary)
        self.down = BitLinear(hidden, width, ternary)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), each position on its own."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class BoltBlock(nn.Module):
    """RMSNorm -> mixer -> residual; RMSNorm -> TernaryGLU -> residual.

    attention: whether the mixer is an AttentionMixer, which v4 does not have. layer_scale (config): a factor a channel,
    0 at the start, on both branches; source: arXiv:2003.04887, arXiv:2103.17239.
    """

    def __init__(self, config: ModelConfig, attention: bool = False):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = (AttentionMixer(config.width, config.heads, config.window, config.kernel_size, config.ternary)
                      if attention else GatedConvMixer(config.width, config.kernel_size, config.ternary))
        self.glu_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.glu = TernaryGLU(config.width, config.hidden, config.ternary)
        self.layer_scale = nn.Parameter(torch.zeros(2, config.width)) if config.layer_scale else None
        if not config.layer_scale:  # the stream starts as the embedding alone, nearly (the idea of arXiv:1901.09321)
            with torch.no_grad():
                for last in (self.mixer.project_out, self.glu.down):
                    last.weight *= OUTPUT_START

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, D), past: the mixer's state or None; returns the same two after the block."""
        mixer_scale, glu_scale = (1, 1) if self.layer_scale is None else self.layer_scale
        mixed, past = self.mixer(self.mixer_norm(x), past)
        x = x + mixed * mixer_scale
        return x + self.glu(self.glu_norm(x)) * glu_scale, past


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
        self.blocks = nn.ModuleList(BoltBlock(config, number in config.attention) for number in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.dropout = 0.0  # of what the first block and the head read, while training
        self.sampled_softmax = False  # estimate the loss from a part of the vocabulary, while training
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

        ids: (B, T); past: one tensor a block, (B, ...), or None, which is the same as zeros, at the start of a text.
        Returns (hidden, past): (B, T, D), and the states after the last id.
        """
        x = F.dropout(self.embedding(ids), self.dropout, self.training)
        if self.compiled and torch.is_grad_enabled():
            torch._dynamo.mark_dynamic(x, 0)  # one program for every batch
        states = []
        for block, state in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            x, state = block(x, state)
            states.append(state)
        return F.dropout(self.norm(x), self.dropout, self.training), states

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
                                  self.power_rows, self.sampled_softmax and self.training)


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by kind: total, ternary (inside BitLinear), embedding, convolution, norm (with layer scales)."""
    with torch.device("meta"):
        model = FlashLM(config)
    counts = {"total": 0, "ternary": 0, "embedding": 0, "convolution": 0, "norm": 0}
    kinds = {BitLinear: "ternary", nn.Embedding: "embedding", GatedConvMixer: "convolution",
             AttentionMixer: "convolution", nn.RMSNorm: "norm", BoltBlock: "norm"}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            counts[kinds[type(module)]] += parameter.numel()
            counts["total"] += parameter.numel()
    return counts


def packed_bytes(config: ModelConfig) -> int:
    """About how many bytes a model takes if packed as tightly as it may be: what a preset costs to store.

    An estimate, below the size of a compact checkpoint, whose embedding has 16 bits: five ternary weights to a byte,
    the embedding at 8 bits with a 16-bit scale a row and a 16-bit token id, the rest as float32.
    Float twins have all linear layers as float32.
    """
    counts = count_parameters(config)
    linear = counts["ternary"] / 5 if config.ternary else 4 * counts["ternary"]
    return math.ceil(linear) + counts["embedding"] + 4 * config.vocabulary_size + 4 * (
        counts["convolution"] + counts["norm"])
