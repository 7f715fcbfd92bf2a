"""The command line, from training to telling stories. Results on stdout, notices and progress on stderr."""

import argparse
import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from flashlm_helpers import __version__
from flashlm_helpers.config import PRESETS, FlashLMError, TrainConfig, find_preset, project_dir
from flashlm_helpers.corpus import HUB, open_corpus, read_stories
from flashlm_helpers.files import atomic_write, one_line, require_writable
from flashlm_helpers.hardware import choose_preset, has_bfloat16, usable_cores

DEFAULT_HOURS = 2.0
RUNTIMES = ("torch", "c", "onnx")
TOKENS_PER_CORE_SECOND = 10_000  # more than a core trains on; decides how much text a timed run takes
TOKENS_PER_STORY = 180
SMALLEST_TAKE = 20_000


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, as all of ours are."""

    def error(self, message):
        """Print one line and exit with status 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """All commands and flags; the published script's flags keep their names and meaning."""
    parser = OneLineParser(prog="python -m flashlm_helpers", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a model to a time limit")
    size = train.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", help="train v4-small (4.4 M parameters)")
    size.add_argument("--large", action="store_true", help="train v4-large (16.9 M); default: by cores and memory")
    size.add_argument("--preset", choices=PRESETS, help="train this preset; *-float: its twin with float weights")
    train.add_argument("--hours", type=float, help=f"time limit in hours (default {DEFAULT_HOURS:g} without --epochs)")
    train.add_argument("--epochs", type=float, help="passes over the text; with --hours, whichever ends first")
    train.add_argument("--batch", type=int, help="sequences a step (default: measured if only --hours is given and it "
                                                 "is two minutes or more, otherwise 8)")
    train.add_argument("--eager", action="store_true", help="do not use torch.compile")
    train.add_argument("--lr", type=float, help=f"peak learning rate (default {TrainConfig.lr:g})")
    train.add_argument("--dropout", type=float, help="share of activations left out while training, such as 0.1 "
                                                     f"for a text read many times (default {TrainConfig.dropout:g})")
    train.add_argument("--seed", type=int, help=f"of weights and batch order (default {TrainConfig.seed})")
    train.add_argument("--patience", type=int, help="validations without a better loss before stopping "
                                                    f"(default {TrainConfig.patience})")
    train.add_argument("--vocab-size", type=int, help="ids in the vocabulary (default: as many as the preset has)")
    train.add_argument("--save-dir", metavar="PATH", help="where the run goes (default: a new folder in checkpoints/)")
    train.add_argument("--resume", metavar="PATH", help="a run's folder or its last.pt: go on exactly where it stopped")

    race = commands.add_parser("race", help="train several models for the same time, and compare them")
    race.add_argument("--presets", required=True, metavar="A,B,...",
                      help="who takes part: presets, perhaps with changes, such as v4-small:optimizer=adamw:lr=0.002")
    race.add_argument("--minutes", required=True, type=float, help="time limit of each run")
    race.add_argument("--seeds", default="0,1,2", metavar="N,N,...", help="runs of each entrant (default 0,1,2)")
    race.add_argument("--results", metavar="PATH", help="a .jsonl file: each run adds a line, and what stands there is "
                                                        "not run again (default: benchmarks/results/race.jsonl)")
    for command in (train, race):
        text = command.add_mutually_exclusive_group()
        text.add_argument("--text-dir", metavar="DIR",
                          help="a folder with train*.txt (and valid*.txt), .jsonl or .parquet")
        text.add_argument("--dataset", metavar="NAME", help=f"auto (default), builtin, {', '.join(HUB)}")

    evaluate = commands.add_parser("eval-bpc", help="bits per character of a model on a text, beside baselines")
    evaluate.add_argument("--text", required=True, metavar="FILE", help="stories, .txt, .jsonl or .parquet")
    evaluate.add_argument("--no-baselines", action="store_true", help="the model only")

    generate = commands.add_parser("generate", help="write a story")
    generate.add_argument("--prompt", default="Once upon a time", metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=200, help="the most tokens to write (default 200)")
    generate.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    generate.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens (default 0: all)")
    generate.add_argument("--top-p", type=float, default=0.95, help="keep the likeliest tokens up to p (default 0.95)")
    generate.add_argument("--seed", type=int, default=0)
    for command in (evaluate, generate):
        command.add_argument("--checkpoint", required=True, metavar="PATH",
                             help="a .pt file or a run's folder, or an exported model: packed or .onnx")
    help_runtime = "what computes (default: torch for checkpoints, c for packed models, onnx for .onnx"
    evaluate.add_argument("--runtime", choices=RUNTIMES, help=f"{help_runtime})")
    generate.add_argument("--runtime", choices=(*RUNTIMES, "compiled"),
                          help=f"{help_runtime}; compiled: torch, after some ten seconds of compiling)")

    export = commands.add_parser("export", help="write a model for use, small enough to hand around")
    export.add_argument("--checkpoint", required=True, metavar="PATH", help="a .pt file or a run's folder")
    export.add_argument("--format", choices=["compact", "packed", "onnx"], default="compact",
                        help="compact: a checkpoint with ternary weights at 1.6 bits and the embedding as float16; "
                             "packed: for the C runtime, 1.6 bits and 8; onnx: 2 bits and 8")
    export.add_argument("--exact", action="store_true",
                        help="packed: the embedding as float32, not rounded; onnx: all of it")
    export.add_argument("--out", required=True, metavar="PATH", help="the file to write")

    info = commands.add_parser("info", help="parameters, ternary share, receptive field and size on disk")
    which = info.add_mutually_exclusive_group()
    which.add_argument("--preset", choices=PRESETS, help="default: the preset for this machine")
    which.add_argument("--checkpoint", metavar="PATH", help="a .pt file or a run's folder")

    for command in (train, race, evaluate, generate, export, info):
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return parser


def notice(message: str) -> None:
    """One line for the person watching."""
    print(message, file=sys.stderr)


def stories_for(hours: float | None) -> int | None:
    """How many stories a run of `hours` can read at most, rounded up so that runs share caches; None: all."""
    if hours is None:
        return None
    wanted = hours * 3600 * usable_cores() * TOKENS_PER_CORE_SECOND / TOKENS_PER_STORY
    take = SMALLEST_TAKE
    while take < wanted:
        take *= 2
    return take


def run_train(args) -> dict:
    """Train, or go on training; prints BPC and a story."""
    from flashlm_helpers.checkpoint import LAST, load_checkpoint
    from flashlm_helpers.generation import generate
    from flashlm_helpers.tokens import prepare
    from flashlm_helpers.training import train

    resume = load_checkpoint(args.resume, LAST) if args.resume else None
    preset = "v4-large" if args.large else "v4-small" if args.small else args.preset
    given = {name: getattr(args, name) for name in ("hours", "epochs", "batch", "lr", "dropout", "seed", "patience")
             if getattr(args, name) is not None} | ({"compile": False} if args.eager else {})
    if resume and args.vocab_size:
        raise FlashLMError("--vocab-size is for a new run: a resumed one keeps its vocabulary")
    if resume:
        before, model_config = resume["train_config"], resume["model_config"]
        train_config = replace(before, **given)
        if (train_config.hours, train_config.epochs) != (before.hours, before.epochs):  # decided anew
            train_config = replace(before, **({"bfloat16": None, "compile": None} | given))
        if preset and preset != model_config.name:
            raise FlashLMError(f"{args.resume} holds a {model_config.name}: leave out the preset to resume")
        source = resume["source"]
        if not source.keys() >= {"dataset", "text_dir", "limit", "vocabulary_size"}:
            raise FlashLMError(f"{args.resume} does not say which text it was trained on: resume from the {LAST} "
                               "of a run that was started here")
    else:
        if not given.keys() & {"hours", "epochs"}:
            given["hours"] = DEFAULT_HOURS
        train_config = TrainConfig(**given)
        model_config = PRESETS[preset or choose_preset()]
        source = {"dataset": "auto", "text_dir": None, "limit": None, "vocabulary_size": args.vocab_size}
    save_dir = _save_dir(args, model_config.name)

    if args.text_dir or args.dataset:  # an absolute path: the run may be resumed from another folder
        text_dir = str(Path(args.text_dir).resolve()) if args.text_dir else None
        source |= {"dataset": args.dataset, "text_dir": text_dir}
    if not resume and source["text_dir"] is None:
        source["limit"] = stories_for(train_config.hours)
    corpus = open_corpus(source["dataset"], source["text_dir"], source["limit"])
    if source["text_dir"] is None:
        source["dataset"] = corpus.name  # "auto" has become what was found
    wanted = source["vocabulary_size"]
    vocabulary, train_tokens, valid_tokens = prepare(corpus, wanted or find_preset(model_config.name).vocabulary_size)
    if args.vocab_size and len(vocabulary) < wanted:
        raise FlashLMError(f"the text supports a vocabulary of {len(vocabulary):,} ids, not {wanted:,}: "
                           f"give --vocab-size {len(vocabulary)} or less, or more text")
    notice(f"{corpus.name}: {train_tokens.n_stories:,} stories, {train_tokens.n_tokens / 1e6:.1f} M tokens; vocabulary "
           f"of {len(vocabulary):,} covers {vocabulary.coverage:.2%}; training {model_config.name} into {save_dir}")
    result = train(model_config, train_config, vocabulary, train_tokens, valid_tokens, save_dir, source, resume)

    story = generate(result.model, vocabulary, "Once upon a time", seed=train_config.seed)[0].text
    if not args.json:
        report = result.report
        print(f"stopped by {result.stopped_by} after {report['seconds']:.0f} s and {report['tokens_seen']:,} tokens "
              f"({report['tokens_per_second']:,.0f} tokens/s)\n"
              f"validation: {report['val_nats_per_token']:.4f} nats/token, BPC {report['bpc']:.4f}, "
              f"BPB {report['bpb']:.4f}\n\n{story}\n\nkept in {save_dir}")
    return result.report | {"story": story, "save_dir": str(save_dir)}


def run_race(args) -> dict:
    """Train several models for the same time; prints a table and draws their curves beside the results."""
    from flashlm_helpers.plots import plot_race
    from flashlm_helpers.race import Entrant, race, race_table

    try:
        seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise FlashLMError(f"--seeds must be whole numbers with commas between them, not {args.seeds!r}") from None
    entrants = [Entrant.parse(text) for text in re.split(r",(?![^\[]*\])", args.presets)]  # not the commas of lists
    source = {"dataset": args.dataset or "auto", "text_dir": None, "limit": None}
    if args.text_dir:
        source["text_dir"] = str(Path(args.text_dir).resolve())
    elif 0 < args.minutes < 1e6:
        source["limit"] = stories_for(args.minutes / 60)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run that is under way must not outlive the race
    results = Path(args.results) if args.results else project_dir() / "benchmarks" / "results" / "race.jsonl"
    records = race(entrants, seeds, args.minutes, source, results, project_dir() / "checkpoints" / "race")
    figure = results.with_suffix(".png")
    with atomic_write(figure) as file:
        plot_race(records).savefig(file, dpi=120)
    table = race_table(records)
    if not args.json:
        print(f"{table}\n\nruns in {results}, curves in {figure}")
    return {"results": str(results), "figure": str(figure), "records": records}


def _save_dir(args, preset: str) -> Path:
    """Where the run goes; never a folder that holds another run. A resumed run brings its best weights along."""
    resumed = Path(args.resume) if args.resume else None
    if resumed and not resumed.is_dir():
        resumed = resumed.parent
    named = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.save_dir) if args.save_dir else resumed or project_dir() / "checkpoints" / named
    if resumed and folder.resolve() == resumed.resolve():
        return folder
    if (folder / "last.pt").exists():
        raise FlashLMError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --save-dir")
    require_writable(folder)
    if resumed and (resumed / "best.pt").is_file():
        with atomic_write(folder / "best.pt") as file:
            file.write((resumed / "best.pt").read_bytes())
    return folder


def run_eval_bpc(args) -> dict:
    """Score a text with a model, and with baselines that count or compress."""
    from flashlm_helpers.baselines import compressor_baselines, counting_baselines
    from flashlm_helpers.evaluation import evaluate
    from flashlm_helpers.tokens import tokenize

    opened = _open(args)
    vocabulary, source = opened.vocabulary, opened.source
    stories = [story for story in map(str.strip, read_stories(args.text)) if story]
    if not stories:
        raise FlashLMError(f"{args.text} holds no story: give a text file that is not empty")
    report = evaluate(opened.model, vocabulary, stories)
    if not args.json:
        print(report)
        print(f"end symbols, reported apart: {report.end_nats_per_story:.4f} nats a story")
    result = {"checkpoint": args.checkpoint, "text": args.text, "runtime": opened.runtime} | report.as_dict()
    if opened.runtime == "torch":
        result["products"] = "bfloat16" if has_bfloat16() else "float32"
    if args.no_baselines:
        return result

    training_ids = None
    try:
        corpus = open_corpus(source["dataset"], source["text_dir"], source["limit"])
        training_ids = tokenize(corpus, "train", vocabulary).ids
    except KeyError:
        notice("the checkpoint does not say which text it was trained on, so no unigram and trigram")
    except FlashLMError as error:
        notice(f"the training text is not at hand, so no unigram and trigram: {error}")
    counted = counting_baselines(vocabulary, training_ids, stories)
    packed = compressor_baselines(stories)
    result["baselines"] = {name: {"bpc": r.bpc, "bpb": r.bpb} for name, r in counted.items()} | packed
    if not args.json:
        print("\nbaselines on the same text, counted alike:")
        for name, value in sorted(result["baselines"].items(), key=lambda item: item[1]["bpc"]):
            print(f"  {name:<22} BPC {value['bpc']:.4f}  BPB {value['bpb']:.4f}")
    return result


def run_generate(args) -> dict:
    """Write one story."""
    from flashlm_helpers.generation import generate

    opened = _open(args)
    settings = {name: getattr(args, name) for name in ("tokens", "temperature", "top_k", "top_p", "seed")}
    if opened.runtime == "c":
        story = opened.model.generate(args.prompt, **settings)[0]
    else:
        story = generate(opened.model, opened.vocabulary, args.prompt, **settings)[0]
    if not args.json:
        print(story.text)
    return asdict(story) | {"runtime": opened.runtime}


def _open(args):
    """The model that a command is about, by PyTorch if there is no compiler."""
    from flashlm_helpers.runtime import open_model
    from flashlm_helpers.runtime.bolt import NoRuntime

    try:
        return open_model(args.checkpoint, args.runtime)
    except NoRuntime as error:
        notice(f"{error}; PyTorch computes instead")
        return open_model(args.checkpoint, "torch")


def run_export(args) -> dict:
    """Write a model for use."""
    from flashlm_helpers.checkpoint import load_checkpoint, save_compact
    from flashlm_helpers.runtime import open_model

    if Path(args.out).exists():
        raise FlashLMError(f"{args.out} is there already: give the name of a new file, such as model.pt")
    if args.format == "compact":
        if args.exact:
            raise FlashLMError("--exact is for packed and onnx: a compact checkpoint has its embedding as float16")
        save_compact(args.out, load_checkpoint(args.checkpoint))
    else:
        if args.format == "onnx" and Path(args.out).suffix != ".onnx":
            raise FlashLMError("an ONNX model is known by its name: give one that ends with .onnx")
        opened = open_model(args.checkpoint, "torch")
        if args.format == "packed":
            from flashlm_helpers.runtime.packed import save_packed

            save_packed(args.out, opened.model, opened.vocabulary, 32 if args.exact else 8)
        else:
            from flashlm_helpers.runtime.onnx import save_onnx

            save_onnx(args.out, opened.model, opened.vocabulary, low_bit=not args.exact)
    size = Path(args.out).stat().st_size
    if not args.json:
        print(f"{args.out}: {size / 1e6:.2f} MB")
    return {"checkpoint": args.checkpoint, "format": args.format, "out": args.out, "bytes": size}


def run_info(args) -> dict:
    """Describe a preset or a checkpoint."""
    from flashlm_helpers.checkpoint import BEST, load_checkpoint
    from flashlm_helpers.model import count_parameters
    from flashlm_helpers.runtime.packed import is_packed, load_packed

    if args.checkpoint:
        path = Path(args.checkpoint)
        config = (load_packed(path)[0].config if is_packed(path) else load_checkpoint(path)["model_config"])
        size = (path / BEST if path.is_dir() else path).stat().st_size
    else:
        config, size = PRESETS[args.preset or choose_preset()], None
    counts = count_parameters(config)
    ternary = counts["ternary"] if config.ternary else 0
    other = counts["total"] - ternary
    result = {
        "name": config.name, "config": asdict(config), "parameters": counts,
        "ternary_share": ternary / counts["total"], "receptive_field": config.receptive_field,
        "bytes": {"float32": 4 * counts["total"], "ternary_at_1.6_bits_rest_float32": ternary // 5 + 4 * other,
                  "checkpoint": size},
    }
    if not args.json:
        print(f"{config.name}: {counts['total']:,} parameters, {result['ternary_share']:.1%} of them ternary\n"
              f"receptive field: {config.receptive_field} tokens\n"
              f"as float32: {result['bytes']['float32'] / 1e6:.1f} MB; ternary weights at 1.6 bits, the rest float32: "
              f"{result['bytes']['ternary_at_1.6_bits_rest_float32'] / 1e6:.1f} MB"
              + (f"; this checkpoint: {size / 1e6:.1f} MB" if size else ""))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run one command; a mistake a person can mend is one line on stderr and status 2."""
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="backslashreplace")  # a terminal may not know every character of a story
    parser = make_parser()
    args = parser.parse_args(arguments)
    for name in ("checkpoint", "text", "text_dir", "save_dir", "resume", "results", "out"):
        if getattr(args, name, None) == "":  # an unset variable of a shell must not start another run than meant
            parser.error(f"--{name.replace('_', '-')} is empty: give a path")
    run = {"train": run_train, "race": run_race, "eval-bpc": run_eval_bpc, "generate": run_generate,
           "export": run_export, "info": run_info}[args.command]
    try:
        result = run(args)
        if args.json:
            print(json.dumps(result))
        sys.stdout.flush()
    except FlashLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("error: there is not enough memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough; nothing may be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a path that the system itself refuses, such as one that is too long
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
