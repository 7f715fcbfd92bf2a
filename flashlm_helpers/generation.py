"""Stories from a model, one token at a time, in constant time per token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashlm_helpers.config import FlashLMError, check_seed
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import freeze_ternary
from flashlm_helpers.vocab import BOS, EOS, SURROGATE, Vocabulary

MOST_TOKENS = 1_000_000  # of one story
LIKELIEST = 128  # ids that top-p looks at first, since sorting all of them takes longer than the model


@dataclass
class Story:
    """A prompt and what the model wrote after it.

    text: both together. ids: the generated ids, without EOS. surprise: bits of each generated id under the model's
    own distribution, before temperature and cuts; entropy: bits of that distribution. finished: whether the
    model ended the story itself.
    """

    prompt: str
    text: str = ""
    ids: list[int] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    finished: bool = False


def sampling_distribution(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities (B, V) to draw from, out of logits (B, V).

    temperature divides the logits (below 1e-6: all on the largest); then only the top_k likeliest ids stay (0: all),
    then the fewest ids whose probabilities reach top_p. Source: arXiv:1904.09751 (nucleus sampling).
    """
    if temperature < 1e-6:  # beyond this, float32 cannot tell it from greedy
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    logits = (logits - logits.amax(1, keepdim=True)) / temperature
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p = logits.softmax(1)
    if top_p < 1:
        ranked, order = p.topk(min(LIKELIEST, p.shape[1]))
        if (ranked.sum(1) < top_p).any():
            ranked, order = p.sort(dim=1, descending=True)
        before = ranked.cumsum(1) - ranked
        p = torch.zeros_like(p).scatter(1, order, ranked.masked_fill(before >= max(top_p, 1e-30), 0.0))
    return p / p.sum(1, keepdim=True)


def check_request(prompts: Sequence[str], tokens: int, temperature: float, top_k: int, top_p: float,
                  seed: int) -> None:
    """Raise FlashLMError for an empty prompt or a setting out of range; every runtime asks this first."""
    if not prompts or not all(prompts):
        raise FlashLMError('the prompt is empty: give a few words, for example "Once upon a time"')
    check_seed(seed)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise FlashLMError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k < 0:
        raise FlashLMError(f"top-k must be 0 (off) or more, not {top_k}")
    if not 0 < top_p <= 1:
        raise FlashLMError(f"top-p must be above 0 and at most 1 (off), not {top_p}")
    if not 1 <= tokens <= MOST_TOKENS:
        raise FlashLMError(f"tokens must be from 1 to {MOST_TOKENS:,}, not {tokens}")


def _read(model, ids: Tensor, past: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """The logits (B, V) of what follows ids (B, T), and the states after them; past: the states before them."""
    if isinstance(model, FlashLM):
        hidden, past = model.hidden(ids, past)
        return model.head(hidden[:, -1]).float(), past
    logits, past = model.read(ids, past)
    return logits[:, -1], past


@torch.inference_mode()
def stream(model: FlashLM, vocabulary: Vocabulary, prompts: Sequence[str], tokens: int = 200,
           temperature: float = 0.8, top_k: int = 0, top_p: float = 0.95, seed: int = 0) -> Iterator[list[Story]]:
    """Yield the stories after each step, until all have ended or have `tokens` generated ids.

    model: a FlashLM, or one of another runtime that has read(ids, past): a compiled.CompiledModel, an onnx.OnnxModel.
    The state of each block is carried along and has a fixed size, so a token costs the same at any position. Story i
    draws from its own generator seeded with seed + i, so it does not depend on the others in the batch.
    The same list of Story objects is yielded again and again, grown by one id each; `text` is set at the end.
    Raises FlashLMError for an empty prompt or a setting out of range.
    """
    check_request(prompts, tokens, temperature, top_k, top_p, seed)
    if isinstance(model, FlashLM):
        model = freeze_ternary(model)
    stories = [Story(prompt) for prompt in prompts]
    draws = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    begun = [_read(model, torch.tensor([[BOS, *vocabulary.encode(prompt)]]), None) for prompt in prompts]
    logits = torch.cat([last for last, _ in begun])
    past = [torch.cat(states) for states in zip(*(states for _, states in begun), strict=True)]
    for _ in range(tokens):
        logits[:, :EOS] = -math.inf  # PAD, UNK and BOS are never written
        log_p = logits.log_softmax(1)
        entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(1) / math.log(2)
        chances = sampling_distribution(logits, temperature, top_k, top_p)
        points = torch.cat([torch.rand(1, 1, generator=draw) for draw in draws])
        up_to = chances.cumsum(1)
        chosen = torch.searchsorted(up_to, points * up_to[:, -1:], right=True)
        for row, story in enumerate(stories):
            token = int(chosen[row])
            if token == EOS:
                story.finished = True
            elif not story.finished:
                story.ids.append(token)
                story.surprise.append(-float(log_p[row, token]) / math.log(2))
                story.entropy.append(float(entropy[row]))
        yield stories
        if all(story.finished for story in stories):
            break
        logits, past = _read(model, chosen, past)
    for story in stories:
        story.text = story.prompt + SURROGATE.sub("\ufffd", vocabulary.decode(story.ids))


def generate(model: FlashLM, vocabulary: Vocabulary, prompts: str | Sequence[str], **settings) -> list[Story]:
    """Write one story for each prompt, as a batch; `settings` are those of stream().

    Greedy (temperature=0) output is that of the full forward pass. Raises FlashLMError as stream() does.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stories: list[Story] = []
    for stories in stream(model, vocabulary, prompts, **settings):  # noqa: B007
        pass
    return stories
