"""Every way a run can end saves it, and a folder is never two runs'."""

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_same_run,
    interrupt_at,
    quiet,
    run_training,
    timeless,
    times,
    write_stories,
)

from flashlm_helpers import training
from flashlm_helpers.checkpoint import BEST, LAST, Progress, load_checkpoint
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.experiments.terminal import TerminalLine
from flashlm_helpers.machine import files
from flashlm_helpers.machine.files import append_json_line, atomic_write, hold_folder
from flashlm_helpers.machine.notices import LenientStream, notice
from flashlm_helpers.training import StopReason

PROGRAM = [sys.executable, "-m", "flashlm_helpers"]
TINY = ["--preset", "tiny", "--batch", "2", "--eager"]

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")


@pytest.fixture(autouse=True)
def kept_apart(home):
    """Every test here has a FLASHLM_HOME of its own."""


def endless(text_dir, folder, *more):
    """The command line of a run that only a signal ends."""
    command = [*PROGRAM, "train", *TINY, "--hours", "1", "--text-dir", str(text_dir)]
    return [*command, "--save-dir", str(folder), *more]


def until_training(stream):
    """Read what a run says until it has decided how to compute."""
    while b", batch " not in stream.readline():
        pass


def wait_for(condition, seconds=60):
    """Wait until something is so; a test whose condition never comes about fails here."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def assert_whole(folder):
    """A run's folder holds what it should, and nothing else."""
    assert {path.name for path in folder.iterdir()} == {BEST, LAST, "report.json"}
    assert load_checkpoint(folder, LAST).progress.step > 0
    assert load_checkpoint(folder).progress.best.bpc > 0
    return json.loads((folder / "report.json").read_text())


# ---- signals, and nobody who listens ----


@posix
def test_signals_end_runs_whose_readers_are_gone(text_dir, tmp_path):
    """As Ctrl-C does with `2>&1 | tee log`, where tee dies first, or a terminal that is closed."""
    # Tests under nohup would hand on that this signal is ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    runs = {}
    for name in ("SIGINT", "SIGHUP"):
        command = endless(text_dir, tmp_path / name, "--json")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        runs[name] = subprocess.Popen(command, **pipes)
    signal.signal(signal.SIGHUP, before)
    for name, process in runs.items():
        until_training(process.stdout)
        process.stdout.close()
        process.send_signal(getattr(signal, name))

    # The result could not be handed over, which the status says; the run is whole.
    for name, process in runs.items():
        assert process.wait(60) == 1
        assert assert_whole(tmp_path / name)["stopped_by"] == "interrupt"


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_every_signal_that_ends_a_program_saves_a_run(prepared, model_config, tmp_path, name):
    before = signal.getsignal(getattr(signal, name))

    def end(progress):
        if progress.step == 2:
            signal.raise_signal(getattr(signal, name))

    recipe = TrainConfig(epochs=5, batch=8, validation_stories=2)
    _, _, stopped_by = run_training(model_config, recipe, prepared, tmp_path, on_step=end)
    assert stopped_by == StopReason.INTERRUPT
    assert load_checkpoint(tmp_path, LAST).progress.step == 3
    assert signal.getsignal(getattr(signal, name)) == before


@posix
def test_runs_without_their_streams_are_runs(text_dir, tmp_path):
    """Closed, full, or under nohup, with the terminal closed as well."""
    started = [">&- 2>&- <&-", "nohup"]
    if Path("/dev/full").exists():
        started.insert(0, "2>/dev/full")
    runs = []
    for number, streams in enumerate(started):
        command = [*PROGRAM, "train", *TINY, "--epochs", "0.1", "--text-dir", str(text_dir)]
        command += ["--save-dir", str(tmp_path / str(number)), "--json"]
        line = f'exec "$@" {streams}' if streams != "nohup" else 'trap "" HUP; exec "$@"'
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        runs.append(subprocess.Popen(["sh", "-c", line, "sh", *command], **pipes))
    until_training(runs[-1].stderr)
    runs[-1].send_signal(signal.SIGHUP)

    for number, process in enumerate(runs):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and b"Traceback" not in err
        report = assert_whole(tmp_path / str(number))
        assert report["stopped_by"] == "budget"
        if ">&-" not in started[number].split():
            assert json.loads(out)["bpc"] == report["bpc"]


@posix
def test_a_result_that_cannot_be_written_is_one_line(text_dir, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    folder = tmp_path / "run"
    command = [*PROGRAM, "train", *TINY, "--epochs", "0.02", "--text-dir", str(text_dir)]
    with open("/dev/full", "w") as full:
        command += ["--save-dir", str(folder)]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "space" in done.stderr
    assert_whole(folder)


@posix
def test_a_signal_before_training_leaves_nothing_behind(tmp_path):
    """While a text is tokenized there is no run to save, but there is a file to take away."""
    text = tmp_path / "text"
    text.mkdir()
    write_stories(text / "train.txt", [f"There were {n} cats. " * 60 for n in range(10_000)])
    command = endless(text, tmp_path / "run")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    data = tmp_path / "home" / "data"
    wait_for(lambda: data.is_dir() and list(data.glob(".*.tokens.*.partial")))
    process.send_signal(signal.SIGTERM)
    assert "Traceback" not in process.communicate(timeout=60)[1]
    assert process.returncode == 130 and not list(data.glob(".*"))


class Broken(io.StringIO):
    """A stream that nothing can be written to."""

    def write(self, text):
        """Refuse, as a pipe without a reader does."""
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self):
        """Refuse as well."""
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize("stream", [Broken(), None], ids=["broken", "none"])
def test_training_from_python_needs_no_stderr(text_dir, model_config, tmp_path, stream):
    """Vocabulary, tokenizing, autotune, the live line and the word about stopping write there."""
    experiment = Experiment(text_dir, model_config, TrainConfig(hours=1, batch=8, compile=False))
    line = None

    def show(progress):
        nonlocal line
        line = line or TerminalLine(1_000)
        line(progress)
        if progress.step == 5:
            signal.raise_signal(signal.SIGINT)

    with redirect_stderr(stream):
        report = experiment.run(tmp_path / "run", on_step=show)
    assert report.stopped_by == StopReason.INTERRUPT
    assert_whole(tmp_path / "run")


def test_a_notice_in_the_midst_of_another_is_dropped_and_nothing_else():
    class Interrupted(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call")

    with redirect_stderr(Interrupted()):
        notice("unheard")
    heard = io.StringIO()
    stream = LenientStream(heard)
    assert stream.write("heard") == 5 and heard.getvalue() == "heard"
    assert stream.isatty() is False and stream.getvalue() == "heard"


def test_one_ctrl_c_that_arrives_twice_is_one(prepared, model_config, tmp_path):
    """A wrapper passes on what the terminal has sent to all; the run still ends in order."""

    def press(progress):
        if progress.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    recipe = TrainConfig(epochs=5, batch=8, validation_stories=5)
    _, progress, stopped_by = run_training(model_config, recipe, prepared, tmp_path, on_step=press)
    assert stopped_by == StopReason.INTERRUPT and progress.step == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
def test_what_ends_a_run_from_inside_saves_it(prepared, model_config, tmp_path, error, monkeypatch):
    """A callback that draws, the memory, a second Ctrl-C: the run goes on to the last bit."""
    recipe = TrainConfig(epochs=0.2, batch=8, validation_stories=5)
    run_training(model_config, recipe, prepared, tmp_path / "whole")

    def fail(progress):
        if progress.step == 5:
            raise error("in on_step")

    folder = tmp_path / "half"
    with pytest.raises(error):
        run_training(model_config, recipe, prepared, folder, on_step=fail)
    half = load_checkpoint(folder, LAST)
    assert half.progress.step == 5
    run_training(model_config, recipe, prepared, folder, resume=half)
    assert_same_run(load_checkpoint(tmp_path / "whole", LAST), load_checkpoint(folder, LAST))


def test_ctrl_c_once_more_ends_a_run_at_once_and_saves_it(
    prepared, model_config, tmp_path, monkeypatch
):
    monkeypatch.setattr("flashlm_helpers.machine.signals.SAME_REQUEST", -1.0)
    validate = training.token_nats

    def press_again(*arguments):
        signal.raise_signal(signal.SIGINT)
        return validate(*arguments)

    monkeypatch.setattr(training, "token_nats", press_again)
    recipe = TrainConfig(epochs=5, batch=8, validation_stories=5)
    with pytest.raises(KeyboardInterrupt):
        run_training(model_config, recipe, prepared, tmp_path, on_step=interrupt_at(3))
    assert load_checkpoint(tmp_path, LAST).progress.step == 4

    # The next cell of a notebook can train again.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(training, "token_nats", validate)
    recipe = replace(recipe, epochs=0.1)
    assert run_training(model_config, recipe, prepared, tmp_path)[2] == StopReason.BUDGET


def test_memory_that_is_not_there_is_one_line(capsys, monkeypatch):
    def use_too_much(args):
        torch.empty(2**50)

    monkeypatch.setattr("flashlm_helpers.cli.info.run", use_too_much)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "error: there is not enough memory\n"


# ---- a full disk ----

# A file must not grow beyond so many bytes, which fails like a full disk: within a write.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from flashlm_helpers.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def run_limited(size, *arguments):
    command = [sys.executable, "-c", LIMITED, str(size), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@posix
@pytest.mark.parametrize("share", [0.05, 0.5], ids=["neither fits", "best.pt fits"])
def test_a_disk_that_is_full_at_the_end_is_one_line_and_takes_nothing(text_dir, tmp_path, share):
    folder = tmp_path / "run"
    command = ["train", *TINY, "--text-dir", text_dir]
    assert main([*map(str, command), "--epochs", "0.02", "--save-dir", str(folder)]) == 0
    before = (folder / LAST).read_bytes()

    further = ["train", "--resume", folder, "--epochs", "0.04"]
    done = run_limited(int(share * len(before)), *further)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    *notices, line = done.stderr.strip().split("\n")
    assert line.startswith("error: ") and "could not be saved" in line
    assert any("File too large" in notice for notice in notices)
    assert not list(folder.glob(".*"))

    # What stood there goes on, when there is room.
    assert (folder / LAST).read_bytes() == before
    assert main(list(map(str, further))) == 0


@posix
def test_an_export_onto_a_full_disk_is_one_line(tmp_path):
    out = tmp_path / "model"
    checkpoint = Path(__file__).parent.parent / "checkpoints" / "hybrid-large.pt"
    done = run_limited(100_000, "export", "--checkpoint", checkpoint, "--out", out)
    assert done.returncode == 2 and not list(tmp_path.glob("*model*"))
    assert done.stderr.startswith(f"error: cannot write {out} (File too large)")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO])
@pytest.mark.parametrize("after", [0, 700, 60_000])
def test_a_write_that_fails_in_the_middle_is_one_line(tmp_path, monkeypatch, number, after):
    """torch.save says nothing of the disk; the file does, whatever the write was that failed."""
    path = tmp_path / LAST
    path.write_bytes(b"before")

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > after:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    class NotedFile(files._NotedFile, Full):
        """What is written goes through Full, and the note is made of its error."""

    monkeypatch.setattr(files, "_NotedFile", NotedFile)
    content = {"weights": torch.ones(50_000), "more": list(range(1000))}
    with pytest.raises(FlashLMError, match=os.strerror(number)) as caught:
        with atomic_write(path) as file:
            torch.save(content, file)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"before"
    assert [left.name for left in tmp_path.iterdir()] == [LAST]


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full as long as `disk.full` says so, for files of these names."""

    class Disk:
        full = ()

    real = training.save_checkpoint

    def save(path, checkpoint):
        if path.name in Disk.full:
            raise FlashLMError(f"cannot write {path} (No space left on device)")
        real(path, checkpoint)

    monkeypatch.setattr(training, "save_checkpoint", save)
    monkeypatch.setattr(training, "MAX_TOKEN_SHARE", 2.0)  # validate every few steps
    return Disk


@pytest.mark.parametrize("full", [(LAST,), (BEST,), (LAST, BEST)], ids=str)
def test_a_disk_that_was_full_for_a_while_costs_nothing(
    prepared, model_config, tmp_path, disk, capsys, full
):
    recipe = TrainConfig(epochs=0.2, batch=8, validation_stories=5)
    _, whole, _ = run_training(model_config, recipe, prepared, tmp_path / "whole")
    disk.full = full

    def make_room(progress):
        if progress.step == 8:
            assert progress.history.valid
            assert (progress.best is None) == (BEST in full)
            disk.full = ()

    _, progress, _ = run_training(
        model_config, recipe, prepared, tmp_path / "run", on_step=make_room
    )
    assert progress.best == whole.best and progress.best_step == whole.best_step
    for name in (LAST, BEST):
        one = load_checkpoint(tmp_path / "run", name).network.state_dict()
        other = load_checkpoint(tmp_path / "whole", name).network.state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("full", [(LAST,), (BEST,)], ids=str)
def test_a_run_whose_end_is_not_saved_says_so(prepared, model_config, tmp_path, disk, full):
    disk.full = full
    recipe = TrainConfig(epochs=0.1, batch=8, validation_stories=5)
    with pytest.raises(FlashLMError, match="could not be saved"):
        run_training(model_config, recipe, prepared, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == list({LAST, BEST} - set(full))


# ---- a folder belongs to one living run ----


def test_runs_of_one_second_have_folders_of_their_own(text_dir, home, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *arguments: "20260101-000000")
    command = ["train", *TINY, "--epochs", "0.01", "--text-dir", str(text_dir)]
    for _ in range(3):
        assert main(command) == 0
    folders = sorted((home / "checkpoints").iterdir())
    names = ["tiny-20260101-000000", "tiny-20260101-000000-2", "tiny-20260101-000000-3"]
    assert [folder.name for folder in folders] == names
    for folder in folders:
        assert_whole(folder)


@posix
def test_a_folder_of_a_living_run_is_refused_and_of_a_killed_one_is_not(
    text_dir, model_config, tmp_path, capsys
):
    """The same --save-dir, --resume of a run that is under way, and a notebook in its folder."""
    folder = tmp_path / "run"
    process = subprocess.Popen(endless(text_dir, folder), stderr=subprocess.PIPE)
    until_training(process.stderr)
    short = ["train", *TINY, "--epochs", "0.01", "--text-dir", str(text_dir)]
    assert main([*short, "--save-dir", str(folder)]) == 2
    line = capsys.readouterr().err
    assert f"another run is training in {folder}" in line and line.count("\n") == 1
    experiment = Experiment(text_dir, model_config, TrainConfig(epochs=0.01, batch=2))
    with pytest.raises(FlashLMError, match="another run is training"):
        experiment.run(folder, on_step=quiet)

    process.send_signal(signal.SIGSTOP)  # it lives as long as it is not dead
    assert main([*short, "--save-dir", str(folder)]) == 2
    process.kill()
    process.wait()
    assert main([*short, "--save-dir", str(folder)]) == 0
    assert_whole(folder)


def test_one_process_runs_in_a_folder_again_but_not_at_once(text_dir, model_config, tmp_path):
    experiment = Experiment(text_dir, model_config, TrainConfig(epochs=0.02, batch=2))
    refusals = []

    def run_beside(progress):
        if progress.step == 2:
            thread = threading.Thread(target=run_other)
            thread.start()
            thread.join()

    def run_other():
        with pytest.raises(FlashLMError, match="another run is training") as caught:
            experiment.run(tmp_path / "run", on_step=quiet)
        refusals.append(caught.value)

    first = experiment.run(tmp_path / "run", on_step=run_beside)
    assert len(refusals) == 1
    assert experiment.run(tmp_path / "run", on_step=quiet).bpb == first.bpb
    with pytest.raises(ZeroDivisionError):
        experiment.run(tmp_path / "run", on_step=lambda progress: 1 / 0)
    assert experiment.run(tmp_path / "run", on_step=quiet).bpb == first.bpb
    assert_whole(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_a_run_goes_without(tmp_path, monkeypatch, number):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold_folder(tmp_path / "run"):
        pass
    append_json_line(tmp_path / "r.jsonl", {"a": 1})
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


APPENDING = """
import sys
from pathlib import Path
from flashlm_helpers.machine.files import append_json_line
for line in range(int(sys.argv[3])):
    append_json_line(Path(sys.argv[1]), {"who": sys.argv[2], "line": line})
"""


@pytest.mark.soak
def test_two_that_add_to_one_results_file_lose_no_line(tmp_path):
    path = tmp_path / "r.jsonl"
    lines = times(40, 400)
    appending = [
        sys.executable,
        "-c",
        APPENDING.replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])"),
    ]
    both = [subprocess.Popen([*appending, path, who, str(lines)]) for who in "ab"]
    assert [one.wait() for one in both] == [0, 0]
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for who in "ab":
        assert [row["line"] for row in found if row["who"] == who] == list(range(lines))
    assert [left.name for left in tmp_path.iterdir()] == ["r.jsonl"]


# ---- kill -9 ----

# One process imports everything and then divides in two, since importing takes longer than a run.
FORKING = """
import os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from flashlm_helpers import training
from flashlm_helpers.checkpoint import LAST
from flashlm_helpers.config import FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.corpus import open_corpus
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.sources.gpt2 import gpt2_encoding
from flashlm_helpers.tokens import prepare

torch.set_num_threads(1)
gpt2_encoding()
draw = random.Random(int(sys.argv[1]))


def fork(work):
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
"""

KILLING = """
training.MAX_TOKEN_SHARE = 2.0  # validate, and save, every few steps
model = ModelConfig(
    "test", width=16, blocks=2, hidden=24, sequence_length=32, kernel_size=4, vocabulary_size=1_000
)
recipe = TrainConfig(epochs=0.4, batch=8, dropout=0.1, validation_stories=5)
text, runs, kills = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])


def train(folder):
    resume = folder if (folder / LAST).exists() else None
    try:
        Experiment(text, model, recipe).run(folder, resume, on_step=lambda progress: None)
    except FlashLMError as error:  # it was killed after its last save, before it could say so
        assert "has spent its budget" in str(error)


began = time.monotonic()
assert ended(fork(lambda: train(runs / "whole"))) == 0
seconds = time.monotonic() - began

number = 0
while kills > 0:
    folder = runs / str(number)
    process = fork(lambda: train(folder))
    time.sleep(draw.uniform(0, seconds))
    os.kill(process, signal.SIGKILL)
    status = ended(process)
    kills -= status != 0
    assert status in (0, -signal.SIGKILL), status
    number += status == 0
folder = runs / str(number)
assert ended(fork(lambda: train(folder))) == 0
"""


def run_forking(program, *arguments):
    """Run FORKING and a program after it, in a process of its own."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    seed = random.randrange(1_000_000)
    command = [sys.executable, "-c", FORKING + program, str(seed), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.soak
def test_runs_that_are_killed_at_random_moments_end_as_if_they_had_not_been(text_dir, tmp_path):
    run_forking(KILLING, text_dir, tmp_path, times(2, 100))
    whole = tmp_path / "whole"
    for folder in set(tmp_path.iterdir()) - {whole, tmp_path / "home"}:
        for name in (LAST, BEST):
            one, other = load_checkpoint(whole, name), load_checkpoint(folder, name)
            if name == LAST:
                assert_same_run(one, other)
            assert timeless(one.progress) == timeless(other.progress)
            weights = other.network.state_dict()
            for key, tensor in one.network.state_dict().items():
                assert torch.equal(tensor, weights[key])


TOKENIZING = """
text, data, races = sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])


def tokenize(folder, start):
    while time.monotonic() < start:
        pass
    prepare(open_corpus(text), 1_000, folder)


for number in range(races):
    start = time.monotonic() + 0.05
    folder = data / str(number)
    both = [fork(lambda: tokenize(folder, start)) for _ in range(2)]
    kill = number % 2
    if kill:  # one of them dies in the middle, and the other does not mind
        time.sleep(draw.uniform(0.05, 0.3))
        os.kill(both[0], signal.SIGKILL)
    statuses = [ended(process) for process in both]
    assert statuses[1] == 0 and statuses[0] in (0, -signal.SIGKILL if kill else 0), statuses

    # What it left behind is gone with the next write. (This process has no threads, which a fork
    # could not take along, so another one tokenizes.)
    (folder / next(folder.glob("*valid*")).name).unlink()
    assert ended(fork(lambda: tokenize(folder, start))) == 0
"""


@pytest.mark.soak
def test_two_that_tokenize_into_one_cache_leave_whole_files(text_dir, tmp_path):
    data = tmp_path / "data"
    run_forking(TOKENIZING, text_dir, data, times(2, 50))
    found = [{path.name: path.read_bytes() for path in one.iterdir()} for one in data.iterdir()]
    assert len(found[0]) == 3
    assert all(one == found[0] for one in found)


LEAVING = """
import os, signal, sys
from pathlib import Path
from flashlm_helpers.machine.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@posix
def test_what_killed_processes_leave_is_removed_by_the_next_write_and_the_living_keep_theirs(
    tmp_path,
):
    command = [sys.executable, "-c", LEAVING]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    killed, living = [subprocess.Popen([*command, tmp_path / name], **pipes) for name in "ab"]
    for process in (killed, living):
        assert process.stdout.readline() == b"writing\n"
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_write(tmp_path / "c") as file:
        file.write(b"whole")
    assert len(list(tmp_path.glob(".*"))) == 1
    living.communicate(b"go on\n")
    assert living.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


# ---- the clock, and how often to look ----


class Clock:
    """A clock that steps and validations move on, by so many seconds each."""

    def __init__(self, monkeypatch, step=1.0, validation=0.0):
        self.now = 1e6
        self.step = step
        self.validation = validation
        for name in ("optimizer_step", "token_nats"):
            monkeypatch.setattr(training, name, self._moving(name, getattr(training, name)))

    def __call__(self):
        return self.now

    def _moving(self, name, function):
        def moving(*arguments):
            self.now += self.step if name == "optimizer_step" else self.validation
            return function(*arguments)

        return moving


EIGHT_HOURS = 8 * 3600


@pytest.mark.parametrize("during", ["step", "validation", "display", "save"])
def test_hours_of_sleep_do_not_end_a_run(prepared, model_config, tmp_path, monkeypatch, during):
    """A suspended laptop, a paused machine, SIGSTOP: whatever was under way at the moment."""
    clock = Clock(monkeypatch, step=60.0)
    real = training.save_checkpoint
    slept = False

    def sleep(progress):
        nonlocal slept
        if during == "display" and progress.step == 20:
            clock.now += EIGHT_HOURS
        clock.step = 60.0 + (EIGHT_HOURS if during == "step" and progress.step == 20 else 0)
        clock.validation = EIGHT_HOURS if during == "validation" and progress.step == 20 else 0

    def save(path, checkpoint):
        nonlocal slept
        if during == "save" and not slept:
            slept = True
            clock.now += EIGHT_HOURS
        real(path, checkpoint)

    monkeypatch.setattr(training, "save_checkpoint", save)
    recipe = TrainConfig(hours=1, batch=2, validation_stories=2, compile=False)
    _, progress, stopped_by = run_training(
        model_config, recipe, prepared, tmp_path, on_step=sleep, clock=clock
    )
    assert stopped_by == StopReason.BUDGET
    assert 60 - 10 <= progress.step <= 60
    assert progress.elapsed == pytest.approx(3600, abs=600)
    assert progress.elapsed == sum(progress.seconds.values())


def test_steps_that_become_slower_count_in_full_before_long(
    prepared, model_config, tmp_path, monkeypatch
):
    clock = Clock(monkeypatch, step=1.0)

    def slow_down(progress):
        clock.step = 1.0 if progress.step < 50 else 40.0

    recipe = TrainConfig(hours=1, batch=2, validation_stories=2, compile=False)
    began = clock()
    run_training(model_config, recipe, prepared, tmp_path, on_step=slow_down, clock=clock)
    assert 3600 <= clock() - began <= 3600 * 1.05


@pytest.mark.parametrize("seconds, least, most", [(0.0, 4, 5), (2.0, 3, 5), (30.0, 1, 2)])
def test_a_timed_run_on_a_small_text_looks_after_every_epoch_where_that_is_cheap(
    prepared, model_config, tmp_path, monkeypatch, seconds, least, most
):
    clock = Clock(monkeypatch, validation=seconds)
    monkeypatch.setattr(training, "MIN_SECONDS_BETWEEN", 1e9)  # the clock's own validations: none
    windows = prepared.train.windows(model_config.sequence_length)
    batch = windows // 20  # twenty steps, and seconds, per epoch
    recipe = TrainConfig(hours=100 / 3600, batch=batch, validation_stories=2, compile=False)
    _, progress, _ = run_training(model_config, recipe, prepared, tmp_path, clock=clock)
    looks = progress.history.valid
    assert least <= len(looks) <= most
    assert progress.seconds["validate"] <= 0.1 * progress.seconds["train"] + 2 * seconds
    for before, after in zip(looks, looks[1:-1], strict=False):
        assert after.tokens - before.tokens >= prepared.train.n_tokens
    assert progress.validations_since_best <= 1  # patience does not count them


def test_a_text_that_is_read_many_times_is_mentioned_once(capsys):
    line = TerminalLine(n_tokens=1_000)
    early = Progress(step=1, fraction=0.005, tokens_seen=40)
    for progress in (early, replace(early, fraction=0.02, tokens_seen=160), early):
        line(progress)
    assert capsys.readouterr().err.count("the text will be read about 8 times") == 1
    TerminalLine(n_tokens=10_000)(replace(early, fraction=0.02, tokens_seen=160))
    assert "will be read" not in capsys.readouterr().err
