"""How training is carried out on this machine, decided once: number format, compilation, batch.

The first two change nothing but rounding. TrainConfig's `bfloat16`, `compile` and `batch` are None until decide() has
looked at the machine and the time there is; values given by hand turn a part off, or on.
"""

import copy
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from statistics import median

import torch

from flashlm_helpers.config import TrainConfig, project_dir
from flashlm_helpers.files import one_line
from flashlm_helpers.hardware import has_bfloat16
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import accumulate_gradient, make_optimizer, optimizer_step
from flashlm_helpers.tokens import TokenFile

DEFAULT_BATCH = 8  # sequences a step where nothing is measured
MEASURED_TOKENS = (2048, 4096)  # tokens a step of the batches that are measured
MEASURING_SHARE = 0.05  # of the run's time, at most
FAST_ENOUGH = 0.7  # of the best speed: slower batches are out
ENOUGH_STEPS = 1_200  # of a run: with as many a larger batch was better, with fewer a smaller one (notebook 11)
COMPILE_SECONDS = 120.0  # expected length of a run from which compiling repays: it takes half a minute the first time
COMPILERS = ("g++", "clang++", "c++", "cl")


def keep_programs() -> None:
    """Keep what torch.compile builds in data/compiled, for later runs; PyTorch's own choice is a temporary folder.

    To be called before the first optimizer is made: that loads the compiler, which asks for its folder only once.
    Leaves PyTorch's choice where the folder cannot be written, or has a space in its name, which breaks its commands.
    """
    folder = (project_dir() / "data" / "compiled").resolve()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK) and folder.is_dir() and " " not in str(folder):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def missing_compiler() -> str | None:
    """What a C++ compiler would bring, if there is none."""
    if any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", *COMPILERS)):
        return None
    return "a C++ compiler, such as g++, would make it a third faster"


def compile_failure(error: Exception) -> str:
    """One line on what torch.compile raised."""
    cause = re.search(r"\berror: (.+)", str(error))  # a compiler's message stands below its long command
    return f"torch.compile failed: {(cause[1] if cause else one_line(error))[:160]}"


def compile_model(model: FlashLM, bfloat16: bool) -> str | None:
    """Compile the model's parts, once they have worked on a copy.

    Returns None, or one line on why the model was left eager.
    """
    if reason := missing_compiler():
        return reason
    torch._dynamo.config.recompile_limit = 64  # programs of one function: by kind of mixer, batch, and use
    trial = copy.deepcopy(model)
    ids = torch.ones(DEFAULT_BATCH, model.config.sequence_length, dtype=torch.long)
    try:
        trial.compile()
        with torch._dynamo.config.patch(suppress_errors=False, fail_on_recompile_limit_hit=True):
            accumulate_gradient(trial, ids, ids, bfloat16)
    except Exception as error:  # a compiler that is there need not work, and nothing depends on it
        return compile_failure(error)
    torch._dynamo.config.suppress_errors = True  # scoring is compiled later: should that fail, it is eager
    model.compile()
    return None


def measure_batches(step: Callable[[int], object], batches: Sequence[int], limit: float, repeats: int = 2,
                    clock: Callable[[], float] = time.perf_counter) -> dict[int, float]:
    """Sequences per second of step(batch), by batch: medians of interleaved repeats.

    limit: seconds that measuring may take; where the first step shows that it would take longer, nothing is returned.
    """
    began = clock()
    step(batches[0])
    if (clock() - began) * (repeats + 1) * sum(batches) / batches[0] > limit:
        return {}
    seconds: dict[int, list[float]] = {batch: [] for batch in batches}
    for turn in range(repeats + 1):
        for batch, taken in seconds.items():
            began = clock()
            step(batch)
            if turn:  # the first time only warms up
                taken.append(clock() - began)
    return {batch: batch / median(taken) for batch, taken in seconds.items()}


def choose_batch(speeds: dict[int, float], seconds: float) -> int:
    """Of the batches that are fast enough, the largest that leaves a run enough steps, or else the smallest.

    speeds: sequences per second by batch. seconds: the length of the run.
    """
    fast = [batch for batch, speed in speeds.items() if speed >= FAST_ENOUGH * max(speeds.values())]
    return max((batch for batch in fast if speeds[batch] / batch * seconds >= ENOUGH_STEPS), default=min(fast))


def decide(model: FlashLM, config: TrainConfig, tokens: TokenFile, seconds: float) -> TrainConfig:
    """Fill in what `config` leaves open, compile the model if that pays, and say so in one line on stderr.

    seconds: the expected length of the run. A batch is measured only for a budget in hours alone: with one in epochs
    the same seed must give the same steps on every machine. Returns the config with nothing left open, and leaves the
    random numbers of the run alone.
    """
    with torch.random.fork_rng(devices=[]):
        return _decide(model, config, tokens, seconds)


def _decide(model: FlashLM, config: TrainConfig, tokens: TokenFile, seconds: float) -> TrainConfig:
    long, reason, speeds = seconds >= COMPILE_SECONDS, None, {}
    config = replace(config, bfloat16=has_bfloat16() if config.bfloat16 is None else config.bfloat16)
    if config.compile or (config.compile is None and long):
        reason = compile_model(model, config.bfloat16)
    elif config.compile is None:
        reason = "too short a run to repay compiling"
    if config.batch is None and config.epochs is None and long:
        trial = copy.deepcopy(model)
        if model.compiled:
            trial.compile()
        optimizer, length = make_optimizer(trial, config), model.config.sequence_length
        speeds = measure_batches(
            lambda batch: optimizer_step(trial, optimizer, *tokens.batch(0, batch, length, config.seed), config),
            [max(1, count // length) for count in MEASURED_TOKENS], limit=MEASURING_SHARE * seconds)
        config = replace(config, batch=choose_batch(speeds, seconds) if speeds else None)
    config = replace(config, compile=model.compiled, batch=config.batch or DEFAULT_BATCH)
    measured = ", ".join(f"{batch}: {speed * model.config.sequence_length:,.0f}" for batch, speed in speeds.items())
    print(f"{'bfloat16' if config.bfloat16 else 'float32'} products, {'compiled' if config.compile else 'eager'}"
          f"{f' ({reason})' if reason else ''}, {torch.get_num_threads()} threads, batch {config.batch}"
          f"{f' (tokens/s by batch: {measured})' if measured else ''}", file=sys.stderr)
    return config
