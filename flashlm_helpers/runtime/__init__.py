"""Inference by other means than PyTorch, and PyTorch itself: open_model() takes any of our files to any of them."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlm_helpers.checkpoint import load_checkpoint
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.runtime.packed import is_packed, load_packed, save_packed
from flashlm_helpers.vocab import Vocabulary


@dataclass
class Opened:
    """A model, by what runs it.

    model: a FlashLM, a compiled.CompiledModel, a bolt.Bolt or an onnx.OnnxModel. source: the text it was trained on, as
    a checkpoint says it, or empty. runtime: torch, compiled, c or onnx.
    """

    model: Any
    vocabulary: Vocabulary
    source: dict
    runtime: str


def open_model(path: str | Path, runtime: str | None = None) -> Opened:
    """Open a checkpoint (.pt or a run's folder), a packed file or an .onnx file.

    runtime: None is the file's own. Whatever it needs is made from the file: for C a checkpoint is packed, with its
    embedding at 8 bits. Raises FlashLMError if the file cannot be used, bolt.NoRuntime if there is no compiler.
    """
    packed, onnx = is_packed(path), Path(path).suffix == ".onnx"
    runtime = runtime or ("c" if packed else "onnx" if onnx else "torch")
    if onnx:
        from flashlm_helpers.runtime.onnx import OnnxModel

        if runtime != "onnx":
            raise FlashLMError(f"{path} is an ONNX model, which only --runtime onnx can run")
        model = OnnxModel(path)
        return Opened(model, model.vocabulary, {}, runtime)
    if runtime == "c":
        from flashlm_helpers.runtime.bolt import Bolt, library

        library()  # before a large checkpoint is read for nothing
        if packed:
            return Opened(Bolt(path), load_packed(path)[1], {}, runtime)
    if packed:
        (model, vocabulary), source = load_packed(path), {}
    else:
        content = load_checkpoint(path)
        model, vocabulary, source = content["model"].eval(), content["vocabulary"], content["source"]
    if runtime == "compiled":
        from flashlm_helpers.runtime.compiled import CompiledModel

        model = CompiledModel(model)
    elif runtime != "torch":
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model"
            if runtime == "c":
                save_packed(file, model, vocabulary)
                model = Bolt(file)  # what it has mapped stays when the file is gone
            else:
                from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx

                save_onnx(file, model, vocabulary)
                model = OnnxModel(file)
    return Opened(model, vocabulary, source, runtime)
