"""Models for use: packed files, run by bolt.c, and ONNX files, run by ONNX Runtime.

load() opens any file of ours with any of the runtimes, PyTorch among them. What only one of them
needs is imported when it is asked for.
"""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from flashlm_helpers.checkpoint import BEST, LAST, Checkpoint, load_checkpoint
from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.model import FlashLM, LanguageModel
from flashlm_helpers.runtime.packed import is_packed, load_packed, save_packed
from flashlm_helpers.runtime.pytorch import PyTorchModel

# PyTorch, bolt.c and ONNX Runtime.
RUNTIMES = ("torch", "c", "onnx")


def load(
    path: str | Path,
    runtime: str | None = None,
    build_model: Callable[[ModelConfig], nn.Module] = FlashLM,
) -> LanguageModel:
    """Load a checkpoint (a .pt file or a run's folder), a packed file or an .onnx file.

    runtime: "torch", "c" or "onnx"; None is the file's own. For another one, the file that it
    reads is made from this one. build_model: makes the network of a checkpoint.
    Raises FlashLMError if the file cannot be used, RuntimeUnavailable if there is no C compiler.
    """
    if runtime not in (None, *RUNTIMES):
        raise FlashLMError(f"there is no runtime {runtime!r}: choose one of {', '.join(RUNTIMES)}")

    # What its own runtime reads as it is.
    packed = is_packed(path)
    if Path(path).suffix == ".onnx":
        return _load_onnx(path, runtime)
    if packed and runtime in (None, "c"):
        return _load_bolt(path)

    # A compiler that is missing is told before a large checkpoint is read for nothing.
    if runtime == "c":
        _require_bolt()

    # Everything else is a model of PyTorch first.
    if packed:
        model = load_packed(path)
    else:
        require_checkpoint(path)
        checkpoint = load_checkpoint(path, build_model=build_model)
        network = checkpoint.network.eval()
        model = PyTorchModel(network, checkpoint.vocabulary, checkpoint.source)
    return model if runtime in (None, "torch") else _convert(model, runtime)


def load_to_resume(path: str | Path) -> Checkpoint:
    """Load the latest checkpoint of a run, or the file that is named.

    Raises FlashLMError if it cannot be used, or lacks what only training needs.
    """
    require_checkpoint(path)
    checkpoint = load_checkpoint(path, LAST)
    if checkpoint.optimizer is None:
        problem = f"{path} is a model to use, without the optimizer state that training needs"
        raise FlashLMError(f"{problem}: resume from the {LAST} of its run")
    return checkpoint


def require_checkpoint(path: str | Path) -> None:
    """Raise FlashLMError if a path is there, but is plainly no checkpoint."""
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).exists() and not (path / LAST).exists():
            problem = f"there is no checkpoint in {path}, which holds neither {BEST} nor {LAST}"
            raise FlashLMError(f"{problem}: give a .pt file or a run's folder")
    elif is_packed(path) or path.suffix == ".onnx":
        kind = "an ONNX model" if path.suffix == ".onnx" else "a packed model"
        problem = f"{path} is {kind}, which was exported to be used and holds no more than that"
        raise FlashLMError(f"{problem}: give the checkpoint that it was made of")

    # A checkpoint is a zip archive; most mistakes are not.
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                problem = f"{path} cannot be loaded, for it is no checkpoint"
                raise FlashLMError(f"{problem}: give a .pt file, a run's folder or a packed model")


def _convert(model: PyTorchModel, runtime: str) -> LanguageModel:
    """Run a model with another runtime, by way of a file that is removed again."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model"
        if runtime == "c":
            # Its memory stays mapped when the file is gone.
            save_packed(file, model)
            converted = _load_bolt(file)
        else:
            from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx

            save_onnx(file, model)
            converted = OnnxModel(file)

    # Neither kind of file says where the text was.
    converted.source = model.source
    return converted


def _load_onnx(path: str | Path, runtime: str | None) -> LanguageModel:
    # A graph does not hold the weights as a network does.
    if runtime not in (None, "onnx"):
        raise FlashLMError(f"{path} is an ONNX model, which only --runtime onnx can run")
    from flashlm_helpers.runtime.onnx import OnnxModel

    return OnnxModel(path)


def _load_bolt(path: str | Path) -> LanguageModel:
    from flashlm_helpers.runtime.bolt import Bolt

    return Bolt(path)


def _require_bolt() -> None:
    """Raise RuntimeUnavailable if bolt.c cannot be built here."""
    from flashlm_helpers.runtime.bolt import library

    library()


def __getattr__(name: str):
    """Import a module of this folder when it is first asked for, as in fl.runtime.pytorch."""
    if name in "bolt compact onnx packed pytorch".split():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"{__name__} has no {name!r}")
