"""flashlm race: train several models for the same time, and compare them."""

import argparse
from dataclasses import asdict
from pathlib import Path

from flashlm_helpers.cli.common import add_mixer_flag, add_text_flags, stories_for
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.experiments.race import Entrant, race, race_table, split_entrants
from flashlm_helpers.machine.files import atomic_write, project_dir


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "race", help="train several models for the same time, and compare them"
    )
    parser.add_argument(
        "--presets",
        required=True,
        metavar="A,B,...",
        help="who takes part: presets, perhaps with changes, such as "
        "v4-small:mixers=[conv,attention]:lr=0.002",
    )
    add_mixer_flag(parser)

    # How long, how often, on which text.
    parser.add_argument("--minutes", required=True, type=float, help="time limit of each run")
    parser.add_argument(
        "--seeds", default="0,1,2", metavar="N,N,...", help="runs of each entrant (default 0,1,2)"
    )
    add_text_flags(parser)
    parser.add_argument(
        "--results",
        metavar="PATH",
        help="a .jsonl file: each run adds a line, and what stands there is not run again "
        "(default: benchmarks/results/race.jsonl)",
    )


def run(args: argparse.Namespace) -> dict:
    """Race; print a table and draw the curves beside the results."""
    from flashlm_helpers.experiments.curves import plot_race

    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise FlashLMError(
            f"--seeds must be whole numbers with commas between them, not {args.seeds!r}"
        ) from None
    entrants = [Entrant.parse(text) for text in split_entrants(args.presets)]

    text = Path(args.text_dir) if args.text_dir else args.dataset or "auto"
    limit = None
    if not args.text_dir and 0 < args.minutes < 1e6:
        limit = stories_for(args.minutes / 60)
    results = project_dir() / "benchmarks" / "results" / "race.jsonl"
    if args.results:
        results = Path(args.results)

    runs = project_dir() / "checkpoints" / "race"
    records = race(entrants, seeds, args.minutes, text, limit, results, runs)

    figure = results.with_suffix(".png")
    with atomic_write(figure) as file:
        plot_race(records).savefig(file, dpi=120)
    if not args.json:
        print(f"{race_table(records)}\n\nruns in {results}, curves in {figure}")
    rows = [asdict(record) for record in records]
    return {"results": str(results), "figure": str(figure), "records": rows}
