"""The archived v3: its size, its rule without a scale, and all else that a FlashLM can do."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same_run, interrupt_at, run_training
from hypothesis import given, settings
from hypothesis import strategies as st

import flashlm_helpers as fl
from flashlm_helpers.archive import v3
from flashlm_helpers.archive.v3 import (
    FlashLMv3,
    RecursiveBlock,
    ScaledBlock,
    SignLinear,
    ternarize_by_sign,
)
from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import PRESETS, FlashLMError, TrainConfig
from flashlm_helpers.quantization import freeze_ternary, latent_weight, pack_ternary, unpack_ternary
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import Vocabulary


@pytest.fixture
def small(vocabulary):
    """v3's shape, small."""
    sizes = {"width": 32, "hidden": 43, "sequence_length": 64}
    return replace(PRESETS["v3"], vocabulary_size=len(vocabulary), **sizes)


def network_of(config, build=fl.FlashLM):
    """A network whose predictions are far from even."""
    torch.manual_seed(0)
    network = build(config).eval()
    with torch.no_grad():
        network.norm.weight *= 20
    return network


# ---- the size ----


def test_it_has_the_published_parameters_exactly(capsys):
    counts = fl.count_parameters(PRESETS["v3"])
    assert counts.total == 13_555_969
    assert counts.embedding == 12_865_792
    assert counts.total - counts.embedding - 256 == 689_921
    assert main(["info", "--preset", "v3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["total"] == 13_555_969


def test_both_passes_share_their_weights(small):
    block = RecursiveBlock(small)
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.bias.fill_(50.0)  # the second pass counts fully
    x = torch.randn(2, 20, small.width)
    once, _ = one_pass(block, x)
    twice, _ = one_pass(block, once)
    torch.testing.assert_close(block(x)[0], twice, rtol=1e-3, atol=1e-3 * float(twice.std()))


def one_pass(block, x):
    after = []
    return block._pass(x, [None] * 3, after), after


# ---- the rule ----


@given(st.integers(1, 9), st.integers(2, 40), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_weights_above_the_average_are_kept_by_sign_and_survive_packing(rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    ternary = ternarize_by_sign(weight)
    mean = weight.abs().mean()
    for one, kept in zip(weight.flatten().tolist(), ternary.flatten().tolist(), strict=True):
        assert kept == (0 if abs(one) <= mean else math.copysign(1, one))

    # As a compact checkpoint does it.
    packed = unpack_ternary(pack_ternary(ternary), tuple(ternary.shape))
    again = latent_weight(packed, torch.ones(()))
    assert torch.equal(ternarize_by_sign(again), ternary)


def test_the_gradient_passes_straight_through():
    layer = SignLinear(12, 7)
    x = torch.randn(5, 12)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(7, 12))


@pytest.mark.parametrize("width", [64, 256])
def test_without_a_scale_the_output_grows_with_the_width(width):
    torch.manual_seed(0)
    x = torch.randn(400, width)
    with torch.no_grad():
        without = float(SignLinear(width, width)(x).std())
        scaled = float(fl.BitLinear(width, width)(x).std())
    assert without / math.sqrt(width) == pytest.approx(0.65, abs=0.05)
    assert scaled == pytest.approx(0.66, abs=0.05)


# ---- what every FlashLM can do ----


def test_the_block_keeps_what_a_mixer_promises(small):
    for kind in (RecursiveBlock, ScaledBlock):
        assert "sees no future" in fl.check_mixer(kind, replace(small, sequence_length=220))


def test_a_later_edit_changes_nothing_before_it_across_the_widest_dilation(small):
    network = network_of(small)
    ids = torch.randint(4, small.vocabulary_size, (1, 450))
    before = network(ids)
    for place in (100, 449):
        edited = ids.clone()
        edited[0, place] = 4 + (edited[0, place] - 3) % (small.vocabulary_size - 4)
        changed = (network(edited) != before).any(-1)[0]
        assert not changed[:place].any()
        assert changed[place]
    assert fl.receptive_field(small) == 415


def test_frozen_it_computes_the_same(small):
    network = network_of(small)
    ids = torch.randint(4, small.vocabulary_size, (2, 30))
    frozen = freeze_ternary(network)
    assert not any(isinstance(layer, SignLinear) for layer in frozen.modules())
    assert torch.equal(frozen(ids), network(ids))


@pytest.mark.parametrize("build", [fl.FlashLM, FlashLMv3])
def test_resumed_it_is_the_same_to_the_last_bit(build, small, prepared, one_thread, tmp_path):
    # conftest's run_training makes a FlashLM.
    recipe = TrainConfig(epochs=0.2, batch=8, validation_stories=4)

    def run(folder, **arguments):
        torch.manual_seed(recipe.seed)
        network = build(small)
        optimizer = fl.build_optimizer(network, recipe)
        fl.training.train(network, optimizer, recipe, prepared, folder, **arguments)
        return load_checkpoint(folder / LAST, build_model=build)

    whole = run(tmp_path / "whole")
    half = run(tmp_path / "cut", on_step=interrupt_at(4))
    assert half.progress.step == 5 < whole.progress.step
    assert_same_run(whole, run(tmp_path / "cut", resume=half))


def test_compact_files_and_checkpoints_give_the_same_model(small, prepared, tmp_path, capsys):
    recipe = TrainConfig(epochs=0.05, batch=8, validation_stories=4)
    run_training(small, recipe, prepared, tmp_path)
    source = str(tmp_path / "best.pt")
    compact = str(tmp_path / "compact.pt")
    assert main(["export", "--checkpoint", source, "--format", "compact", "--out", compact]) == 0
    whole = fl.load(source).network
    loaded = fl.load(compact).network
    for one, other in zip(whole.modules(), loaded.modules(), strict=True):
        if isinstance(one, SignLinear):
            assert torch.equal(one.effective_weight, other.effective_weight)


def test_onnx_computes_what_pytorch_does(small, vocabulary, tmp_path):
    from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx

    model = PyTorchModel(network_of(small), vocabulary, bfloat16=False)
    sequences = [np.array([2, *np.random.default_rng(0).integers(4, len(vocabulary), 90)])]
    expected = model.token_nats(sequences)
    save_onnx(tmp_path / "exact.onnx", model, low_bit=False)
    exact = OnnxModel(tmp_path / "exact.onnx")
    np.testing.assert_allclose(exact.token_nats(sequences)[0], expected[0], atol=2e-3)
    prompts = [[2, 9, 8], [2, 7]]
    greedy = fl.generation.Sampling(tokens=12, temperature=0)
    written = [story.ids for story in exact.write(prompts, greedy)]
    assert written == [story.ids for story in model.write(prompts, greedy)]


@pytest.mark.parametrize("command", ["export", "generate"])
def test_what_c_cannot_run_is_one_line(command, small, prepared, tmp_path, capsys):
    recipe = TrainConfig(epochs=0.02, batch=8, validation_stories=4)
    run_training(small, recipe, prepared, tmp_path)
    arguments = {
        "export": ["--format", "packed", "--out", str(tmp_path / "m.flashlm")],
        "generate": ["--runtime", "c"],
    }
    capsys.readouterr()
    assert main([command, "--checkpoint", str(tmp_path), *arguments[command]]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "mixer 'v3' cannot be packed" in error
    assert not (tmp_path / "m.flashlm").exists()


def test_a_width_that_does_not_divide_is_one_line():
    with pytest.raises(FlashLMError, match="16 groups"):
        fl.count_parameters(replace(PRESETS["v3"], width=24))


# ---- the recipe ----


def test_a_quarter_of_the_positions_counts_in_training_and_all_do_in_scoring(small):
    network = network_of(small, FlashLMv3)
    ids = torch.randint(4, small.vocabulary_size, (4, 64))
    targets = ids.roll(-1, 1)
    everything = fl.FlashLM.loss(network, ids, targets)
    assert torch.equal(network.loss(ids, targets), everything)

    # In training the mean over many draws comes near it, and each draw differs.
    network.train()
    torch.manual_seed(0)
    draws = torch.stack([network.loss(ids, targets) for _ in range(60)])
    assert draws.std() > 0
    assert abs(draws.mean() - everything) < 4 * draws.std() / math.sqrt(60)
    network.loss(ids, targets).backward()
    assert network.embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize(
    "spent, length", [(0.0, 64), (0.249, 64), (0.25, 128), (0.5, 256), (0.75, 512), (1.0, 512)]
)
def test_sequences_grow_from_64_to_512(spent, length, small, monkeypatch):
    network = network_of(small, FlashLMv3).train()
    network.spent = spent
    seen = []
    hidden = network.hidden
    monkeypatch.setattr(network, "hidden", lambda ids: seen.append(ids.shape) or hidden(ids))
    ids = torch.randint(4, small.vocabulary_size, (2, 512))
    network.loss(ids, ids)
    assert seen == [(1024 // length, length)]


def test_what_stands_before_a_piece_does_not_reach_it(small, monkeypatch):
    network = network_of(small, FlashLMv3).train()
    monkeypatch.setattr(v3, "COUNTED", 1)
    ids = torch.randint(4, small.vocabulary_size, (2, 128))
    targets = ids.clone()
    targets[:, :112] = -100  # only the last of eight pieces counts
    edited = ids.clone()
    edited[:, :112] = 4
    assert network.loss(ids, targets) != network.loss(edited, targets)
    network.spent = 0.0
    torch.testing.assert_close(network.loss(ids, targets), network.loss(edited, targets))


def test_a_run_tells_its_network_how_much_is_spent(small, prepared, one_thread, tmp_path):
    recipe = TrainConfig(epochs=0.1, batch=8, validation_stories=4)
    told = []

    class Noting(FlashLMv3):
        def loss(self, *arguments, **named):
            told.append(self.spent)
            return super().loss(*arguments, **named)

    network = Noting(small)
    optimizer = fl.build_optimizer(network, recipe)
    fl.training.train(network, optimizer, recipe, prepared, tmp_path)
    assert told == sorted(told)
    assert 0 < told[0] < 0.2 and told[-1] == 1.0


def test_gpt2s_whole_vocabulary_has_tokens_that_do_not_occur():
    whole = Vocabulary.build(["A tiny text."], 50_257)
    assert len(whole) == 50_257
    assert len(Vocabulary.build(["A tiny text."], 50_256)) < 300
    text = "Ünïcode, and a zebra's \ud800 end"
    assert whole.decode(whole.encode(text)) == text
