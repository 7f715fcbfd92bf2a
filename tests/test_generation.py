import math

import pytest
import torch
from conftest import stir
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.generation import generate, sampling_distribution, stream
from flashlm_helpers.model import FlashLM
from flashlm_helpers.vocab import BOS, EOS, PAD, UNK

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0]])


@pytest.fixture(params=["model_config", "hybrid_config"])
def model(request):
    torch.manual_seed(3)
    model = stir(FlashLM(request.getfixturevalue(request.param)))
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    return model


@torch.no_grad()
def test_greedy_equals_the_full_forward_pass(model, vocabulary):
    story = generate(model, vocabulary, "Once upon a time", tokens=80, temperature=0)[0]
    ids = [BOS, *vocabulary.encode("Once upon a time")]
    for token, entropy, surprise in zip(story.ids, story.entropy, story.surprise, strict=True):
        logits = model(torch.tensor([ids]))[0, -1]
        logits[[PAD, UNK, BOS]] = -torch.inf
        assert logits[token] >= logits.max() - 1e-4
        p = logits.softmax(0)
        assert surprise == pytest.approx(-float(p[token].log2()), abs=1e-3)
        assert entropy == pytest.approx(float(torch.special.entr(p).sum()) / math.log(2), abs=1e-3)
        ids.append(token)
    assert story.text == "Once upon a time" + vocabulary.decode(story.ids)
    assert not {PAD, UNK, BOS, EOS} & set(story.ids)


def test_a_batch_writes_what_each_prompt_alone_would(model, vocabulary):
    prompts = ["Once", "A cat sat on the mat and looked at the moon", "Łódź 猫"]
    together = generate(model, vocabulary, prompts, tokens=30, seed=5, top_p=0.9)
    for i, prompt in enumerate(prompts):
        alone = generate(model, vocabulary, prompt, tokens=30, seed=5 + i, top_p=0.9)[0]
        assert together[i].ids == alone.ids and together[i].text == alone.text
    assert together[2].text.startswith("Łódź 猫")


def test_seeds_decide(model, vocabulary):
    first, again, other = (generate(model, vocabulary, "One day", tokens=30, temperature=1.5, seed=s)[0].text
                           for s in (1, 1, 2))
    assert first == again != other


def test_a_story_ends_at_the_end_symbol_and_the_batch_with_its_last_story(model, vocabulary, monkeypatch):
    def head(self, hidden):  # the end symbol has one chance in ten, everything else shares the rest
        logits = torch.zeros(*hidden.shape[:-1], len(vocabulary))
        logits[..., EOS] = torch.tensor((len(vocabulary) - 4) / 9).log()
        return logits

    monkeypatch.setattr(FlashLM, "head", head)
    lengths = []
    for stories in stream(model, vocabulary, ["a", "b", "c"], tokens=500):
        lengths.append([len(story.ids) for story in stories])
    assert all(story.finished and EOS not in story.ids for story in stories)
    assert len(lengths) == max(lengths[-1]) + 1 and len(set(lengths[-1])) > 1
    short = generate(model, vocabulary, "a", tokens=lengths[-1][0])[0]
    assert not short.finished and len(short.ids) == lengths[-1][0]


def test_surprise_and_entropy_are_bits_of_the_models_own_distribution(model, vocabulary, model_config):
    with torch.no_grad():
        model.embedding.weight.zero_()
    story = generate(model, vocabulary, "Hello", tokens=20, temperature=0.3, top_k=5)[0]
    expected = torch.tensor(len(vocabulary) - 3.0).log2().item()  # uniform over all but PAD, UNK and BOS
    assert story.surprise == pytest.approx([expected] * len(story.ids), rel=1e-5)
    assert story.entropy == pytest.approx([expected] * len(story.ids), rel=1e-5)


def test_temperature_top_k_and_top_p_by_hand():
    plain = LOGITS.softmax(1)
    torch.testing.assert_close(sampling_distribution(LOGITS), plain)
    torch.testing.assert_close(sampling_distribution(LOGITS, temperature=2.0), (LOGITS / 2).softmax(1))
    assert sampling_distribution(LOGITS, temperature=0).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]
    torch.testing.assert_close(sampling_distribution(LOGITS, top_k=2)[0], torch.tensor([0.7311, 0.2689, 0, 0]),
                               atol=1e-4, rtol=0)
    # 0.644, 0.237, 0.087, 0.032: two are needed for 0.8, one for 0.6.
    assert (sampling_distribution(LOGITS, top_p=0.8)[0] > 0).tolist() == [True, True, False, False]
    assert (sampling_distribution(LOGITS, top_p=0.6)[0] > 0).tolist() == [True, False, False, False]


@given(st.floats(0, 100), st.integers(0, 30), st.floats(1e-6, 1), st.integers(0, 1_000))
@settings(deadline=None)
def test_every_setting_gives_a_distribution_that_keeps_the_likeliest(temperature, top_k, top_p, seed):
    logits = 8 * torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    p = sampling_distribution(logits, temperature, top_k, top_p)
    torch.testing.assert_close(p.sum(1), torch.ones(3))
    assert (p >= 0).all() and (p.gather(1, logits.argmax(1, keepdim=True)) > 0).all()
    if top_k:
        assert ((p > 0).sum(1) <= max(top_k, 1)).all()


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -2}, {"top_p": 0},
                                      {"top_p": 1.5}, {"tokens": 0}])
def test_impossible_settings_are_refused(model, vocabulary, settings):
    with pytest.raises(FlashLMError):
        generate(model, vocabulary, "Once", **settings)


def test_what_no_string_encodes_to_is_shown_as_replacement_characters(model, vocabulary, monkeypatch):
    spelled = iter(vocabulary.encode("\ud83d") + [EOS])

    def head(self, hidden):  # writes the bytes of half a character
        logits = torch.zeros(*hidden.shape[:-1], len(vocabulary))
        logits[..., next(spelled)] = 100
        return logits

    monkeypatch.setattr(FlashLM, "head", head)
    assert generate(model, vocabulary, "Hi ")[0].text == "Hi \ufffd"


def test_an_empty_prompt_is_refused(model, vocabulary):
    for prompt in ("", [], ["fine", ""]):
        with pytest.raises(FlashLMError, match="prompt is empty"):
            generate(model, vocabulary, prompt)
