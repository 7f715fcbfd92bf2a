import itertools
from dataclasses import replace

import pytest
import torch
from conftest import stir
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashlm_helpers.config import PRESETS, FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.head import CANDIDATES, ROWS, draw_candidates, head_cross_entropy
from flashlm_helpers.model import AttentionMixer, FlashLM, GatedConvMixer, TernaryGLU, count_parameters
from flashlm_helpers.quantization import BitLinear, quantize_straight_through

CONFIG = ModelConfig("test", width=12, blocks=3, hidden=20, sequence_length=64, kernel_size=4, vocabulary_size=50)

HYBRID = replace(CONFIG, attention=(1,), heads=3, window=9, layer_scale=True)


@pytest.fixture(scope="module", params=[CONFIG, HYBRID, replace(CONFIG, attention=(0, 2), heads=1, window=1)],
                ids=["v4", "hybrid", "window of 1"])
def model(request):
    torch.manual_seed(0)
    return stir(FlashLM(request.param))


def draw_ids(seed, *shape):
    return torch.randint(0, CONFIG.vocabulary_size, shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1_000), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_editing_the_future_changes_no_earlier_logit(model, seed, time, data):
    ids = draw_ids(seed, 2, time)
    t = data.draw(st.integers(0, time - 1))
    edited = ids.clone()
    edited[:, t] = (edited[:, t] + data.draw(st.integers(1, 49))) % 50
    before, after = model(ids), model(edited)
    assert torch.equal(before[:, :t], after[:, :t])
    assert not torch.equal(before[:, t], after[:, t])


def test_the_receptive_field_is_exactly_what_the_config_says(model):
    assert PRESETS["v4-small"].receptive_field == 43
    ids = draw_ids(1, 1, 30)
    last = model(ids)[0, -1]
    for t in range(30):
        edited = ids.clone()
        edited[0, t] = (edited[0, t] + 1) % 50
        assert torch.equal(model(edited)[0, -1], last) == (30 - t > model.config.receptive_field)


@given(st.integers(0, 100), st.lists(st.integers(1, 15), min_size=1, max_size=6))
@settings(deadline=None)
def test_carrying_the_state_equals_the_full_pass(model, seed, pieces):
    ids = draw_ids(seed, 2, sum(pieces))
    full, _ = model.hidden(ids)
    past, parts, sizes = None, [], None
    for piece in ids.split(pieces, dim=1):
        hidden, past = model.hidden(piece, past)
        parts.append(hidden)
        assert sizes in (None, [state.shape for state in past])  # whatever was read, the state is of one size
        sizes = [state.shape for state in past]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 100), st.integers(1, 40))
@settings(deadline=None)
def test_a_state_of_zeros_is_the_start_of_a_text(model, seed, time):
    ids = draw_ids(seed, 2, time)
    full, past = model.hidden(ids)
    again, same = model.hidden(ids, [torch.zeros_like(state) for state in past])
    torch.testing.assert_close([again, *same], [full, *past], rtol=1e-5, atol=1e-5)


def test_the_attention_is_softmax_over_a_window_with_a_slope_a_head():
    width, heads, window = 6, 2, 5
    mixer, x = AttentionMixer(width, heads, window, kernel_size=3), torch.randn(2, 17, width)
    projected = x @ quantize_straight_through(mixer.project_in.weight).T
    padded = F.pad(projected[..., : 3 * width].transpose(1, 2), (2, 0))
    mixed = F.conv1d(padded, mixer.taps.T.unsqueeze(1), groups=3 * width).transpose(1, 2)
    attended = torch.zeros(2, 17, width)
    for b, t, head in itertools.product(range(2), range(17), range(heads)):
        query, key, value = (mixed[b].split(width, dim=-1)[n].split(width // heads, dim=-1)[head] for n in range(3))
        query, key = (part / (part.square().mean(-1, keepdim=True) + 1e-12).sqrt() for part in (query, key))
        seen = range(max(0, t - window + 1), t + 1)
        scores = torch.stack([query[t] @ key[s] / (width // heads) ** 0.5 - (0.5, 2.0**-8)[head] * (t - s)
                              for s in seen])
        place = slice(head * width // heads, (head + 1) * width // heads)
        attended[b, t, place] = scores.softmax(0) @ value[seen.start : seen.stop]
    expected = (attended * torch.sigmoid(projected[..., 3 * width :])) @ mixer.project_out.effective_weight.T
    torch.testing.assert_close(mixer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_layer_scales_start_a_model_as_its_embedding_alone():
    model, ids = FlashLM(HYBRID), draw_ids(0, 2, 9)
    torch.testing.assert_close(model.hidden(ids)[0], model.norm(model.embedding(ids)))


def test_a_float_twin_computes_with_the_latent_weights():
    twin = FlashLM(replace(HYBRID, ternary=False))
    for layer in twin.modules():
        if isinstance(layer, BitLinear):
            x = torch.randn(3, layer.in_features)
            torch.testing.assert_close(layer(x), x @ layer.weight.T)
            assert len(layer.effective_weight.unique()) > 3
    for name, config in PRESETS.items():
        if not name.endswith("-float"):
            assert PRESETS[f"{name}-float"] == replace(config, name=f"{name}-float", ternary=False)


def test_dropout_acts_while_training_only():
    model, ids = stir(FlashLM(HYBRID)), draw_ids(0, 2, 9)
    before = model(ids)
    model.dropout = 0.5
    hidden = model.hidden(ids)[0]
    assert 0.2 < (hidden == 0).float().mean() < 0.8 and not torch.equal(hidden, model.hidden(ids)[0])
    assert torch.equal(model.eval()(ids), before)


@pytest.mark.parametrize("change, complaint", [
    ({"attention": (3,)}, "from 0 to 2"), ({"attention": (0,), "heads": 5}, "choose a divisor"),
    ({"window": 0}, "window must be"), ({"heads": 1.5}, "heads must be")])
def test_architectures_that_cannot_be_are_refused(change, complaint):
    with pytest.raises(FlashLMError, match=complaint):
        replace(CONFIG, **change)


def test_the_mixer_is_a_gated_causal_depthwise_convolution():
    mixer, x = GatedConvMixer(6, 8), torch.randn(3, 20, 6)
    gate, value = (x @ quantize_straight_through(mixer.project_in.weight).T).chunk(2, dim=-1)
    padded = F.pad(value.transpose(1, 2), (7, 0))
    mixed = F.conv1d(padded, mixer.taps.T.unsqueeze(1), groups=6).transpose(1, 2)
    expected = (mixed * torch.sigmoid(gate)) @ quantize_straight_through(mixer.project_out.weight).T
    torch.testing.assert_close(mixer(x)[0], expected)


def test_the_glu_follows_its_formula():
    glu, x = TernaryGLU(6, 10), torch.randn(4, 6)
    gate, up, down = (quantize_straight_through(layer.weight) for layer in (glu.gate, glu.up, glu.down))
    torch.testing.assert_close(glu(x), (F.silu(x @ gate.T) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize("name, total", [("v4-small", 4_364_736), ("v4-large", 16_847_232)])
def test_presets_have_the_shapes_of_v4(name, total):
    config = PRESETS[name]
    D, H, K, V = config.width, config.hidden, config.kernel_size, config.vocabulary_size
    counts = count_parameters(config)
    assert counts["ternary"] == config.blocks * (3 * D * D + 3 * D * H)
    assert counts["total"] == total == counts["ternary"] + V * D + config.blocks * (K * D + 2 * D) + D


def test_head_and_embedding_are_one_parameter(model):
    assert sum(p.numel() for p in model.parameters()) == count_parameters(model.config)["total"]
    ids = draw_ids(0, 1, 5)
    assert torch.equal(model(ids), model.hidden(ids)[0] @ model.embedding.weight.T)


def test_the_loss_is_the_cross_entropy_of_the_logits(model):
    ids, targets = draw_ids(1, 2, 9), draw_ids(2, 2, 9)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=7)
    torch.testing.assert_close(model.loss(ids, targets, ignore_index=7), expected)


@pytest.mark.parametrize("rows, width, size", [(1, 3, 7), (ROWS - 1, 16, 33), (ROWS + 1, 5, 301), (3 * ROWS, 8, 64)])
@pytest.mark.parametrize("ignored", [0, 1, 2])
def test_the_chunked_head_equals_cross_entropy(rows, width, size, ignored):
    hidden, weight = torch.randn(rows, width), torch.randn(size, width)
    targets = torch.randint(1, size, (rows,))
    targets[1 :: ignored + 1] = 0 if ignored else targets[1 :: ignored + 1]
    results = []
    for loss_of in (lambda h, w: head_cross_entropy(h, w, targets, ignore_index=0),
                    lambda h, w: F.cross_entropy(h @ w.T, targets, ignore_index=0)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_of(h, w)
        (3 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_the_chunked_head_under_bfloat16_is_as_close_as_its_rounding():
    hidden, weight, targets = torch.randn(700, 64), torch.randn(90, 64) * 0.1, torch.randint(0, 90, (700,))
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_cross_entropy(h, w, targets)
    loss.backward()
    hr, wr = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    reference = F.cross_entropy(hr @ wr.T, targets)
    reference.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=5e-3, atol=5e-3)
    for ours, exact in ((h.grad, hr.grad), (w.grad, wr.grad)):
        assert (ours - exact).norm() < 0.02 * exact.norm()


def test_a_head_without_any_target_costs_nothing():
    hidden = torch.randn(4, 3, requires_grad=True)
    loss = head_cross_entropy(hidden, torch.randn(5, 3), torch.zeros(4, dtype=torch.long), ignore_index=0)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@given(seed=st.integers(0, 2**31), size=st.integers(2, 5000), tokens=st.integers(1, 4000),
       different=st.integers(1, 5000))
@settings(max_examples=50, deadline=None)
def test_candidates_are_all_targets_and_stand_for_the_whole_vocabulary(seed, size, tokens, different):
    torch.manual_seed(seed)
    targets, count = torch.randint(0, min(size, different), (tokens,)), max(CANDIDATES, tokens // 2)
    candidates = draw_candidates(targets, size)
    assert (candidates is None) == (count >= size or len(targets.unique()) >= count)
    if candidates is None:
        return
    ids, bias = candidates
    assert len(ids.unique()) == len(bias) == count and torch.isin(targets, ids).all()
    assert 0 <= ids.min() and ids.max() < size
    assert bias.exp().sum().item() == pytest.approx(size, rel=1e-4)  # each token counts, by itself or by another
    assert not bias[torch.isin(ids, targets)].any()


def test_a_sampled_head_has_the_loss_and_gradient_of_the_whole_one_on_average():
    hidden, weight = torch.randn(40, 8), torch.randn(3 * CANDIDATES, 8) * 0.4
    targets, results = torch.randint(0, 20, (40,)), []
    for sampled, repeats in ((False, 1), (True, 100)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = sum(head_cross_entropy(h, w, targets, 3, sampled=sampled) for _ in range(repeats)) / repeats
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    (whole, *gradients), (estimated, *estimates) = results
    assert estimated.item() == pytest.approx(whole.item(), rel=0.001)
    for exact, estimate in zip(gradients, estimates, strict=True):
        assert (estimate - exact).norm() < 0.05 * exact.norm()


def test_the_loss_is_estimated_while_training_only():
    model, ids = stir(FlashLM(replace(CONFIG, vocabulary_size=2 * CANDIDATES))), torch.ones(2, 9, dtype=torch.long)
    exact, model.sampled_softmax = model.loss(ids, ids), True
    assert len({model.loss(ids, ids).item() for _ in range(5)}) > 1
    assert model.eval().loss(ids, ids) == exact


@pytest.mark.parametrize("change", [{"width": 0}, {"blocks": -1}, {"kernel_size": 2.5}])
def test_impossible_architectures_are_refused(change):
    with pytest.raises(FlashLMError, match="positive whole number"):
        replace(CONFIG, **change)


@pytest.mark.parametrize("settings", [
    {}, {"hours": 0}, {"hours": float("nan")}, {"epochs": -1}, {"hours": float("inf")}, {"hours": 1, "batch": 0},
    {"hours": 1, "lr": 0.0}, {"hours": 1, "warmup": 0.8}])
def test_impossible_budgets_and_recipes_are_refused(settings):
    with pytest.raises(FlashLMError):
        TrainConfig(**settings)
