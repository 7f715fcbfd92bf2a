from dataclasses import replace

import onnx
import pytest
import torch
from conftest import stir

from flashlm_helpers.config import FlashLMError
from flashlm_helpers.generation import generate
from flashlm_helpers.model import FlashLM
from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx

SHAPES = {"v4": {}, "hybrid": {"attention": (1,), "heads": 2, "window": 12, "layer_scale": True},
          "kernel and window of 1": {"kernel_size": 1, "attention": (0,), "heads": 1, "window": 1},
          "float twin": {"ternary": False}}


@pytest.fixture(params=SHAPES)
def model(request, model_config):
    torch.manual_seed(0)
    model = stir(FlashLM(replace(model_config, **SHAPES[request.param]))).eval()
    with torch.no_grad():
        model.norm.weight *= 20
    return model


@pytest.fixture
def exact(model, vocabulary, tmp_path):
    save_onnx(tmp_path / "exact.onnx", model, vocabulary, low_bit=False)
    return OnnxModel(tmp_path / "exact.onnx")


@torch.inference_mode()
def test_onnx_computes_what_pytorch_computes(model, exact, prepared):
    ids = torch.tensor(prepared[2].ids[:180].astype(int)).view(3, 60)
    wanted = model(ids)
    torch.testing.assert_close(exact.read(ids)[0], wanted, rtol=1e-4, atol=1e-4)
    past = None
    for start, stop in ((0, 1), (1, 2), (2, 30), (30, 60)):  # by steps, and in pieces
        logits, past = exact.read(ids[:, start:stop], past)
        torch.testing.assert_close(logits, wanted[:, start:stop], rtol=1e-4, atol=1e-4)
    assert exact.read(ids[:, 59:], past)[1][0].shape == past[0].shape


def test_greedy_stories_are_those_of_pytorch(model, exact, vocabulary):
    prompts = ["One day, a cat", "Tom"]
    told, wanted = (generate(m, vocabulary, prompts, tokens=40, temperature=0) for m in (exact, model))
    assert [story.ids for story in told] == [story.ids for story in wanted]
    assert exact.vocabulary.hash == vocabulary.hash


def test_few_bits_change_little(model, exact, vocabulary, prepared, tmp_path):
    save_onnx(tmp_path / "small.onnx", model, vocabulary)
    onnx.checker.check_model(tmp_path / "small.onnx", full_check=False)
    sequences = [prepared[2].ids[:200].astype(int)]
    small, large = (m.token_nats(sequences)[0].mean() for m in (OnnxModel(tmp_path / "small.onnx"), exact))
    assert small == pytest.approx(large, rel=0.03)
    if model.config.ternary:
        assert (tmp_path / "small.onnx").stat().st_size < (tmp_path / "exact.onnx").stat().st_size * 2 / 3


def test_other_files_are_refused(vocabulary, model, tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    graph = onnx.helper.make_graph([], "none", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    for name in ("bad.onnx", "foreign.onnx", "missing.onnx"):
        with pytest.raises(FlashLMError) as refusal:
            OnnxModel(tmp_path / name)
        assert "\n" not in str(refusal.value)
