"""Compare a curriculum with the same texts shuffled together, and with its last text alone.

All runs have the same model, batch and number of steps, and so take the same time on a machine
that does nothing else; counting steps instead of seconds keeps the comparison fair on one that
does. Each run adds a line to the results, and what stands there already is not run again.
"""

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import flashlm_helpers as fl
from flashlm_helpers.cli.common import parse_curriculum
from flashlm_helpers.corpus import Curriculum, open_curriculum
from flashlm_helpers.machine.files import append_json_line, read_json_lines
from flashlm_helpers.training import StopReason

RESULTS = Path(__file__).parent / "results" / "curriculum.jsonl"
SCORED_STORIES = 400  # of every text's validation split
CONDITIONS = ("in stages", "shuffled", "last text alone")


def text_of(condition: str, stages: Sequence[tuple[Path | str, float]]) -> Curriculum:
    """Return what a condition reads."""
    if condition == "last text alone":
        return open_curriculum([(stages[-1][0], 1.0)])
    return open_curriculum(stages, shuffled=condition == "shuffled")


def run(
    condition: str,
    stages: Sequence[tuple[Path | str, float]],
    preset: str,
    tokens: int,
    batch: int,
    seed: int,
) -> dict:
    """Train on so many tokens, and score the best weights on every text."""
    # A budget in passes over the text, so that it ends with a step and not with the clock.
    corpus = text_of(condition, stages)
    model = fl.PRESETS[preset]
    length = model.sequence_length
    windows = fl.prepare(corpus, model.vocabulary_size).train.windows(length)
    steps = math.ceil(tokens / (batch * length))
    recipe = fl.TrainConfig(epochs=steps * batch / windows, batch=batch, seed=seed)

    with tempfile.TemporaryDirectory() as folder:
        report = fl.Experiment(corpus, model, recipe).run(folder)
        if report.stopped_by == StopReason.INTERRUPT:
            raise KeyboardInterrupt
        scores = {}
        for name, stories in held_out(stages).items():
            scores[name] = asdict(fl.evaluate(report.model, stories))

    curves = {}
    for name, points in report.history.sources.items():
        curves[name] = [asdict(point) for point in points]
    return {
        "steps": report.steps,
        "tokens": report.tokens_seen,
        "seconds": report.seconds,
        "stopped_by": report.stopped_by,
        "best_step": report.best_step,
        "scores": scores,
        "curves": curves,
    }


def held_out(stages: Sequence[tuple[Path | str, float]]) -> dict[str, list[str]]:
    """Return the first validation stories of every text, by its name."""
    stories = {}
    for text, _ in stages:
        corpus = fl.open_corpus(text)
        stories[corpus.name] = list(itertools.islice(corpus.stories("valid"), SCORED_STORIES))
    return stories


def main() -> None:
    """Run what is missing, and print every run's bits per byte on every text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curriculum", required=True, metavar="SOURCE:SHARE,...")
    parser.add_argument("--preset", default="v4-small", choices=fl.PRESETS)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    fl.setup(threads=args.threads, show=False)
    stages = []
    for name, share in parse_curriculum(args.curriculum):
        stages.append((Path(name) if Path(name).is_dir() else name, share))

    # Seeds come first, so that a comparison that is stopped has all conditions.
    for seed, condition in itertools.product(args.seeds.split(","), CONDITIONS):
        terms = {"condition": condition, "seed": int(seed), "preset": args.preset}
        terms |= {"wanted_tokens": args.tokens, "batch": args.batch}
        terms |= {"texts": [[fl.open_corpus(text).name, share] for text, share in stages]}
        lines = read_json_lines(args.results)
        found = [line for line in lines if terms.items() <= line.items()]
        if not found:
            done = run(condition, stages, args.preset, args.tokens, args.batch, int(seed))
            found = [json.loads(json.dumps(terms | done))]
            append_json_line(args.results, found[0])
        scores = {name: round(score["bpb"], 4) for name, score in found[0]["scores"].items()}
        print(f"{condition:<16} seed {seed}  BPB {scores}", flush=True)


if __name__ == "__main__":
    main()
