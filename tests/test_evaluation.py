import lzma
import math

import numpy as np
import pytest
import torch
from conftest import stir

from flashlm_helpers.baselines import TrigramModel, compressor_baselines, counting_baselines
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.evaluation import bits_report, encode_stories, evaluate, token_nats
from flashlm_helpers.model import FlashLM
from flashlm_helpers.vocab import BOS, EOS, PAD, Vocabulary


@pytest.fixture(scope="module")
def texts(stories):
    long = " ".join(stories[:6])  # far longer than a chunk
    return [*stories[100:110], long, "A.", "Żółw 🐢 – naïve\ttext", "x"]


@pytest.fixture(params=["model_config", "hybrid_config"])
def model(request):
    torch.manual_seed(1)
    model = stir(FlashLM(request.getfixturevalue(request.param)))
    with torch.no_grad():
        model.embedding.weight.mul_(40)  # far from uniform, so that every token counts
    return model


def slow_nats(model, vocabulary, text):
    """One position at a time, each from the whole prefix, in float64 from the logits on."""
    ids = [BOS, *vocabulary.encode(text), EOS]
    nats = []
    for t in range(1, len(ids)):
        logits = model(torch.tensor([ids[:t]]))[0, -1].double()
        nats.append(-float(logits.log_softmax(0)[ids[t]]))
    return nats


@torch.no_grad()
def test_bpc_equals_an_independent_slow_computation(model, vocabulary, texts):
    report = evaluate(model, vocabulary, texts, bfloat16=False)
    nats = [slow_nats(model, vocabulary, text) for text in texts]
    text_nats = sum(sum(n[:-1]) for n in nats)
    assert report.bpc == pytest.approx(text_nats / math.log(2) / sum(map(len, texts)), rel=1e-5)
    assert report.bpb == pytest.approx(text_nats / math.log(2) / sum(len(t.encode()) for t in texts), rel=1e-5)
    assert report.nats_per_token == pytest.approx(text_nats / sum(len(n) - 1 for n in nats), rel=1e-5)
    assert report.end_nats_per_story == pytest.approx(np.mean([n[-1] for n in nats]), rel=1e-4)
    assert (report.n_stories, report.n_chars) == (len(texts), sum(map(len, texts)))
    assert report.n_tokens == sum(len(vocabulary.encode(t)) for t in texts)


def test_a_uniform_model_needs_log2_of_v_bits_a_token(model, vocabulary, texts):
    with torch.no_grad():
        model.embedding.weight.zero_()
    report = evaluate(model, vocabulary, texts)
    assert report.bpc == pytest.approx(math.log2(len(vocabulary)) * report.n_tokens / report.n_chars, rel=1e-6)
    assert report.nats_per_token == pytest.approx(math.log(len(vocabulary)), rel=1e-6)
    assert counting_baselines(vocabulary, None, texts)["uniform"].bpc == pytest.approx(report.bpc, rel=1e-6)


def test_batches_chunks_and_padding_change_nothing(model, vocabulary, texts):
    sequences = encode_stories(vocabulary, texts)
    together = token_nats(model, sequences, bfloat16=False)
    for sequence, nats in zip(sequences, together, strict=True):
        assert len(nats) == len(sequence) - 1
        np.testing.assert_allclose(nats, token_nats(model, [sequence], bfloat16=False)[0], rtol=1e-4, atol=1e-5)


def test_the_interval_covers_and_narrows(vocabulary):
    draw = np.random.default_rng(0)

    def report(count):
        texts = ["abcdefghij"] * count
        return bits_report(texts, [np.append(draw.normal(2.0, 0.5, 5), 1.0) for _ in texts])

    truth, covered = 2.0 * 5 / math.log(2) / 10, 0
    for _ in range(40):
        low, high = report(50).interval["bpc"]
        covered += low <= truth <= high
    assert 32 <= covered <= 40
    few, many = report(40).interval["bpb"], report(4_000).interval["bpb"]
    assert (many[1] - many[0]) < 0.2 * (few[1] - few[0])
    assert bits_report(["one"], [np.ones(3)]).interval is None


def test_stories_and_vocabularies_that_cannot_be_scored_are_refused(model, vocabulary):
    for texts in ([], ["fine", ""]):
        with pytest.raises(FlashLMError, match="no story"):
            evaluate(model, vocabulary, texts)
    with pytest.raises(FlashLMError, match="vocabulary"):
        evaluate(model, Vocabulary.build(["a b c"], 300), ["text"])


def test_the_trigram_is_a_distribution_in_every_context(prepared):
    vocabulary, train, _ = prepared
    model, everything = TrigramModel(train.ids, len(vocabulary)), np.arange(len(vocabulary))
    seen = train.ids[[5, 6, 200, 201]].astype(int)
    pairs = ((BOS, BOS), (BOS, seen[0]), (seen[0], seen[1]), (seen[2], seen[3]), (seen[0], PAD), (PAD, PAD))
    for first, second in pairs:
        p = model.probability(np.full_like(everything, first), np.full_like(everything, second), everything)
        assert p.min() > 0 and p.sum() == pytest.approx(1.0, abs=1e-9)


def test_the_trigram_equals_kneser_ney_by_hand():
    """a b a b a c, with two start symbols before it; ids: BOS 2, EOS 3, a 4, b 5, c 6."""
    model = TrigramModel(np.array([2, 4, 5, 4, 5, 4, 6, 3]), 7)

    def p(*ids):
        return float(model.probability(*(np.array([i]) for i in ids))[0])

    # Trigrams, each once but aba twice: BBa Bab aba*2 bab bac ac$. Discount n1 / (n1 + 2 n2) = 5/7.
    # Bigrams by the number of different words before: Ba 1, ab 2 (B_, b_), ba 1, ac 1, c$ 1: 4 once, 1 twice: 4/6.
    # Unigrams likewise: a 2 (B, b), b 1, c 1, $ 1: 3/5.
    unigram = {"a": (2 - 0.6) / 5 + 0.6 * 4 / 5 / 7, "c": (1 - 0.6) / 5 + 0.6 * 4 / 5 / 7}
    bigram_ac = (1 - 2 / 3) / 3 + (2 / 3) * 2 / 3 * unigram["c"]  # context a: ab 2, ac 1
    assert p(5, 4, 6) == pytest.approx((1 - 5 / 7) / 2 + (5 / 7) * 2 / 2 * bigram_ac)
    assert p(6, 4, 6) == pytest.approx(bigram_ac)  # the trigram's context was never seen
    assert p(4, 6, 4) == pytest.approx(0 + (5 / 7) * (0 + (2 / 3) * unigram["a"]))


def test_counting_models_order_as_they_must(prepared, stories):
    vocabulary, train, _ = prepared
    reports = counting_baselines(vocabulary, train.ids, stories[100:])
    assert list(reports) == ["uniform", "unigram", "trigram (Kneser-Ney)"]
    assert reports["uniform"].bpc > reports["unigram"].bpc > reports["trigram (Kneser-Ney)"].bpc
    assert len({(r.n_tokens, r.n_chars, r.n_bytes) for r in reports.values()}) == 1


def test_compressors_are_counted_on_the_same_text(texts):
    found = compressor_baselines(texts)
    raw = "\n".join(texts).encode()
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    assert found["xz -9e"]["bpb"] == pytest.approx(8 * len(packed) / len(raw))
    assert all(0 < value["bpb"] <= value["bpc"] < 8 for value in found.values())
