import json
import lzma
import math
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import stir
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers import plots
from flashlm_helpers.checkpoint import History, TrainPoint, ValidPoint
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.evaluation import (
    bits_report,
    encode_stories,
    evaluate,
    pack_into_lanes,
    token_nats,
)
from flashlm_helpers.experiments import curves
from flashlm_helpers.experiments.baselines import (
    TrigramModel,
    compressor_baselines,
    counting_baselines,
)
from flashlm_helpers.experiments.curves import plot_race
from flashlm_helpers.generation import Story
from flashlm_helpers.model import FlashLM
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import BOS, EOS, PAD, Vocabulary


@pytest.fixture(scope="module")
def texts(stories):
    long = " ".join(stories[:3])  # read in several pieces
    return [*stories[100:105], long, "A.", "Żółw 🐢 – naïve\ttext", "x"]


@pytest.fixture(params=["model_config", "hybrid_config"])
def network(request):
    torch.manual_seed(1)
    network = stir(FlashLM(request.getfixturevalue(request.param)))
    with torch.no_grad():
        network.embedding.weight.mul_(40)  # far from uniform, so that every token counts
    return network


# ---- a model ----


def slow_nats(network, vocabulary, text):
    """Score one position at a time, each from its whole prefix, in float64 from the logits on."""
    ids = [BOS, *vocabulary.encode(text), EOS]
    nats = []
    for t in range(1, len(ids)):
        hidden, _ = network.hidden(torch.tensor([ids[:t]]))
        logits = network.head(hidden[0, -1]).double()
        nats.append(-float(logits.log_softmax(0)[ids[t]]))
    return nats


@torch.no_grad()
def test_bpc_equals_an_independent_slow_computation(network, vocabulary, texts):
    report = evaluate(PyTorchModel(network, vocabulary, bfloat16=False), texts)

    nats = [slow_nats(network, vocabulary, text) for text in texts]
    text_nats = sum(sum(values[:-1]) for values in nats)
    bits = text_nats / math.log(2)
    n_tokens = sum(len(vocabulary.encode(text)) for text in texts)
    n_chars = sum(map(len, texts))
    n_bytes = sum(len(text.encode()) for text in texts)

    assert report.bpc == pytest.approx(bits / n_chars, rel=1e-5)
    assert report.bpb == pytest.approx(bits / n_bytes, rel=1e-5)
    assert report.nats_per_token == pytest.approx(text_nats / n_tokens, rel=1e-5)
    ends = np.mean([values[-1] for values in nats])
    assert report.end_nats_per_story == pytest.approx(ends, rel=1e-4)
    assert (report.n_stories, report.n_tokens) == (len(texts), n_tokens)
    assert (report.n_chars, report.n_bytes) == (n_chars, n_bytes)


def test_a_uniform_model_needs_log2_of_v_bits_per_token(network, vocabulary, texts):
    with torch.no_grad():
        network.embedding.weight.zero_()
    report = evaluate(PyTorchModel(network, vocabulary), texts)
    bits = math.log2(len(vocabulary)) * report.n_tokens
    assert report.bpc == pytest.approx(bits / report.n_chars, rel=1e-6)
    assert report.nats_per_token == pytest.approx(math.log(len(vocabulary)), rel=1e-6)

    counted = counting_baselines(vocabulary, None, texts)
    assert counted["uniform"].bpc == pytest.approx(report.bpc, rel=1e-6)


def test_lanes_pieces_and_padding_change_nothing(network, vocabulary, texts):
    sequences = encode_stories(vocabulary, texts)
    assert max(map(len, sequences)) > 512 > len(sequences[0])
    together = token_nats(network, sequences, bfloat16=False)
    for sequence, nats in zip(sequences, together, strict=True):
        assert len(nats) == len(sequence) - 1 and nats.dtype == np.float64
        [alone] = token_nats(network, [sequence], bfloat16=False)
        np.testing.assert_allclose(nats, alone, rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 5), st.integers(1, 9))
@settings(deadline=None)
def test_every_position_is_read_once_and_the_pieces_of_a_sequence_follow_one_another(
    lengths, lanes, width
):
    positions = Counter()
    reading = {}  # lane -> the piece it read in the pass before
    for pieces in pack_into_lanes(lengths, lanes, width):
        assert pieces and len({piece.lane for piece in pieces}) == len(pieces) <= lanes
        before = reading
        reading = {piece.lane: piece for piece in pieces}
        for piece in pieces:
            assert 0 <= piece.lane < lanes
            end = min(piece.start + width, lengths[piece.sequence])
            positions.update((piece.sequence, n) for n in range(piece.start, end))
            if piece.start:
                earlier = before[piece.lane]
                assert earlier.sequence == piece.sequence
                assert earlier.start == piece.start - width
    wanted = {(i, n) for i, length in enumerate(lengths) for n in range(length)}
    assert positions == Counter(wanted)


def test_a_model_follows_a_network_that_trains_on(network, vocabulary, texts):
    model = PyTorchModel(network, vocabulary, bfloat16=False)
    before = evaluate(model, texts).nats_per_token
    with torch.no_grad():
        network.blocks[0].glu.up.weight.normal_()
    after = evaluate(model, texts).nats_per_token
    anew = PyTorchModel(network, vocabulary, bfloat16=False)
    assert before != after == evaluate(anew, texts).nats_per_token


class CoinTosser:
    """The least that evaluate() asks of a model: a vocabulary, and nats; here a bit per token."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def token_nats(self, sequences):
        for ids in sequences:
            assert ids[0] == BOS and ids[-1] == EOS
        return [np.full(len(ids) - 1, math.log(2)) for ids in sequences]


def test_any_model_with_a_vocabulary_and_token_nats_can_be_evaluated(vocabulary, texts):
    report = evaluate(CoinTosser(vocabulary), texts)
    n_tokens = sum(len(vocabulary.encode(text)) for text in texts)
    assert report.bpc == pytest.approx(n_tokens / sum(map(len, texts)))
    assert report.end_nats_per_story == pytest.approx(math.log(2))


def test_stories_and_vocabularies_that_cannot_be_scored_are_refused(network, vocabulary):
    for texts in ([], ["fine", ""]):
        with pytest.raises(FlashLMError, match="no story"):
            evaluate(PyTorchModel(network, vocabulary), texts)
    other = Vocabulary.build(["a b c"], 300)
    with pytest.raises(FlashLMError, match="use the vocabulary the model was trained with"):
        PyTorchModel(network, other)


# ---- the accounting ----


def test_the_interval_covers_and_narrows():
    draw = np.random.default_rng(0)

    def report(count):
        nats = [np.append(draw.normal(2.0, 0.5, 5), 1.0) for _ in range(count)]
        return bits_report(["abcdefghij"] * count, nats)

    truth = 2.0 * 5 / math.log(2) / 10
    covered = 0
    for _ in range(40):
        low, high = report(50).interval["bpc"]
        covered += low <= truth <= high
    assert 32 <= covered <= 40

    few = report(40).interval["bpb"]
    many = report(4_000).interval["bpb"]
    assert many[1] - many[0] < 0.2 * (few[1] - few[0])


def test_a_report_is_plain_numbers_for_json():
    report = bits_report(["ab", "ż"], [np.ones(3), np.full(2, 2.0)])
    content = asdict(report)
    assert json.loads(json.dumps(content)) == content
    assert content["interval"].keys() == {"level", "bpc", "bpb"}
    assert content["interval"]["level"] == 0.95
    low, high = content["interval"]["bpc"]
    assert low <= report.bpc <= high
    assert f"BPC {report.bpc:.4f} [{low:.4f}, {high:.4f}]" in str(report)

    single = bits_report(["one"], [np.ones(3)])
    assert single.interval is None and "nan" not in str(single) and "[" not in str(single)


# ---- baselines ----


def test_the_trigram_is_a_distribution_in_every_context(prepared):
    vocabulary = prepared.vocabulary
    train = prepared.train
    model = TrigramModel(train.ids, len(vocabulary))
    everything = np.arange(len(vocabulary))
    a, b, c, d = train.ids[[5, 6, 200, 201]].astype(int)
    for first, second in ((BOS, BOS), (BOS, a), (a, b), (c, d), (a, PAD), (PAD, PAD)):
        before = np.full_like(everything, first), np.full_like(everything, second)
        p = model.probability(*before, everything)
        assert p.min() > 0
        assert p.sum() == pytest.approx(1.0, abs=1e-9)


def test_the_trigram_equals_kneser_ney_by_hand():
    """Count a b a b a c, with two start symbols before it; ids: BOS 2, EOS 3, a 4, b 5, c 6."""
    model = TrigramModel(np.array([2, 4, 5, 4, 5, 4, 6, 3]), 7)

    def p(*ids):
        return float(model.probability(*(np.array([i]) for i in ids))[0])

    # Trigrams, each once but aba twice: BBa Bab aba*2 bab bac ac$. Discount n1 / (n1 + 2 n2) = 5/7.
    # Bigrams by the number of different words before: Ba 1, ab 2 (B_, b_), ba 1, ac 1, c$ 1: four
    # once, one twice: 4/6. Unigrams likewise: a 2 (B, b), b 1, c 1, $ 1: 3/5.
    unigram_a = (2 - 0.6) / 5 + 0.6 * 4 / 5 / 7
    unigram_c = (1 - 0.6) / 5 + 0.6 * 4 / 5 / 7
    bigram_ac = (1 - 2 / 3) / 3 + (2 / 3) * 2 / 3 * unigram_c  # context a: ab 2, ac 1
    assert p(5, 4, 6) == pytest.approx((1 - 5 / 7) / 2 + (5 / 7) * 2 / 2 * bigram_ac)
    assert p(6, 4, 6) == pytest.approx(bigram_ac)  # the trigram's context was never seen
    assert p(4, 6, 4) == pytest.approx(0 + (5 / 7) * (0 + (2 / 3) * unigram_a))


def test_counting_models_order_as_they_must(prepared, stories):
    vocabulary = prepared.vocabulary
    train = prepared.train
    reports = counting_baselines(vocabulary, train.ids, stories[100:])
    assert list(reports) == ["uniform", "unigram", "trigram (Kneser-Ney)"]
    uniform, unigram, trigram = reports.values()
    assert uniform.bpc > unigram.bpc > trigram.bpc
    assert len({(r.n_tokens, r.n_chars, r.n_bytes) for r in reports.values()}) == 1


def test_compressors_are_counted_on_the_same_text(texts):
    found = compressor_baselines(texts)
    raw = "\n".join(texts).encode()
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    assert found["xz -9e"]["bpb"] == pytest.approx(8 * len(packed) / len(raw))
    assert all(0 < value["bpb"] <= value["bpc"] < 8 for value in found.values())


# ---- figures ----


def test_figures_take_what_runs_races_and_models_leave():
    trained = [TrainPoint(n, 60.0 * n, 100 * n, 0.004, 5.0 - n, 1.0) for n in range(1, 4)]
    validated = [ValidPoint(n, 60.0 * n, 100 * n, 5.0, 2.0, 2.5 - n / 10) for n in (1, 3)]
    loss, rate = plots.plot_training(History(trained, validated)).axes
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3], [1, 3]]
    assert list(rate.lines[0].get_ydata()) == [0.004] * 3

    runs = []
    for entrant, seed in (("one", 0), ("one", 1), ("two", 0)):
        runs.append(SimpleNamespace(entrant=entrant, seed=seed, validation=validated))
    panels = plot_race(runs).axes
    assert [len(panel.lines) for panel in panels] == [3, 3]
    assert [label.get_text() for label in panels[1].get_legend().texts] == ["one", "two"]

    reports = {"model": bits_report(["ab", "cd"], [np.ones(3)] * 2)}
    [axes] = curves.plot_bpc(reports, {"xz": {"bpc": 9.0}}, highlight="model").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["xz", "model"]

    story = Story("a", "a$\n", ids=[4, 5], surprise=[1.0, 2.0], entropy=[1.5, 0.5])
    [axes] = curves.plot_entropy(story, ["$", "\n"]).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"\$", r"\n"]
    plots.plt.close("all")
