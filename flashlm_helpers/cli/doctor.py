"""flashlm doctor: what this machine can do, what is missing, and what each finding implies."""

import argparse
import importlib.metadata
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil
import torch

from flashlm_helpers.cli.common import choose_preset
from flashlm_helpers.config import PRESETS, FlashLMError, TrainConfig
from flashlm_helpers.experiments.size import count_parameters
from flashlm_helpers.machine.compiler import has_cxx_compiler
from flashlm_helpers.machine.files import project_dir
from flashlm_helpers.machine.hardware import GIB, allowed_cores, describe_hardware, usable_cores
from flashlm_helpers.machine.measuring import measure_batches
from flashlm_helpers.machine.numbers import has_bfloat16
from flashlm_helpers.machine.threads import FOLLOWER, MARGIN, Usage
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer, optimizer_step, step_memory
from flashlm_helpers.runtime.bolt import RuntimeUnavailable, library
from flashlm_helpers.sources.hub import HUB, open_split

PACKAGE = "flashlm-notebooks"  # as pip knows it
MEASURING_SECONDS = 60.0


@dataclass(frozen=True)
class Finding:
    """Something that was looked at: what it is like here, and what follows from that."""

    name: str
    found: str
    implies: str


def add_parser(commands) -> None:
    """Add the command and its flags."""
    parser = commands.add_parser("doctor", help="what this machine can do, and what is missing")
    parser.add_argument("--clean", action="store_true", help="delete the caches in data/ first")
    parser.add_argument(
        "--measure", action="store_true", help="also try threads and batches, for up to a minute"
    )


def run(args: argparse.Namespace) -> dict:
    """Look at the machine, and print a table of findings."""
    if args.clean:
        clean_caches()
    findings = []
    for look in (processor, cores, memory, cxx_compiler, c_runtime, versions, caches, hub):
        findings.append(look())
        if not args.json:
            print(describe(findings[-1]), flush=True)

    # Last, because it takes longest.
    result = {"findings": [asdict(finding) for finding in findings]}
    if args.measure:
        result["measured"] = []
        for row in measure():
            result["measured"].append(row)
            if not args.json:
                print(describe(as_finding(row)), flush=True)
    return result


def describe(finding: Finding) -> str:
    """Return a finding in two lines."""
    return f"{finding.name:<13} {finding.found}\n{'':<13} {finding.implies}"


def as_finding(row: dict) -> Finding:
    """Return a row of measure() in words."""
    found = f"{row['tokens_per_second']:,} tokens/s"
    threads = "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return Finding("measured", found, f"trained eagerly, {threads}, batch {row['batch']}")


# ---- the machine ----


def processor() -> Finding:
    """Look at the processor and its number formats."""
    machine = describe_hardware()
    if has_bfloat16():
        implies = "matmuls in bfloat16, about three times as fast as in float32"
    else:
        implies = "it has no bfloat16, so training computes in float32, which is slower"
    capability = torch.backends.cpu.get_cpu_capability()
    return Finding("processor", f"{machine['processor']}, {capability}", implies)


def cores() -> Finding:
    """Look at who uses the cores at this moment."""
    before = Usage.now()
    time.sleep(1.0)
    others = Usage.now().others_since(before)

    # Training asks the same question once per second.
    usable = usable_cores()
    implies = f"training takes up to {usable} threads"
    if others > MARGIN:
        implies += ", and fewer while other programs are that busy"
    return Finding(
        "cores",
        f"{usable} usable; other programs use {others:.1f} of {len(allowed_cores())} now",
        implies,
    )


def memory() -> Finding:
    """Look at which presets can be trained in the memory that is free."""
    free = psutil.virtual_memory().available
    fitting = []
    for name, config in PRESETS.items():
        if not config.ternary:
            continue  # a float twin needs as much as its model

        # Weights, gradients, and two moments of AdamW; then what a step needs.
        fixed = 16 * count_parameters(config).total
        if fixed + step_memory(config, 1) <= free:
            fitting.append(name)
    return Finding(
        "memory",
        f"{free / GIB:.1f} GiB free",
        f"enough to train {', '.join(fitting) or 'no preset'}",
    )


def cxx_compiler() -> Finding:
    """Look for the compiler that torch.compile needs."""
    if has_cxx_compiler():
        return Finding("C++ compiler", "found", "runs of two minutes or more are compiled")
    implies = "training runs eagerly; g++ or clang++ would make it a third faster"
    return Finding("C++ compiler", "not found", implies)


def c_runtime() -> Finding:
    """Try to build and load bolt.c."""
    try:
        library()
    except RuntimeUnavailable as error:
        return Finding("C runtime", str(error), "PyTorch computes instead, more slowly")
    return Finding("C runtime", "builds and loads", "packed models run in C")


# ---- what is installed, kept and reachable ----


def versions() -> Finding:
    """Compare what is installed with what requirements.txt names."""
    other = []
    try:
        requirements = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        advice = "install it with pip install -e ."
        return Finding("versions", "the package is not installed, only on the path", advice)
    for line in requirements:
        match = re.match(r"([\w.-]+)==([\w.]+)", line)
        if match:
            name, pinned = match.groups()
            try:
                installed = importlib.metadata.version(name).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                installed = "missing"
            if installed != pinned:
                other.append(f"{name} {installed} (not {pinned})")

    # Other versions may well work, but these are what is tested.
    if other:
        return Finding("versions", ", ".join(other), "pip install -e . brings the tested ones")
    return Finding("versions", "as in requirements.txt", "what the tests were run with")


def caches() -> Finding:
    """Add up what data/ and checkpoints/ hold."""
    sizes = []
    for name in ("data", "checkpoints"):
        folder = project_dir() / name
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        sizes.append(f"{folder} {size / 1e6:,.0f} MB")
    implies = "flashlm doctor --clean deletes what is in data/, which is built anew when needed"
    return Finding("caches", ", ".join(sizes), implies)


def clean_caches() -> None:
    """Delete the caches in data/, and nothing that is not made by this program."""
    folder = project_dir() / "data"
    for pattern in ("*.tokens", "*-vocabulary-*.json", ".*.partial"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for name in ("compiled", "matplotlib"):
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            shutil.rmtree(folder / name, ignore_errors=True)


def hub() -> Finding:
    """Ask the hub for a first story of TinyStories."""
    try:
        open_split(HUB["tinystories"], "train")
    except FlashLMError as error:
        implies = "without --text-dir, training takes the built-in corpus"
        return Finding("hub", str(error), implies)
    return Finding("hub", "it answers", "training streams TinyStories from it")


# ---- measured ----


def measure() -> Iterator[dict]:
    """Train copies of this machine's preset with several threads and batches; yields rates."""
    config = PRESETS[choose_preset()]
    recipe = TrainConfig(hours=1.0, bfloat16=has_bfloat16())
    network = FlashLM(config)
    optimizer = build_optimizer(network, recipe)
    length = config.sequence_length
    ids = torch.randint(0, config.vocabulary_size, (4096 // length + 1, length + 1))

    def step(batch: int) -> None:
        rows = ids[:batch]
        optimizer_step(network, optimizer, rows[:, :-1], rows[:, 1:], recipe)

    # One thread, all of them, and half as many.
    most = usable_cores()
    counts = sorted({1, max(1, most // 2), most})
    batches = (2048 // length, 4096 // length)
    for threads in counts:
        with FOLLOWER.hold(threads):
            speeds = measure_batches(step, batches, MEASURING_SECONDS / len(counts))
        for batch, speed in speeds.items():
            rate = round(speed * length)
            yield {"threads": threads, "batch": batch, "tokens_per_second": rate}
