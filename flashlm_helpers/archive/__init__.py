"""Models of the past, kept to compare with. Nothing imports them but by their names."""

import importlib


def __getattr__(name: str):
    """Import a module of this folder when it is first asked for, as in fl.archive.v3."""
    if name == "v3":
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"{__name__} has no {name!r}")
