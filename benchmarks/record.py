"""Enter a row into the table of records: how well two cores learn a text in 5, 20 or 60 minutes.

    python benchmarks/record.py --minutes 20 --preset hybrid-large:dropout=0.1 --text-dir DIR

It trains, packs the model, tests that it sees no future, adds a line to results/records.jsonl, and
writes RECORDS.md anew from that file. The rules are in RECORDS.md.
"""

import hashlib
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

import flashlm_helpers as fl
from flashlm_helpers.checkpoint import load_checkpoint
from flashlm_helpers.cli.common import OneLineParser, add_mixer_flag, register_mixers
from flashlm_helpers.corpus import SPLITS, Corpus
from flashlm_helpers.evaluation import encode_stories
from flashlm_helpers.experiments.mixer_check import differs
from flashlm_helpers.machine.files import (
    append_json_line,
    atomic_write,
    one_line,
    read_json_lines,
)
from flashlm_helpers.machine.hardware import allowed_cores, usable_cores
from flashlm_helpers.machine.threads import Usage
from flashlm_helpers.runtime.packed import save_packed
from flashlm_helpers.vocab import SPECIALS

MINUTES = (5, 20, 60)
CORES = 2
SEED = 0
QUIET = 0.1  # cores that other programs may use, on average, without a word
PLACES = 16  # from which a text is edited

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "results" / "records.jsonl"
TABLE = HERE / "RECORDS.md"
OUR_FILES = (":!benchmarks/results/records.jsonl", ":!benchmarks/RECORDS.md")  # none for git

HEADING = """# Records: what two cores learn in 5, 20 and 60 minutes

`benchmarks/record.py` writes this page from `results/records.jsonl`. One command enters a row:

    python benchmarks/record.py --minutes 20 --preset hybrid-large:dropout=0.1 --text-dir DIR

DIR holds `train*` and `valid*`. `--mixer NAME=MODULE:CLASS` and `--build-model MODULE:CLASS` enter
parts of your own.

## Rules

1. 5, 20 or 60 minutes: validating and saving count, tokenizing and compiling come before.
2. Two threads on two cores. Processors differ, so compare rows of the same one.
3. Weights start at random and learn from the training stories alone, copies of valid ones left out.
4. One run with seed 0. Three seeds of one model were 0.003 BPB apart: a smaller lead proves little.
5. BPB counts every token of every validation story (2,000 at most), the first one included.
6. In brackets, the 95 % bootstrap interval over stories. 256 of them also chose the checkpoint.
7. Rows compare where both digests are the same. They are of the stories, whatever file has them.
8. Causal: editing the end of a text changes no logit before it, and probabilities sum to one.
9. Packed: the file that bolt.c runs, or why there is none. Peak memory: of the training process.
10. The commit that ran, "+changes" if files differed. If others used the cores, the row says so.
"""


@dataclass(frozen=True)
class Row:
    """One entry: a line of records.jsonl."""

    name: str
    minutes: float
    text: str  # the name of its folder
    digests: dict[str, str]  # of the stories of "train" and "valid"
    bpb: float
    interval: list[float] | None  # of bpb, 95 % over stories
    n_stories: int  # that were scored
    tokens_seen: int
    epochs: float
    peak_memory_bytes: int
    packed_bytes: int | None
    not_packed: str | None  # why
    causal: bool
    other_cores: float  # that other programs used, on average
    fewest_threads: int  # while others did
    hardware: dict
    config: dict  # {"model": ..., "training": ...}, in plain values
    commit: str
    command: str
    finished: str  # UTC


# ---- the table ----


def render(rows: Sequence[Row]) -> str:
    """Return the page of records: the rules, then one table per text and time, the best row first.

    Rows that are not causal come last.
    """
    tables: dict[tuple, list[Row]] = {}
    for row in rows:
        text = (row.text, row.digests["train"], row.digests["valid"])
        tables.setdefault((text, row.minutes), []).append(row)

    parts = [HEADING]
    for (text, minutes), entered in sorted(tables.items()):
        name, train, valid = map(_cell, text)
        parts.append(f"## {minutes:g} minutes on {name} (train `{train}`, valid `{valid}`)\n")
        entered.sort(key=lambda row: (not row.causal, row.bpb))
        lines = [
            "| name | BPB | tokens (M) | peak memory (GB) | packed (MB) | causal | processor "
            "| commit | command |",
            "|---" * 9 + "|",
            *map(_line, entered),
        ]
        parts.append("\n".join(lines) + "\n")
    if not rows:
        parts.append("No row has been entered yet.\n")
    return "\n".join(parts)


def _line(row: Row) -> str:
    """Return one row of a table."""
    name = row.name
    if row.other_cores > QUIET or row.fewest_threads < CORES:
        name += f" (beside programs that used {row.other_cores:.1f} cores)"
    packed = f"- ({row.not_packed})"
    if row.packed_bytes is not None:
        packed = f"{row.packed_bytes / 1e6:.2f}"

    # The interval is missing where a single story was scored.
    bpb = f"{row.bpb:.4f}"
    if row.interval:
        bpb += " [{:.4f}, {:.4f}]".format(*row.interval)
    cells = [
        name,
        bpb,
        f"{row.tokens_seen / 1e6:.2f}",
        f"{row.peak_memory_bytes / 1e9:.2f}",
        packed,
        "yes" if row.causal else "**no**",
        f"{row.hardware['processor']}, {row.hardware['matmul']}",
        row.commit,
        f"`{row.command}`",
    ]
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Keep a text within its cell."""
    return " ".join(text.split()).replace("|", "\\|")


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file; none if there is no file. Raises FlashLMError for other lines."""
    try:
        return [Row(**content) for content in read_json_lines(path)]
    except TypeError as error:
        raise fl.FlashLMError(
            f"{path} holds lines that are no records ({one_line(error)}): restore it"
        ) from error


def write_table(records: Path, table: Path) -> None:
    """Write the page of the records anew."""
    page = render(read_rows(records))
    with atomic_write(table) as file:
        file.write(page.encode())


# ---- a row ----


def make_row(
    entrant: fl.Entrant, minutes: float, text_dir: Path, folder: Path, name: str, command: str
) -> Row:
    """Train an entrant in a process of its own, and measure all that a row says.

    folder: where the run goes; its weights and the packed file stay there.
    Raises FlashLMError for too few cores, a text that cannot be used, and what a race refuses.
    """
    code = commit()
    corpus = fl.open_corpus(text_dir)
    with two_cores(), tempfile.TemporaryDirectory() as scratch:
        digests = {split: digest(corpus, split) for split in SPLITS}
        before = _usage()
        [record] = fl.race(
            [entrant], [SEED], minutes, corpus, None, Path(scratch) / "record.jsonl", folder
        )
        other_cores = _usage().others_since(before)

        # The weights that were scored, as everyone else would load them.
        run = folder / record.key
        model = fl.load(run, "torch", entrant.build_model)
        packed_bytes, not_packed = pack(model, run / "model.flashlm")
        text = fl.prepare(corpus, entrant.model.vocabulary_size)
        stories = text.held_out(record.score.n_stories)
        causal = is_causal(model, stories)
        threads = load_checkpoint(run, build_model=entrant.build_model).progress.threads

    score = record.score
    return Row(
        name=name,
        minutes=minutes,
        text=corpus.name,
        digests=digests,
        bpb=score.bpb,
        interval=score.interval and score.interval["bpb"],
        n_stories=score.n_stories,
        tokens_seen=record.tokens_seen,
        epochs=record.epochs,
        peak_memory_bytes=record.peak_memory_bytes,
        packed_bytes=packed_bytes,
        not_packed=not_packed,
        causal=causal,
        other_cores=other_cores,
        fewest_threads=min(count for _, count in threads),
        hardware=record.hardware,
        config=record.config,
        commit=code,
        command=command,
        finished=record.finished,
    )


def digest(corpus: Corpus, split: str) -> str:
    """Return a short SHA-256 of the stories of a split, in order; white space around them aside."""
    content = hashlib.sha256()
    for story in corpus.stories(split):
        encoded = story.encode("utf-8", "surrogatepass")
        content.update(b"%d:" % len(encoded))  # where one story ends and the next begins
        content.update(encoded)
    return content.hexdigest()[:12]


def pack(model: fl.PyTorchModel, path: Path) -> tuple[int | None, str | None]:
    """Pack a model; return the bytes of its file, or else why it cannot be packed."""
    try:
        save_packed(path, model)
    except fl.FlashLMError as error:
        return None, str(error)
    return path.stat().st_size, None


def commit() -> str:
    """Return the commit of this clone, "+changes" if files are not as in it, "-" without git."""
    root = HERE.parent
    if not (root / ".git").exists():
        return "-"
    try:
        head = _git(root, "rev-parse", "--short=9", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", ".", *OUR_FILES)
    except (OSError, subprocess.CalledProcessError):
        return "-"
    return f"{head}+changes" if changes else head


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


# ---- two cores ----


@contextmanager
def two_cores() -> Iterator[None]:
    """Keep this process, and those that it starts in the block, to two threads on two cores.

    Raises FlashLMError if it may use fewer.
    """
    usable = usable_cores()
    if usable < CORES:
        raise fl.FlashLMError(
            f"a record is made on {CORES} cores, and this process may use {usable}: give it more "
            "(OMP_NUM_THREADS, taskset, and containers set limits)"
        )

    # The environment is inherited, and so is the affinity, where a system has one.
    threads = os.environ.get("OMP_NUM_THREADS")
    allowed = allowed_cores()
    os.environ["OMP_NUM_THREADS"] = str(CORES)
    _bind(choose_cores(allowed))
    try:
        yield
    finally:
        _bind(allowed)
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def _bind(cores: list[int]) -> None:
    process = psutil.Process()
    if hasattr(process, "cpu_affinity"):  # macOS has none
        process.cpu_affinity(cores)


def choose_cores(allowed: Sequence[int]) -> list[int]:
    """Choose two logical cores; of two different physical ones if the system tells and has them."""
    first, *others = allowed
    same = _siblings(first)
    apart = [core for core in others if core not in same]
    return [first, (apart or others)[0]]


def _siblings(core: int) -> set[int]:
    """Return the logical cores that share a physical one with this one, itself included."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        ranges = path.read_text().strip().split(",")
    except OSError:  # not Linux
        return {core}

    # Such as "0,64" or "0-1".
    cores = set()
    for part in ranges:
        low, _, high = part.partition("-")
        cores |= set(range(int(low), int(high or low) + 1))
    return cores


def _usage() -> Usage:
    """Read the machine's clocks; what finished children of this process used is ours, too."""
    times = os.times()
    usage = Usage.now()
    return replace(usage, ours=usage.ours + times.children_user + times.children_system)


# ---- the test of causality ----


@torch.no_grad()
def is_causal(model: fl.PyTorchModel, stories: Sequence[str]) -> bool:
    """Return whether a network predicts from the past alone, tested on two stories as one batch.

    An edit of the second story, from some position on, must change no logit of earlier ones, nor
    any of the first story. What scoring asks for must be probabilities that sum to one.
    """
    network = model.network.eval()
    ids = _side_by_side(model, stories)
    T = ids.shape[1]
    before, _ = network.hidden(ids)
    logits = network.head(before)
    for place in range(1, T, max(1, T // PLACES)):
        edited = ids.clone()
        edited[1, place:] = _other_ids(ids[1, place:], len(model.vocabulary))
        after, _ = network.hidden(edited)
        changed = differs(after, before) | differs(network.head(after), logits)
        if changed[0].any() or changed[1, :place].any():
            return False

    # The negative log-likelihoods of all ids, after the first story.
    everything = torch.arange(len(model.vocabulary))
    last = before[0, -1].expand(len(everything), -1)
    total = float(network.token_nll(last, everything).double().neg().exp().sum())
    return abs(total - 1) < 1e-3


def _side_by_side(model: fl.PyTorchModel, stories: Sequence[str]) -> Tensor:
    """Return the two longest stories as ids (2, T), cut to equal lengths and a training window."""
    one, other = encode_stories(model.vocabulary, sorted(stories, key=len)[-2:])
    T = min(len(one), len(other), model.network.config.sequence_length)
    return torch.stack([torch.from_numpy(one[:T]), torch.from_numpy(other[:T])])


def _other_ids(ids: Tensor, size: int) -> Tensor:
    """Replace every id by another one that a text may have."""
    first = len(SPECIALS)
    return first + (ids - first + 1) % (size - first)


# ---- the command ----


def make_parser() -> OneLineParser:
    """Make the parser of the command."""
    parser = OneLineParser(prog="record.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=int, choices=MINUTES)
    parser.add_argument("--preset", help="a preset, perhaps with changes: NAME:FIELD=VALUE:...")
    parser.add_argument("--text-dir", metavar="DIR", help="a folder with train* and valid*")
    parser.add_argument("--name", help="of the row (default: the preset as it is written)")
    add_mixer_flag(parser)
    parser.add_argument(
        "--build-model",
        metavar="MODULE:CLASS",
        help="a model of your own, imported from a module in this folder",
    )
    parser.add_argument(
        "--table", action="store_true", help="run nothing, and write RECORDS.md anew"
    )
    return parser


def find_model(place: str) -> type[nn.Module]:
    """Import the class of a model of one's own; raise FlashLMError if that is impossible."""
    sys.path.insert(0, os.getcwd())
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything when it is imported
        raise fl.FlashLMError(
            f"cannot import the model {place} ({one_line(error)}): write MODULE:CLASS"
        ) from error


def command_of(args) -> str:
    """Return the command that makes this row again, without the place of the text on this disk."""
    words = ["python", "benchmarks/record.py", "--minutes", str(args.minutes)]
    words += ["--preset", args.preset, "--text-dir", "DIR"]
    if args.name:
        words += ["--name", args.name]
    for mixer in args.mixer:
        words += ["--mixer", mixer]
    if args.build_model:
        words += ["--build-model", args.build_model]
    return shlex.join(words)


def main(arguments: list[str] | None = None) -> int:
    """Enter a row, and return the exit status; a mistake that a person can mend is status 2."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not args.table and not (args.minutes and args.preset and args.text_dir):
        parser.error("a row needs --minutes, --preset and --text-dir")
    try:
        if not args.table:
            enter(args)
        write_table(RECORDS, TABLE)
    except fl.FlashLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"records in {TABLE}")
    return 0


def enter(args) -> None:
    """Make the row that the flags describe, and add it to the records."""
    read_rows(RECORDS)  # what is wrong with it is better known before the run
    register_mixers(args)
    entrant = fl.Entrant.parse(args.preset)
    if args.build_model:
        entrant = replace(entrant, build_model=find_model(args.build_model))
    folder = fl.project_dir() / "checkpoints" / "records"
    row = make_row(
        entrant,
        args.minutes,
        Path(args.text_dir),
        folder,
        args.name or args.preset,
        command_of(args),
    )
    append_json_line(RECORDS, asdict(row))
    print(_line(row))


if __name__ == "__main__":
    sys.exit(main())
