"""Races: models trained for the same wall-clock time on the same text, in turns, and compared by bits per byte."""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev

from flashlm_helpers.checkpoint import BEST, LAST, load_checkpoint
from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig, find_preset
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.fastpath import COMPILE_SECONDS, compile_model, keep_programs
from flashlm_helpers.files import append_json_line, read_json_lines, require_writable
from flashlm_helpers.hardware import has_bfloat16
from flashlm_helpers.model import FlashLM, count_parameters, packed_bytes
from flashlm_helpers.optimization import microbatch
from flashlm_helpers.tokens import prepare
from flashlm_helpers.training import train

SCORED_STORIES = 2_000  # of the validation split, at the end of every run
_BUDGET = ("hours", "epochs", "seed")  # the race sets these, so no entrant may


@dataclass(frozen=True)
class Entrant:
    """What takes part: a preset and what is changed of it, in the architecture or in the recipe.

    name: as it was written, "v4-small:optimizer=adamw". recipe: TrainConfig's fields that differ from the default.
    """

    name: str
    model: ModelConfig
    recipe: dict

    @classmethod
    def parse(cls, text: str) -> "Entrant":
        """Read "PRESET" or "PRESET:FIELD=VALUE:FIELD=VALUE", fields of ModelConfig or TrainConfig.

        Raises FlashLMError for a name, field or value that does not exist.
        """
        preset, *changes = text.split(":")
        model, recipe = find_preset(preset), {}
        known = {f.name for f in dataclasses.fields(TrainConfig)} - set(_BUDGET)
        shape = {f.name for f in dataclasses.fields(ModelConfig)} - {"name"}
        for change in changes:
            field, equals, value = change.partition("=")
            if not equals or field not in known | shape:
                raise FlashLMError(f"{change!r} in {text!r} changes nothing that can be changed: write FIELD=VALUE, "
                                   f"with a field of the recipe ({', '.join(sorted(known))}) or of the architecture")
            try:
                value = json.loads(value)
            except ValueError:
                pass  # a word, such as adamw
            if field in known:
                recipe[field] = value
            else:
                model = replace(model, **{field: tuple(value) if isinstance(value, list) else value})
        TrainConfig(hours=1, **recipe)  # refuses what cannot be
        return cls(text, model, recipe)


def race(entrants: list[Entrant], seeds: list[int], minutes: float, source: dict, results: Path,
         runs: Path) -> list[dict]:
    """Train every entrant with every seed for `minutes`, in turns, each in a process of its own.

    source: what open_corpus is asked for, {"dataset", "text_dir", "limit"}. results: a .jsonl file; each run appends a
    line to it when it is scored, and what stands there already is not run again, so a race may be stopped and gone on
    with. A run that was stopped starts anew: half a run that is resumed has prepared twice, and less time to train.
    runs: where the runs' folders go. Returns the records of this race, in the order of running.
    Raises FlashLMError if anything of it cannot run, before the first run where that can be known, and
    KeyboardInterrupt if a run is interrupted.
    """
    if not 0 < minutes <= 1e6:
        raise FlashLMError(f"minutes must be greater than 0 and at most a million, not {minutes}: try --minutes 6")
    if results.suffix != ".jsonl":
        raise FlashLMError(f"results are JSON lines, so their file must end in .jsonl, and not be {results.name!r}")
    corpus = open_corpus(source["dataset"], source["text_dir"], source["limit"])
    if source["text_dir"] is None:
        source = source | {"dataset": corpus.name}  # "auto" has become what was found
    planned = {}
    for seed, entrant in itertools.product(seeds, entrants):
        microbatch(entrant.model)
        config = TrainConfig(hours=minutes / 60, seed=seed, **entrant.recipe)
        asked = {"model": asdict(entrant.model), "training": asdict(config), "corpus": corpus.key}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        if key in planned:
            raise FlashLMError(f"{entrant.name} with seed {seed} would run twice: name every entrant and seed once")
        planned[key] = entrant, config
    require_writable(results.parent)
    done = {record.get("key"): record for record in read_json_lines(results)}
    for turn, (key, (entrant, config)) in enumerate(planned.items(), 1):
        if key not in done:
            print(f"run {turn} of {len(planned)}: {entrant.name}, seed {config.seed}", file=sys.stderr)
            record = {"key": key, "entrant": entrant.name, "seed": config.seed, "minutes": minutes,
                      "corpus": corpus.name} | _run_apart(entrant.model, config, source, runs / key)
            append_json_line(results, record)
            done[key] = record
    # The same run may have been named in another way before.
    return [done[key] | {"entrant": entrant.name} for key, (entrant, _) in planned.items()]


def race_table(records: list[dict]) -> str:
    """A text table: for each entrant the mean over its seeds and, in brackets, their standard deviation; best first."""
    entrants: dict[str, list[dict]] = {}
    for record in records:
        entrants.setdefault(record["entrant"], []).append(record)
    lines = {}
    for name, runs in entrants.items():
        bpb = [run["score"]["bpb"] for run in runs]
        spread = f"({stdev(bpb):.4f})" if len(bpb) > 1 else "(-)"
        lines[name] = (mean(bpb), f"{mean(bpb):.4f} {spread:<9}"
                       f"{mean(run['score']['nats_per_token'] for run in runs):8.4f}"
                       f"{mean(run['tokens_seen'] for run in runs) / 1e6:9.2f}"
                       f"{mean(run['tokens_per_second'] for run in runs):10,.0f}{runs[0]['packed_bytes'] / 1e6:11.2f}"
                       f"{len(runs):6}")
    width = max(map(len, lines))
    heading = f"{'entrant':<{width}}  BPB (spread)  nats/token M tokens  tokens/s  packed MB  runs"
    return "\n".join([heading, *(f"{name:<{width}}  {lines[name][1]}"
                                 for name in sorted(lines, key=lambda name: lines[name][0]))])


def _run_apart(model: ModelConfig, config: TrainConfig, source: dict, folder: Path) -> dict:
    """One run in a fresh process: nothing compiled, cached or freed by another run is at hand."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, model, config, source, folder))
    try:
        process.start()
        sender.close()
        result = json.loads(receiver.recv())  # JSON, so that a record is the same now and when it is read again
    except EOFError:
        process.join()
        raise FlashLMError(f"the run in {folder} left no result (exit status {process.exitcode})") from None
    except KeyboardInterrupt:
        if process.pid:
            process.terminate()
            process.join()
        raise
    process.join()
    if "error" in result:
        raise FlashLMError(result["error"])
    if result["stopped_by"] == "interrupt":
        raise KeyboardInterrupt
    return result


def _run(sender: Connection, model: ModelConfig, config: TrainConfig, source: dict, folder: Path) -> None:
    """Train, score the best weights on the validation split, and send the record, or why there is none."""
    try:
        result = _train_and_score(model, config, source, folder)
    except FlashLMError as error:
        result = {"error": str(error)}
    except KeyboardInterrupt:
        result = {"stopped_by": "interrupt"}
    sender.send(json.dumps(result))


def _train_and_score(model: ModelConfig, config: TrainConfig, source: dict, folder: Path) -> dict:
    shutil.rmtree(folder, ignore_errors=True)
    corpus = open_corpus(source["dataset"], source["text_dir"], source["limit"])
    vocabulary, train_tokens, valid_tokens = prepare(corpus, model.vocabulary_size)
    source = source | {"vocabulary_size": model.vocabulary_size}
    model = replace(model, vocabulary_size=len(vocabulary))
    keep_programs()
    if config.compile or (config.compile is None and config.hours * 3600 >= COMPILE_SECONDS):
        compile_model(FlashLM(model), has_bfloat16())  # before the clock starts, as an earlier run would have
    report = train(model, config, vocabulary, train_tokens, valid_tokens, folder, source).report
    if report["stopped_by"] == "interrupt":
        return {"stopped_by": "interrupt"}
    stories = [vocabulary.decode(ids) for ids in valid_tokens.sample_stories(SCORED_STORIES)]
    score = evaluate(load_checkpoint(folder / BEST)["model"], vocabulary, stories)
    (folder / LAST).unlink()  # the largest file, and nothing goes on from it
    kept = ("stopped_by", "steps", "tokens_seen", "tokens_per_second", "epochs", "seconds", "seconds_by_activity",
            "train_nats_per_token", "peak_memory_bytes", "hardware", "config")
    return {name: report[name] for name in kept} | {
        "parameters": count_parameters(model), "packed_bytes": packed_bytes(model),
        "validation": report["history"]["valid"], "score": score.as_dict(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
