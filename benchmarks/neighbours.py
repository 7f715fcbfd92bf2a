"""Measure what other programs cost: training and scoring alone, and beside them.

Each worker is a process that was compiled and warmed up before anything is measured, and sleeps
between its turns. The neighbours are one or two loops in Python that use a core each, or a second
training of the same kind. "fixed" is a process as it was before: as many threads as cores, which
spin as long as their library wants. All of them take turns, and medians are reported; rates are
comparable within one run only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

NEIGHBOURS = ("alone", "one loop", "two loops", "a training")
WORK = ("compiled", "eager", "scoring")
SETTLE_SECONDS = 4.0  # before each measurement, in which a worker finds its number of threads


def work(preset: str, kind: str, follows: bool) -> None:
    """Train or score in this process, for as long as each line on stdin says; tell the rate."""
    import flashlm_helpers as fl
    from flashlm_helpers.autotune import compile_network
    from flashlm_helpers.evaluation import encode_stories, token_nats
    from flashlm_helpers.machine.numbers import has_bfloat16
    from flashlm_helpers.machine.threads import FOLLOWER, follow
    from flashlm_helpers.optimization import optimizer_step

    # A model and a text, without anything that a race would measure.
    fl.setup(seed=0, show=False)
    if not follows:
        FOLLOWER.most = None
    config = fl.PRESETS[preset]
    text = fl.prepare(fl.open_corpus("builtin", 3_000), config.vocabulary_size)
    network = fl.FlashLM(config)
    network.sampled_softmax = True
    batch = 4096 // config.sequence_length
    recipe = fl.TrainConfig(hours=1, batch=batch, bfloat16=has_bfloat16())
    optimizer = fl.build_optimizer(network, recipe)
    if kind == "compiled":
        problem = compile_network(network, recipe.bfloat16)
        assert problem is None, problem
    stories = encode_stories(text.vocabulary, text.held_out(24))
    steps = 0

    def step() -> int:
        """Do a step, and return its number of tokens."""
        nonlocal steps
        if kind == "scoring":
            token_nats(network, stories)
            return sum(len(story) - 1 for story in stories)
        follow()
        inputs, targets = text.train.batch(steps, batch, config.sequence_length, 0)
        optimizer_step(network, optimizer, inputs, targets, recipe)
        steps += 1
        return inputs.numel()

    # Warm up, and then wait for lines.
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = float(line)
        for duration in (SETTLE_SECONDS, seconds):
            tokens = 0
            begin = time.perf_counter()
            while time.perf_counter() - begin < duration:
                tokens += step()
            rate = tokens / (time.perf_counter() - begin)
        print(json.dumps(rate), flush=True)


class Worker:
    """A process that runs work()."""

    def __init__(self, preset: str, kind: str, follows: bool):
        environment = dict(os.environ)
        if not follows:
            environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's own choice: 3 ms
        command = [sys.executable, __file__, "--work", preset, kind, str(int(follows))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        line = self.process.stdout.readline()
        assert line == "ready\n", f"{command} ended"

    def begin(self, seconds: float) -> None:
        """Begin to settle, and to measure for so many seconds."""
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()

    def rate(self) -> float:
        """Wait for the end, and return the tokens per second."""
        return json.loads(self.process.stdout.readline())


def measure(worker: Worker, other: Worker, neighbour: str, seconds: float) -> float:
    """Return a worker's tokens per second beside a neighbour."""
    loops = {"one loop": 1, "two loops": 2}.get(neighbour, 0)
    with ExitStack() as stack:
        for _ in range(loops):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        if neighbour == "a training":
            other.begin(seconds + 1.0)
        worker.begin(seconds)
        rate = worker.rate()

    # The other one ends a little later.
    if neighbour == "a training":
        other.rate()
    return rate


def main() -> None:
    """Measure every kind of work beside every neighbour, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="v4-small,hybrid-large")
    parser.add_argument("--kinds", default=",".join(WORK))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        preset, kind, follows = args.work
        return work(preset, kind, follows == "1")

    results = {}
    for preset in args.presets.split(","):
        for kind in args.kinds.split(","):
            workers = {"ours": Worker(preset, kind, True), "fixed": Worker(preset, kind, False)}
            training = "compiled" if kind == "scoring" else kind
            others = {name: Worker(preset, training, name == "ours") for name in workers}
            rates = {}
            for _ in range(args.rounds):
                for neighbour in NEIGHBOURS:
                    for name, worker in workers.items():
                        rate = measure(worker, others[name], neighbour, args.seconds)
                        rates.setdefault((name, neighbour), []).append(rate)
            for worker in (*workers.values(), *others.values()):
                worker.process.kill()

            # Over what a quiet machine gave to the fixed one, as it was before.
            base = median(rates["fixed", "alone"])
            for name in workers:
                row = {n: median(rates[name, n]) for n in NEIGHBOURS}
                results[f"{preset} {kind} {name}"] = row
                cells = [f"{n} {rate:8,.0f} ({rate / base:.2f})" for n, rate in row.items()]
                print(f"{preset:<13}{kind:<9}{name:<6}", "  ".join(cells), flush=True)
    path = Path(__file__).parent / "results" / "neighbours.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
