from dataclasses import replace

import onnx
import pytest
import torch
from conftest import stir
from torch import nn

from flashlm_helpers import registry
from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.generation import generate, stream
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.runtime.onnx import PIECE, OnnxModel, save_onnx
from flashlm_helpers.runtime.pytorch import PyTorchModel

SMALL = ModelConfig("test", width=16, blocks=2, hidden=24, sequence_length=32, kernel_size=4)
SHAPES = {
    "v4": {},
    "hybrid": {"mixers": ("conv", "attention"), "heads": 2, "window": 12, "layer_scale": True},
    "kernel and window of 1": {
        "kernel_size": 1,
        "mixers": ("attention", "conv"),
        "heads": 1,
        "window": 1,
    },
}


def lively(config, vocabulary, build_model=FlashLM):
    """A model whose guesses are far from even."""
    torch.manual_seed(0)
    network = stir(build_model(replace(config, vocabulary_size=len(vocabulary)))).eval()
    with torch.no_grad():
        network.norm.weight *= 20
    return PyTorchModel(network, vocabulary)


# Exporting takes seconds, so models and files are made once.


@pytest.fixture(scope="module", params=SHAPES)
def model(request, vocabulary):
    return lively(replace(SMALL, **SHAPES[request.param]), vocabulary)


@pytest.fixture(scope="module")
def exact_path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "exact.onnx"
    save_onnx(path, model, low_bit=False)
    return path


@pytest.fixture(scope="module")
def exact(exact_path):
    return OnnxModel(exact_path)


@torch.inference_mode()
def test_onnx_computes_what_pytorch_computes(model, exact, prepared):
    ids = torch.tensor(prepared.valid.ids[:180].astype(int)).view(3, 60)
    wanted = model.network(ids)
    torch.testing.assert_close(exact.logits(ids), wanted, rtol=1e-4, atol=1e-4)
    states = None
    for start, stop in ((0, 1), (1, 2), (2, 30), (30, 60)):  # by steps, and in pieces
        logits, states = exact.read(ids[:, start:stop], states)
        torch.testing.assert_close(logits, wanted[:, start:stop], rtol=1e-4, atol=1e-4)
    _, after = exact.read(ids[:, 59:], states)
    assert [state.shape for state in after] == [state.shape for state in states]


def test_greedy_stories_are_those_of_pytorch(model, exact):
    settings = {"prompts": ["One day, a cat", "Tom"], "tokens": 40, "temperature": 0}
    told = generate(exact, **settings)
    wanted = generate(model, **settings)
    assert [story.ids for story in told] == [story.ids for story in wanted]
    assert [story.text for story in told] == [story.text for story in wanted]
    *_, streamed = stream(exact, **settings)
    assert streamed == told


def test_a_score_does_not_depend_on_the_pieces_it_is_made_in(model, exact, prepared):
    ids = prepared.valid.ids[: 2 * PIECE + 7].astype(int)
    nats, short = exact.token_nats([ids, ids[:3]])
    with torch.inference_mode():
        logits = model.network(torch.tensor(ids[None, :-1]))[0]
    wanted = nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    torch.testing.assert_close(torch.from_numpy(nats).float(), wanted, rtol=1e-4, atol=1e-4)
    assert short.tolist() == pytest.approx(nats[:2].tolist(), abs=1e-4)


def test_the_file_says_what_it_is_and_where_nothing_was(model, exact, vocabulary, stories):
    assert (exact.runtime, exact.source, exact.vocabulary.hash) == ("onnx", None, vocabulary.hash)
    assert evaluate(exact, stories[:3]).bpc == pytest.approx(evaluate(model, stories[:3]).bpc, 0.01)
    inputs = {one.name: one.shape for one in exact._session.get_inputs()}
    outputs = [one.name for one in exact._session.get_outputs()]
    assert inputs.pop("ids") == ["texts", "time"] and outputs[0] == "logits"
    assert outputs[1:] == [f"{name}_next" for name in inputs]
    assert all(shape[0] == "texts" for shape in inputs.values())


@pytest.mark.parametrize("model", ["hybrid"], indirect=True)
def test_few_bits_change_little_but_the_size(model, exact, exact_path, prepared, tmp_path):
    small_path = tmp_path / "small.onnx"
    save_onnx(small_path, model)
    assert small_path.stat().st_size < 0.7 * exact_path.stat().st_size
    sequences = [prepared.valid.ids[:200].astype(int)]
    mean = OnnxModel(small_path).token_nats(sequences)[0].mean()
    assert mean == pytest.approx(exact.token_nats(sequences)[0].mean(), rel=0.03)

    # What programs of others rely on, and what is not their business.
    file = onnx.load(small_path)
    onnx.checker.check_model(file)
    names = ["read", "recent0", "recent1", "attended1"]
    assert [one.name for one in file.graph.input] == ["ids", *names]
    after = [f"{name}_next" for name in names]
    assert [one.name for one in file.graph.output] == ["logits", *after]
    assert {one.key for one in file.metadata_props} == {"name", "vocabulary", "vocabulary_hash"}
    assert b".py" not in small_path.read_bytes()


class Echo(nn.Module):
    """A mixer of one's own: a position and the one before it."""

    def __init__(self, config):
        super().__init__()
        self.project = BitLinear(2 * config.width, config.width, config.ternary)

    def forward(self, x, state=None):
        last = x.new_zeros(len(x), 1, x.shape[2]) if state is None else state[0]
        before = torch.cat([last, x[:, :-1]], dim=1)
        return self.project(torch.cat([x, before], dim=2)), (x[:, -1:],)


class Loop(Echo):
    """A mixer that goes through a text in Python, which no graph can."""

    def forward(self, x, state=None):
        outputs = []
        for t in range(x.shape[1]):
            mixed, state = super().forward(x[:, t : t + 1], state)
            outputs.append(mixed)
        return torch.cat(outputs, dim=1), state


class Conditional(Echo):
    """A mixer that takes a few tokens in another way than many."""

    def forward(self, x, state=None):
        return super().forward(x if x.shape[1] < 5 else 2 * x, state)


class Louder(FlashLM):
    """A network of one's own."""

    def head(self, hidden):
        return super().head(hidden) * 2


@pytest.fixture
def own_mixers(monkeypatch):
    for kind in (Echo, Loop, Conditional):
        monkeypatch.setitem(registry._REGISTRY, kind.__name__.lower(), kind)


def test_parts_of_your_own_are_exported_too(own_mixers, vocabulary, tmp_path):
    config = replace(SMALL, mixers=("echo", "conv"), ternary=False)
    model = lively(config, vocabulary, Louder)
    save_onnx(tmp_path / "mine.onnx", model)  # nothing in it can be taken to few bits
    greedy = {"prompts": "Tom", "tokens": 20, "temperature": 0}
    story = generate(OnnxModel(tmp_path / "mine.onnx"), **greedy)[0]
    wanted = generate(model, **greedy)[0]
    assert story.ids == wanted.ids
    assert story.surprise == pytest.approx(wanted.surprise, abs=1e-3)


@pytest.mark.parametrize("name", ["loop", "conditional"])
def test_a_mixer_that_cannot_be_exported_is_named(name, own_mixers, vocabulary, tmp_path):
    model = lively(replace(SMALL, mixers=("conv", name)), vocabulary)
    with pytest.raises(FlashLMError, match=f"^mixer '{name}' cannot be exported") as refusal:
        save_onnx(tmp_path / "no.onnx", model)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    graph = onnx.helper.make_graph([], "none", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "foreign.onnx")
    for name in ("bad.onnx", "foreign.onnx", "missing.onnx"):
        with pytest.raises(FlashLMError) as refusal:
            OnnxModel(tmp_path / name)
        assert "\n" not in str(refusal.value)
