import itertools
import os
import signal
import tempfile
from dataclasses import replace

import pytest
import torch

from flashlm_helpers import builtin, head
from flashlm_helpers.config import ModelConfig, TrainConfig
from flashlm_helpers.corpus import SEPARATOR, open_corpus
from flashlm_helpers.tokens import prepare

# What tests compile is neither the clone's cache nor in a folder that is gone with the first test.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "flashlm-tests-compiled"))


def write_stories(path, stories):
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories), encoding="utf-8")


def quiet(progress):
    """An on_step that shows nothing."""


def interrupt_at(step):
    return lambda progress: signal.raise_signal(signal.SIGINT) if progress.step == step else None


def assert_same_run(one, other):
    """Weights, optimizer state and all that a checkpoint says of a run but its times, bit for bit."""
    for name, tensor in one["model"].state_dict().items():
        assert torch.equal(tensor, other["model"].state_dict()[name]), name
    for part, same in zip(one["optimizer"], other["optimizer"], strict=True):
        assert part["param_groups"] == same["param_groups"] and part["state"].keys() == same["state"].keys()
        for key, state in part["state"].items():
            assert all(torch.equal(state[name], same["state"][key][name]) for name in state)
    assert torch.equal(one["random_state"], other["random_state"])
    timeless = [{k: v for k, v in content["progress"].items() if k not in ("elapsed", "seconds", "step_seconds")}
                for content in (one, other)]
    for progress in timeless:
        for rows in progress["history"].values():
            for row in rows:
                del row["seconds"]
    assert timeless[0] == timeless[1]


@pytest.fixture(scope="session")
def stories():
    return list(itertools.islice(builtin.stories("train"), 120))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory, stories):
    folder = tmp_path_factory.mktemp("text")
    write_stories(folder / "train.txt", stories[:100])
    write_stories(folder / "valid.txt", stories[100:])
    return folder


@pytest.fixture(scope="session")
def prepared(text_dir, tmp_path_factory):
    """(vocabulary, train tokens, valid tokens) of a hundred stories."""
    return prepare(open_corpus(text_dir=text_dir), 1_000, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def vocabulary(prepared):
    return prepared[0]


@pytest.fixture
def few_candidates(monkeypatch):
    """A sampled softmax that has something to leave out of a small vocabulary."""
    monkeypatch.setattr(head, "CANDIDATES", 200)


@pytest.fixture
def model_config(vocabulary):
    return ModelConfig("test", width=16, blocks=2, hidden=24, sequence_length=32, kernel_size=4,
                       vocabulary_size=len(vocabulary))


@pytest.fixture
def hybrid_config(model_config):
    """The same with attention of a short window in one block, and layer scales."""
    return replace(model_config, attention=(1,), heads=2, window=12, layer_scale=True)


def stir(model):
    """Give the layer scales values, so that blocks count; as they start, they do not."""
    with torch.no_grad():
        for block in model.blocks:
            if block.layer_scale is not None:
                block.layer_scale.normal_(1.0, 0.3)
    return model


@pytest.fixture
def train_config():
    """About a dozen steps."""
    return TrainConfig(epochs=0.11, batch=8, validation_stories=5)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty FLASHLM_HOME, so that commands keep their caches and runs out of the clone."""
    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
