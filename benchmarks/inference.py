"""Measure how fast a model writes, by every way there is: `make bench`.

All ways run in one process and take turns. Medians are reported, and rates are compared within one
run only: machines are shared and noisy. One thread each, except for the last. It needs a trained
model, since an untrained one guesses so evenly that choosing a token takes longer than it ever
does in use: by default it trains one for a minute.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from plain import PlainFlashLM, plain_generate

import flashlm_helpers as fl
from flashlm_helpers.config import PRESETS
from flashlm_helpers.machine.hardware import describe_hardware
from flashlm_helpers.runtime.bolt import COMPILERS, SOURCE, Bolt
from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx
from flashlm_helpers.runtime.packed import save_packed

PROMPT_TOKENS = 16
TOKENS = 200
MANY = 64
SETTINGS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
OPENING = (
    "Once upon a time, there was a little girl named Lily. "
    "She loved to play outside in the park with her dog."
)
MANY_STORIES = f"C, {MANY} stories at once, all cores"


def trained(preset: str, folder: Path) -> fl.PyTorchModel:
    """Return a model that has learned a little, from the built-in corpus."""
    corpus = fl.open_corpus("builtin", 20_000)
    return fl.Experiment(corpus, preset, fl.TrainConfig(hours=1 / 60)).run(folder).model


def ways_of(model: fl.PyTorchModel, prompt: str, folder: Path) -> dict:
    """Return every way to write, by name: a function from a seed to how many tokens it wrote."""
    plain = PlainFlashLM(model.network.config)
    plain.load_state_dict(model.network.state_dict())
    save_onnx(folder / "float.onnx", model, low_bit=False)
    save_onnx(folder / "small.onnx", model)
    save_packed(folder / "model.flashlm", model)
    bolt = Bolt(folder / "model.flashlm")

    def writer(way: fl.LanguageModel, prompts: list[str]):
        def write(seed: int) -> int:
            stories = fl.generate(way, prompts, tokens=TOKENS, seed=seed, **SETTINGS)
            return sum(len(story.ids) + story.finished for story in stories)

        return write

    def write_plainly(seed: int) -> int:
        return plain_generate(plain, model.vocabulary, prompt, TOKENS, seed, **SETTINGS)

    return {
        "plain: the whole window for each token": write_plainly,
        "PyTorch, streaming": writer(model, [prompt]),
        "ONNX Runtime, float32": writer(OnnxModel(folder / "float.onnx", threads=1), [prompt]),
        "ONNX Runtime, 2 and 8 bits": writer(OnnxModel(folder / "small.onnx", threads=1), [prompt]),
        "C": writer(bolt, [prompt]),
        MANY_STORIES: writer(bolt, [prompt] * MANY),
    }


def rates(ways: dict, repeats: int) -> dict[str, dict]:
    """Measure the tokens per second of each way, in turns; the first turn warms up."""
    measured = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, write in ways.items():
            began = time.perf_counter()
            tokens = write(turn)
            measured[name].append(tokens / (time.perf_counter() - began))

    results = {}
    for name, values in measured.items():
        warm = values[1:]
        spread = {"lowest": min(warm), "highest": max(warm)}
        results[name] = {"tokens_per_second": median(warm)} | spread
    return results


def late_over_early(
    path: Path, repeats: int, early: int = 100, late: int = 10_000, steps: int = 100
) -> float:
    """Measure how much longer a token takes at position `late` than at position `early`."""
    bolt = Bolt(path)
    ids = np.array([5], np.uint16)
    logits = np.empty(len(bolt.vocabulary) + 16, np.float32)
    ratios = []
    for _ in range(repeats):
        seconds = np.empty(late + steps)  # of every position
        with bolt._state() as state:
            for position in range(len(seconds)):
                began = time.perf_counter()
                bolt._bolt.bolt_step(state, ids, logits)
                seconds[position] = time.perf_counter() - began
        before = seconds[early : early + steps].sum()
        after = seconds[late : late + steps].sum()
        ratios.append(after / before)
    return median(ratios)


def resident(path: Path, prompt: str, folder: Path) -> int | None:
    """Measure the bytes of memory that the program needs; None where the system does not say."""
    program = folder / "bolt"
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    subprocess.run([compiler, "-O3", str(SOURCE), "-o", str(program)], check=True)

    most = 0
    for seed in range(20):
        command = [program, path, prompt, "-s", str(seed)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return None
            # Until it has started, it is still a copy of this Python.
            started = f"Name:\t{program.name}\n" in status
            if started and "VmHWM" in status:
                kibibytes = int(status.split("VmHWM:")[1].split()[0])
                most = max(most, 1024 * kibibytes)
    return most


def main() -> None:
    """Measure, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="v4-small", choices=PRESETS)
    parser.add_argument("--checkpoint", help="a trained model instead of the preset")
    parser.add_argument("--repeats", type=int, default=7)
    default = "default: benchmarks/results/inference-PRESET.json"
    parser.add_argument("--out", type=Path, help=default)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.checkpoint:
            model = fl.load(args.checkpoint)
        else:
            model = trained(args.preset, folder / "run")
        torch.set_num_threads(1)
        ids = model.vocabulary.encode(OPENING)[:PROMPT_TOKENS]
        prompt = model.vocabulary.decode(ids)
        result = measure(model, prompt, folder, args.repeats)

    report(result, args.repeats)
    preset = result["preset"]
    out = args.out or Path(__file__).parent / "results" / f"inference-{preset}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


def measure(model: fl.PyTorchModel, prompt: str, folder: Path, repeats: int) -> dict:
    """Measure rates, sizes and memory of one model by every way."""
    measured = rates(ways_of(model, prompt, folder), repeats)
    packed = folder / "model.flashlm"
    files = (packed, folder / "float.onnx", folder / "small.onnx")
    return {
        "preset": model.network.config.name,
        "hardware": describe_hardware(),
        "rates": measured,
        "kernels": Bolt(packed).kernels,
        "bytes": {file.name: file.stat().st_size for file in files},
        "late_over_early": late_over_early(packed, repeats),
        "resident_bytes": resident(packed, prompt, folder),
    }


def report(result: dict, repeats: int) -> None:
    """Print what was measured."""
    speeds = {way: rate["tokens_per_second"] for way, rate in result["rates"].items()}
    plain = next(iter(speeds.values()))
    limits = f"prompt of {PROMPT_TOKENS} tokens, up to {TOKENS} written"
    print(f"{result['preset']}: {limits}; {repeats} rounds")
    for way, rate in result["rates"].items():
        spread = f"({rate['lowest']:,.0f} to {rate['highest']:,.0f})"
        ratio = speeds[way] / plain
        print(f"  {way:<40} {speeds[way]:>9,.0f} tokens/s {spread}  {ratio:6.1f}x")

    # Many stories over one, late over early, and what all of it needs.
    print(f"  {MANY} stories at once over one: {speeds[MANY_STORIES] / speeds['C']:.2f}x")
    print(f"  position 10,000 over 100: {result['late_over_early']:.3f}x the time")
    memory = (result["resident_bytes"] or 0) / 1e6
    print(f"  resident memory of the program: {memory:.1f} MB; kernels: {result['kernels']}")
    for name, size in result["bytes"].items():
        print(f"  {name:<14} {size:>12,} bytes")


if __name__ == "__main__":
    main()
