"""What a model card must say, measured: bits per byte, stories that were not picked, and what was learned by heart.

    python benchmarks/model_card.py --checkpoint checkpoints/NAME.pt --text-dir DIR > card.json

Learned by heart is what also stands in the training text, token by token: the share of runs of 8, 16 and 32 tokens in
generated stories that do, beside the same share for held-out stories, which nobody can have learned.
"""

import argparse
import json

import numpy as np

from flashlm_helpers.checkpoint import load_model
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.generation import generate
from flashlm_helpers.tokens import TokenFile, tokenize

PROMPT, SAMPLES, RUNS = "Once upon a time", 200, (8, 16, 32)


def hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit number for every run of `length` ids; equal runs have equal numbers, others differ almost surely."""
    result = np.zeros(max(0, len(ids) - length + 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for k in range(length):
            result = result * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + len(result)].astype(np.uint64) + np.uint64(1)
    return result


def shares_in(texts: list[np.ndarray], training: TokenFile) -> dict[int, float]:
    """Of the runs of 8, 16 and 32 ids in `texts`, the share that the training text has too."""
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
    model, vocabulary = load_model(args.checkpoint)
    corpus = open_corpus(text_dir=args.text_dir)
    training, held_out = tokenize(corpus, "train", vocabulary), tokenize(corpus, "valid", vocabulary)
    real = held_out.sample_stories(held_out.n_stories)
    samples = generate(model, vocabulary, [PROMPT] * SAMPLES, tokens=300, seed=1000)
    print(json.dumps({
        "score": evaluate(model, vocabulary, [vocabulary.decode(ids) for ids in real]).as_dict(),
        "stories": [generate(model, vocabulary, PROMPT, tokens=300, seed=seed)[0].text for seed in range(5)],
        "by_heart": {"generated": shares_in([np.array(story.ids) for story in samples], training),
                     "held_out": shares_in(real[:SAMPLES], training)},
        "ended_by_itself": sum(story.finished for story in samples) / SAMPLES,
    }, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
