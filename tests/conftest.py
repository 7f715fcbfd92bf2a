import itertools
import os
import shutil
import signal
import tempfile
from dataclasses import asdict, replace

import pytest
import torch

from flashlm_helpers import builtin, loss
from flashlm_helpers.config import ModelConfig, TrainConfig
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.machine.threads import FOLLOWER
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer
from flashlm_helpers.runtime.bolt import COMPILERS
from flashlm_helpers.runtime.packed import save_packed
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.sources.files import SEPARATOR
from flashlm_helpers.tokens import prepare
from flashlm_helpers.training import train

# What tests compile is neither the clone's cache nor in a folder that is gone with the first test.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "flashlm-tests-compiled")
)


def times(short, soak):
    """How often a test tries what is random: `soak` times in `make soak`, otherwise `short`."""
    return soak if os.environ.get("FLASHLM_SOAK") else short


def write_stories(path, stories):
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories), encoding="utf-8")


def quiet(progress):
    """An on_step that shows nothing."""


def interrupt_at(step):
    return lambda progress: signal.raise_signal(signal.SIGINT) if progress.step == step else None


def fresh(model_config, train_config, vocabulary):
    """A network and its optimizer as Experiment.run() makes them."""
    torch.manual_seed(train_config.seed)
    network = FlashLM(replace(model_config, vocabulary_size=len(vocabulary)))
    return network, build_optimizer(network, train_config)


def run_training(model_config, train_config, text, folder, **arguments):
    """Train from the seed of the recipe; returns (network, progress, stop reason)."""
    network, optimizer = fresh(model_config, train_config, text.vocabulary)
    arguments.setdefault("on_step", quiet)
    progress, stopped_by, _ = train(network, optimizer, train_config, text, folder, **arguments)
    return network, progress, stopped_by


def assert_same_run(one, other):
    """Weights, optimizer state and all that a checkpoint says of a run but times, bit for bit."""
    weights = other.network.state_dict()
    for name, tensor in one.network.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert one.optimizer["param_groups"] == other.optimizer["param_groups"]
    assert one.optimizer["state"].keys() == other.optimizer["state"].keys()
    for key, state in one.optimizer["state"].items():
        same = other.optimizer["state"][key]
        assert all(torch.equal(state[name], same[name]) for name in state)
    assert torch.equal(one.random_state, other.random_state)
    assert timeless(one.progress) == timeless(other.progress)


def timeless(progress):
    """A Progress as a dictionary, without what depends on the clock."""
    content = asdict(progress)
    for name in ("elapsed", "seconds", "step_seconds"):
        del content[name]
    history = content["history"]
    for rows in [history["train"], history["valid"], *history["sources"].values()]:
        for row in rows:
            del row["seconds"]
    return content


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
    return prepare(open_corpus(text_dir), 1_000, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def vocabulary(prepared):
    return prepared.vocabulary


@pytest.fixture
def few_candidates(monkeypatch):
    """A sampled softmax that has something to leave out of a small vocabulary."""
    monkeypatch.setattr(loss, "NEGATIVES", 200)


@pytest.fixture
def model_config(vocabulary):
    return ModelConfig(
        "test",
        width=16,
        blocks=2,
        hidden=24,
        sequence_length=32,
        kernel_size=4,
        vocabulary_size=len(vocabulary),
    )


@pytest.fixture
def hybrid_config(model_config):
    """The same with attention of a short window in one block, and layer scales."""
    return replace(model_config, mixers=("conv", "attention"), heads=2, window=12, layer_scale=True)


def stir(network):
    """Give the layer scales values, so that blocks count; as they start, they do not."""
    with torch.no_grad():
        for block in network.blocks:
            if getattr(block, "layer_scale", None) is not None:
                block.layer_scale.normal_(1.0, 0.3)
    return network


# What bolt.c can run, and the smallest model that has all of it.
SMALL = ModelConfig("test", width=32, blocks=2, hidden=48, sequence_length=32, kernel_size=4)
HYBRID = {"mixers": ("conv", "attention"), "heads": 2, "window": 12, "layer_scale": True}
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C compiler")


def lively(vocabulary, **changes):
    """A SMALL model whose norms differ from one another, and whose guesses are far from even."""
    torch.manual_seed(0)
    network = FlashLM(replace(SMALL, vocabulary_size=len(vocabulary), **changes))
    stir(network).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.weight.normal_(1.0, 0.3)
        network.norm.weight *= 20
    return PyTorchModel(network, vocabulary)


@pytest.fixture(params=["v4", "hybrid"])
def packed(request, vocabulary, tmp_path):
    """A packed file of a model without attention, and of one with it."""
    model = lively(vocabulary, **(HYBRID if request.param == "hybrid" else {}))
    save_packed(tmp_path / "m.flashlm", model)
    return tmp_path / "m.flashlm"


@pytest.fixture
def train_config():
    """About a dozen steps."""
    return TrainConfig(epochs=0.11, batch=8, validation_stories=5)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty FLASHLM_HOME, so that commands keep their caches and runs out of the clone."""
    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def on_its_own():
    """What a command sets for its process, the next test does not see: here they share one."""
    threads = torch.get_num_threads()
    yield
    FOLLOWER.most = None
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """Operations as small as those of tests wait longer for a second thread than it saves."""
    torch.set_num_threads(1)
