"""The commands, and what a mistake looks like: one line on stderr and status 2."""

import importlib
import json
import os
import signal
import sys
from contextlib import redirect_stderr
from typing import TextIO

from flashlm_helpers import __version__
from flashlm_helpers.cli.common import OneLineParser, register_mixers
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line
from flashlm_helpers.machine.hardware import usable_cores
from flashlm_helpers.machine.notices import LenientStream
from flashlm_helpers.machine.setup import check_threads, setup
from flashlm_helpers.machine.signals import ENDINGS, handling
from flashlm_helpers.machine.threads import FOLLOWER

DESCRIPTION = (
    "Train, measure and use a ternary (1.58-bit) language model on a CPU. Results go to stdout, "
    "with --json as exactly one JSON object; notices and progress go to stderr."
)
COMMANDS = {  # name on the command line: module of this folder
    "train": "train",
    "race": "race",
    "eval-bpc": "eval_bpc",
    "generate": "generate",
    "export": "export",
    "info": "info",
    "doctor": "doctor",
}
PLACES = (  # flags that must not be empty
    "checkpoint", "text", "text_dir", "dataset", "curriculum", "save_dir", "resume", "results",
    "out",
)  # fmt: skip


def make_parser() -> OneLineParser:
    """Make the parser of all commands and their flags."""
    parser = OneLineParser(prog="flashlm", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS.values():
        importlib.import_module(f"flashlm_helpers.cli.{module}").add_parser(commands)
    for command in commands.choices.values():
        command.add_argument(
            "--threads",
            type=int,
            help="compute with so many threads at most (default: all cores that are free)",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; a mistake a person can mend is status 2.

    It is 1 where the result could not be handed over, because the reader of stdout had left.
    """
    # Started without one of these (>&-), the program has one that leads nowhere; otherwise the
    # next file it opens, perhaps a checkpoint, would take its place.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))

    # What a terminal cannot show is escaped, and does not end the program.
    outputs = (sys.stdout, sys.stderr)
    for output in outputs:
        output.reconfigure(errors="backslashreplace")

    # Nor does a notice that nobody reads, and whatever asks for an end lets files be tidied up.
    with redirect_stderr(LenientStream()), handling(ENDINGS, signal.default_int_handler):
        try:
            return _run(arguments)
        finally:
            for output in outputs:
                _drop_unwritten(output)


def _drop_unwritten(output: TextIO) -> None:
    """Send what nobody reads nowhere, or the interpreter would fail to write it at its end."""
    try:
        output.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


def _run(arguments: list[str] | None) -> int:
    """Parse the arguments, run their command and return its exit status."""
    try:
        parser = make_parser()
        args = parser.parse_args(arguments)
        for name in PLACES:
            if getattr(args, name, None) == "":  # an unset variable of a shell must be noticed
                parser.error(f"--{name.replace('_', '-')} is empty: give a path or a name")

        # Only the command that is asked for is imported and prepared for.
        command = importlib.import_module(f"flashlm_helpers.cli.{COMMANDS[args.command]}")

        # A bound on the threads holds for all runtimes, as if the shell had set it.
        if args.threads is not None:
            check_threads(args.threads)
            os.environ["OMP_NUM_THREADS"] = str(args.threads)
        if args.command in ("train", "race"):
            setup(show=False)
        else:
            FOLLOWER.limit(usable_cores())
        if hasattr(args, "mixer"):
            register_mixers(args)

        # What it saves is saved when it returns; then comes what it says.
        result = command.run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
    except FlashLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        print("error: there is not enough memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has seen enough
        return 1
    except OSError as error:  # a path that the system itself refuses, such as one too long
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
