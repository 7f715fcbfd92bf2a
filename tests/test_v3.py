"""FlashLM v3: its published sizes, its rule without a scale, and that all else works with it."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import assert_same_run, interrupt_at, quiet, times
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flashlm_helpers as fl
from flashlm_helpers.archive.v3 import (
    DILATIONS,
    PASSES,
    ConvLayer,
    FlashLMv3,
    RecursiveBlock,
    ScaledBlock,
    SignLinear,
    ternarize_by_sign,
)
from flashlm_helpers.checkpoint import LAST, Checkpoint, load_checkpoint
from flashlm_helpers.config import PRESETS, FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.experiments.race import _run_apart
from flashlm_helpers.machine.numbers import matmul_autocast
from flashlm_helpers.mixers import map_state
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer
from flashlm_helpers.quantization import freeze_ternary, latent_weight
from flashlm_helpers.registry import own_mixers
from flashlm_helpers.runtime.compact import save_compact
from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx
from flashlm_helpers.runtime.packed import save_packed
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.sources.gpt2 import GPT2_SIZE
from flashlm_helpers.vocab import LARGEST, SPECIALS, Vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(vocabulary):
    return ModelConfig(
        "small-v3",
        width=32,
        blocks=1,
        hidden=40,
        sequence_length=64,
        kernel_size=4,
        vocabulary_size=len(vocabulary),
        mixers=("v3",),
    )


@pytest.fixture
def network(small):
    """One whose norms, router and guesses are not what they are at the start."""
    torch.manual_seed(0)
    network = FlashLM(small).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.normal_(1.0, 0.3)
        network.norm.weight *= 10
    return network


# ---- sizes ----


def test_the_preset_has_the_published_sizes():
    config = PRESETS["v3"]
    counts = fl.count_parameters(config)
    assert counts.total == 13_555_969
    assert counts.embedding == 12_865_792 == config.vocabulary_size * config.width
    assert counts.total - counts.embedding - config.width == 689_921  # less the final norm
    assert counts.ternary + counts.convolution + counts.norm + counts.other == counts.total - (
        counts.embedding
    )
    assert fl.count_parameters(PRESETS["v3-float"]) == counts
    assert own_mixers(config) == {}


def test_a_width_that_does_not_divide_into_groups_is_one_line(small):
    with pytest.raises(FlashLMError, match="16 groups of channels, which do not divide 40"):
        FlashLM(replace(small, width=40))


@pytest.mark.parametrize("size", [GPT2_SIZE, LARGEST])
def test_a_vocabulary_of_that_size_is_the_whole_one(size, stories):
    vocabulary = Vocabulary.build(stories[:3], size)
    assert len(vocabulary) == size
    assert vocabulary.coverage == 1.0

    # Tokens that never occurred in the text are there, each as one id.
    rare = "Quarterly thermodynamics"
    assert len(vocabulary.encode(rare)) < len(Vocabulary.build(stories[:3], 5_000).encode(rare))
    assert vocabulary.decode(vocabulary.encode(rare)) == rare
    assert len(Vocabulary.build(stories[:3], GPT2_SIZE - 1)) < 2_000  # as before
    assert GPT2_SIZE - 1 not in vocabulary.kept  # a mark between texts, which no text holds
    assert len(set(vocabulary.kept)) == size - len(SPECIALS)


# ---- the rule ----


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(1, 40), st.integers(-20, 20))
def test_the_rule_keeps_signs_above_the_average_and_knows_no_scale(seed, rows, columns, power):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    ternary = ternarize_by_sign(weight)
    large = weight.abs() > weight.abs().mean()
    assert torch.equal(ternary != 0, large)
    assert torch.equal(ternary[large].sign(), weight[large].sign().to(torch.int8))

    assert torch.equal(ternarize_by_sign(weight * 2.0**power), ternary)

    # A compact file stores the ternary weight, and what is read from it must round to the same.
    assert torch.equal(ternarize_by_sign(latent_weight(ternary, torch.ones(()))), ternary)


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.ones(3, 4), -torch.ones(1, 1)])
def test_weights_of_one_size_are_all_rounded_to_zero(weight):
    """None is larger than the average of all."""
    ternary = ternarize_by_sign(weight)
    assert not ternary.any()
    assert not ternarize_by_sign(latent_weight(ternary, torch.ones(()))).any()


@pytest.mark.parametrize("size", [16, 683 * 256])
def test_a_stored_weight_without_a_zero_but_one_rounds_to_itself(size):
    """The closest that a weight's size and the average can come to each other."""
    ternary = torch.ones(1, size, dtype=torch.int8)
    ternary[0, 0] = 0
    assert torch.equal(ternarize_by_sign(latent_weight(ternary, torch.ones(()))), ternary)


def test_the_gradient_passes_straight_through():
    torch.manual_seed(0)
    layer = SignLinear(6, 5)
    x = torch.randn(7, 6)
    wanted = torch.randn(7, 5)
    (layer(x) * wanted).sum().backward()
    torch.testing.assert_close(layer.weight.grad, wanted.T @ x)

    twin = SignLinear(6, 5, ternary=False)
    assert torch.equal(twin.effective_weight, twin.weight)


@torch.no_grad()
def test_outputs_grow_with_the_width_of_the_input():
    torch.manual_seed(0)
    for width in (64, 1024):
        out = SignLinear(width, 500)(torch.randn(200, width))
        assert out.std().item() == pytest.approx(0.652 * width**0.5, rel=0.05)
        kept = fl.BitLinear(width, 500)(torch.randn(200, width))
        assert 0.5 < kept.std() < 1


# ---- the block ----


def test_a_layer_is_two_dilated_convolutions_and_a_gate(small):
    """Against sums written out for one channel and one position."""
    torch.manual_seed(0)
    layer = ConvLayer(small, dilation=3)
    x = torch.randn(1, 20, 32)
    out, _ = layer(x, None)
    normed = layer.norm(x)[0]
    t = 13
    channel = 21  # of group 10, with channel 20
    sums = {}
    for name in ("gate", "value"):
        weight = getattr(layer, name).weight[channel]  # (2, K)
        taps = [weight[:, k] @ normed[t - 3 * (3 - k), 20:22] for k in range(4)]
        sums[name] = sum(taps)
    expected = x[0, t, channel] + torch.sigmoid(sums["gate"]) * sums["value"]
    torch.testing.assert_close(out[0, t, channel], expected)


def test_the_router_weighs_the_second_pass(small):
    torch.manual_seed(0)
    block = RecursiveBlock(small).eval()
    x = torch.randn(2, 9, 32)
    nn.init.zeros_(block.router.weight)

    # All of it, none of it: two passes and one.
    nn.init.constant_(block.router.bias, 100.0)
    both, _ = block(x)
    nn.init.constant_(block.router.bias, -100.0)
    first, _ = block(x)
    again, _ = block(first)
    torch.testing.assert_close(both, again)
    assert not torch.allclose(both, first)


@torch.no_grad()
def test_no_position_depends_on_the_future_or_on_what_is_out_of_reach(network):
    reach = RecursiveBlock.reach(network.config)
    assert reach == 2 * 3 * (1 + 4 + 64)
    torch.manual_seed(1)
    V = network.config.vocabulary_size
    ids = torch.randint(4, V, (1, reach + 30))
    before = network(ids)[0]
    for t in (0, 7, reach, reach + 29):
        edited = ids.clone()
        edited[0, t] = 4 + (ids[0, t] - 3) % (V - 4)
        changed = (network(edited)[0] - before).abs().amax(1) > 1e-3 * before.abs().max()
        assert not changed[:t].any()
        assert changed[t]
        assert not changed[t + reach + 1 :].any()

    # Exactly so far, in the arithmetic of more digits.
    precise = network.double()
    edited = ids.clone()
    edited[0, 0] = 4 + (ids[0, 0] - 3) % (V - 4)
    difference = (precise(edited)[0] - precise(ids)[0]).abs().amax(1)
    assert difference[reach] > 0
    assert not difference[reach + 1 :].any()


@torch.no_grad()
def test_reading_in_any_pieces_is_reading_at_once(network):
    torch.manual_seed(2)
    ids = torch.randint(4, network.config.vocabulary_size, (2, 470))  # more than its reach
    full, after = network.hidden(ids)
    for lengths in ([1] * 470, [200, 1, 199, 70], [469, 1]):
        states = None
        parts = []
        for piece in ids.split(lengths, dim=1):
            hidden, states = network.hidden(piece, states)
            parts.append(hidden)
        torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=1e-3, atol=1e-3)

    # Its state has one size, however long the text.
    (state,) = states
    assert [part.shape[1] for part in state] == [3 * d for d in DILATIONS] * PASSES
    map_state(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3), state, after[0])


def test_the_check_of_mixers_passes():
    sizes = ModelConfig("sizes", width=16, blocks=1, hidden=8, sequence_length=70, kernel_size=2)
    assert "sees no future" in fl.check_mixer("v3", sizes)


@torch.no_grad()
def test_with_scales_the_stream_keeps_its_size(small):
    torch.manual_seed(0)
    x = torch.randn(2, 30, 32)
    without, _ = RecursiveBlock(small)(x)
    with_scales, _ = ScaledBlock(small)(x)
    assert with_scales.std() < 3 < 30 < without.std()


def test_a_block_beside_bolt_blocks(small):
    """It takes the place of a whole block, wherever in the pattern."""
    mixed = FlashLM(replace(small, blocks=2, mixers=("conv", "v3")))
    assert [type(block).__name__ for block in mixed.blocks] == ["BoltBlock", "RecursiveBlock"]
    ids = torch.randint(4, 300, (1, 9))
    assert mixed(ids).isfinite().all()


# ---- out of this process, and back ----


def test_a_frozen_copy_and_a_compact_file_compute_the_same(network, vocabulary, tmp_path):
    ids = torch.randint(4, len(vocabulary), (2, 50))
    expected = network(ids)
    assert torch.equal(freeze_ternary(network)(ids), expected)

    # Ternary weights survive exactly; the embedding is rounded to float16.
    save_compact(tmp_path / "c.pt", Checkpoint(network, TrainConfig(hours=1), vocabulary))
    loaded = load_checkpoint(tmp_path / "c.pt").network.eval()
    for name, layer in network.named_modules():
        if isinstance(layer, SignLinear):
            assert torch.equal(loaded.get_submodule(name).ternarized()[0], layer.ternarized()[0])
    network.embedding.weight.data = network.embedding.weight.half().float()
    torch.testing.assert_close(loaded(ids), network(ids))


def test_onnx_computes_the_same(network, vocabulary, tmp_path):
    save_onnx(tmp_path / "m.onnx", PyTorchModel(network, vocabulary), low_bit=False)
    onnx = OnnxModel(tmp_path / "m.onnx", threads=1)
    ids = torch.randint(4, len(vocabulary), (2, 450))
    expected = network(ids)
    torch.testing.assert_close(onnx.logits(ids), expected, rtol=1e-3, atol=1e-3)
    _, states = onnx.read(ids[:, :-1])
    last, _ = onnx.read(ids[:, -1:], states)
    torch.testing.assert_close(last[:, 0], expected[:, -1], rtol=1e-3, atol=1e-3)


@pytest.mark.soak
@pytest.mark.skipif(times(True, False), reason="a second export: make soak")
def test_onnx_of_few_bits_is_close(network, vocabulary, tmp_path):
    """At two bits per ternary weight, of widths that do not fill a block, and no scale."""
    save_onnx(tmp_path / "m.onnx", PyTorchModel(network, vocabulary))
    onnx = OnnxModel(tmp_path / "m.onnx", threads=1)
    ids = torch.randint(4, len(vocabulary), (2, 100))
    expected = network(ids)
    assert torch.corrcoef(torch.stack([onnx.logits(ids), expected]).flatten(1))[0, 1] > 0.98


def test_c_says_in_one_line_that_it_does_not_know_v3(network, vocabulary, tmp_path):
    with pytest.raises(FlashLMError, match="mixer 'v3' cannot be packed: bolt.c knows conv"):
        save_packed(tmp_path / "m.flashlm", PyTorchModel(network, vocabulary))


# ---- the recipe ----


def lengths_and_rows(network, monkeypatch, spent, ids):
    """The shape that the blocks read, and the positions that reach the head, in one loss."""
    seen = {}

    def cross_entropy(rows, weight, targets, *rest):
        seen["targets"] = targets
        return rows.sum() * 0

    def hidden(ids, states=None):
        seen["shape"] = tuple(ids.shape)
        return network.embedding(ids), []

    monkeypatch.setattr("flashlm_helpers.archive.v3.tied_cross_entropy", cross_entropy)
    monkeypatch.setattr(network, "hidden", hidden)
    network.spent = spent
    network.train().loss(ids, ids)
    return seen["shape"], seen["targets"]


@pytest.mark.parametrize(
    "spent, shape", [(0, (24, 8)), (0.25, (12, 16)), (0.6, (6, 32)), (0.75, (3, 64)), (1, (3, 64))]
)
def test_sequences_grow_and_a_quarter_of_the_positions_counts(small, monkeypatch, spent, shape):
    network = FlashLMv3(small)
    ids = torch.arange(3 * 64).view(3, 64)
    read, counted = lengths_and_rows(network, monkeypatch, spent, ids)
    assert read == shape
    assert len(counted.unique()) == len(counted) == 3 * 64 // 4


def test_windows_that_do_not_divide_stay_whole(small, monkeypatch):
    network = FlashLMv3(small)
    read, _ = lengths_and_rows(network, monkeypatch, 0.1, torch.ones(2, 33, dtype=torch.long))
    assert read == (2, 33)


def test_scoring_counts_every_position(small):
    torch.manual_seed(0)
    network = FlashLMv3(small).eval()
    plain = FlashLM(small).eval()
    plain.load_state_dict(network.state_dict())
    network.spent = 0.0
    ids, targets = torch.randint(4, 300, (2, 3, 64))
    assert torch.equal(network.loss(ids, targets), plain.loss(ids, targets))


def test_the_mean_over_draws_is_the_loss_of_all_positions(small):
    torch.manual_seed(0)
    network = FlashLMv3(small)
    ids, targets = torch.randint(4, 300, (2, 3, 64))
    targets[0, :20] = 0  # PAD, which does not count
    with torch.no_grad():
        whole = network.eval().loss(ids, targets, 0)
        drawn = [network.train().loss(ids, targets, 0) for _ in range(100)]
    assert torch.stack(drawn).mean() == pytest.approx(whole.item(), rel=0.02)


@pytest.mark.parametrize("build_model", [FlashLM, FlashLMv3])
def test_it_learns_and_resumes_to_the_last_bit(
    build_model, small, text_dir, stories, tmp_path, home
):
    recipe = TrainConfig(epochs=0.3, batch=8, validation_stories=5, bfloat16=False)
    limited = replace(small, vocabulary_size=1_000)
    experiment = Experiment(text_dir, limited, recipe, build_model=build_model)
    whole = experiment.run(tmp_path / "whole", on_step=quiet)
    at = whole.steps // 3
    assert at / whole.steps > 0.25  # not in the first quarter, in which a run begins
    experiment.run(tmp_path / "half", on_step=interrupt_at(at))
    experiment.run(tmp_path / "half", resume=tmp_path / "half", on_step=quiet)

    one = load_checkpoint(tmp_path / "whole", LAST, build_model)
    assert_same_run(one, load_checkpoint(tmp_path / "half", LAST, build_model))
    curve = whole.history.train
    assert curve[-1].nats_per_token < curve[0].nats_per_token - 0.5

    # What v3's recipe has trained is a FlashLM like any other.
    loaded = fl.load(tmp_path / "whole")
    assert type(loaded.network) is FlashLM
    assert fl.generate(loaded, "One day", tokens=9) == fl.generate(whole.model, "One day", tokens=9)
    assert fl.evaluate(loaded, stories[:3]).bpb == fl.evaluate(whole.model, stories[:3]).bpb


def test_its_recipe_races_in_a_process_of_its_own(small, text_dir, tmp_path, home):
    recipe = TrainConfig(hours=2 / 3600, batch=2, validation_stories=2)
    limited = replace(small, vocabulary_size=1_000)
    experiment = Experiment(fl.open_corpus(text_dir).source, limited, recipe, FlashLMv3)
    record = _run_apart(experiment, tmp_path / "run")
    assert record["steps"] > 0
    assert record["config"]["model"]["mixers"] == ["v3"]
    assert record["parameters"]["other"] == limited.width + 1  # the router
    assert record["score"]["n_tokens"] > 0


def test_every_parameter_learns(small):
    """In bfloat16, too, and through both passes."""
    torch.manual_seed(0)
    for network, bfloat16 in itertools.product([FlashLM(small), FlashLMv3(small)], [False, True]):
        optimizer = build_optimizer(network, TrainConfig(hours=1))
        ids, targets = torch.randint(4, 300, (2, 2, 64))
        optimizer.zero_grad()
        with matmul_autocast(bfloat16):
            loss = network.train().loss(ids, targets)
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad.isfinite().all() and parameter.grad.any(), name
