"""How fast a model writes, by every way there is: `make bench`.

All ways live in one process and take turns; medians are reported, and rates are compared within one run only: machines
are shared and noisy. One thread each, but for the last. Needs a trained model, since an untrained one guesses so evenly
that choosing a token takes longer than it ever does in use: by default it trains one for a minute.
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

from flashlm_helpers.checkpoint import BEST, load_model
from flashlm_helpers.config import PRESETS, TrainConfig
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.generation import generate
from flashlm_helpers.hardware import describe_hardware
from flashlm_helpers.runtime.bolt import COMPILERS, SOURCE, Bolt
from flashlm_helpers.runtime.compiled import CompiledModel
from flashlm_helpers.runtime.onnx import OnnxModel, save_onnx
from flashlm_helpers.runtime.packed import save_packed
from flashlm_helpers.tokens import prepare
from flashlm_helpers.training import train

PROMPT_TOKENS, TOKENS, MANY = 16, 200, 64
SETTINGS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
MANY_STORIES = f"C, {MANY} stories at once, all cores"


def trained(preset: str, folder: Path):
    """A model that has learned a little, from the built-in corpus."""
    vocabulary, train_tokens, valid_tokens = prepare(open_corpus("builtin", None, 20_000),
                                                     PRESETS[preset].vocabulary_size)
    train(PRESETS[preset], TrainConfig(hours=1 / 60), vocabulary, train_tokens, valid_tokens, folder)
    return load_model(folder / BEST)


def ways_of(model, vocabulary, prompt: str, folder: Path) -> dict:
    """Name of each way: a function from a seed to how many tokens it wrote."""
    plain = PlainFlashLM(model.config)
    plain.load_state_dict(model.state_dict())
    for name, low_bit in (("float.onnx", False), ("small.onnx", True)):
        save_onnx(folder / name, model, vocabulary, low_bit)
    save_packed(folder / "model.flashlm", model, vocabulary)
    bolt = Bolt(folder / "model.flashlm")
    onnx = {name: OnnxModel(folder / name, threads=1) for name in ("float.onnx", "small.onnx")}

    def written(stories) -> int:
        return sum(len(story.ids) + story.finished for story in stories)

    def stream(model):
        return lambda seed: written(generate(model, vocabulary, prompt, tokens=TOKENS, seed=seed, **SETTINGS))

    return {
        "plain: the whole window for each token": lambda seed: plain_generate(plain, vocabulary, prompt, TOKENS, seed,
                                                                              **SETTINGS),
        "PyTorch, streaming": stream(model),
        "PyTorch, streaming, compiled": stream(CompiledModel(model)),
        "ONNX Runtime, float32": stream(onnx["float.onnx"]),
        "ONNX Runtime, 2 and 8 bits": stream(onnx["small.onnx"]),
        "C": lambda seed: written(bolt.generate(prompt, TOKENS, seed=seed, **SETTINGS)),
        MANY_STORIES: lambda seed: written(bolt.generate([prompt] * MANY, TOKENS, seed=seed, **SETTINGS)),
    }


def rates(ways: dict, repeats: int) -> dict[str, dict]:
    """Tokens a second of each way, in turns; the first turn warms up."""
    measured = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, write in ways.items():
            began = time.perf_counter()
            tokens = write(turn)
            measured[name].append(tokens / (time.perf_counter() - began))
    return {name: {"tokens_per_second": median(values[1:]), "lowest": min(values[1:]), "highest": max(values[1:])}
            for name, values in measured.items()}


def late_over_early(path: Path, repeats: int, early: int = 100, late: int = 10_000, steps: int = 100) -> float:
    """How much longer a token takes at position `late` than at position `early`."""
    bolt, ratios = Bolt(path), []
    ids, logits = np.array([5], np.uint16), np.empty(bolt.vocabulary_size + 16, np.float32)
    for _ in range(repeats):
        seconds = {}
        with bolt._state() as state:
            for position in range(late + steps):
                if position in (early, late):
                    began = time.perf_counter()
                bolt._bolt.bolt_step(state, ids, logits)
                if position + 1 - steps in (early, late):
                    seconds[position + 1 - steps] = time.perf_counter() - began
        ratios.append(seconds[late] / seconds[early])
    return median(ratios)


def resident(path: Path, prompt: str, folder: Path) -> int | None:
    """Bytes of memory that the stand-alone program needs at most; None where the system does not tell."""
    program = folder / "bolt"
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    subprocess.run([compiler, "-O3", str(SOURCE), "-o", str(program)], check=True)
    most = 0
    for seed in range(20):
        process = subprocess.Popen([program, path, prompt, "-s", str(seed)], stdout=subprocess.DEVNULL)
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return None
            if f"Name:\t{program.name}\n" in status and "VmHWM" in status:  # not the copy of Python that it was before
                most = max(most, 1024 * int(status.split("VmHWM:")[1].split()[0]))
    return most


def main() -> None:
    """Measure and print the table; write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="v4-small", choices=PRESETS)
    parser.add_argument("--checkpoint", help="a trained model instead of the preset")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/inference-PRESET.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, vocabulary = load_model(args.checkpoint) if args.checkpoint else trained(args.preset, folder / "run")
        preset = model.config.name
        torch.set_num_threads(1)
        prompt = vocabulary.decode(vocabulary.encode(
            "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog."
        )[:PROMPT_TOKENS])
        measured = rates(ways_of(model, vocabulary, prompt, folder), args.repeats)
        packed = folder / "model.flashlm"
        sizes = {file.name: file.stat().st_size for file in (packed, folder / "float.onnx", folder / "small.onnx")}
        result = {"preset": preset, "hardware": describe_hardware(), "rates": measured, "kernels": Bolt(packed).kernels,
                  "bytes": sizes, "late_over_early": late_over_early(packed, args.repeats),
                  "resident_bytes": resident(packed, prompt, folder)}
    plain, *_ = (rate["tokens_per_second"] for rate in measured.values())
    print(f"{preset}: prompt of {PROMPT_TOKENS} tokens, up to {TOKENS} written; {args.repeats} rounds")
    for way, rate in measured.items():
        print(f"  {way:<40} {rate['tokens_per_second']:>9,.0f} tokens/s ({rate['lowest']:,.0f} to "
              f"{rate['highest']:,.0f})  {rate['tokens_per_second'] / plain:6.1f}x")
    single, many = (measured[way]["tokens_per_second"] for way in ("C", MANY_STORIES))
    print(f"  {MANY} stories at once over one: {many / single:.2f}x; position 10,000 over 100: "
          f"{result['late_over_early']:.3f}x the time; resident memory of the program: "
          f"{(result['resident_bytes'] or 0) / 1e6:.1f} MB; kernels: {result['kernels']}")
    for name, size in sizes.items():
        print(f"  {name:<14} {size:>12,} bytes")
    out = args.out or Path(__file__).parent / "results" / f"inference-{preset}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
