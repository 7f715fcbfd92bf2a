"""How training is carried out on this machine, decided once: number format, compilation, batch.

Nothing here changes what is computed beyond rounding. TrainConfig's `bfloat16`, `compile` and `batch` are None until
decide() has looked at the machine and the time there is; values given by hand turn a part off, or on.
"""

import copy
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch

from flashlm_helpers.config import TrainConfig, project_dir
from flashlm_helpers.files import one_line
from flashlm_helpers.hardware import has_bfloat16
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import accumulate_gradient, make_optimizer, optimizer_step
from flashlm_helpers.tokens import TokenFile

DEFAULT_BATCH, BATCHES = 8, (8, 16, 32)  # sequences a step: where nothing is measured, and what is measured
FAST_ENOUGH = 0.93  # of the best speed: the smallest such batch is taken, small batches learn more from a token
COMPILE_SECONDS = 120.0  # expected length of a run from which compiling repays: it takes half a minute the first time
COMPILERS = ("g++", "clang++", "c++", "cl")


def keep_programs() -> None:
    """Keep what torch.compile builds in data/compiled, for later runs; PyTorch's own choice is a temporary folder.

    To be called before the first optimizer is made: that loads the compiler, which asks for its folder only once.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(project_dir() / "data" / "compiled"))


def compile_model(model: FlashLM, bfloat16: bool) -> str | None:
    """Compile the model's parts, once they have worked on a copy.

    Returns None, or one line on why the model was left eager.
    """
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", *COMPILERS)):
        return "a C++ compiler, such as g++, would make it half as fast again"
    trial = copy.deepcopy(model)
    trial.compile()
    ids = torch.ones(DEFAULT_BATCH, model.config.sequence_length, dtype=torch.long)
    try:
        accumulate_gradient(trial, ids, ids, bfloat16)
    except Exception as error:  # a compiler that is there need not work, and nothing depends on it
        return f"torch.compile failed: {one_line(error)[:120]}"
    torch._dynamo.config.suppress_errors = True  # scoring is compiled later: should that fail, it is eager
    model.compile()
    return None


def measure_batches(step: Callable[[int], object], repeats: int = 2,
                    clock: Callable[[], float] = time.perf_counter) -> dict[int, float]:
    """Sequences per second of step(batch) for every batch of BATCHES: medians of interleaved repeats."""
    seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for turn in range(repeats + 1):
        for batch, taken in seconds.items():
            began = clock()
            step(batch)
            if turn:  # the first time only warms up
                taken.append(clock() - began)
    return {batch: batch / median(taken) for batch, taken in seconds.items()}


def choose_batch(speeds: dict[int, float]) -> int:
    """The smallest batch that is fast enough; speeds: tokens or sequences per second by batch."""
    return min(batch for batch, speed in speeds.items() if speed >= FAST_ENOUGH * max(speeds.values()))


def decide(model: FlashLM, config: TrainConfig, tokens: TokenFile, seconds: float) -> TrainConfig:
    """Fill in what `config` leaves open, compile the model if that pays, and say so in one line on stderr.

    seconds: the expected length of the run. A batch is measured only for a budget in hours: with one in epochs the
    same seed must give the same steps on every machine. Returns the config with nothing left open.
    """
    long, reason, speeds = seconds >= COMPILE_SECONDS, None, {}
    config = replace(config, bfloat16=has_bfloat16() if config.bfloat16 is None else config.bfloat16)
    if config.compile or (config.compile is None and long):
        reason = compile_model(model, config.bfloat16)
    elif config.compile is None:
        reason = "too short a run to repay compiling"
    if config.batch is None and config.hours is not None and long:
        trial = copy.deepcopy(model)
        if model.compiled:
            trial.compile()
        optimizer, length = make_optimizer(trial, config), model.config.sequence_length
        speeds = measure_batches(lambda batch: optimizer_step(
            trial, optimizer, *tokens.batch(0, batch, length, config.seed), config))
        config = replace(config, batch=choose_batch(speeds))
    config = replace(config, compile=model.compiled, batch=config.batch or DEFAULT_BATCH)
    measured = ", ".join(f"{batch}: {speed * model.config.sequence_length:,.0f}" for batch, speed in speeds.items())
    print(f"{'bfloat16' if config.bfloat16 else 'float32'} products, {'compiled' if config.compile else 'eager'}"
          f"{f' ({reason})' if reason else ''}, {torch.get_num_threads()} threads, batch {config.batch}"
          f"{f' (tokens/s by batch: {measured})' if measured else ''}", file=sys.stderr)
    return config
