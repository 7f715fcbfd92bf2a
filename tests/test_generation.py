import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.evaluation import encode_stories, evaluate
from flashlm_helpers.generation import (
    Sampling,
    Story,
    generate,
    sample_next_token,
    sampling_distribution,
    stream,
    stream_by_reading,
)
from flashlm_helpers.model import FlashLM, LanguageModel
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import BOS, EOS, PAD, UNK

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0]])


@pytest.fixture(params=["model_config", "hybrid_config"])
def model(request, vocabulary):
    torch.manual_seed(3)
    network = stir(FlashLM(request.getfixturevalue(request.param)))
    with torch.no_grad():
        network.embedding.weight.mul_(30)
    return PyTorchModel(network, vocabulary)


# ---- stories of a network ----


@torch.no_grad()
def test_greedy_equals_the_full_forward_pass(model, vocabulary):
    [story] = generate(model, "Once upon a time", tokens=80, temperature=0)
    ids = [BOS, *vocabulary.encode("Once upon a time")]
    for token, entropy, surprise in zip(story.ids, story.entropy, story.surprise, strict=True):
        logits = model.network(torch.tensor([ids]))[0, -1]
        logits[[PAD, UNK, BOS]] = -torch.inf
        assert logits[token] >= logits.max() - 1e-4

        p = logits.softmax(0)
        assert surprise == pytest.approx(-float(p[token].log2()), abs=1e-3)
        expected = float(torch.special.entr(p).sum()) / math.log(2)
        assert entropy == pytest.approx(expected, abs=1e-3)
        ids.append(token)
    assert story.text == "Once upon a time" + vocabulary.decode(story.ids)
    assert not {PAD, UNK, BOS, EOS} & set(story.ids)


def test_a_batch_writes_what_each_prompt_alone_would(model):
    prompts = ["Once", "A cat sat on the mat and looked at the moon", "Łódź 猫"]
    together = generate(model, prompts, tokens=30, seed=5, top_p=0.9)
    for number, prompt in enumerate(prompts):
        [alone] = generate(model, prompt, tokens=30, seed=5 + number, top_p=0.9)
        assert together[number].ids == alone.ids
        assert together[number].text == alone.text
    assert together[2].text.startswith("Łódź 猫")


def test_seeds_decide(model):
    texts = []
    for seed in (1, 1, 2):
        [story] = generate(model, "One day", tokens=30, temperature=1.5, seed=seed)
        texts.append(story.text)
    first, again, other = texts
    assert first == again != other


def test_a_story_ends_at_the_end_symbol_and_the_batch_with_its_last_story(
    model, vocabulary, monkeypatch
):
    def head(self, hidden):  # the end symbol has one chance in ten, everything else shares the rest
        logits = torch.zeros(*hidden.shape[:-1], len(vocabulary))
        logits[..., EOS] = torch.tensor((len(vocabulary) - 4) / 9).log()
        return logits

    monkeypatch.setattr(FlashLM, "head", head)
    lengths = []
    for stories in stream(model, ["a", "b", "c"], tokens=500):
        lengths.append([len(story.ids) for story in stories])
    assert all(story.finished and EOS not in story.ids for story in stories)
    assert len(lengths) == max(lengths[-1]) + 1 and len(set(lengths[-1])) > 1

    [short] = generate(model, "a", tokens=lengths[-1][0])
    assert not short.finished and len(short.ids) == lengths[-1][0]


def test_a_stream_grows_the_stories_that_generate_writes(model):
    settings = {"tokens": 12, "seed": 3}
    seen = []
    for number, stories in enumerate(stream(model, ["One", "Two"], **settings), start=1):
        seen.append(stories)
        assert all(len(story.ids) == number or story.finished for story in stories)
        assert [(story.prompt, story.text) for story in stories] == [("One", ""), ("Two", "")]
    assert all(stories is seen[0] for stories in seen)
    assert seen[0] == generate(model, ["One", "Two"], **settings)
    assert next(stream(model, "One", tokens=1))[0].prompt == "One"  # and not its letters


def test_surprise_and_entropy_are_bits_of_the_models_own_distribution(model, vocabulary):
    with torch.no_grad():
        model.network.embedding.weight.zero_()
    [story] = generate(model, "Hello", tokens=20, temperature=0.3, top_k=5)
    uniform = math.log2(len(vocabulary) - 3)  # over all ids but PAD, UNK and BOS
    assert story.surprise == pytest.approx([uniform] * len(story.ids), rel=1e-5)
    assert story.entropy == pytest.approx([uniform] * len(story.ids), rel=1e-5)


def test_stories_are_of_the_network_as_it_is_now(model):
    before = generate(model, "One day", tokens=30, temperature=0)
    with torch.no_grad():
        model.network.blocks[0].glu.up.weight.normal_()
        model.network.embedding.weight.normal_()
    after = generate(model, "One day", tokens=30, temperature=0)
    assert before != after
    assert after == generate(
        PyTorchModel(model.network, model.vocabulary), "One day", tokens=30, temperature=0
    )


def test_what_no_string_encodes_to_is_shown_as_replacement_characters(
    model, vocabulary, monkeypatch
):
    spelled = iter(vocabulary.encode("\ud83d") + [EOS])

    def head(self, hidden):  # writes the bytes of half a character
        logits = torch.zeros(*hidden.shape[:-1], len(vocabulary))
        logits[..., next(spelled)] = 100
        return logits

    monkeypatch.setattr(FlashLM, "head", head)
    assert generate(model, "Hi ")[0].text == "Hi \ufffd"


# ---- models of one's own ----


class Parrot:
    """A LanguageModel without a network: it repeats a sentence, and notes what is asked of it."""

    runtime = "parrot"
    source = None

    def __init__(self, vocabulary, sentence):
        self.vocabulary = vocabulary
        self.sentence = vocabulary.encode(sentence)
        self.asked = []

    def token_nats(self, sequences):
        self.asked.append(("token_nats", [ids.tolist() for ids in sequences]))
        return [np.ones(len(ids) - 1) for ids in sequences]

    def write(self, prompts, sampling):
        self.asked.append(("write", prompts, sampling))
        *_, stories = self._repeat(prompts, sampling)
        return stories

    def stream(self, prompts, sampling):
        self.asked.append(("stream", prompts, sampling))
        return self._repeat(prompts, sampling)

    def _repeat(self, prompts, sampling):
        stories = [Story() for _ in prompts]
        for token in self.sentence[: sampling.tokens]:
            for story in stories:
                story.ids.append(token)
            yield stories


def test_generate_stream_and_evaluate_need_what_the_protocol_declares_and_no_more(vocabulary):
    methods = {name for name in vars(LanguageModel) if not name.startswith("_")}
    assert methods == {"token_nats", "write", "stream"}
    assert LanguageModel.__annotations__.keys() == {"vocabulary", "runtime", "source"}

    parrot = Parrot(vocabulary, " said the cat")
    assert all(hasattr(parrot, name) for name in methods | LanguageModel.__annotations__.keys())
    settings = {"tokens": 2, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 7}
    prompts = ["Hello", "Łódź"]
    ids = [[BOS, *vocabulary.encode(prompt)] for prompt in prompts]

    # Each asks one method, once, with ids from BOS on and with settings that were checked.
    generate(parrot, prompts, **settings)
    list(stream(parrot, prompts, **settings))
    evaluate(parrot, prompts)
    sequences = [ids.tolist() for ids in encode_stories(vocabulary, prompts)]
    assert parrot.asked == [
        ("write", ids, Sampling(**settings)),
        ("stream", ids, Sampling(**settings)),
        ("token_nats", sequences),
    ]


def test_prompt_and_text_are_filled_in_for_any_model(vocabulary):
    parrot = Parrot(vocabulary, " said the cat")
    [story] = generate(parrot, "Hello")
    assert story.prompt == "Hello" and story.text == "Hello said the cat"

    *_, stories = stream(parrot, ["Hello", "Bye"])
    assert [story.text for story in stories] == ["Hello said the cat", "Bye said the cat"]
    assert asdict(stories[1])["prompt"] == "Bye"
    assert evaluate(parrot, ["Hello"]).nats_per_token == 1


class Bigram(nn.Module):
    """A network that is no FlashLM: each id decides what follows it."""

    def __init__(self, size):
        super().__init__()
        self.config = SimpleNamespace(vocabulary_size=size)
        self.logits = nn.Embedding(size, size)

    def hidden(self, ids, states=None):
        return self.logits(ids), []

    def head(self, hidden):
        return hidden

    def token_nll(self, hidden, targets):
        return nn.functional.cross_entropy(hidden, targets, reduction="none")


@torch.no_grad()
def test_any_network_with_hidden_head_and_token_nll_can_write_and_be_scored(vocabulary):
    torch.manual_seed(0)
    network = Bigram(len(vocabulary))
    model = PyTorchModel(network, vocabulary)
    [story] = generate(model, "A cat", tokens=5, temperature=0)
    before = vocabulary.encode("A cat")[-1]
    for token in story.ids:
        assert token == EOS + network.logits.weight[before, EOS:].argmax()
        before = token

    ids = torch.tensor([BOS, *vocabulary.encode("A cat"), EOS])
    [nats] = model.token_nats([ids.numpy()])
    log_p = network.logits.weight.log_softmax(1)
    torch.testing.assert_close(torch.from_numpy(nats), -log_p[ids[:-1], ids[1:]].double())


def test_whatever_reads_can_write():
    """Count on from the last id: the states hold how many ids each text has so far."""

    def read(ids, states):
        count = torch.zeros(len(ids), 1) if states is None else states[0]
        logits = torch.full((len(ids), 50), -torch.inf)
        logits[torch.arange(len(ids)), ids[:, -1] + 1] = 0
        return logits, [count + ids.shape[1]]

    prompts = [[BOS, 7], [BOS, 11, 20]]
    *_, stories = stream_by_reading(read, prompts, Sampling(tokens=3))
    assert [story.ids for story in stories] == [[8, 9, 10], [21, 22, 23]]
    assert [story.surprise for story in stories] == [[0, 0, 0], [0, 0, 0]]


# ---- sampling ----


def test_temperature_top_k_and_top_p_by_hand():
    plain = LOGITS.softmax(1)
    torch.testing.assert_close(sampling_distribution(LOGITS), plain)
    warm = sampling_distribution(LOGITS, temperature=2.0)
    torch.testing.assert_close(warm, (LOGITS / 2).softmax(1))
    greedy = sampling_distribution(LOGITS, temperature=0)
    assert greedy.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    two = sampling_distribution(LOGITS, top_k=2)[0]
    torch.testing.assert_close(two, torch.tensor([0.7311, 0.2689, 0, 0]), atol=1e-4, rtol=0)

    # 0.644, 0.237, 0.087, 0.032: two are needed for 0.8, one for 0.6.
    nucleus = sampling_distribution(LOGITS, top_p=0.8)[0]
    assert (nucleus > 0).tolist() == [True, True, False, False]
    nucleus = sampling_distribution(LOGITS, top_p=0.6)[0]
    assert (nucleus > 0).tolist() == [True, False, False, False]


@given(st.floats(0, 100), st.integers(0, 30), st.floats(1e-6, 1), st.integers(0, 1_000))
@settings(deadline=None)
def test_every_setting_gives_a_distribution_that_keeps_the_likeliest(
    temperature, top_k, top_p, seed
):
    logits = 8 * torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    p = sampling_distribution(logits, temperature, top_k, top_p)
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    assert (p >= 0).all()
    assert (p.gather(1, logits.argmax(1, keepdim=True)) > 0).all()
    if top_k:
        assert ((p > 0).sum(1) <= top_k).all()


def test_top_p_is_the_same_however_many_ids_it_needs():
    """A nucleus of one, of 128 and of more ids: sorting all of them gives the same."""
    logits = torch.linspace(0, 3, 400).repeat(1, 1)
    p = logits.softmax(1)[0]
    ranked = p.sort(descending=True).values
    for top_p in (0.001, 0.3, 0.9):
        kept = sampling_distribution(logits, top_p=top_p)[0] > 0
        fewest = int((ranked.cumsum(0) < top_p).sum()) + 1
        assert int(kept.sum()) == fewest and kept[-fewest:].all()


def test_ids_are_drawn_as_often_as_they_should_be_each_row_by_its_own_generator():
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    sampling = Sampling(temperature=1.0, top_p=1.0)
    counts = torch.zeros_like(LOGITS)
    first = []
    for _ in range(2_000):
        drawn = sample_next_token(LOGITS, sampling, generators)
        counts.scatter_add_(1, drawn, torch.ones(2, 1))
        first.append(int(drawn[0]))
    torch.testing.assert_close(counts / 2_000, LOGITS.softmax(1), atol=0.03, rtol=0)

    alone = torch.Generator().manual_seed(0)
    for token in first[:50]:
        assert int(sample_next_token(LOGITS[:1], sampling, [alone])) == token


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": -1}, "temperature must be 0 (greedy) or more, not -1"),
        ({"temperature": math.nan}, "temperature must be 0 (greedy) or more, not nan"),
        ({"temperature": math.inf}, "temperature must be 0 (greedy) or more, not inf"),
        ({"top_k": -2}, "top-k must be 0 (off) or more, not -2"),
        ({"top_p": 0}, "top-p must be above 0 and at most 1 (off), not 0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1 (off), not 1.5"),
        ({"tokens": 0}, "tokens must be from 1 to 1,000,000, not 0"),
        ({"tokens": 1_000_001}, "tokens must be from 1 to 1,000,000, not 1000001"),
        ({"seed": -1}, "seed must be a whole number from 0 to 2**62 - 1, not -1: try --seed 42"),
    ],
)
def test_impossible_settings_are_refused(vocabulary, settings, message):
    parrot = Parrot(vocabulary, "no")
    with pytest.raises(FlashLMError) as refusal:
        generate(parrot, "Once", **settings)
    assert str(refusal.value) == message
    with pytest.raises(FlashLMError):
        next(stream(parrot, "Once", **settings))
    assert not parrot.asked


def test_an_empty_prompt_is_refused(vocabulary):
    parrot = Parrot(vocabulary, "no")
    for prompt in ("", [], ["fine", ""]):
        with pytest.raises(FlashLMError, match="the prompt is empty: give a few words"):
            generate(parrot, prompt)
        with pytest.raises(FlashLMError, match="prompt is empty"):
            next(stream(parrot, prompt))
    assert not parrot.asked
