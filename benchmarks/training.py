"""Measure how fast this machine trains, step by step from the plain implementation: `make bench`.

Every variant runs in a process of its own, so that its memory can be read and no setting leaks into
another. They take turns, one at a time, and medians are reported. Rates are compared within one run
only: machines are shared and noisy. Together the processes take about 5 GB of memory for v4-small
and 9 GB for v4-large.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from plain import BATCH, PlainFlashLM, plain_optimizer

from flashlm_helpers.autotune import compile_network
from flashlm_helpers.config import PRESETS, TrainConfig
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.evaluation import encode_stories, evaluate, token_nats
from flashlm_helpers.loss import CHUNK_ROWS
from flashlm_helpers.machine.allocator import disable_malloc_trim
from flashlm_helpers.machine.compiler import has_cxx_compiler, use_compile_cache
from flashlm_helpers.machine.hardware import GIB, describe_hardware, peak_memory, usable_cores
from flashlm_helpers.machine.numbers import has_bfloat16
from flashlm_helpers.model import FlashLM
from flashlm_helpers.optimization import build_optimizer, learning_rate, optimizer_step
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.tokens import PreparedText, prepare
from flashlm_helpers.training import train

FAST_BATCH = {"v4-small": 16, "v4-large": 8}
# Each adds one thing to the one before it.
TRAINING = {
    "plain": set(),
    "shifted convolution, head in chunks": {"model"},
    "larger batch, fused AdamW": {"model", "batch"},
    "bfloat16 matmuls": {"model", "batch", "bfloat16"},
    "freed memory kept": {"model", "batch", "bfloat16", "memory"},
    "compiled": {"model", "batch", "bfloat16", "memory", "compile"},
}


def open_text(text_dir: str | None) -> PreparedText:
    """Return the text of a folder, or of the built-in corpus, with the vocabulary of v4."""
    corpus = open_corpus(Path(text_dir)) if text_dir else open_corpus("builtin", 20_000)
    return prepare(corpus, 10_000)


def plain_twin(network: FlashLM) -> PlainFlashLM:
    """Return the plain implementation with the weights of a network."""
    twin = PlainFlashLM(network.config)
    twin.load_state_dict(network.state_dict())
    return twin


def training_variant(parts: set, preset: str, text_dir: str | None, bfloat16: bool):
    """Return a function that makes one optimizer step, and the tokens it takes."""
    config = PRESETS[preset]
    tokens = open_text(text_dir).train
    batch = FAST_BATCH.get(preset, 8) if "batch" in parts else BATCH
    in_bfloat16 = bfloat16 and "bfloat16" in parts
    recipe = TrainConfig(hours=1, lr=1e-3, batch=batch, bfloat16=in_bfloat16)

    torch.manual_seed(0)
    network = FlashLM(config)
    if "memory" in parts:
        disable_malloc_trim()
    if "model" not in parts:
        network = plain_twin(network)
    if "compile" in parts:
        reason = compile_network(network, recipe.bfloat16)
        if reason:
            raise SystemExit(reason)
    build = build_optimizer if "batch" in parts else plain_optimizer
    optimizer = build(network, recipe)
    steps = itertools.count()

    def step():
        inputs, targets = tokens.batch(next(steps), batch, config.sequence_length, 1)
        optimizer_step(network, optimizer, inputs, targets, recipe)

    return step, batch * config.sequence_length


def matmul_variant(preset: str, bfloat16: bool):
    """Return the matmuls of one step and nothing else, in the fast path's shapes and format."""
    config = PRESETS[preset]
    positions = FAST_BATCH.get(preset, 8) * config.sequence_length
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    D = config.width
    H = config.hidden

    # (rows, inputs, outputs) of the five layers per block, and of the head in chunks.
    block = [(D, 2 * D), (D, D), (D, H), (D, H), (H, D)]
    shapes = [(positions, inputs, outputs) for inputs, outputs in block] * config.blocks
    shapes += [(CHUNK_ROWS, D, config.vocabulary_size)] * (positions // CHUNK_ROWS)
    operands = {}
    for rows, inputs, outputs in set(shapes):
        x = torch.randn(rows, inputs, dtype=dtype)
        weight = torch.randn(outputs, inputs, dtype=dtype)
        gradient = torch.randn(rows, outputs, dtype=dtype)
        operands[rows, inputs, outputs] = (x, weight, gradient)
    disable_malloc_trim()

    def step():
        for shape in shapes:
            x, weight, gradient = operands[shape]
            x @ weight.T, gradient @ weight, gradient.T @ x

    return step, positions


def evaluation_variant(way: str, preset: str, text_dir: str | None, bfloat16: bool):
    """Return a function that scores some real stories, and their tokens."""
    config = PRESETS[preset]
    text = open_text(text_dir)
    sequences = encode_stories(text.vocabulary, text.held_out(128))
    network = FlashLM(config)
    if way == "plain":
        return plain_scoring(plain_twin(network), sequences)

    disable_malloc_trim()
    if way == "compiled":
        reason = compile_network(network, bfloat16)
        if reason:
            raise SystemExit(reason)
    count = sum(len(sequence) - 1 for sequence in sequences)
    return (lambda: token_nats(network, sequences, bfloat16)), count


def plain_scoring(network: PlainFlashLM, sequences):
    """Return a function that scores windows of the training length, and their tokens."""
    length = network.config.sequence_length
    ids = torch.cat([torch.from_numpy(sequence) for sequence in sequences])
    windows = ids.unfold(0, length + 1, length)

    @torch.no_grad()
    def score():
        for pair in windows.split(BATCH):
            network.loss(pair[:, :-1], pair[:, 1:])

    return score, windows.shape[0] * length


def start_variant(preset: str, text_dir: str | None) -> None:
    """Start a run of an hour, as the command line would, and stop it after its first step."""
    text = open_text(text_dir)
    recipe = TrainConfig(hours=1)
    network = FlashLM(PRESETS[preset])
    optimizer = build_optimizer(network, recipe)

    def stop(progress):
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder, suppress(KeyboardInterrupt):
        train(network, optimizer, recipe, text, folder, on_step=stop)


def work(args) -> None:
    """Time as many calls as each line on stdin says, and answer in a line of JSON."""
    torch.set_num_threads(usable_cores())
    use_compile_cache()
    group, name = args.worker.split("/")
    if group == "start":
        start_variant(args.preset, args.text_dir)
        print("{}", flush=True)
        return
    bfloat16 = has_bfloat16() and not args.float32
    if group == "training":
        call, tokens = training_variant(TRAINING[name], args.preset, args.text_dir, bfloat16)
    elif group == "matmuls":
        call, tokens = matmul_variant(args.preset, bfloat16)
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
        if args.text_dir:
            command += ["--text-dir", args.text_dir]
        if args.float32:
            command.append("--float32")
        self.name = name
        self.seconds = []
        began = time.perf_counter()

        # It answers with one line when it is ready, or ends and leaves its reason on stderr.
        with tempfile.TemporaryFile("w+") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, text=True, **pipes)
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
        """Return tokens per second, their spread over the turns, and memory."""
        rates = sorted(self.ready["tokens"] / s for s in self.seconds)
        return {
            "tokens_per_second": median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "peak_memory_gib": self.memory / GIB,
        }


def measure(names: list[str], args) -> dict[str, dict]:
    """Measure variants in turns; return the result of each."""
    workers = [Worker(name, args) for name in names]
    for _ in range(args.repeats + 1):
        for worker in workers:
            worker.turn(args.seconds)
    for worker in workers:
        worker.end()
        worker.seconds = worker.seconds[1:]  # the first turn finds out how long a call takes
    return {worker.name: worker.result() for worker in workers}


def same_loss(args, steps: int = 300, batch: int = 8) -> dict:
    """Compare the validation loss of the plain and the fast way after equal steps.

    Both have the same weights at the start, batches, schedule and recipe.
    """
    text = open_text(args.text_dir)
    stories = text.held_out(200)
    losses = {}
    for name in ("plain", "fast"):
        fast = name == "fast"
        bfloat16 = fast and has_bfloat16() and not args.float32
        recipe = TrainConfig(epochs=1, batch=batch, bfloat16=bfloat16)
        torch.manual_seed(0)
        network = FlashLM(PRESETS[args.preset])
        trained = network
        build = build_optimizer
        if fast:
            compile_network(network, bfloat16)
        else:
            trained = plain_twin(network)
            build = plain_optimizer

        optimizer = build(trained, recipe)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate((step + 1) / steps, recipe.lr)
            inputs, targets = text.train.batch(step, batch, network.config.sequence_length, 1)
            optimizer_step(trained, optimizer, inputs, targets, recipe)

        network.load_state_dict(trained.state_dict())
        model = PyTorchModel(network, text.vocabulary, bfloat16=False)
        losses[name] = evaluate(model, stories).nats_per_token
    return losses | {"steps": steps, "batch": batch}


def draw(result: dict, path: Path) -> None:
    """Draw bars of tokens per second, with the matmuls' limit as a line."""
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    rates = {name: rate["tokens_per_second"] for name, rate in result["training"].items()}
    limit = result["matrix_products"]["tokens_per_second"]
    labels = [f"+ {name}" if place else name for place, name in enumerate(rates)]
    axis.barh(labels, rates.values(), color="#0072B2")
    for place, rate in enumerate(rates.values()):
        axis.text(rate, place, f" {rate / rates['plain']:.1f}x", va="center")
    axis.axvline(limit, color="#E69F00", linestyle="--", label="matmuls alone")
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max(limit, *rates.values()))
    axis.set_xlabel("tokens trained per second")
    axis.set_title(f"{result['preset']}, {result['hardware']['cores']} cores")
    axis.legend(loc="upper center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def report(result: dict) -> None:
    """Print the result as a table."""
    for kind in ("training", "evaluation"):
        rates = result.get(kind, {})
        if rates:
            heading = f"\n{result['preset']}, {kind}"
            columns = "tokens/s   lowest  highest   ratio   memory GiB"
            print(f"{heading:<42}{columns:>52}")
        for place, (name, rate) in enumerate(rates.items()):
            print(row(f"{'+ ' if place else ''}{name}", rate, rates["plain"]))

    if result.get("matrix_products"):
        alone = result["matrix_products"]["tokens_per_second"]
        print(f"  {'matmuls alone':<42}{alone:>9,.0f}")
        share = result["matrix_share"]
        print(f"  share of the last step that is matmuls at that rate: {share:.0%}")
    if result.get("first_step_seconds"):
        seconds = result["first_step_seconds"]
        print(f"  from the start of Python to the end of a step compiled earlier: {seconds:.1f} s")
    if result.get("same_loss"):
        losses = result["same_loss"]
        print(
            f"  validation nats/token after {losses['steps']} equal steps: "
            f"plain {losses['plain']:.4f}, fast {losses['fast']:.4f}"
        )


def row(name: str, rate: dict, plain: dict) -> str:
    """Format one variant beside the plain one."""
    ratio = rate["tokens_per_second"] / plain["tokens_per_second"]
    return (
        f"  {name:<42}{rate['tokens_per_second']:>9,.0f}{rate['lowest']:>9,.0f}"
        f"{rate['highest']:>9,.0f}{ratio:>8.2f}{rate['peak_memory_gib']:>12.2f}"
    )


def main() -> None:
    """Measure, print, and save JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="v4-small")
    parser.add_argument(
        "--text-dir", metavar="DIR", help="real text; the built-in corpus by default"
    )
    parser.add_argument("--repeats", type=int, default=7, help="turns of every variant")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn")
    parser.add_argument("--float32", action="store_true", help="as on a processor without bfloat16")
    parser.add_argument("--ladder-only", action="store_true", help="training speed only")
    parser.add_argument(
        "--no-loss", action="store_true", help="do not train both ways to compare their losses"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(usable_cores())
    if args.worker:
        work(args)
        return
    measure_all(args)


def measure_all(args) -> None:
    """Measure what the flags ask for, in turns; print it, and save JSON and figure."""
    text = "a folder" if args.text_dir else "builtin"
    result = {"preset": args.preset, "hardware": describe_hardware(), "text": text}
    open_text(args.text_dir)  # made once, before anything is timed

    # The ladder of training, and its limit.
    compiler = has_cxx_compiler()
    names = [name for name, parts in TRAINING.items() if compiler or "compile" not in parts]
    rates = measure([f"training/{name}" for name in names] + ["matmuls/alone"], args)
    limit = rates.pop("matmuls/alone")
    result["matrix_products"] = limit
    result["training"] = {name.split("/")[1]: rate for name, rate in rates.items()}
    last = result["training"][names[-1]]
    result["matrix_share"] = last["tokens_per_second"] / limit["tokens_per_second"]

    if not args.ladder_only:
        ways = ["plain", "eager", "compiled"] if compiler else ["plain", "eager"]
        rates = measure([f"evaluation/{way}" for way in ways], args)
        result["evaluation"] = {name.split("/")[1]: rate for name, rate in rates.items()}
        starts = [Worker("start/first step", args).end() for _ in range(3)]
        result["first_step_seconds"] = median(starts)
        if not args.no_loss:
            result["same_loss"] = same_loss(args)

    report(result)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"training-{args.preset}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, args.out / f"training-{args.preset}.png")


if __name__ == "__main__":
    main()
