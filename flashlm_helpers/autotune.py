"""Autotune a run to this machine: number format, compilation, and a batch by a short measurement.

The first two change nothing but rounding. A TrainConfig's `bfloat16`, `compile` and `batch` are
None until autotune() has looked at the machine and at the time there is.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from flashlm_helpers.config import TrainConfig
from flashlm_helpers.machine.compiler import compile_failure, compile_obstacle
from flashlm_helpers.machine.measuring import measure_batches
from flashlm_helpers.machine.notices import notice
from flashlm_helpers.machine.numbers import has_bfloat16
from flashlm_helpers.machine.threads import follow
from flashlm_helpers.optimization import accumulate_gradient, optimizer_step
from flashlm_helpers.tokens import TokenFile

DEFAULT_BATCH = 8  # sequences per step where nothing is measured
CANDIDATE_TOKENS = (2048, 4096)  # per step, of the batches that are measured
MEASURING_SHARE = 0.05  # of the run's time, at most
FAST_ENOUGH = 0.7  # of the best speed; slower batches are out
ENOUGH_STEPS = 1_200  # in runs of fewer steps a smaller batch was better (see the ablations)
MIN_SECONDS_TO_COMPILE = 120.0  # compiling takes half a minute the first time


def compile_network(network: nn.Module, bfloat16: bool | None) -> str | None:
    """Compile a network's parts, after a copy of it has made a step with them.

    Returns None, or one line on why the network was left eager.
    """
    # Where it cannot work, do not even begin.
    if obstacle := compile_obstacle():
        return obstacle

    # One step of a copy, in which a failure is an error.
    torch._inductor.config.cpp.dynamic_threads = True  # their number may change during a run
    torch._dynamo.config.recompile_limit = 64  # programs per function: by mixer, batch and use
    trial = copy.deepcopy(network)
    ids = torch.ones(DEFAULT_BATCH, network.config.sequence_length, dtype=torch.long)
    strict = torch._dynamo.config.patch(suppress_errors=False, fail_on_recompile_limit_hit=True)
    try:
        trial.compile()
        with strict:
            accumulate_gradient(trial, ids, ids, bfloat16)
    except Exception as error:  # a compiler that exists may still fail, and nothing depends on it
        return compile_failure(error)

    # What scoring needs is compiled later; if that fails, it runs eagerly.
    torch._dynamo.config.suppress_errors = True
    network.compile()
    return None


def choose_batch(speeds: dict[int, float], seconds: float) -> int:
    """Choose the largest batch that is fast enough and leaves the run enough steps.

    speeds: sequences per second by batch. seconds: the length of the run. If no batch leaves
    enough steps, the smallest of the fast ones is chosen.
    """
    # Slow batches are out.
    threshold = FAST_ENOUGH * max(speeds.values())
    fast = sorted(batch for batch, speed in speeds.items() if speed >= threshold)

    # A larger batch makes better steps, as long as there are enough of them.
    chosen = fast[0]
    for batch in fast:
        if speeds[batch] / batch * seconds >= ENOUGH_STEPS:
            chosen = batch
    return chosen


def autotune(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    tokens: TokenFile,
    seconds: float,
) -> TrainConfig:
    """Decide what `config` leaves open, compile the network if that pays, and say so on stderr.

    seconds: the expected length of the run. The batch is measured only if the budget is in hours
    alone: with epochs, the same seed must make the same steps on every machine.
    Returns the config with nothing left open. The run's random numbers are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        # The number format follows the processor.
        if config.bfloat16 is None:
            config = replace(config, bfloat16=has_bfloat16())

        # Compile a run that is long enough to repay it.
        long_enough = seconds >= MIN_SECONDS_TO_COMPILE
        reason = None
        if config.compile or (config.compile is None and long_enough):
            reason = compile_network(network, config.bfloat16)
        elif config.compile is None:
            reason = "too short a run to repay compiling"
        config = replace(config, compile=getattr(network, "compiled", False))

        # Measure the batch where that is allowed and there is time for it.
        speeds = {}
        if config.batch is None:
            if long_enough and config.epochs is None:
                step = _trial_step(network, optimizer, config, tokens)
                length = network.config.sequence_length
                batches = [max(1, count // length) for count in CANDIDATE_TOKENS]
                speeds = measure_batches(step, batches, MEASURING_SHARE * seconds)
            batch = choose_batch(speeds, seconds) if speeds else DEFAULT_BATCH
            config = replace(config, batch=batch)

    notice(_describe(config, reason, speeds, network.config.sequence_length))
    return config


def _trial_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    tokens: TokenFile,
) -> Callable[[int], object]:
    """Return a function that makes a step with a batch of so many sequences, on copies."""
    # Together, because the optimizer refers to the network's parameters.
    network, optimizer = copy.deepcopy((network, optimizer))
    if config.compile:
        network.compile()

    def step(batch: int) -> None:
        follow()
        length = network.config.sequence_length
        inputs, targets = tokens.batch(0, batch, length, config.seed)
        optimizer_step(network, optimizer, inputs, targets, config)

    return step


def _describe(
    config: TrainConfig, reason: str | None, speeds: dict[int, float], length: int
) -> str:
    # How it computes, on how many threads, and with which batch.
    threads = torch.get_num_threads()
    parts = [
        "bfloat16 matmuls" if config.bfloat16 else "float32 matmuls",
        ("compiled" if config.compile else "eager") + (f" ({reason})" if reason else ""),
        "1 thread" if threads == 1 else f"{threads} threads",
        f"batch {config.batch}",
    ]

    # What the choice of the batch was based on.
    measured = [f"{batch}: {speed * length:,.0f}" for batch, speed in speeds.items()]
    if measured:
        parts.append(f"tokens/s by batch {', '.join(measured)}")
    return ", ".join(parts)
