"""The commands, and what a mistake looks like: one line on stderr and status 2."""

import importlib
import json
import os
import sys

from flashlm_helpers import __version__
from flashlm_helpers.cli.common import OneLineParser, register_mixers
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.machine.files import one_line
from flashlm_helpers.machine.setup import setup

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
}
PLACES = ("checkpoint", "text", "text_dir", "dataset", "save_dir", "resume", "results", "out")


def make_parser() -> OneLineParser:
    """Make the parser of all commands and their flags."""
    parser = OneLineParser(prog="flashlm", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS.values():
        importlib.import_module(f"flashlm_helpers.cli.{module}").add_parser(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; a mistake a person can mend is status 2."""
    # What a terminal cannot show is escaped, and does not end the program.
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="backslashreplace")
    parser = make_parser()
    args = parser.parse_args(arguments)
    for name in PLACES:
        if getattr(args, name, None) == "":  # an unset variable of a shell must not go unnoticed
            parser.error(f"--{name.replace('_', '-')} is empty: give a path or a name")

    # Only the command that is asked for is imported and prepared for.
    command = importlib.import_module(f"flashlm_helpers.cli.{COMMANDS[args.command]}")
    try:
        if args.command in ("train", "race"):
            setup(show=False)
        register_mixers(args)
        result = command.run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
    except FlashLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: there is not enough memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough; nothing may be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a path that the system itself refuses, such as one too long
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
