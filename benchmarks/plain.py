"""FlashLM the plain way, the reference for speed.

float32, eager, conv1d, all logits at once, AdamW unfused. Parameters have the shapes and names of
flashlm_helpers.model.FlashLM's, so one can load the other's weights: the only difference is how the
sums are computed.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers.config import ModelConfig, TrainConfig
from flashlm_helpers.generation import sampling_distribution
from flashlm_helpers.optimization import build_optimizer
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.vocab import BOS, EOS, Vocabulary

BATCH = 2  # sequences a step


class PlainBitLinear(BitLinear):
    """Ternary weights by arithmetic on the latent ones, at every use."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        scale = self.weight.abs().mean()
        ternary = (self.weight / (scale + 1e-8)).round().clamp(-1, 1)
        quantized = ternary * scale
        return F.linear(x, self.weight + (quantized - self.weight).detach())


class PlainMixer(nn.Module):
    """The gated convolution, by conv1d."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.project_in = PlainBitLinear(config.width, 2 * config.width)
        self.taps = nn.Parameter(
            torch.randn(config.kernel_size, config.width) * config.kernel_size**-0.5
        )
        self.project_out = PlainBitLinear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, value = self.project_in(x).chunk(2, dim=-1)
        kernel_size, width = self.taps.shape
        padded = F.pad(value.transpose(1, 2), (kernel_size - 1, 0))
        mixed = F.conv1d(padded, self.taps.T.unsqueeze(1), groups=width).transpose(1, 2)
        return self.project_out(mixed * torch.sigmoid(gate))


class PlainGLU(nn.Module):
    """The gated linear unit."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = PlainBitLinear(config.width, config.hidden)
        self.up = PlainBitLinear(config.width, config.hidden)
        self.down = PlainBitLinear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PlainBlock(nn.Module):
    """RMSNorm, mixer, residual; RMSNorm, GLU, residual."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = PlainMixer(config)
        self.glu_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.glu = PlainGLU(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.glu(self.glu_norm(x))


class PlainFlashLM(nn.Module):
    """The whole model: ids (B, T) to logits (B, T, V)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) to logits (B, T, V)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, ids: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(
            self(ids).flatten(0, 1).float(), targets.flatten(), ignore_index=ignore_index
        )


def plain_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The recipe of build_optimizer() by an AdamW that does one small operation after another."""
    groups = []
    for group in build_optimizer(model, config).param_groups:
        groups.append({"params": group["params"], "weight_decay": group["weight_decay"]})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


@torch.no_grad()
def plain_generate(
    model: PlainFlashLM,
    vocabulary: Vocabulary,
    prompt: str,
    tokens: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> int:
    """Write a story by computing the whole window for each token; return the number of tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.tensor([[BOS, *vocabulary.encode(prompt)]])
    read = ids.shape[1]
    while ids.shape[1] < read + tokens:
        logits = model(ids[:, -model.config.sequence_length :])[:, -1]
        chosen = torch.multinomial(
            sampling_distribution(logits, temperature, top_k, top_p), 1, generator=draw
        )
        ids = torch.cat([ids, chosen], dim=1)
        if int(chosen) == EOS:
            break
    return ids.shape[1] - read
