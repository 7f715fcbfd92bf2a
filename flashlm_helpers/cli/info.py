"""flashlm info: parameters, ternary share, receptive field and size of a model."""

import argparse
from dataclasses import asdict
from pathlib import Path

from flashlm_helpers.checkpoint import BEST, load_checkpoint
from flashlm_helpers.cli.common import CHECKPOINT_HELP, add_mixer_flag, choose_preset
from flashlm_helpers.config import PRESETS, ModelConfig
from flashlm_helpers.experiments.size import count_parameters, receptive_field
from flashlm_helpers.runtime import require_checkpoint
from flashlm_helpers.runtime.packed import is_packed, load_packed


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "info", help="parameters, ternary share, receptive field and size on disk"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, help="default: the preset for this machine")
    which.add_argument("--checkpoint", metavar="PATH", help=CHECKPOINT_HELP)
    add_mixer_flag(parser)


def run(args: argparse.Namespace) -> dict:
    """Describe a preset, a checkpoint or a packed file."""
    # A file has a size on disk, a preset does not.
    size = None
    if args.checkpoint:
        path = Path(args.checkpoint)
        config = config_of(path)
        size = (path / BEST if path.is_dir() else path).stat().st_size
    else:
        config = PRESETS[args.preset or choose_preset()]

    # Ternary weights take 1.6 bits each when packed; a float twin has none.
    counts = count_parameters(config)
    ternary = counts.ternary if config.ternary else 0
    other = counts.total - ternary
    sizes = {
        "float32": 4 * counts.total,
        "ternary_at_1.6_bits_rest_float32": ternary // 5 + 4 * other,
        "checkpoint": size,
    }
    result = {
        "name": config.name,
        "config": asdict(config),
        "parameters": asdict(counts),
        "ternary_share": ternary / counts.total,
        "receptive_field": receptive_field(config),
        "bytes": sizes,
    }
    if not args.json:
        print(describe(result))
    return result


def config_of(path: Path) -> ModelConfig:
    """Read the architecture of a checkpoint or a packed file."""
    if is_packed(path):
        return load_packed(path).network.config
    require_checkpoint(path)
    return load_checkpoint(path).network.config


def describe(result: dict) -> str:
    """Say in plain words what run() found."""
    sizes = result["bytes"]
    field = result["receptive_field"]
    lines = [
        f"{result['name']}: {result['parameters']['total']:,} parameters, "
        f"{result['ternary_share']:.1%} of them ternary",
        f"receptive field: {'not bounded' if field is None else f'{field} tokens'}",
        f"as float32: {sizes['float32'] / 1e6:.1f} MB; ternary weights at 1.6 bits, the rest "
        f"float32: {sizes['ternary_at_1.6_bits_rest_float32'] / 1e6:.1f} MB",
    ]

    # A preset is no file.
    if sizes["checkpoint"]:
        lines[-1] += f"; this checkpoint: {sizes['checkpoint'] / 1e6:.1f} MB"
    return "\n".join(lines)
