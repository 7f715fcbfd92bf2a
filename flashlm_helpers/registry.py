"""The open door: mixers by name."""

import importlib

from torch import nn

from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.machine.files import one_line
from flashlm_helpers.mixers import AttentionMixer, GatedConvMixer

_REGISTRY: dict[str, type[nn.Module] | str] = {
    "conv": GatedConvMixer,
    "attention": AttentionMixer,
    "v3": "flashlm_helpers.archive.v3:RecursiveBlock",
}
_BUILT_IN = frozenset(_REGISTRY)


def register_mixer(name: str, mixer: type[nn.Module] | str) -> None:
    """Make a mixer known by name, so that ModelConfig(mixers=("conv", "mine")) can use it.

    mixer: a class as this module describes, or where to import it from, "module:Class", which
    other processes can do as well. A class of the same name and module replaces its earlier
    definition, so that a notebook's cell may run twice. A class with `is_block = True` is a whole
    block: it maps the stream to the stream that follows, and has no GLU beside it.
    Raises FlashLMError if the name is taken or not a word, or the class cannot be imported.
    """
    if not name.isidentifier():
        raise FlashLMError(f"a mixer cannot be named {name!r}: choose a word such as mine")

    # Import it now, where a mistake can still be seen.
    found = _import_class(mixer) if isinstance(mixer, str) else mixer
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise FlashLMError(f"{mixer!r} is not a mixer: give a class of nn.Module, or module:Class")

    # The same class may be registered again, another one may not take its name.
    earlier = _REGISTRY.get(name)
    if earlier is not None and where_to_import(earlier) != where_to_import(mixer):
        owner = where_to_import(earlier)
        raise FlashLMError(f"the name {name!r} belongs to {owner}: choose another one")
    _REGISTRY[name] = mixer


def where_to_import(mixer: type[nn.Module] | str) -> str:
    """Return "module:Class" for a mixer's class."""
    return mixer if isinstance(mixer, str) else f"{mixer.__module__}:{mixer.__qualname__}"


def own_mixers(config: ModelConfig) -> dict[str, str]:
    """Return where to import each mixer of a config that is not built in, by name."""
    own = {}
    for name in set(config.mixers) - _BUILT_IN:
        own[name] = where_to_import(find_mixer(name))
    return own


def _import_class(path: str) -> type[nn.Module]:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a module of one's own may fail in any way
        problem = f"cannot import the mixer {path!r} ({one_line(error)})"
        raise FlashLMError(f"{problem}: give module:Class") from error


def find_mixer(name: str) -> type[nn.Module]:
    """Return the class registered under a name; raise FlashLMError if there is none."""
    if name not in _REGISTRY:
        raise FlashLMError(
            f"the mixer {name!r} is not registered here: call fl.register_mixer({name!r}, ...) "
            f"first, or give --mixer {name}=module:Class"
        )
    found = _REGISTRY[name]
    return _import_class(found) if isinstance(found, str) else found
