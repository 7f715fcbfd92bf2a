"""Measure what a model card must say: bits per byte, stories that were not picked, memorization.

    python benchmarks/model_card.py --checkpoint checkpoints/NAME.pt --text-dir DIR > card.json

Memorization is the share of runs of 8, 16 and 32 tokens in generated stories that also occur in the
training text, beside the same share for held-out stories, which no model can have memorized.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

import flashlm_helpers as fl
from flashlm_helpers.tokens import TokenFile, tokenize

PROMPT = "Once upon a time"
SAMPLES = 200
RUNS = (8, 16, 32)  # tokens


def hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Return a 64-bit number per run of `length` ids; different runs differ almost surely."""
    result = np.zeros(max(0, len(ids) - length + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(length):
            result = (
                result * np.uint64(0x9E3779B97F4A7C15)
                + ids[k : k + len(result)].astype(np.uint64)
                + np.uint64(1)
            )
    return result


def shares_in(texts: list[np.ndarray], training: TokenFile) -> dict[int, float]:
    """Return the share of the runs of 8, 16 and 32 ids in `texts` that the training text has."""
    shares = {}
    for length in RUNS:
        known = hashes(np.asarray(training.ids), length)
        runs = np.concatenate([hashes(ids, length) for ids in texts])
        shares[length] = float(np.isin(runs, known).mean())
    return shares


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text-dir", required=True, help="the folder it was trained on")
    args = parser.parse_args()
    model = fl.load(args.checkpoint)
    vocabulary = model.vocabulary
    corpus = fl.open_corpus(Path(args.text_dir))
    training = tokenize(corpus, "train", vocabulary)
    held_out = tokenize(corpus, "valid", vocabulary)
    real = held_out.sample_stories(held_out.n_stories)
    stories = [vocabulary.decode(ids) for ids in real]
    samples = fl.generate(model, [PROMPT] * SAMPLES, tokens=300, seed=1000)
    written = [np.array(story.ids) for story in samples]
    shown = [fl.generate(model, PROMPT, tokens=300, seed=seed)[0].text for seed in range(5)]
    card = {
        "score": asdict(fl.evaluate(model, stories)),
        "stories": shown,
        "by_heart": {
            "generated": shares_in(written, training),
            "held_out": shares_in(real[:SAMPLES], training),
        },
        "ended_by_itself": sum(story.finished for story in samples) / SAMPLES,
    }
    print(json.dumps(card, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
