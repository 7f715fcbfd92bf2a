"""Experiments: one training run described in full, its report, and races between several.

An Experiment is the one way from a text to a trained model: the command line, races, benchmarks
and notebooks all go through it.
"""

import importlib


def __getattr__(name: str):
    """Import a module of this folder when it is first asked for, as in fl.experiments.terminal."""
    known = "baselines curves experiment live mixer_check peers race scaling size terminal verbatim"
    if name in known.split():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"{__name__} has no {name!r}")
