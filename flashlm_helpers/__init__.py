"""FlashLM in notebooks: understand, train, measure and run a ternary (1.58-bit) language model.

    import flashlm_helpers as fl

gives the names that a reader needs, listed below in the order of the data's way through them;
everything else hangs on its module, such as fl.plots or fl.quantization. Each is imported when
it is first used. `flashlm --help` is the command line.
"""

import importlib
import os

from flashlm_helpers.machine.network import keep_to_ourselves

__version__ = "0.2.0"
keep_to_ourselves()  # before anything below imports a library

# Threads that wait for each other spin for 0.2 ms before they sleep, and not for 3: long enough for
# the next operation to come, and short enough to leave the cores to other programs. PyTorch's
# thread library (libgomp, on Linux) reads this once, when PyTorch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_NAMES = {
    "config": "FlashLMError ModelConfig TrainConfig PRESETS",
    "machine.files": "project_dir",
    "machine.setup": "setup",
    "corpus": "open_corpus",
    "vocab": "Vocabulary",
    "tokens": "prepare",
    "quantization": "ternarize BitLinear",
    "registry": "register_mixer",
    "model": "FlashLM LanguageModel",
    "optimization": "build_optimizer",
    "experiments.mixer_check": "check_mixer",
    "experiments.size": "count_parameters packed_bytes receptive_field",
    "experiments.experiment": "Experiment RunReport",
    "experiments.race": "Entrant race race_table",
    "evaluation": "evaluate",
    "generation": "generate stream",
    "runtime": "load",
    "runtime.pytorch": "PyTorchModel",
    "experiments.live": "LiveLossCurve",
}
_MODULES = (
    "config corpus vocab tokens quantization mixers registry model loss optimization autotune "
    "training checkpoint evaluation generation plots machine experiments runtime builtin "
    "archive"
)
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_WHERE)


def __getattr__(name: str):
    """Import a name, or a module, when it is first asked for."""
    if name in _WHERE:
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    elif name in _MODULES.split():
        return importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"flashlm_helpers has no {name!r}: see dir(flashlm_helpers)")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES.split(), "__version__"])
