"""flashlm eval-bpc: bits per character of a model on a text, beside peers and baselines."""

import argparse
from dataclasses import asdict

from flashlm_helpers.cli.common import add_mixer_flag, add_model_flags, load_or_torch, notice
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.experiments.baselines import compressor_baselines, counting_baselines
from flashlm_helpers.experiments.peers import PeerReport, load_peer, require_transformers
from flashlm_helpers.experiments.verbatim import measure_overlap, training_stories
from flashlm_helpers.machine.numbers import has_bfloat16
from flashlm_helpers.model import LanguageModel
from flashlm_helpers.sources.files import read_stories
from flashlm_helpers.sources.models import find_model
from flashlm_helpers.tokens import tokenize

OURS = "this checkpoint"  # its name in the table


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser(
        "eval-bpc", help="bits per character of a model on a text, beside peers and baselines"
    )
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="stories: .txt, .json, .jsonl, .csv, .parquet",
    )
    parser.add_argument("--no-baselines", action="store_true", help="models only")
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="let the model write, and find what it copies from its training text",
    )
    add_model_flags(parser, required=False)
    add_mixer_flag(parser)
    _add_peer_flags(parser)


def _add_peer_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="also, or only, a causal language model of others, through transformers: "
        "owner/name on the hub, or a folder; may be given several times",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens such a model reads at once (default: all it can, at most 2,048)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from one window to the next over a longer story (default: half the context)",
    )


def run(args: argparse.Namespace) -> dict:
    """Score a text with a model, with peers, and with baselines that count or compress."""
    # What can be wrong comes before what takes time.
    _check_what_is_asked(args)
    model = load_or_torch(args) if args.checkpoint else None
    stories = _read_stripped(args.text)
    reports = _score_peers(args, stories)

    # What cannot be compared says so before anything else is said.
    overlap = None
    if args.overlap:
        training = training_stories(model.source, model.vocabulary)
        overlap = measure_overlap(model, stories, training)

    # The models first; people may wait for the baselines.
    result = {"text": args.text}
    rows = {}
    if model:
        result = {"checkpoint": args.checkpoint} | result | _score_ours(model, stories, args.json)
        if reports:
            rows[OURS] = result
    if overlap is not None:
        result["overlap"] = asdict(overlap)
        if not args.json:
            print(f"\n{overlap}")
    if reports:
        result["peers"] = {name: report.to_dict() for name, report in reports.items()}
        rows |= result["peers"]
        if not args.json:
            print("\n".join(_describe(name, report) for name, report in reports.items()))

    if not args.no_baselines:
        result["baselines"] = baselines(model, stories)
        rows |= result["baselines"]
    if rows and not args.json:
        _print_table(rows, "models and baselines" if reports else "baselines")
    return result


def _score_ours(model: LanguageModel, stories: list[str], quiet: bool) -> dict:
    """Score one of our models, and print it unless asked to be quiet."""
    report = evaluate(model, stories)
    if not quiet:
        print(report)
        print(f"end symbols, reported apart: {report.end_nats_per_story:.4f} nats per story")
    result = {"runtime": model.runtime} | asdict(report)
    if model.runtime == "torch":
        result["products"] = "bfloat16" if has_bfloat16() else "float32"
    return result


def _check_what_is_asked(args: argparse.Namespace) -> None:
    """Raise FlashLMError unless there is a model to score, and what it takes to load it."""
    if not args.checkpoint and not args.model:
        raise FlashLMError("there is no model to score: give --checkpoint PATH or --model NAME")
    if not all(args.model):
        raise FlashLMError("--model is empty: give a path or a name")
    if not args.model and (args.context is not None or args.stride is not None):
        raise FlashLMError("--context and --stride are for a --model NAME: ours need neither")
    for flag, given in {"--runtime": args.runtime, "--overlap": args.overlap}.items():
        if given and not args.checkpoint:
            raise FlashLMError(f"{flag} is for a --checkpoint PATH: give one")
    if args.model:
        require_transformers()


def _read_stripped(path: str) -> list[str]:
    """Return the stories as they are trained on: stripped, without empty ones."""
    stripped = (story.strip() for story in read_stories(path))
    stories = [story for story in stripped if story]
    if not stories:
        raise FlashLMError(f"{path} holds no story: give a text file that is not empty")
    return stories


# ---- peers ----


def _score_peers(args: argparse.Namespace, stories: list[str]) -> dict[str, PeerReport]:
    """Score the models of others, one after another, so that one at a time is in memory."""
    # All are found, or downloaded, before the first one is scored.
    names = dict.fromkeys(args.model)
    files = [find_model(name) for name in names]
    reports = {}
    for found in files:
        peer = load_peer(found, args.context, args.stride)
        notice(f"scoring {peer.name} ({peer.parameters:,} parameters)")
        reports[peer.name] = peer.evaluate(stories)
        _warn_of_losses(peer.name, reports[peer.name])
    return reports


def _warn_of_losses(name: str, found: PeerReport) -> None:
    """Say in a line if a tokenizer leaves out or merges what it should spell."""
    if not found.lossy_stories and not found.unknown_tokens:
        return
    count = f"{found.lossy_stories:,} of {found.report.n_stories:,} stories"
    notice(
        f"warning: the tokenizer of {name} does not give back {count} as they were "
        f"({found.unknown_tokens:,} unknown tokens): what is lost costs it nothing, so its figure "
        "is too low"
    )


def _describe(name: str, found: PeerReport) -> str:
    """Return how a peer was read, in one line."""
    commit = f", revision {found.revision[:12]}" if found.revision else ""
    return (
        f"{name}{commit}: {found.parameters:,} parameters, {found.report.n_tokens:,} tokens, "
        f"windows of {found.context:,} with stride {found.stride:,}, first token given "
        f"{found.start_symbol}"
    )


def _print_table(rows: dict[str, dict], what: str) -> None:
    """Print models, peers and baselines, the best first, with the intervals of models."""
    width = max(22, *map(len, rows))
    print(f"\n{what} on the same text, counted alike:")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bpc"]):
        line = f"  {name:<{width}} BPC {row['bpc']:.4f}  BPB {row['bpb']:.4f}"
        if interval := row.get("interval"):
            line += " [{:.4f}, {:.4f}]".format(*interval["bpb"])
        print(line)


# ---- baselines ----


def baselines(model: LanguageModel | None, stories: list[str]) -> dict[str, dict[str, float]]:
    """Score what a model has to beat; the counting ones need a vocabulary and its training text.

    model: one of ours; None leaves the compressors.
    """
    if model is None:
        return compressor_baselines(stories)

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
