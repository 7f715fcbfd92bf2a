"""Compact checkpoints: small files for PyTorch, without what training needs."""

from pathlib import Path

import torch

from flashlm_helpers.checkpoint import Checkpoint, plain_content
from flashlm_helpers.machine.files import atomic_write
from flashlm_helpers.quantization import BitLinear, pack_ternary


def save_compact(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a model to use and hand around: a small file, without what training needs.

    Ternary weights take 1.6 bits each, the embedding float16, the rest float32. The loaded model
    computes the same up to the embedding's rounding and the last bit of the scales.
    Raises FlashLMError if the file cannot be written.
    """
    layers = dict(checkpoint.network.named_modules())
    weights = {}
    for name, weight in checkpoint.network.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        if isinstance(layer, BitLinear) and layer.ternary:
            ternary, scale = layer.ternarized()
            packed = pack_ternary(ternary)
            weights[name] = {"packed": packed, "scale": scale, "shape": list(weight.shape)}
        elif name == "embedding.weight":
            weights[name] = weight.half()
        else:
            weights[name] = weight

    vocabulary = checkpoint.vocabulary
    bare = Checkpoint(checkpoint.network, checkpoint.train_config, vocabulary)
    content = plain_content(bare) | {
        "vocabulary": {
            "hash": vocabulary.hash,
            "coverage": vocabulary.coverage,
            "kept": torch.tensor(vocabulary.kept, dtype=torch.int32),
        },
        "progress": {},
        "model": weights,
    }
    with atomic_write(Path(path)) as file:
        torch.save(content, file)
