"""Write stories with a model, one token at a time, each at the same cost."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flashlm_helpers.config import FlashLMError, check_seed, option
from flashlm_helpers.machine.threads import follow
from flashlm_helpers.mixers import State, map_state
from flashlm_helpers.model import LanguageModel
from flashlm_helpers.sources.gpt2 import SURROGATE
from flashlm_helpers.vocab import BOS, EOS, Vocabulary

MOST_TOKENS = 1_000_000  # of one story

Prompts = Sequence[Sequence[int]]  # token ids of each, BOS first


@dataclass
class Story:
    """A prompt and what a model wrote after it."""

    prompt: str = ""
    text: str = ""  # both together, once the story has ended

    # The generated ids, without EOS. For each: its bits under the model's own distribution,
    # before temperature and cuts, and the bits of that distribution, its mean surprise.
    ids: list[int] = field(default_factory=list)
    surprise: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    finished: bool = False  # whether the model ended the story itself


# ---- sampling ----

LIKELIEST = 128  # ids that top-p sorts first: sorting all of them takes longer than the model


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn from a model's distribution.

    Story i of a batch draws from its own generator, seeded with seed + i, so it does not depend
    on the others. Raises FlashLMError for a setting out of range.
    """

    tokens: int = option(200, "tokens to write at most")
    temperature: float = option(0.8, "divides the logits; 0 is greedy")
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all")
    top_p: float = option(0.95, "keep the fewest tokens whose probabilities reach p; 1 keeps all")
    seed: int = option(0, "seed of the random numbers")

    def __post_init__(self):
        check_seed(self.seed)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise FlashLMError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise FlashLMError(f"top-k must be 0 (off) or more, not {self.top_k}")

        # These two have limits at both ends.
        if not 0 < self.top_p <= 1:
            raise FlashLMError(f"top-p must be above 0 and at most 1 (off), not {self.top_p}")
        if not 1 <= self.tokens <= MOST_TOKENS:
            raise FlashLMError(f"tokens must be from 1 to {MOST_TOKENS:,}, not {self.tokens}")


def sampling_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Turn logits (B, V) into the probabilities (B, V) to draw from.

    The settings are those of Sampling, in the order in which they apply.
    Source: arXiv:1805.04833 (top-k), arXiv:1904.09751 (top-p, or nucleus sampling).
    """
    if temperature < 1e-6:  # float32 cannot tell it from greedy
        likeliest = logits.argmax(1, keepdim=True)
        return torch.zeros_like(logits).scatter_(1, likeliest, 1.0)

    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    logits = (logits - logits.amax(1, keepdim=True)) / temperature

    # Cut by rank, then by probability; the rest sums to 1 again.
    if 0 < top_k < logits.shape[1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(1)
    if top_p < 1:
        p = _keep_nucleus(p, top_p)
    return p / p.sum(1, keepdim=True)


def _keep_nucleus(p: Tensor, top_p: float) -> Tensor:
    """Set p (B, V) to 0 for all but the fewest ids that reach top_p together."""
    # Few ids are enough, unless the model is unsure or top_p is near 1.
    ranked, order = p.topk(min(LIKELIEST, p.shape[1]))
    if (ranked.sum(1) < top_p).any():
        ranked, order = p.sort(dim=1, descending=True)

    # An id is kept if those before it do not reach top_p yet; the first one always is.
    before = ranked.cumsum(1) - ranked
    kept = ranked.masked_fill(before >= max(top_p, 1e-30), 0.0)
    return torch.zeros_like(p).scatter(1, order, kept)


def sample_next_token(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw one id for each row of logits (B, V), with a generator per row; returns (B, 1)."""
    # A row's point comes from its own generator, so the other rows make no difference.
    p = sampling_distribution(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    points = torch.cat([torch.rand(1, 1, generator=generator) for generator in generators])

    # Lay the probabilities end to end: the id whose stretch the point falls on is drawn.
    ends = p.cumsum(1)
    return torch.searchsorted(ends, points * ends[:, -1:], right=True)


# ---- writing, with any model that can read ----

# Maps ids (B, T) and the states before them, None at the start of a text, to the logits (B, V) of
# the id that follows, and the states after them: one per block, batch first.
Read = Callable[[Tensor, list[State] | None], tuple[Tensor, list[State]]]


@torch.inference_mode()
def stream_by_reading(read: Read, prompts: Prompts, sampling: Sampling) -> Iterator[list[Story]]:
    """Write stories with a model that can only read; yield them after each token, grown in place.

    The states have a fixed size, so a token costs the same at any position. Ends when all stories
    have ended, or have `sampling.tokens` ids.
    """
    stories = [Story() for _ in prompts]
    generators = []
    for number in range(len(prompts)):
        generators.append(torch.Generator().manual_seed(sampling.seed + number))

    # From here on logits (B, V) are of the next id, given all that the states (B, ...) have seen.
    logits, states = _read_prompts(read, prompts)
    for _ in range(sampling.tokens):
        follow()
        logits[:, :EOS] = -math.inf  # PAD, UNK and BOS are never written
        chosen = sample_next_token(logits, sampling, generators)
        _record(stories, logits, chosen)
        yield stories

        # A story that has ended is read on beside the others, and what follows it is ignored.
        if all(story.finished for story in stories):
            break
        logits, states = read(chosen, states)


def _read_prompts(read: Read, prompts: Prompts) -> tuple[Tensor, list[State]]:
    """Read each prompt, and put logits and states together as a batch."""
    logits = []
    states = []
    for prompt in prompts:
        # One by one, because their lengths differ.
        after, state = read(torch.tensor([prompt]), None)
        logits.append(after)
        states.append(state)

    # states[prompt][block] becomes one state per block, whose batch are the prompts.
    joined = []
    for block in zip(*states, strict=True):
        joined.append(map_state(lambda *parts: torch.cat(parts), *block))
    return torch.cat(logits), joined


def _record(stories: list[Story], logits: Tensor, chosen: Tensor) -> None:
    """Add the ids chosen (B, 1), and their bits by the logits (B, V), to the stories that go on."""
    # The entropy is -sum p log2 p; an id that cannot be drawn has log p = -inf and adds nothing.
    log_p = logits.log_softmax(1)
    weighted = log_p.exp() * log_p.nan_to_num(neginf=0.0)
    entropy = -weighted.sum(1) / math.log(2)
    for row, story in enumerate(stories):
        token = int(chosen[row])
        if token == EOS:
            story.finished = True

        # What is drawn after a story's end is no part of it.
        if not story.finished:
            story.ids.append(token)
            story.surprise.append(-float(log_p[row, token]) / math.log(2))
            story.entropy.append(float(entropy[row]))


# ---- from text to text, with any model ----


def generate(model: LanguageModel, prompts: str | Sequence[str], **settings) -> list[Story]:
    """Write one story for each prompt, as a batch.

    model: of any runtime. settings: those of Sampling. With temperature=0 the stories are those
    of the full forward pass. Raises FlashLMError for an empty prompt or a setting out of range.
    """
    prompts = _as_list(prompts)
    ids = encode_prompts(model.vocabulary, prompts)
    stories = model.write(ids, Sampling(**settings))
    return _complete(stories, prompts, model.vocabulary)


def stream(model: LanguageModel, prompts: str | Sequence[str], **settings) -> Iterator[list[Story]]:
    """Yield the stories of generate() after each token, until all have ended.

    The list is the same each time, its stories grown in place; their `text` is set at the end.
    Raises FlashLMError as generate() does.
    """
    prompts = _as_list(prompts)
    ids = encode_prompts(model.vocabulary, prompts)
    stories = []
    for stories in model.stream(ids, Sampling(**settings)):
        # Whoever shows a story while it grows needs its prompt, too.
        for story, prompt in zip(stories, prompts, strict=True):
            story.prompt = prompt
        yield stories
    _complete(stories, prompts, model.vocabulary)


def encode_prompts(vocabulary: Vocabulary, prompts: Sequence[str]) -> list[list[int]]:
    """Return each prompt as BOS and its ids.

    Raises FlashLMError if there is no prompt, or an empty one.
    """
    if not prompts or not all(prompts):
        raise FlashLMError('the prompt is empty: give a few words, for example "Once upon a time"')
    return [[BOS, *vocabulary.encode(prompt)] for prompt in prompts]


def _as_list(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _complete(stories: list[Story], prompts: list[str], vocabulary: Vocabulary) -> list[Story]:
    """Fill in the texts; half a character, which only a model writes, becomes U+FFFD."""
    for story, prompt in zip(stories, prompts, strict=True):
        written = vocabulary.decode(story.ids)
        story.prompt = prompt
        story.text = prompt + SURROGATE.sub("\ufffd", written)
    return stories
