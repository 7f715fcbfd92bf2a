"""Race the archived v3 against v4-small: the same time, the same text, bits per byte."""

import argparse
from dataclasses import replace
from pathlib import Path

import flashlm_helpers as fl
from flashlm_helpers.archive.v3 import FlashLMv3

RESULTS = Path(__file__).parent / "results" / "v3.jsonl"


def entrants() -> list[fl.Entrant]:
    """Return who takes part: v3 as it was, then with one change after another, and v4-small."""
    fl.register_mixer("v3_scaled", "flashlm_helpers.archive.v3:ScaledBlock")
    v3 = fl.PRESETS["v3"]
    scaled = replace(v3, mixers=("v3_scaled",))

    # Sequences that grow would be compiled anew at each length, while the clock runs.
    eager = {"compile": False}
    return [
        fl.Entrant("v3, its recipe", v3, eager, FlashLMv3),
        fl.Entrant("v3, our recipe", v3),
        fl.Entrant("and v4's scale", scaled),
        fl.Entrant("and 10,000 tokens", replace(scaled, vocabulary_size=10_000)),
        fl.Entrant("v4-small", fl.PRESETS["v4-small"]),
    ]


def main() -> None:
    """Race, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--text-dir", type=Path, metavar="DIR", help="default: the built-in corpus")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    fl.setup(show=False)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    text = args.text_dir or "builtin"
    records = fl.race(entrants(), seeds, args.minutes, text, results=args.results)
    print(fl.race_table(records))


if __name__ == "__main__":
    main()
