"""Train v4-shaped models of several widths on several numbers of tokens, for a scaling law.

Every point is the end of a run of its own, whose learning rate falls to zero just there. Budgets
are counted in tokens, so results do not depend on the speed of the machine or on what else it
does. Each run adds a line to the results, and what stands there already is not run again; with
--part 1/2 and --part 2/2, two processes share the work.
"""

import argparse
import itertools
import json
import math
import tempfile
from dataclasses import asdict
from pathlib import Path

import flashlm_helpers as fl
from flashlm_helpers.corpus import Corpus
from flashlm_helpers.machine.files import append_json_line, read_json_lines
from flashlm_helpers.training import StopReason

RESULTS = Path(__file__).parent / "results" / "scaling.jsonl"
SCORED_STORIES = 400  # of the validation split
BATCH = 8
LR = 4e-3  # of a width of 192; narrower models want more


def model_of(width: int) -> fl.ModelConfig:
    """Return v4's shape at another width: six blocks, and a GLU of 8/3 of the width."""
    hidden = 16 * round(width / 6)
    return fl.ModelConfig(f"v4-{width}", width=width, hidden=hidden, vocabulary_size=4096)


def learning_rate_of(width: int) -> float:
    """Return the peak learning rate, in inverse proportion to the width (arXiv:2203.03466)."""
    return LR * 192 / width


def run(corpus: Corpus, width: int, tokens: int, lr: float, seed: int) -> dict:
    """Train on so many tokens, and score the last weights."""
    # A budget in passes over the text ends with a step.
    model = model_of(width)
    length = model.sequence_length
    windows = fl.prepare(corpus, model.vocabulary_size).train.windows(length)
    steps = math.ceil(tokens / (BATCH * length))
    recipe = fl.TrainConfig(epochs=steps * BATCH / windows, batch=BATCH, lr=lr, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        report = fl.Experiment(corpus, model, recipe).run(folder)
    if report.stopped_by == StopReason.INTERRUPT:
        raise KeyboardInterrupt

    stories = list(itertools.islice(corpus.stories("valid"), SCORED_STORIES))
    score = fl.evaluate(report.model, stories)
    return {
        "tokens": report.tokens_seen,
        "epochs": report.epochs,
        "parameters": asdict(fl.count_parameters(report.config.model)),
        "nats_per_byte": score.bpb * math.log(2),
        "score": asdict(score),
        "train_nats_per_token": report.train_nats_per_token,
        "seconds": report.seconds,
    }


def main() -> None:
    """Run what is missing of the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text-dir", metavar="DIR", help="default: the built-in corpus")
    parser.add_argument("--widths", default="32,48,64,96,128,192")
    parser.add_argument("--tokens", default="0.5,1,2,4", help="in millions")
    parser.add_argument("--lr", type=float, help="default: by the width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="K/N: take the K-th of every N runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    fl.setup(threads=args.threads, show=False)
    corpus = fl.open_corpus(Path(args.text_dir)) if args.text_dir else fl.open_corpus("builtin")

    # Short runs first, so that a grid that is stopped has all widths.
    millions = [float(value) for value in args.tokens.split(",")]
    widths = [int(value) for value in args.widths.split(",")]
    part, parts = map(int, args.part.split("/"))
    for number, (tokens, width) in enumerate(itertools.product(millions, widths)):
        lr = args.lr or learning_rate_of(width)
        terms = {"text": corpus.name, "width": width, "lr": lr, "seed": args.seed}
        terms |= {"wanted_tokens": round(tokens * 1e6)}
        lines = read_json_lines(args.results)
        if number % parts != part - 1 or any(terms.items() <= line.items() for line in lines):
            continue
        done = terms | run(corpus, width, terms["wanted_tokens"], lr, args.seed)
        append_json_line(args.results, json.loads(json.dumps(done)))
        print(
            f"{corpus.name} width {width} {tokens:g} M: {done['score']['bpb']:.4f} BPB", flush=True
        )


if __name__ == "__main__":
    main()
