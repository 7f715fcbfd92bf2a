import itertools
from dataclasses import replace

import pytest
import torch
from conftest import stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashlm_helpers.config import (
    PRESETS,
    FlashLMError,
    ModelConfig,
    TrainConfig,
    attention_at,
    find_preset,
)
from flashlm_helpers.experiments.size import count_parameters, packed_bytes, receptive_field
from flashlm_helpers.loss import CHUNK_ROWS, NEGATIVES, sample_negatives, tied_cross_entropy
from flashlm_helpers.mixers import AttentionMixer, GatedConvMixer, map_state
from flashlm_helpers.model import FlashLM, TernaryGLU
from flashlm_helpers.quantization import BitLinear, quantize_straight_through

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = ModelConfig(
    "test",
    width=12,
    blocks=3,
    hidden=20,
    sequence_length=64,
    kernel_size=4,
    vocabulary_size=50,
)
HYBRID = replace(CONFIG, mixers=("conv", "attention", "conv"), heads=3, window=9, layer_scale=True)
NARROW = replace(CONFIG, mixers=("attention", "conv"), heads=1, window=1)


@pytest.fixture(
    scope="module", params=[CONFIG, HYBRID, NARROW], ids=["v4", "hybrid", "window of 1"]
)
def network(request):
    torch.manual_seed(0)
    return stir(FlashLM(request.param))


def draw_ids(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocabulary_size, shape, generator=generator)


# ---- what a position sees ----


@given(st.integers(0, 1_000), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_editing_the_future_changes_no_earlier_logit(network, seed, time, data):
    ids = draw_ids(seed, 2, time)
    t = data.draw(st.integers(0, time - 1))
    edited = ids.clone()
    edited[:, t] = (edited[:, t] + data.draw(st.integers(1, 49))) % 50
    before = network(ids)
    after = network(edited)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_the_receptive_field_is_exactly_what_is_said(network):
    assert receptive_field(PRESETS["v4-small"]) == 43
    ids = draw_ids(1, 1, 30)
    last = network(ids)[0, -1]
    for t in range(30):
        edited = ids.clone()
        edited[0, t] = (edited[0, t] + 1) % 50
        unseen = 30 - t > receptive_field(network.config)
        assert torch.equal(network(edited)[0, -1], last) == unseen


def sizes_of(states):
    return [map_state(lambda tensor: torch.tensor(tensor.shape), state) for state in states]


@given(st.integers(0, 100), st.lists(st.integers(1, 15), min_size=1, max_size=6))
@settings(deadline=None)
def test_carrying_the_states_equals_the_full_pass(network, seed, pieces):
    ids = draw_ids(seed, 2, sum(pieces))
    full, after = network.hidden(ids)
    states = None
    parts = []
    for piece in ids.split(pieces, dim=1):
        hidden, states = network.hidden(piece, states)
        parts.append(hidden)
        # However much was read, the states are of one size.
        torch.testing.assert_close(sizes_of(states), sizes_of(after))
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, after, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 100), st.integers(1, 40))
@settings(deadline=None)
def test_states_of_zeros_are_the_start_of_a_text(network, seed, time):
    ids = draw_ids(seed, 2, time)
    full, states = network.hidden(ids)
    zeros = [map_state(torch.zeros_like, state) for state in states]
    again, same = network.hidden(ids, zeros)
    torch.testing.assert_close(again, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(same, states, rtol=1e-5, atol=1e-5)


# ---- the parts, by their formulas ----


def conv1d(value, taps):
    """Convolve value (B, T, D) causally with taps (K, D), by PyTorch's own convolution."""
    K, D = taps.shape
    padded = F.pad(value.transpose(1, 2), (K - 1, 0))
    return F.conv1d(padded, taps.T.unsqueeze(1), groups=D).transpose(1, 2)


def test_attention_is_softmax_over_a_window_with_a_slope_per_head():
    D, heads, window = 6, 2, 5
    config = replace(CONFIG, width=D, heads=heads, window=window, kernel_size=3)
    mixer = AttentionMixer(config)
    x = torch.randn(2, 17, D)
    projected = x @ quantize_straight_through(mixer.project_in.weight).T
    mixed = conv1d(projected[..., : 3 * D], mixer.taps)

    # One text, position and head at a time.
    slopes = (0.5, 2.0**-8)
    attended = torch.zeros(2, 17, D)
    for b, t, head in itertools.product(range(2), range(17), range(heads)):
        parts = [part.split(D // heads, dim=-1)[head] for part in mixed[b].split(D, dim=-1)]
        query, key, value = parts
        query = query / (query.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        key = key / (key.square().mean(-1, keepdim=True) + 1e-12).sqrt()

        seen = range(max(0, t - window + 1), t + 1)
        scores = []
        for s in seen:
            similarity = query[t] @ key[s] / (D // heads) ** 0.5
            scores.append(similarity - slopes[head] * (t - s))
        weights = torch.stack(scores).softmax(0)
        place = slice(head * D // heads, (head + 1) * D // heads)
        attended[b, t, place] = weights @ value[seen.start : seen.stop]

    gate = torch.sigmoid(projected[..., 3 * D :])
    expected = (attended * gate) @ mixer.project_out.effective_weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_mixer_is_a_gated_causal_depthwise_convolution():
    mixer = GatedConvMixer(replace(CONFIG, width=6, kernel_size=8))
    x = torch.randn(3, 20, 6)
    gate, value = (x @ quantize_straight_through(mixer.project_in.weight).T).chunk(2, dim=-1)
    mixed = conv1d(value, mixer.taps)
    expected = (mixed * torch.sigmoid(gate)) @ quantize_straight_through(mixer.project_out.weight).T
    torch.testing.assert_close(mixer(x)[0], expected)


def test_the_glu_follows_its_formula():
    glu = TernaryGLU(replace(CONFIG, width=6, hidden=10))
    x = torch.randn(4, 6)
    gate = quantize_straight_through(glu.gate.weight)
    up = quantize_straight_through(glu.up.weight)
    down = quantize_straight_through(glu.down.weight)
    torch.testing.assert_close(glu(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


def test_layer_scales_start_a_network_as_its_embedding_alone():
    network = FlashLM(HYBRID)
    ids = draw_ids(0, 2, 9)
    expected = network.norm(network.embedding(ids))
    torch.testing.assert_close(network.hidden(ids)[0], expected)


def test_a_float_twin_computes_with_the_latent_weights():
    twin = FlashLM(replace(HYBRID, ternary=False))
    layers = [layer for layer in twin.modules() if isinstance(layer, BitLinear)]
    assert len(layers) == 3 * 5
    for layer in layers:
        x = torch.randn(3, layer.in_features)
        torch.testing.assert_close(layer(x), x @ layer.weight.T)
        assert len(layer.effective_weight.unique()) > 3
    for name, config in PRESETS.items():
        if not name.endswith("-float"):
            expected = replace(config, name=f"{name}-float", ternary=False)
            assert PRESETS[f"{name}-float"] == expected


def test_dropout_acts_while_training_only():
    network = stir(FlashLM(HYBRID))
    ids = draw_ids(0, 2, 9)
    before = network(ids)
    network.dropout = 0.5
    hidden = network.hidden(ids)[0]
    assert 0.2 < (hidden == 0).float().mean() < 0.8
    assert not torch.equal(hidden, network.hidden(ids)[0])
    assert torch.equal(network.eval()(ids), before)


# ---- parameters ----


@pytest.mark.parametrize("name, total", [("v4-small", 4_364_736), ("v4-large", 16_847_232)])
def test_presets_have_the_shapes_of_v4(name, total):
    config = PRESETS[name]
    D, H, K = config.width, config.hidden, config.kernel_size
    counts = count_parameters(config)
    assert counts.ternary == config.blocks * (3 * D * D + 3 * D * H)
    assert counts.embedding == config.vocabulary_size * D
    assert counts.convolution == config.blocks * K * D
    assert counts.norm == config.blocks * 2 * D + D
    assert counts.other == 0
    assert counts.total == total
    assert total == counts.ternary + counts.embedding + counts.convolution + counts.norm


def test_head_and_embedding_are_one_parameter(network):
    counted = sum(parameter.numel() for parameter in network.parameters())
    assert counted == count_parameters(network.config).total
    ids = draw_ids(0, 1, 5)
    assert torch.equal(network(ids), network.hidden(ids)[0] @ network.embedding.weight.T)


def test_a_ternary_model_packs_into_a_fraction_of_its_float_twin():
    config = PRESETS["v4-small"]
    counts = count_parameters(config)
    five_per_byte = counts.ternary // 5
    assert five_per_byte < packed_bytes(config) < five_per_byte + 1.1 * counts.embedding
    saved = packed_bytes(PRESETS["v4-small-float"]) - packed_bytes(config)
    assert saved == pytest.approx(counts.ternary * (4 - 1 / 5), abs=1)


# ---- the loss ----


def test_the_loss_is_the_cross_entropy_of_the_logits(network):
    ids = draw_ids(1, 2, 9)
    targets = draw_ids(2, 2, 9)
    logits = network(ids).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=7)
    torch.testing.assert_close(network.loss(ids, targets, ignore_index=7), expected)


def test_token_nll_is_the_cross_entropy_of_each_row_however_many(network):
    for rows in (1, CHUNK_ROWS, CHUNK_ROWS + 3):
        hidden = torch.randn(rows, CONFIG.width)
        targets = draw_ids(rows, rows)
        expected = F.cross_entropy(network.head(hidden), targets, reduction="none")
        nll = network.token_nll(hidden, targets)
        assert nll.dtype == torch.float32
        torch.testing.assert_close(nll, expected)


def loss_and_gradients(compute, hidden, weight, factor=1.0):
    """Return compute(hidden, weight), and its gradients times a factor by both."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    loss = compute(hidden, weight)
    (factor * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize(
    "rows, width, size",
    [(1, 3, 7), (CHUNK_ROWS - 1, 16, 33), (CHUNK_ROWS + 1, 5, 301), (3 * CHUNK_ROWS, 8, 64)],
)
@pytest.mark.parametrize("ignored", [0, 1, 2])
def test_the_chunked_head_equals_cross_entropy(rows, width, size, ignored):
    hidden = torch.randn(rows, width)
    weight = torch.randn(size, width)
    targets = torch.randint(1, size, (rows,))
    if ignored:
        targets[1 :: ignored + 1] = 0

    ours = loss_and_gradients(
        lambda h, w: tied_cross_entropy(h, w, targets, ignore_index=0), hidden, weight, 3
    )
    reference = loss_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=0), hidden, weight, 3
    )
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_the_chunked_head_under_bfloat16_is_as_close_as_its_rounding():
    hidden = torch.randn(700, 64)
    weight = torch.randn(90, 64) * 0.1
    targets = torch.randint(0, 90, (700,))

    def rounded(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return tied_cross_entropy(h, w, targets)

    loss, *gradients = loss_and_gradients(rounded, hidden, weight)
    exact, *expected = loss_and_gradients(
        lambda h, w: F.cross_entropy(h @ w.T, targets), hidden, weight
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=5e-3)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).norm() < 0.02 * reference.norm()


def test_a_head_without_any_target_costs_nothing():
    targets = torch.zeros(4, dtype=torch.long)
    loss, gradient, _ = loss_and_gradients(
        lambda h, w: tied_cross_entropy(h, w, targets, ignore_index=0),
        torch.randn(4, 3),
        torch.randn(5, 3),
    )
    assert loss == 0
    assert not gradient.any()


@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 5000),
    tokens=st.integers(1, 4000),
    different=st.integers(1, 5000),
)
@settings(max_examples=50, deadline=None)
def test_negatives_and_targets_count_for_the_whole_vocabulary(seed, size, tokens, different):
    torch.manual_seed(seed)
    targets = torch.randint(0, min(size, different), (tokens,))
    count = max(NEGATIVES, tokens // 2)
    sample = sample_negatives(targets, size)
    assert (sample is None) == (count >= size or len(targets.unique()) >= count)
    if sample is None:
        return

    ids, bias = sample
    assert len(ids.unique()) == len(bias) == count
    assert torch.isin(targets, ids).all()
    assert 0 <= ids.min() and ids.max() < size
    assert not bias[torch.isin(ids, targets)].any()
    # Each token counts, by itself or by another.
    assert bias.exp().sum().item() == pytest.approx(size, rel=1e-4)


def test_a_sampled_head_has_the_loss_and_gradient_of_the_whole_one_on_average():
    hidden = torch.randn(40, 8)
    weight = torch.randn(3 * NEGATIVES, 8) * 0.4
    targets = torch.randint(0, 20, (40,))

    def average(h, w):
        losses = [tied_cross_entropy(h, w, targets, 3, sampled=True) for _ in range(100)]
        return sum(losses) / len(losses)

    whole, *gradients = loss_and_gradients(
        lambda h, w: tied_cross_entropy(h, w, targets, 3), hidden, weight
    )
    estimated, *estimates = loss_and_gradients(average, hidden, weight)
    assert estimated.item() == pytest.approx(whole.item(), rel=0.001)
    for exact, estimate in zip(gradients, estimates, strict=True):
        assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_the_loss_is_estimated_while_training_only():
    network = stir(FlashLM(replace(CONFIG, vocabulary_size=2 * NEGATIVES)))
    ids = torch.ones(2, 9, dtype=torch.long)
    exact = network.loss(ids, ids)
    network.sampled_softmax = True
    assert len({network.loss(ids, ids).item() for _ in range(5)}) > 1
    assert network.eval().loss(ids, ids) == exact


# ---- what cannot be ----


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"width": 0}, "width must be at least 1"),
        ({"blocks": -1}, "blocks must be at least 1"),
        ({"kernel_size": 2.5}, "kernel_size cannot be 2.5: it must be int"),
        ({"window": 0}, "window must be"),
        ({"heads": 1.5}, "heads cannot be"),
        ({"ternary": 1}, "ternary cannot be"),
        ({"mixers": ()}, "give a tuple of mixers' names"),
        ({"mixers": "conv"}, "give a tuple of mixers' names"),
        ({"mixers": ("conv", 3)}, "give a tuple of mixers' names"),
        ({"mixers": ("conv",) * 4}, "4 mixers for 3 blocks"),
    ],
)
def test_architectures_that_cannot_be_are_refused(change, complaint):
    with pytest.raises(FlashLMError, match=complaint):
        replace(CONFIG, **change)


@pytest.mark.parametrize("places", [[3], [0, 0], [-1], "0", 1])
def test_attention_in_blocks_that_are_not_there_is_refused(places):
    with pytest.raises(FlashLMError, match="from 0 to 2"):
        attention_at(places, 3)
    content = {"name": "old", "width": 8, "blocks": 3, "hidden": 8, "sequence_length": 8}
    with pytest.raises(FlashLMError, match="from 0 to 2"):
        ModelConfig.from_dict(content | {"attention": places})


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(FlashLMError, match="12 does not divide into 5 heads"):
        FlashLM(replace(HYBRID, heads=5))
    FlashLM(replace(CONFIG, heads=5))  # nobody asks for heads here


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"hours": 0},
        {"hours": float("nan")},
        {"epochs": -1},
        {"hours": float("inf")},
        {"hours": 1, "batch": 0},
        {"hours": 1, "batch": 5000},
        {"hours": 1, "lr": 0.0},
        {"hours": 1, "warmup": 0.8},
        {"hours": 1, "dropout": 1.0},
        {"hours": 1, "seed": -1},
        {"hours": 1, "patience": True},
        {"hours": "1"},
    ],
    ids=str,
)
def test_impossible_budgets_and_recipes_are_refused(settings):
    with pytest.raises(FlashLMError) as caught:
        TrainConfig(**settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_is_one_line_that_lists_them():
    with pytest.raises(FlashLMError, match="no preset 'v5': choose one of v4-small, v4-large"):
        find_preset("v5")
