"""flashlm eval-bpc: bits per character of a model on a text, beside baselines."""

import argparse
from dataclasses import asdict

from flashlm_helpers.baselines import compressor_baselines, counting_baselines
from flashlm_helpers.cli.common import add_mixer_flag, add_model_flags, load_or_torch, notice
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.experiments.verbatim import measure_overlap, training_stories
from flashlm_helpers.machine.numbers import has_bfloat16
from flashlm_helpers.model import LanguageModel
from flashlm_helpers.sources.files import read_stories
from flashlm_helpers.tokens import tokenize


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "eval-bpc", help="bits per character of a model on a text, beside baselines"
    )
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="stories: .txt, .json, .jsonl, .csv, .parquet",
    )
    parser.add_argument("--no-baselines", action="store_true", help="the model only")
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="let the model write, and find what it copies from its training text",
    )
    add_model_flags(parser)
    add_mixer_flag(parser)


def run(args: argparse.Namespace) -> dict:
    """Score a text with a model, and with baselines that count or compress."""
    # The stories as they are trained on: stripped, without empty ones.
    model = load_or_torch(args)
    stripped = (story.strip() for story in read_stories(args.text))
    stories = [story for story in stripped if story]
    if not stories:
        raise FlashLMError(f"{args.text} holds no story: give a text file that is not empty")

    # What cannot be compared says so before anything else is said.
    overlap = None
    if args.overlap:
        training = training_stories(model.source, model.vocabulary)
        overlap = measure_overlap(model, stories, training)

    # The model first; people may wait for the baselines.
    report = evaluate(model, stories)
    if not args.json:
        print(report)
        print(f"end symbols, reported apart: {report.end_nats_per_story:.4f} nats per story")
    result = {"checkpoint": args.checkpoint, "text": args.text, "runtime": model.runtime}
    result |= asdict(report)
    if model.runtime == "torch":
        result["products"] = "bfloat16" if has_bfloat16() else "float32"
    if overlap is not None:
        result["overlap"] = asdict(overlap)
        if not args.json:
            print(f"\n{overlap}")
    if args.no_baselines:
        return result

    result["baselines"] = baselines(model, stories)
    if not args.json:
        print("\nbaselines on the same text, counted alike:")
        for name, value in sorted(result["baselines"].items(), key=lambda item: item[1]["bpc"]):
            print(f"  {name:<22} BPC {value['bpc']:.4f}  BPB {value['bpb']:.4f}")
    return result


def baselines(model: LanguageModel, stories: list[str]) -> dict[str, dict[str, float]]:
    """Score what a model has to beat; the counting ones need the text it was trained on."""
    # Where the training text is gone, the uniform model and the compressors are left.
    training_ids = None
    if model.source is None:
        notice("the model does not say which text it was trained on, so no unigram and trigram")
    else:
        try:
            corpus = open_corpus(model.source)
            training_ids = tokenize(corpus, "train", model.vocabulary).ids
        except FlashLMError as error:
            notice(f"the training text is not at hand, so no unigram and trigram: {error}")

    # Counting models and compressors side by side.
    results = {}
    for name, report in counting_baselines(model.vocabulary, training_ids, stories).items():
        results[name] = {"bpc": report.bpc, "bpb": report.bpb}
    return results | compressor_baselines(stories)
