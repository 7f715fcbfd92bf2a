"""Measure what a model card must say: bits per byte, stories that were not picked, memorization.

    python benchmarks/model_card.py --checkpoint checkpoints/NAME.pt --text-dir DIR > card.json

Memorization is what 200 generated stories have in common with the training text, word for word,
beside the same for held-out stories, which no model can have memorized.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import flashlm_helpers as fl
from flashlm_helpers.experiments.verbatim import measure_overlap, training_stories

PROMPT = "Once upon a time"
SAMPLES = 200


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--text-dir", required=True, help="the folder it was trained on")
    args = parser.parse_args()
    model = fl.load(args.checkpoint)
    corpus = fl.open_corpus(Path(args.text_dir))
    stories = list(corpus.stories("valid"))
    samples = fl.generate(model, [PROMPT] * SAMPLES, tokens=300, seed=1000)
    shown = [fl.generate(model, PROMPT, tokens=300, seed=seed)[0].text for seed in range(5)]
    training = training_stories(corpus, model.vocabulary)
    overlap = measure_overlap(model, stories, training, SAMPLES)
    card = {
        "score": asdict(fl.evaluate(model, stories)),
        "stories": shown,
        "overlap": asdict(overlap),
        "ended_by_itself": sum(story.finished for story in samples) / SAMPLES,
    }
    print(json.dumps(card, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
