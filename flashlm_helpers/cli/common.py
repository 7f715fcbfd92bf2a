"""Flags and words that several commands share."""

import argparse
import os
import sys
from dataclasses import fields
from typing import Any, get_args

from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.corpus import HUB
from flashlm_helpers.machine.files import one_line
from flashlm_helpers.machine.hardware import GIB, usable_cores, usable_memory
from flashlm_helpers.machine.notices import notice
from flashlm_helpers.model import LanguageModel
from flashlm_helpers.registry import register_mixer

LARGE_CORES = 8
LARGE_MEMORY = 32 * GIB

TOKENS_PER_CORE_SECOND = 10_000  # more than a core trains on; how much text a timed run takes
TOKENS_PER_STORY = 180
SMALLEST_TAKE = 20_000  # stories

CHECKPOINT_HELP = "a .pt file or a run's folder"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as all of ours are."""

    def error(self, message: str):
        """Print one line and exit with status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def choose_preset(cores: int | None = None, memory: int | None = None) -> str:
    """Choose a preset for a machine: v4-large from 8 cores and 32 GiB on, otherwise v4-small.

    cores, memory (bytes): by default what this process may use.
    """
    cores = usable_cores() if cores is None else cores
    memory = usable_memory() if memory is None else memory
    large = cores >= LARGE_CORES and memory >= LARGE_MEMORY
    return "v4-large" if large else "v4-small"


def stories_for(hours: float | None) -> int | None:
    """Return how many stories a run of `hours` can read at most; None means all of them.

    Rounded up to a power of two times 20,000, so that runs share their caches.
    """
    if hours is None:
        return None
    tokens = hours * 3600 * usable_cores() * TOKENS_PER_CORE_SECOND
    wanted = tokens / TOKENS_PER_STORY

    take = SMALLEST_TAKE
    while take < wanted:
        take *= 2
    return take


# ---- flags ----


def add_recipe_flags(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Add a flag for each of these fields of TrainConfig, with the help text of its definition."""
    described = {field.name: field for field in fields(TrainConfig)}
    for name in names:
        field = described[name]
        kinds = get_args(field.type) or (field.type,)
        default = "" if field.default is None else f" (default {field.default:g})"
        parser.add_argument(f"--{name}", type=kinds[0], help=field.metadata["help"] + default)


def given_recipe(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Return the fields of TrainConfig that were given as flags."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def add_text_flags(parser: argparse.ArgumentParser) -> None:
    """Add --text-dir and --dataset, of which one may be given."""
    known = f"auto (default), builtin, {', '.join(HUB)}"
    any_other = "any data set of the hub: owner/name, owner/name:config, owner/name:config:field"

    text = parser.add_mutually_exclusive_group()
    text.add_argument(
        "--text-dir",
        metavar="DIR",
        help="a folder with train*.txt (and valid*.txt), .json, .jsonl, .csv or .parquet",
    )
    text.add_argument("--dataset", metavar="NAME", help=f"{known}, or {any_other}")


def add_curriculum_flags(parser: argparse.ArgumentParser) -> None:
    """Add --curriculum, --shuffled and --max-grade."""
    parser.add_argument(
        "--curriculum",
        metavar="SOURCE:SHARE,...",
        help="train in stages, each a folder or a data set with its share of the budget, such as "
        "tinystories:0.6,simplestories:0.4; the last one decides which weights are best",
    )
    parser.add_argument(
        "--shuffled",
        action="store_true",
        help="read from all texts of the curriculum in every step, not one after another",
    )
    parser.add_argument(
        "--max-grade",
        type=float,
        metavar="GRADE",
        help="leave out texts that are harder to read than this school grade",
    )


def parse_curriculum(text: str) -> list[tuple[str, float]]:
    """Read "SOURCE:SHARE,SOURCE:SHARE,..."; a source may have colons of its own.

    Raises FlashLMError for a stage that is written otherwise.
    """
    stages = []
    for part in text.split(","):
        source, _, share = part.rpartition(":")
        try:
            stages.append((source, float(share)))
        except ValueError:
            source = ""
        if not source:
            advice = "write SOURCE:SHARE, such as tinystories:0.6"
            raise FlashLMError(f"{part!r} is no stage of a curriculum: {advice}") from None
    return stages


def add_mixer_flag(parser: argparse.ArgumentParser) -> None:
    """Add --mixer NAME=MODULE:CLASS, which may be given several times."""
    parser.add_argument(
        "--mixer",
        action="append",
        default=[],
        metavar="NAME=MODULE:CLASS",
        help="register a mixer of your own, imported from a module in this folder",
    )


def register_mixers(args: argparse.Namespace) -> None:
    """Register what --mixer names; raise FlashLMError if it cannot be imported."""
    if args.mixer:
        sys.path.insert(0, os.getcwd())
    for text in args.mixer:
        name, _, place = text.partition("=")
        if not name or ":" not in place.strip(":"):
            raise FlashLMError(
                f"--mixer {text!r} names no class: write NAME=MODULE:CLASS, such as "
                "mine=my_mixers:Mine"
            )

        # A module of one's own may raise anything when it is imported.
        try:
            register_mixer(name, place)
        except FlashLMError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise FlashLMError(f"cannot import the mixer {place} ({reason})") from error


# ---- models ----


def load_or_torch(args: argparse.Namespace) -> LanguageModel:
    """Load the model that a command is about; by PyTorch if its runtime cannot be built here."""
    from flashlm_helpers.runtime import load
    from flashlm_helpers.runtime.bolt import RuntimeUnavailable

    try:
        return load(args.checkpoint, args.runtime)
    except RuntimeUnavailable as error:
        notice(f"{error}; PyTorch computes instead")
        return load(args.checkpoint, "torch")


def add_model_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --checkpoint, which may be required, and --runtime."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="PATH",
        help=f"{CHECKPOINT_HELP}, or an exported model: packed or .onnx",
    )

    # Without it, a file is run by what it was made for.
    parser.add_argument(
        "--runtime",
        choices=("torch", "c", "onnx"),
        help="what computes (default: torch for checkpoints, c for packed models, onnx for .onnx)",
    )
