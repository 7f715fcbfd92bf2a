"""How fast this machine trains, step by step from the plain implementation: `make bench`.

Every variant lives in a process of its own, so that its memory can be read and no setting leaks into another; they take
turns, one at a time, and medians are reported. Rates are compared within one run only: machines are shared and noisy.
Together the processes take about 5 GB of memory for v4-small and 9 GB for v4-large.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from plain import BATCH, PlainFlashLM, plain_optimizer

from flashlm_helpers.config import PRESETS, TrainConfig
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import encode_stories, evaluate, token_nats
from flashlm_helpers.fastpath import compile_model, keep_programs, missing_compiler
from flashlm_helpers.hardware import (
    GIB,
    describe_hardware,
    has_bfloat16,
    keep_freed_memory,
    peak_memory,
    usable_cores,
)
from flashlm_helpers.head import ROWS
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import make_optimizer, optimizer_step
from flashlm_helpers.schedule import learning_rate
from flashlm_helpers.tokens import prepare
from flashlm_helpers.training import Trainer

FAST_BATCH = {"v4-small": 16, "v4-large": 8}
# Each adds one thing to the one before it.
TRAINING = {
    "plain": set(),
    "shifted convolution, head in chunks": {"model"},
    "larger batch, fused AdamW": {"model", "batch"},
    "bfloat16 products": {"model", "batch", "bfloat16"},
    "freed memory kept": {"model", "batch", "bfloat16", "memory"},
    "compiled": {"model", "batch", "bfloat16", "memory", "compile"},
}


def open_text(text_dir: str | None, stories: int = 20_000):
    """(vocabulary, train tokens, valid tokens): of a folder, or of the built-in corpus."""
    return prepare(open_corpus(None if text_dir else "builtin", text_dir, None if text_dir else stories), 10_000)


def training_variant(parts: set, preset: str, text_dir: str | None, bfloat16: bool):
    """A function that does one optimizer step, and the tokens it takes."""
    config, (_, tokens, _) = PRESETS[preset], open_text(text_dir)
    batch = FAST_BATCH.get(preset, 8) if "batch" in parts else BATCH
    train_config = TrainConfig(hours=1, optimizer="adamw", lr=1e-3, batch=batch,
                               bfloat16=bfloat16 and "bfloat16" in parts)
    torch.manual_seed(0)
    model = FlashLM(config)
    if "memory" in parts:
        keep_freed_memory()
    if "model" not in parts:
        weights, model = model.state_dict(), PlainFlashLM(config)
        model.load_state_dict(weights)
    if "compile" in parts and (reason := compile_model(model, train_config.bfloat16)):
        raise SystemExit(reason)
    optimizer = (make_optimizer if "batch" in parts else plain_optimizer)(model, train_config)
    step = iter(range(10**9))
    return (lambda: optimizer_step(model, optimizer, *tokens.batch(next(step), batch, config.sequence_length, 1),
                                   train_config)), batch * config.sequence_length


def products_variant(preset: str, bfloat16: bool):
    """The matrix products of one step and nothing else, in the shapes and number format of the fast path."""
    config = PRESETS[preset]
    positions = FAST_BATCH.get(preset, 8) * config.sequence_length
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    D, H = config.width, config.hidden
    layers = [(positions, D, 2 * D), (positions, D, D), (positions, D, H), (positions, D, H), (positions, H, D)]
    layers = layers * config.blocks + [(ROWS, D, config.vocabulary_size)] * (positions // ROWS)
    kinds = {shape: [torch.randn(size, dtype=dtype) for size in ((shape[0], shape[1]), (shape[2], shape[1]),
                                                                  (shape[0], shape[2]))] for shape in set(layers)}
    keep_freed_memory()

    def step():
        for shape in layers:
            x, weight, gradient = kinds[shape]
            x @ weight.T, gradient @ weight, gradient.T @ x

    return step, positions


def evaluation_variant(way: str, preset: str, text_dir: str | None, bfloat16: bool):
    """A function that scores some real stories, and their tokens."""
    config, (vocabulary, _, valid) = PRESETS[preset], open_text(text_dir)
    sequences = encode_stories(vocabulary, [vocabulary.decode(ids) for ids in valid.sample_stories(128)])
    model = FlashLM(config)
    if way == "plain":
        weights, model = model.state_dict(), PlainFlashLM(config)
        model.load_state_dict(weights)
        windows = torch.tensor([t for s in sequences for t in s.tolist()]).unfold(0, config.sequence_length + 1,
                                                                                    config.sequence_length)

        @torch.no_grad()
        def score():
            for pair in windows.split(BATCH):
                model.loss(pair[:, :-1], pair[:, 1:])

        return score, windows.shape[0] * config.sequence_length
    keep_freed_memory()
    if way == "compiled" and (reason := compile_model(model, bfloat16)):
        raise SystemExit(reason)
    return (lambda: token_nats(model, sequences, bfloat16)), sum(len(s) - 1 for s in sequences)


def start_variant(preset: str, text_dir: str | None) -> None:
    """A run of an hour that is stopped after its first step, as the command line would start it."""
    vocabulary, train_tokens, valid_tokens = open_text(text_dir)

    def stop(progress):
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        try:
            Trainer(PRESETS[preset], TrainConfig(hours=1), vocabulary, train_tokens, valid_tokens, folder).run(stop)
        except KeyboardInterrupt:
            pass


def work(args) -> None:
    """A worker: for every line on stdin, time as many calls as it says and answer in one line of JSON."""
    torch.set_num_threads(usable_cores())
    keep_programs()
    group, name = args.worker.split("/")
    if group == "start":
        start_variant(args.preset, args.text_dir)
        print("{}", flush=True)
        return
    bfloat16 = has_bfloat16() and not args.float32
    if group == "training":
        call, tokens = training_variant(TRAINING[name], args.preset, args.text_dir, bfloat16)
    elif group == "products":
        call, tokens = products_variant(args.preset, bfloat16)
    else:
        call, tokens = evaluation_variant(name, args.preset, args.text_dir, bfloat16)
    for _ in range(3):
        call()
    print(json.dumps({"tokens": tokens}), flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds, "memory": peak_memory()}), flush=True)


class Worker:
    """One variant in a process of its own."""

    def __init__(self, name: str, args):
        command = [sys.executable, __file__, "--worker", name, "--preset", args.preset]
        command += (["--text-dir", args.text_dir] if args.text_dir else []) + ["--float32"] * args.float32
        self.name, self.seconds, began = name, [], time.perf_counter()
        with tempfile.TemporaryFile("w+") as errors:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                            text=True)
            self.ready = json.loads(self.process.stdout.readline() or "null")
            self.started = time.perf_counter() - began
            if self.ready is None:
                self.process.wait()
                errors.seek(0)
                raise SystemExit(f"{name}: {errors.read().strip() or 'ended without a word'}")

    def turn(self, seconds: float) -> None:
        """Take a turn of about so many seconds."""
        calls = max(1, round(seconds / median(self.seconds))) if self.seconds else 1
        self.process.stdin.write(f"{calls}\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.seconds.append(median(answer["seconds"]))
        self.memory = answer["memory"]

    def end(self) -> float:
        """Let the process end; returns the seconds from its start until it was ready."""
        self.process.stdin.close()
        self.process.wait()
        return self.started

    def result(self) -> dict:
        """Tokens a second, their spread over the turns, and memory."""
        rates = sorted(self.ready["tokens"] / s for s in self.seconds)
        return {"tokens_per_second": median(rates), "lowest": rates[0], "highest": rates[-1],
                "peak_memory_gib": self.memory / GIB}


def measure(names: list[str], args) -> dict[str, dict]:
    """Every variant's result, measured in turns."""
    workers = [Worker(name, args) for name in names]
    for _ in range(args.repeats + 1):
        for worker in workers:
            worker.turn(args.seconds)
    for worker in workers:
        worker.end()
        worker.seconds = worker.seconds[1:]  # the first turn finds out how long a call takes
    return {worker.name: worker.result() for worker in workers}


def same_loss(args, steps: int = 300, batch: int = 8) -> dict:
    """Validation loss of the plain and the fast way after equal steps: same weights, batches, schedule, recipe."""
    vocabulary, tokens, valid = open_text(args.text_dir)
    stories, losses = [vocabulary.decode(ids) for ids in valid.sample_stories(200)], {}
    for name in ("plain", "fast"):
        config = TrainConfig(epochs=1, batch=batch, optimizer="adamw",
                             bfloat16=name == "fast" and has_bfloat16() and not args.float32)
        torch.manual_seed(0)
        model = FlashLM(PRESETS[args.preset])
        if name == "plain":
            weights, trained = model.state_dict(), PlainFlashLM(PRESETS[args.preset])
            trained.load_state_dict(weights)
        else:
            compile_model(model, config.bfloat16)
            trained = model
        optimizer = (plain_optimizer if name == "plain" else make_optimizer)(trained, config)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((step + 1) / steps, config.lr)
            optimizer_step(trained, optimizer, *tokens.batch(step, batch, model.config.sequence_length, 1), config)
        if trained is not model:
            model.load_state_dict(trained.state_dict())
        losses[name] = evaluate(model, vocabulary, stories, bfloat16=False).nats_per_token
    return losses | {"steps": steps, "batch": batch}


def draw(result: dict, path: Path) -> None:
    """Bars of tokens a second, with the matrix products' limit as a line."""
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    rates = {name: rate["tokens_per_second"] for name, rate in result["training"].items()}
    limit = result["matrix_products"]["tokens_per_second"]
    axis.barh(["plain", *(f"+ {name}" for name in list(rates)[1:])], rates.values(), color="#0072B2")
    for place, rate in enumerate(rates.values()):
        axis.text(rate, place, f" {rate / rates['plain']:.1f}x", va="center")
    axis.axvline(limit, color="#E69F00", linestyle="--", label="matrix products alone")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(limit, *rates.values()))
    axis.set_xlabel("tokens trained per second")
    axis.set_title(f"{result['preset']}, {result['hardware']['cores']} cores")
    axis.legend(loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(result: dict) -> None:
    """The result as a table."""
    for kind in ("training", "evaluation"):
        if not result.get(kind):
            continue
        rates = result[kind]
        plain = rates["plain"]["tokens_per_second"]
        print(f"\n{result['preset']}, {kind:<32} tokens/s   lowest  highest   ratio   memory GiB")
        for place, (name, rate) in enumerate(rates.items()):
            print(f"  {'+ ' * (place > 0) + name:<42}{rate['tokens_per_second']:>9,.0f}{rate['lowest']:>9,.0f}"
                  f"{rate['highest']:>9,.0f}{rate['tokens_per_second'] / plain:>8.2f}{rate['peak_memory_gib']:>12.2f}")
    if result.get("matrix_products"):
        print(f"  {'matrix products alone':<42}{result['matrix_products']['tokens_per_second']:>9,.0f}\n"
              f"  share of the last step that is matrix products at that rate: {result['matrix_share']:.0%}")
    if result.get("first_step_seconds"):
        print("  from the start of Python to the end of the first step, compiled in an earlier run: "
              f"{result['first_step_seconds']:.1f} s")
    if result.get("same_loss"):
        print("  validation nats/token after {steps} equal steps: plain {plain:.4f}, fast {fast:.4f}".format(
            **result["same_loss"]))


def main() -> None:
    """Measure, print, and save JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="v4-small")
    parser.add_argument("--text-dir", metavar="DIR", help="real text; the built-in corpus by default")
    parser.add_argument("--repeats", type=int, default=7, help="turns of every variant")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--float32", action="store_true", help="as on a processor without bfloat16")
    parser.add_argument("--ladder-only", action="store_true", help="training speed only")
    parser.add_argument("--no-loss", action="store_true", help="do not train both ways to compare their losses")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if args.worker:
        work(args)
        return
    result = {"preset": args.preset, "hardware": describe_hardware(), "text": args.text_dir and "a folder" or "builtin"}
    open_text(args.text_dir)  # made once, before anything is timed
    compiler = missing_compiler() is None
    names = [name for name, parts in TRAINING.items() if compiler or "compile" not in parts]
    rates = measure([f"training/{name}" for name in names] + ["products/alone"], args)
    result["matrix_products"] = rates.pop("products/alone")
    result["training"] = {name.split("/")[1]: rate for name, rate in rates.items()}
    last = list(result["training"].values())[-1]
    result["matrix_share"] = last["tokens_per_second"] / result["matrix_products"]["tokens_per_second"]
    if not args.ladder_only:
        rates = measure([f"evaluation/{name}" for name in ("plain", "eager", "compiled")[: 2 + compiler]], args)
        result["evaluation"] = {name.split("/")[1]: rate for name, rate in rates.items()}
        result["first_step_seconds"] = median(Worker("start/first step", args).end() for _ in range(3))
        if not args.no_loss:
            result["same_loss"] = same_loss(args)
    report(result)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"training-{args.preset}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out / f"training-{args.preset}.png")


if __name__ == "__main__":
    main()
