"""Races: models trained for the same time on the same text, in turns, compared by bits per byte."""

import functools
import hashlib
import itertools
import json
import multiprocessing
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from flashlm_helpers.autotune import MIN_SECONDS_TO_COMPILE, compile_network
from flashlm_helpers.checkpoint import LAST, ValidPoint
from flashlm_helpers.config import (
    FlashLMError,
    ModelConfig,
    TrainConfig,
    attention_at,
    find_preset,
)
from flashlm_helpers.corpus import Corpus, open_corpus
from flashlm_helpers.evaluation import BPCReport, evaluate
from flashlm_helpers.experiments.experiment import Experiment, Text
from flashlm_helpers.experiments.size import count_parameters, packed_bytes
from flashlm_helpers.machine.files import (
    append_json_line,
    one_line,
    read_json_lines,
    require_writable,
)
from flashlm_helpers.machine.notices import notice
from flashlm_helpers.machine.setup import setup
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer, microbatch_size
from flashlm_helpers.registry import own_mixers, register_mixer
from flashlm_helpers.training import StopReason

SCORED_STORIES = 2_000  # of the validation split, at the end of every run
_SET_BY_RACE = {"hours", "epochs", "seed"}  # so no entrant may
_OF_RECIPE = {field.name for field in fields(TrainConfig)} - _SET_BY_RACE
_OF_MODEL = {field.name for field in fields(ModelConfig)} - {"name"}


# ---- who takes part ----


@dataclass(frozen=True)
class Entrant:
    """A model and the parts of its recipe that differ from the default.

    name: as it was written, such as "v4-small:lr=0.002". build_model, build_optimizer: as in
    Experiment.
    """

    name: str
    model: ModelConfig
    recipe: dict[str, Any] = field(default_factory=dict)
    build_model: Callable[[ModelConfig], nn.Module] = FlashLM
    build_optimizer: Callable[[nn.Module, TrainConfig], torch.optim.Optimizer] = build_optimizer

    def __post_init__(self):
        taken = sorted(_SET_BY_RACE & self.recipe.keys())
        if taken:
            raise FlashLMError(f"the race sets {', '.join(taken)}: leave it out of {self.name!r}")

    @classmethod
    def parse(cls, text: str) -> "Entrant":
        """Read "PRESET" or "PRESET:FIELD=VALUE:...", fields of ModelConfig or TrainConfig.

        Raises FlashLMError for a name, field or value that does not exist.
        """
        preset, *changes = text.split(":")
        model = find_preset(preset)

        # Every change belongs to the recipe or to the architecture.
        recipe = {}
        shape = {}
        for change in changes:
            name, equals, value = change.partition("=")
            if equals and name in _OF_RECIPE:
                recipe[name] = _parse_value(value)
            elif equals and (name in _OF_MODEL or name == "attention"):
                shape[name] = _parse_value(value)
            else:
                raise FlashLMError(
                    f"{change!r} in {text!r} changes nothing: write FIELD=VALUE, with a field of "
                    f"the recipe ({', '.join(sorted(_OF_RECIPE))}) or of the architecture "
                    f"({', '.join(sorted(_OF_MODEL))})"
                )

        # Before mixers had names, races listed the blocks that have attention.
        listed = "attention" in shape
        places = shape.pop("attention", ())
        model = replace(model, **shape)
        if listed:
            model = replace(model, mixers=attention_at(places, model.blocks))

        # These two refuse what cannot be.
        TrainConfig(hours=1, **recipe)
        count_parameters(model)
        return cls(text, model, recipe)


def _parse_value(text: str) -> Any:
    """Read a value as JSON, or as a word; "[a, b]" is a tuple of such values."""
    if text.startswith("[") and text.endswith("]"):
        return tuple(_parse_value(part.strip()) for part in text[1:-1].split(",") if part.strip())
    try:
        return json.loads(text)
    except ValueError:
        return text


# ---- what is recorded of a run ----


@dataclass(frozen=True)
class RaceRecord:
    """One finished run of a race: a line of its results file."""

    key: str  # of entrant, recipe, seed, minutes and text
    entrant: str
    seed: int
    minutes: float
    corpus: str
    stopped_by: str
    steps: int
    tokens_seen: int
    tokens_per_second: float
    epochs: float
    seconds: float
    seconds_by_activity: dict[str, float]
    train_nats_per_token: float | None
    peak_memory_bytes: int
    hardware: dict
    config: dict  # {"model": ..., "training": ...}, in plain values
    parameters: dict[str, int]
    packed_bytes: int
    validation: list[ValidPoint]
    score: BPCReport  # of the best weights, on the validation split
    finished: str  # UTC

    @classmethod
    def from_dict(cls, content: dict) -> "RaceRecord":
        """Make a record of a line of a results file; raise FlashLMError if it is not one."""
        try:
            content = dict(content)
            content["validation"] = [ValidPoint(**row) for row in content["validation"]]
            content["score"] = BPCReport(**content["score"])
            return cls(**content)
        except (KeyError, TypeError) as error:
            raise FlashLMError(f"not the record of a race ({one_line(error)[:200]})") from error


def read_records(path: Path) -> list[RaceRecord]:
    """Read the records of a results file; none if there is no file.

    Raises FlashLMError if it holds anything else.
    """
    records = []
    for content in read_json_lines(path):
        try:
            records.append(RaceRecord.from_dict(content))
        except FlashLMError as error:
            raise FlashLMError(f"{path} holds other lines: {error}: name another file") from error
    return records


def race_table(records: Sequence[RaceRecord]) -> str:
    """Format a table of means over each entrant's seeds, the best entrant first.

    In brackets the standard deviation over the seeds.
    """
    runs_of: dict[str, list[RaceRecord]] = {}
    for record in records:
        runs_of.setdefault(record.entrant, []).append(record)

    # One row per entrant: means over its seeds.
    width = max(len(name) for name in runs_of)
    rows = []
    for name, runs in runs_of.items():
        bpb = [run.score.bpb for run in runs]
        spread = f"({stdev(bpb):.4f})" if len(bpb) > 1 else "(-)"
        nats = mean(run.score.nats_per_token for run in runs)
        tokens = mean(run.tokens_seen for run in runs) / 1e6
        speed = mean(run.tokens_per_second for run in runs)
        packed = runs[0].packed_bytes / 1e6
        quality = f"{mean(bpb):.4f} {spread:<9}{nats:8.4f}"
        costs = f"{tokens:9.2f}{speed:10,.0f}{packed:11.2f}{len(runs):6}"
        rows.append((mean(bpb), f"{name:<{width}}  {quality}{costs}"))

    heading = f"{'entrant':<{width}}  BPB (spread)  nats/token M tokens  tokens/s  packed MB  runs"
    rows.sort(key=lambda row: row[0])
    return "\n".join([heading, *(row for _, row in rows)])


# ---- the race ----


def race(
    entrants: Sequence[str | Entrant],
    seeds: Sequence[int] = (0,),
    minutes: float = 6.0,
    text: Text = "auto",
    limit: int | None = None,
    results: str | Path | None = None,
    folder: str | Path | None = None,
    apart: bool = True,
) -> list[RaceRecord]:
    """Train every entrant with every seed for `minutes`, in turns; return the records in order.

    text, limit: what open_corpus() takes. results: a .jsonl file (by default none is kept); each
    run adds a line when it is scored, and what stands there already is not run again, so a race
    may be stopped and continued. A run that was stopped starts anew, or it would prepare twice.
    folder: where the runs go, by default a temporary folder.
    apart: run each in a process of its own, so that nothing compiled, cached or freed by one
    helps the next. Parts that are defined in a notebook need apart=False.
    Raises FlashLMError for what cannot run, before the first run where that can be known, and
    KeyboardInterrupt if a run is interrupted.
    """
    if not 0 < minutes <= 1e6:
        raise FlashLMError(
            f"minutes must be greater than 0 and at most a million, not {minutes}: try --minutes 6"
        )
    corpus = open_corpus(text, limit)
    planned = _plan(entrants, seeds, minutes, corpus, apart)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folder = Path(folder or scratch)
        results = Path(results or Path(scratch) / "race.jsonl")
        if results.suffix != ".jsonl":
            raise FlashLMError(
                f"results are JSON lines, so their file must end in .jsonl, not be {results.name!r}"
            )
        require_writable(results.parent)

        done = {}
        for turn, (key, (entrant, experiment)) in enumerate(planned.items(), 1):
            done |= {record.key: record for record in read_records(results)}
            if key in done:
                continue
            seed = experiment.recipe.seed
            notice(f"run {turn} of {len(planned)}: {entrant.name}, seed {seed}")
            named = {"key": key, "entrant": entrant.name, "seed": seed, "minutes": minutes}
            measure = _run_apart if apart else _run
            record = named | {"corpus": corpus.name} | measure(experiment, folder / key)
            append_json_line(results, record)
            done[key] = RaceRecord.from_dict(record)

    # The same run may have had another name in an earlier race.
    return [replace(done[key], entrant=entrant.name) for key, (entrant, _) in planned.items()]


def _plan(
    entrants: Sequence[str | Entrant],
    seeds: Sequence[int],
    minutes: float,
    corpus: Corpus,
    apart: bool,
) -> dict[str, tuple[Entrant, Experiment]]:
    """Return the runs of a race by their keys, in order; refuse what cannot run."""
    if isinstance(entrants, str | Entrant):
        entrants = [entrants]
    entrants = [Entrant.parse(one) if isinstance(one, str) else one for one in entrants]
    text = corpus.source if apart else corpus
    if text is None:
        raise FlashLMError("text given as strings stays in this process: race with apart=False")

    planned = {}
    for seed, entrant in itertools.product(seeds, entrants):
        if apart:
            _require_importable(entrant)
        microbatch_size(entrant.model)
        recipe = TrainConfig(hours=minutes / 60, seed=seed, **entrant.recipe)
        asked = {"model": asdict(entrant.model), "training": asdict(recipe), "corpus": corpus.key}

        # Parts of one's own are told apart by their names and that of the entrant.
        if (entrant.build_model, entrant.build_optimizer) != (FlashLM, build_optimizer):
            parts = (entrant.build_model, entrant.build_optimizer)
            asked["parts"] = [entrant.name, *map(_place_of, parts)]
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        if key in planned:
            raise FlashLMError(
                f"{entrant.name} with seed {seed} would run twice: name every entrant and seed once"
            )
        experiment = Experiment(
            text, entrant.model, recipe, entrant.build_model, entrant.build_optimizer
        )
        planned[key] = (entrant, experiment)
    if not planned:
        raise FlashLMError("nobody races: name at least one entrant and one seed")
    return planned


def _require_importable(entrant: Entrant) -> None:
    """Raise FlashLMError if another process could not import a part of an entrant."""
    places = dict(own_mixers(entrant.model))
    for part in (entrant.build_model, entrant.build_optimizer):
        place = _place_of(part)
        places[place.partition(":")[2]] = place

    for name, place in places.items():
        if place.startswith("__main__:") or "<" in place:
            raise FlashLMError(
                f"{name} is defined in this program, where other processes cannot import it: "
                "race with apart=False, or put it into a module"
            )


def _place_of(part: Callable) -> str:
    """Return where a class or a function is defined, "module:name"."""
    while isinstance(part, functools.partial):
        part = part.func
    return f"{part.__module__}:{getattr(part, '__qualname__', type(part).__qualname__)}"


# ---- one run ----


def _run(experiment: Experiment, folder: Path) -> dict:
    """Train, score the best weights on the validation split, and return what is recorded."""
    text = experiment.prepare()
    recipe = experiment.recipe

    # Compile before the clock starts, as an earlier run would have.
    long_enough = recipe.hours * 3600 >= MIN_SECONDS_TO_COMPILE
    if recipe.compile or (recipe.compile is None and long_enough):
        config = replace(experiment.model, vocabulary_size=len(text.vocabulary))
        compile_network(experiment.build_model(config), recipe.bfloat16)

    report = experiment.run(folder)
    if report.stopped_by == StopReason.INTERRUPT:
        raise KeyboardInterrupt
    stories = text.held_out(SCORED_STORIES)
    score = evaluate(report.model, stories)
    (folder / LAST).unlink()  # the largest file, and no run goes on from it

    # The same now as when it is read from the file.
    plain = report.as_dict()
    model = report.config.model
    plain |= {
        "parameters": asdict(count_parameters(model)),
        "packed_bytes": packed_bytes(model),
        "validation": plain["history"]["valid"],
        "score": asdict(score),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    record = {f.name: plain[f.name] for f in fields(RaceRecord) if f.name in plain}
    return json.loads(json.dumps(record))


def _run_apart(experiment: Experiment, folder: Path) -> dict:
    """Run in a fresh process; return what it recorded."""
    # It knows nothing of this process: neither what was compiled nor which mixers there are.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    mixers = own_mixers(experiment.model)
    process = context.Process(target=_run_and_send, args=(sender, experiment, folder, mixers))
    try:
        process.start()
        sender.close()
        answer = receiver.recv()
    except EOFError:
        process.join()
        raise FlashLMError(
            f"the run in {folder} left no result (exit status {process.exitcode})"
        ) from None
    except KeyboardInterrupt:
        if process.pid:
            process.terminate()
            process.join()
        raise

    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _run_and_send(
    sender: Connection, experiment: Experiment, folder: Path, mixers: dict[str, str]
) -> None:
    """Do a run in this process, and send its record, or the error that ended it."""
    try:
        setup(show=False)
        for name, place in mixers.items():
            register_mixer(name, place)

        answer = _run(experiment, folder)
    except (FlashLMError, KeyboardInterrupt) as error:
        answer = type(error)(*error.args)
    sender.send(answer)


def split_entrants(text: str) -> list[str]:
    """Split "A,B:mixers=[conv,mine]" at the commas between entrants, not at those of lists."""
    return re.split(r",(?![^\[]*\])", text)
