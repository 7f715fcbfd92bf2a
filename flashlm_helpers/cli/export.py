"""flashlm export: write a model to use, small enough to hand around."""

import argparse
from pathlib import Path

from flashlm_helpers.checkpoint import load_checkpoint
from flashlm_helpers.cli.common import CHECKPOINT_HELP, add_mixer_flag
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.runtime import require_checkpoint
from flashlm_helpers.runtime.compact import save_compact


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("export", help="write a model to use, small enough to hand around")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help=CHECKPOINT_HELP)
    add_mixer_flag(parser)

    # What becomes of it.
    parser.add_argument(
        "--format",
        choices=["compact", "packed", "onnx"],
        default="compact",
        help="compact: a checkpoint with ternary weights at 1.6 bits and the embedding as "
        "float16; packed: for the C runtime, 1.6 bits and 8; onnx: 2 bits and 8",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="packed: the embedding as float32, not rounded; onnx: all of it",
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="the file to write")


def run(args: argparse.Namespace) -> dict:
    """Export a model to a new file."""
    # Never write over a file that somebody may still need.
    if Path(args.out).exists():
        raise FlashLMError(
            f"{args.out} is there already: give the name of a new file, such as model.pt"
        )
    if args.format == "compact" or Path(args.checkpoint).suffix == ".onnx":
        require_checkpoint(args.checkpoint)  # the others also take a packed model
    export = {"compact": export_compact, "packed": export_packed, "onnx": export_onnx}
    export[args.format](args)

    # The size is why one exports.
    size = Path(args.out).stat().st_size
    if not args.json:
        print(f"{args.out}: {size / 1e6:.2f} MB")
    return {
        "checkpoint": args.checkpoint,
        "format": args.format,
        "out": args.out,
        "bytes": size,
    }


def export_compact(args: argparse.Namespace) -> None:
    """Write a compact checkpoint."""
    if args.exact:
        raise FlashLMError(
            "--exact is for packed and onnx: a compact checkpoint has its embedding as float16"
        )
    save_compact(args.out, load_checkpoint(args.checkpoint))


def export_packed(args: argparse.Namespace) -> None:
    """Write a packed file for the C runtime."""
    from flashlm_helpers.runtime import load
    from flashlm_helpers.runtime.packed import save_packed

    save_packed(args.out, load(args.checkpoint, "torch"), bits=32 if args.exact else 8)


def export_onnx(args: argparse.Namespace) -> None:
    """Write an ONNX file."""
    if Path(args.out).suffix != ".onnx":
        raise FlashLMError("an ONNX model is known by its name: give one that ends with .onnx")
    from flashlm_helpers.runtime import load
    from flashlm_helpers.runtime.onnx import save_onnx

    save_onnx(args.out, load(args.checkpoint, "torch"), low_bit=not args.exact)
