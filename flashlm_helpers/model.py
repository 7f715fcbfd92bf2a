"""FlashLM v4 "Bolt": token ids to logits, through blocks of ternary linear layers."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashlm_helpers.config import ModelConfig
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.loss import CHUNK_ROWS, tied_cross_entropy, token_nll, unnormalized_softmax
from flashlm_helpers.mixers import State
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.registry import find_mixer
from flashlm_helpers.vocab import Vocabulary

if TYPE_CHECKING:
    from flashlm_helpers.generation import Sampling, Story

OUTPUT_START = 0.05  # size of a branch's output at the start, against one that keeps its input's


class TernaryGLU(nn.Module):
    """The feed-forward half of a block: BitLinear D -> H twice, SiLU(gate) * up, BitLinear H -> D.

    Source: arXiv:2002.05202 (gated linear units).
    """

    def __init__(self, config: ModelConfig):
        # Two layers widen each position from D to H, a third one returns to D.
        super().__init__()
        self.gate = BitLinear(config.width, config.hidden, config.ternary)
        self.up = BitLinear(config.width, config.hidden, config.ternary)
        self.down = BitLinear(config.hidden, config.width, config.ternary)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to (B, T, D), each position by itself."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class BoltBlock(nn.Module):
    """RMSNorm -> mixer -> residual; RMSNorm -> TernaryGLU -> residual.

    mixer: its registered name. With config.layer_scale, a learned factor per channel, 0 at the
    start, scales each branch; source: arXiv:2003.04887, arXiv:2103.17239.
    """

    def __init__(self, config: ModelConfig, mixer: str = "conv"):
        # Each half normalizes a copy of the stream before it reads it.
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mixer = find_mixer(mixer)(config)
        self.glu_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.glu = TernaryGLU(config)
        # Both ways to begin let the stream pass the blocks nearly unchanged.
        self.layer_scale = None
        if config.layer_scale:
            self.layer_scale = nn.Parameter(torch.zeros(2, config.width))
        else:
            self._start_quietly()

    @torch.no_grad()
    def _start_quietly(self) -> None:
        """Let the stream start as little more than the embedding (the idea of arXiv:1901.09321)."""
        self.glu.down.weight *= OUTPUT_START
        last = getattr(self.mixer, "project_out", None)
        if isinstance(last, nn.Linear):
            last.weight *= OUTPUT_START

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Map x (B, T, D) and the mixer's state to x and the state after it."""
        # Mix the tokens, then think about each by itself; both results are added to the stream.
        mixed, state = self.mixer(self.mixer_norm(x), state)
        if self.layer_scale is None:
            x = x + mixed
            return x + self.glu(self.glu_norm(x)), state

        # The same, with a learned factor per channel on each branch.
        mixer_scale, glu_scale = self.layer_scale
        x = x + mixed * mixer_scale
        return x + self.glu(self.glu_norm(x)) * glu_scale, state


def build_block(config: ModelConfig, mixer: str) -> nn.Module:
    """Make a BoltBlock with this mixer, or what is registered as a whole block under its name."""
    kind = find_mixer(mixer)
    return kind(config) if getattr(kind, "is_block", False) else BoltBlock(config, mixer)


class FlashLM(nn.Module):
    """The language model: embedding, BoltBlocks, final RMSNorm, and a head tied to the embedding.

    Calling it maps token ids (B, T) to logits (B, T, V). A position depends on itself and the
    positions before it, no farther back than its receptive field. Built in notebook 03.
    A model of your own needs hidden(), head(), loss() and token_nll() of the same signatures.
    """

    def __init__(self, config: ModelConfig):
        # The embedding also serves as the head.
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(build_block(config, name) for name in config.block_mixers)
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

        # Training sets these: dropout of what the first block and the head read, whether the loss
        # is estimated from a part of the vocabulary, and, before every step, the share of the
        # budget that is spent.
        self.dropout = 0.0
        self.sampled_softmax = False
        self.spent = 1.0

        # compile() replaces these by compiled ones.
        self.compiled = False
        self._softmax = unnormalized_softmax
        self._token_nll = token_nll

    def compile(self) -> None:
        """Compile what runs between the matmuls: one program for all blocks, two for the loss.

        The results stay the same up to rounding. The programs are built at first use.
        """
        # Equal blocks share one program.
        for block in self.blocks:
            block.compile(dynamic=False)
        self.compiled = True
        self._softmax = torch.compile(unnormalized_softmax, dynamic=False)
        self._token_nll = torch.compile(token_nll, dynamic=False)

    def hidden(self, ids: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Compute what the head reads.

        ids: (B, T). states: of the blocks' mixers before ids; None at the start of a text.
        Returns the hidden stream (B, T, D) and the states after the last id.
        """
        # The stream starts as the embedding of the tokens.
        x = F.dropout(self.embedding(ids), self.dropout, self.training)
        if self.compiled and torch.is_grad_enabled():
            torch._dynamo.mark_dynamic(x, 0)  # one program for every batch size

        # Each block adds to it, and leaves a state for the tokens that follow.
        after = []
        for number, block in enumerate(self.blocks):
            x, state = block(x, states[number] if states else None)
            after.append(state)
        return F.dropout(self.norm(x), self.dropout, self.training), after

    def head(self, hidden: Tensor) -> Tensor:
        """Map the hidden stream (..., D) to logits (..., V)."""
        return F.linear(hidden, self.embedding.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V)."""
        hidden, _ = self.hidden(ids)
        return self.head(hidden)

    def loss(self, ids: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
        """Compute the mean cross-entropy, in nats, of the targets (B, T) after ids (B, T).

        Targets that are `ignore_index` do not count.
        """
        # In training, a part of the vocabulary may do; scoring always takes all of it.
        hidden, _ = self.hidden(ids)
        sampled = self.sampled_softmax and self.training

        # Every position is a row of its own: (B * T, D) and (B * T).
        rows = hidden.flatten(0, 1)
        weight = self.embedding.weight
        wanted = targets.flatten()
        return tied_cross_entropy(rows, weight, wanted, ignore_index, sampled, self._softmax)

    def token_nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute -ln p of each target (N,) after hidden (N, D), in nats; returns (N,) float32."""
        rows = zip(hidden.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
        return torch.cat([self._token_nll(self.head(h), target) for h, target in rows])


class LanguageModel(Protocol):
    """Whatever runs a trained model: PyTorch, C or ONNX Runtime.

    generate(), stream() and evaluate() use what is declared here, and nothing else.
    """

    vocabulary: Vocabulary
    runtime: str  # "torch", "c" or "onnx"
    source: TextSource | None  # the text it was trained on, if known

    def token_nats(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return -ln p of every id but the first of each sequence, in nats."""

    def write(self, prompts: Sequence[Sequence[int]], sampling: "Sampling") -> "list[Story]":
        """Write a story after each prompt (token ids, BOS first), as fast as possible."""

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: "Sampling"
    ) -> "Iterator[list[Story]]":
        """Yield the same stories after every token, as they grow."""
