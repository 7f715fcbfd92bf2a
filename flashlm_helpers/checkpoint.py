"""Checkpoints: one self-contained file, written atomically, safe to load, enough to go on exactly."""

from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.files import atomic_write, one_line
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import Optimizers
from flashlm_helpers.quantization import BitLinear, latent_weight, pack_ternary, ternarize, unpack_ternary
from flashlm_helpers.vocab import Vocabulary

_FORMAT, _EARLIER = "flashlm-checkpoint-2", ("flashlm-checkpoint-1",)
LAST, BEST = "last.pt", "best.pt"


class _EarlierVersion(Exception):
    """The checkpoint is whole, but not of this format."""


def save_checkpoint(path: str | Path, model: FlashLM, train_config: TrainConfig, vocabulary: Vocabulary,
                    source: dict | None = None, progress: dict | None = None,
                    optimizer: Optimizers | None = None) -> None:
    """Write everything a run consists of, atomically: a crash leaves the previous checkpoint whole.

    source: how to open the corpus again. progress: the trainer's state in plain values. Without `optimizer`
    the file serves evaluation and generation only. Raises FlashLMError if the file cannot be written.
    """
    content = {
        "format": _FORMAT,
        "model_config": asdict(model.config),
        "train_config": asdict(train_config),
        "vocabulary": {"hash": vocabulary.hash, "kept": list(vocabulary.kept), "coverage": vocabulary.coverage},
        "source": source or {},
        "progress": progress or {},
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict() if optimizer else None,
        "random_state": torch.get_rng_state(),
    }
    with atomic_write(Path(path)) as file:
        torch.save(content, file)


def save_compact(path: str | Path, content: dict) -> None:
    """Write the model of a checkpoint for use, not for training on: small enough to hand around.

    content: load_checkpoint()'s result. Ternary weights take 1.6 bits, the embedding float16, the rest float32. What
    load_checkpoint() makes of the file computes the same up to the embedding's rounding and the last bit of scales. It
    does not say where the text was. Raises FlashLMError if the file cannot be written.
    """
    weights, model = {}, content["model"]
    ternary = {f"{name}.weight" for name, layer in model.named_modules()
               if isinstance(layer, BitLinear) and layer.ternary}
    for name, weight in model.state_dict().items():
        if name in ternary:
            values, scale = ternarize(weight)
            weights[name] = {"packed": pack_ternary(values), "scale": scale, "shape": list(weight.shape)}
        else:
            weights[name] = weight.half() if name == "embedding.weight" else weight
    vocabulary = content["vocabulary"]
    compact = content | {
        "model_config": asdict(content["model_config"]), "train_config": asdict(content["train_config"]),
        "vocabulary": {"hash": vocabulary.hash, "coverage": vocabulary.coverage,
                       "kept": torch.tensor(vocabulary.kept, dtype=torch.int32)},
        "source": {}, "progress": {}, "model": weights, "optimizer": None, "random_state": None}
    with atomic_write(Path(path)) as file:
        torch.save(compact, file)


def _expand(weight: Tensor | dict) -> Tensor:
    """A weight of a compact checkpoint as it is in a model; raises ValueError if it is not finite."""
    if isinstance(weight, dict):
        weight = latent_weight(unpack_ternary(weight["packed"], tuple(weight["shape"])), weight["scale"].view(()))
    if not weight.isfinite().all():
        raise ValueError("it holds weights that are not finite")
    return weight.float()


def load_checkpoint(path: str | Path, prefer: str = BEST) -> dict:
    """Read a checkpoint without running any code from it; for a run's folder, its `prefer` file.

    Returns what save_checkpoint() wrote, its configs as ModelConfig and TrainConfig, its vocabulary as
    Vocabulary, its weights in a FlashLM under "model". Raises FlashLMError if it is missing, truncated, damaged or
    not one of ours.
    """
    path = Path(path)
    if path.is_dir():
        path = path / prefer
    if not path.is_file():
        raise FlashLMError(f"there is no checkpoint {path}: give a .pt file or the folder of a run")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(content, dict) and content.get("format") in _EARLIER:
            raise _EarlierVersion
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise FlashLMError("it is no FlashLM checkpoint of this version")
        content["model_config"] = ModelConfig(**content["model_config"])
        # What was saved before there was a choice was trained by AdamW, and on the whole vocabulary.
        earlier = {"optimizer": "adamw", "sampled_softmax": False}
        content["train_config"] = TrainConfig(**earlier | content["train_config"])
        saved = content["vocabulary"]
        content["vocabulary"] = Vocabulary(torch.as_tensor(saved["kept"]).tolist(), saved["coverage"])
        content["vocabulary"].require(saved["hash"], str(path))
        weights, content["model"] = content["model"], FlashLM(content["model_config"])
        content["model"].load_state_dict({name: _expand(weight) for name, weight in weights.items()})
    except _EarlierVersion:
        raise FlashLMError(f"{path} was saved by an earlier version, whose weights lie otherwise: train anew") from None
    except UnpicklingError as error:
        raise FlashLMError(f"{path} cannot be loaded, it is damaged or holds more than tensors and "
                           "plain values: give a .pt file that this program saved") from error
    except Exception as error:  # torch.load raises nearly anything on damaged bytes
        raise FlashLMError(f"{path} cannot be loaded, it is damaged or of another program "
                           f"({one_line(error)[:160]})") from error
    return content


def load_model(path: str | Path, vocabulary: Vocabulary | None = None) -> tuple[FlashLM, Vocabulary]:
    """The model of a checkpoint, ready to score and generate, and its vocabulary.

    vocabulary: if given, must be the checkpoint's own. Raises FlashLMError if it is another one, and as
    load_checkpoint() does.
    """
    content = load_checkpoint(path)
    if vocabulary is not None:
        vocabulary.require(content["vocabulary"].hash, str(path))
    return content["model"].eval(), content["vocabulary"]
