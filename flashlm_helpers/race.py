"""Races: models trained for the same wall-clock time on the same text, in turns, and compared by bits per byte."""

import dataclasses
import hashlib
import json
import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from flashlm_helpers.checkpoint import BEST, LAST, load_checkpoint
from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig, find_preset
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.fastpath import COMPILE_SECONDS, compile_model, keep_programs
from flashlm_helpers.files import append_json_line, one_line, read_json_lines, write_json
from flashlm_helpers.hardware import has_bfloat16
from flashlm_helpers.model import FlashLM, count_parameters, packed_bytes
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
        try:
            TrainConfig(hours=1, **recipe)
        except TypeError as error:
            raise FlashLMError(f"{text!r} has a value of the wrong kind: {one_line(error)}") from error
        return cls(text, model, recipe)


def race(entrants: list[Entrant], seeds: list[int], minutes: float, source: dict, results: Path,
         runs: Path) -> list[dict]:
    """Train every entrant with every seed for `minutes`, in turns, each in a process of its own.

    source: what open_corpus is asked for, {"dataset", "text_dir", "limit"}. results: a .jsonl file; each run appends a
    line to it when it is scored, and what stands there already is not run again, so a race may be stopped and gone on
    with. runs: where the runs' folders go. Returns the records of this race, in the order of running.
    Raises FlashLMError if a run fails, KeyboardInterrupt if one is interrupted.
    """
    corpus = open_corpus(source["dataset"], source["text_dir"], source["limit"])
    source = source | {"dataset": source["dataset"] and corpus.name}
    records = []
    for turn, (seed, entrant) in enumerate((seed, entrant) for seed in seeds for entrant in entrants):
        config = TrainConfig(hours=minutes / 60, seed=seed, **entrant.recipe)
        asked = {"model": asdict(entrant.model), "training": asdict(config), "corpus": corpus.key}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        done = [record for record in read_json_lines(results) if record["key"] == key]
        if not done:
            print(f"run {turn + 1} of {len(seeds) * len(entrants)}: {entrant.name}, seed {seed}", file=sys.stderr)
            record = {"key": key, "entrant": entrant.name, "seed": seed, "minutes": minutes, "corpus": corpus.name}
            append_json_line(results, record | _run_apart(entrant.model, config, source, runs / key))
            done = [record for record in read_json_lines(results) if record["key"] == key]
        records += done[:1]
    return records


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
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(model, config, source, folder))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:  # the run has received it as well: let it save
        process.join()
        raise
    try:
        result = json.loads((folder / "race.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise FlashLMError(f"the run in {folder} left no result (exit status {process.exitcode})") from error
    if "error" in result:
        (folder / "race.json").unlink()
        raise FlashLMError(result["error"])
    if result["stopped_by"] == "interrupt":
        (folder / "race.json").unlink()
        raise KeyboardInterrupt
    return result


def _run(model: ModelConfig, config: TrainConfig, source: dict, folder: Path) -> None:
    """Train, or go on training, score the best weights on the validation split, and leave race.json."""
    try:
        result = _train_and_score(model, config, source, folder)
    except FlashLMError as error:
        result = {"error": str(error)}
    write_json(folder / "race.json", result)


def _train_and_score(model: ModelConfig, config: TrainConfig, source: dict, folder: Path) -> dict:
    corpus = open_corpus(source["dataset"], source["text_dir"], source["limit"])
    vocabulary, train_tokens, valid_tokens = prepare(corpus, model.vocabulary_size)
    model = replace(model, vocabulary_size=len(vocabulary))
    if not (folder / "report.json").exists():
        keep_programs()
        if config.compile or (config.compile is None and config.hours * 3600 >= COMPILE_SECONDS):
            warm = FlashLM(model)  # builds the programs before the clock starts, as an earlier run would have
            warm.dropout = config.dropout
            compile_model(warm, has_bfloat16())
        resume = load_checkpoint(folder / LAST) if (folder / LAST).exists() else None
        train(model, config, vocabulary, train_tokens, valid_tokens, folder, source, resume)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if report["stopped_by"] == "interrupt":
        (folder / "report.json").unlink()
        return {"stopped_by": "interrupt"}
    stories = [vocabulary.decode(ids) for ids in valid_tokens.sample_stories(SCORED_STORIES)]
    score = evaluate(load_checkpoint(folder / BEST)["model"], vocabulary, stories)
    kept = ("stopped_by", "steps", "tokens_seen", "tokens_per_second", "epochs", "seconds", "seconds_by_activity",
            "train_nats_per_token", "peak_memory_bytes", "hardware")
    (folder / LAST).unlink(missing_ok=True)
    return ({name: report[name] for name in kept} | {
        "config": report["config"], "parameters": count_parameters(model), "packed_bytes": packed_bytes(model),
        "validation": report["history"]["valid"], "score": score.as_dict(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
