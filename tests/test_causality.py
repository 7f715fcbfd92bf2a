"""Every preset in every runtime: what comes later changes nothing that came before."""

import numpy as np
import pytest
from conftest import needs_compiler, stir, times

from flashlm_helpers.config import PRESETS
from flashlm_helpers.model import FlashLM
from flashlm_helpers.runtime.bolt import Bolt
from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx
from flashlm_helpers.runtime.packed import save_packed, unsupported_reason
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import BOS, EOS, SPECIALS, Vocabulary

# An export takes some 8 seconds; float twins cannot be packed.
PACKED = [name for name, config in PRESETS.items() if not unsupported_reason(config)]
ONNX = times(["tiny", "hybrid-small"], list(PRESETS))
CASES = [(name, "torch") for name in PRESETS]
CASES += [pytest.param(name, "c", marks=needs_compiler) for name in PACKED]
CASES += [(name, "onnx") for name in ONNX]


@pytest.mark.soak
@pytest.mark.parametrize(("name", "runtime"), CASES)
def test_a_later_edit_changes_nothing_before_it(name, runtime, tmp_path):
    config = PRESETS[name]
    vocabulary = Vocabulary(range(config.vocabulary_size - len(SPECIALS)))
    model = PyTorchModel(stir(FlashLM(config)).eval(), vocabulary)
    if runtime == "c":
        save_packed(tmp_path / "model", model)
        model = Bolt(tmp_path / "model")
    if runtime == "onnx":
        save_onnx(tmp_path / "model.onnx", model)
        model = OnnxModel(tmp_path / "model.onnx")

    # Nats of the ids before the edit stay; those from the edit on do not.
    ids = np.random.default_rng(0).integers(EOS + 1, config.vocabulary_size, 40)
    ids[0] = BOS
    (before,) = model.token_nats([ids])
    for place in (3, 20, 39):
        edited = ids.copy()
        edited[place:] = ids[place:] // 2 + EOS
        (after,) = model.token_nats([edited])
        np.testing.assert_array_equal(after[: place - 1], before[: place - 1])
        assert (after[place - 1 :] != before[place - 1 :]).all()
