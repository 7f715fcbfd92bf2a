"""flashlm generate: write a story."""

import argparse
import os
from dataclasses import asdict

from flashlm_helpers.cli.common import add_mixer_flag, add_model_flags, load_or_torch
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.generation import Sampling, generate


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("generate", help="write a story")
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT")
    parser.add_argument(
        "--tokens",
        type=int,
        default=Sampling.tokens,
        help="tokens to write at most (default %(default)s)",
    )

    # How each of them is drawn.
    parser.add_argument(
        "--temperature",
        type=float,
        default=Sampling.temperature,
        help="0 is greedy (default %(default)s)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        default=Sampling.top_k,
        help="keep the k likeliest tokens (default %(default)s: all)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=Sampling.top_p,
        help="keep the likeliest tokens up to p (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=Sampling.seed, help="of the random numbers")

    # What writes it.
    add_model_flags(parser)
    add_mixer_flag(parser)


def run(args: argparse.Namespace) -> dict:
    """Write one story."""
    # The flags are the fields of Sampling.
    prompt = decode_prompt(args.prompt)
    model = load_or_torch(args)
    names = ("tokens", "temperature", "top_k", "top_p", "seed")
    settings = {name: getattr(args, name) for name in names}
    story = generate(model, prompt, **settings)[0]
    if not args.json:
        print(story.text)
    return asdict(story) | {"runtime": model.runtime}


def decode_prompt(argument: str) -> str:
    """Return an argument as the text that was typed; raise FlashLMError if that is not UTF-8."""
    # Python decodes arguments by the locale, which may not be that of the terminal.
    try:
        return os.fsencode(argument).decode()
    except UnicodeError as error:
        problem = "the prompt is not UTF-8"
        raise FlashLMError(f"{problem}: check the encoding of the terminal") from error
