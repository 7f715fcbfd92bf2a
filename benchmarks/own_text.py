"""Measure what a small text gives: when validation turns up, and how much a model then recites.

    python benchmarks/own_text.py --text-dir DIR --kilobytes 100 --vocab-size 2048 --epochs 40

Trains on the first stories of DIR and prints one JSON object: bits per byte by epochs, and for the
best and the last weights bits per byte and overlap. Notebook 00 has a table of such runs.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import flashlm_helpers as fl
from flashlm_helpers import training
from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.experiments.verbatim import measure_overlap

STORIES = 100  # written, for the overlap


def first_stories(corpus, size: int) -> Iterator[str]:
    """Yield training stories until they have `size` bytes."""
    total = 0
    for story in corpus.stories("train"):
        yield story
        total += len(story.encode())
        if total >= size:
            break


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-dir", required=True, help="a folder with train* and valid*")
    parser.add_argument("--kilobytes", type=int, required=True, help="of training text")
    parser.add_argument("--preset", default="hybrid-small")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    fl.setup(threads=args.threads, show=False)

    # A piece of the text, and all of its validation stories.
    whole = fl.open_corpus(Path(args.text_dir))
    stories = list(first_stories(whole, 1000 * args.kilobytes))
    held_out = list(whole.stories("valid"))
    corpus = fl.open_corpus({"train": stories, "valid": held_out})

    # For a smooth curve, validations may cost as much as training, and nothing ends a run early.
    training.MAX_TOKEN_SHARE = 1.0
    model = replace(fl.PRESETS[args.preset], vocabulary_size=args.vocab_size)
    recipe = fl.TrainConfig(
        epochs=args.epochs, dropout=args.dropout, seed=0, validation_stories=100, patience=1000
    )
    with tempfile.TemporaryDirectory() as scratch:
        run = fl.Experiment(corpus, model, recipe).run(scratch)
        last = load_checkpoint(scratch, LAST)
    tokens = run.tokens_seen / run.epochs
    result = {
        "asked": vars(args) | {"text_dir": whole.name},
        "stories": len(stories),
        "tokens": round(tokens),
        "vocabulary": run.vocabulary.size,
        "train_seconds": run.seconds_by_activity["train"],
        "best_epoch": run.best_step / run.steps * run.epochs,
        "curve": [(point.tokens / tokens, point.bpb) for point in run.history.valid],
    }

    # The best weights are what a run gives; the last ones show what more training does.
    models = {"best": run.model, "last": fl.PyTorchModel(last.network.eval(), last.vocabulary)}
    for name, one in models.items():
        result[name] = {
            "bpb": fl.evaluate(one, held_out).bpb,
            "overlap": asdict(measure_overlap(one, held_out, stories, STORIES)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
