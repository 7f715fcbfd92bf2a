import os
import platform
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import fresh, interrupt_at, quiet

import flashlm_helpers as fl
from flashlm_helpers.autotune import compile_network
from flashlm_helpers.cli.common import choose_preset
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.machine import compiler, hardware, threads
from flashlm_helpers.machine.compiler import compile_failure, has_cxx_compiler, use_compile_cache
from flashlm_helpers.machine.files import find_in_clone
from flashlm_helpers.machine.hardware import (
    GIB,
    describe_hardware,
    peak_memory,
    usable_cores,
    usable_memory,
)
from flashlm_helpers.machine.numbers import has_bfloat16, matmul_autocast
from flashlm_helpers.machine.setup import setup
from flashlm_helpers.training import Trainer

# ---- hardware ----


@pytest.mark.parametrize(
    "cores, memory, preset",
    [
        (8, 32 * GIB, "v4-large"),
        (64, 512 * GIB, "v4-large"),
        (7, 64 * GIB, "v4-small"),
        (16, 31 * GIB, "v4-small"),
    ],
)
def test_the_preset_follows_cores_and_memory(cores, memory, preset):
    assert choose_preset(cores, memory) == preset


def test_a_cgroup_limits_cores_and_memory(monkeypatch):
    limits = {"cpu.max": ["max 100000"], "memory.max": ["max"]}

    def affinity(cores):
        process = hardware.psutil.Process
        monkeypatch.setattr(process, "cpu_affinity", lambda self: cores, raising=False)

    monkeypatch.setattr(hardware, "_cgroup_values", lambda v2, v1: limits[v2])
    monkeypatch.setattr(hardware.psutil, "cpu_count", lambda logical: 16)
    affinity(list(range(32)))
    assert usable_cores() == 16

    whole = usable_memory()
    limits["cpu.max"] = ["max 100000", "150000 100000"]
    limits["memory.max"] = ["max", str(GIB)]
    assert usable_cores() == 2
    assert usable_memory() == GIB < whole

    limits["cpu.max"] = ["50000 100000"]
    assert usable_cores() == 1
    limits["cpu.max"] = ["-1"]  # how the first version of cgroups says "no limit"
    affinity([3])
    assert usable_cores() == 1


@pytest.mark.parametrize("version", [2, 1])
def test_cgroup_files_of_every_level_are_read(tmp_path, monkeypatch, version):
    root = tmp_path / "sys"
    top = root if version == 2 else root / "cpu,cpuacct"
    name = "cpu.max" if version == 2 else "cpu.cfs_quota_us"
    (top / "a" / "b").mkdir(parents=True)
    for folder, value in ((top, "max 1"), (top / "a", "7 1"), (top / "a" / "b", "9 1")):
        (folder / name).write_text(value + "\n")
    group = tmp_path / "cgroup"
    lines = {2: "0::/a/b\n", 1: "9:memory:/x\n4:cpu,cpuacct:/a/b\n"}
    group.write_text(lines[version])

    places = {"/proc/self/cgroup": group, "/sys/fs/cgroup": root}
    real = hardware.Path
    monkeypatch.setattr(hardware, "Path", lambda name: places.get(name) or real(name))
    assert hardware._cgroup_values("cpu.max", "cpu.cfs_quota_us") == ["9 1", "7 1", "max 1"]


def test_the_description_is_plain_and_complete():
    described = describe_hardware()
    assert described["cores"] >= 1
    assert described["memory_gib"] > 0
    assert described["matmul"] in ("bfloat16", "float32")
    assert all(isinstance(value, str | int | float) for value in described.values())


def test_the_peak_of_memory_is_in_bytes():
    before = peak_memory()
    block = torch.ones(2 * before // 4)  # float32: twice as much again
    assert 2 * before <= peak_memory() < 4 * before + block.nbytes


# ---- numbers ----


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_bfloat16_pays_where_the_processor_multiplies_it(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": True, name: True})
    assert has_bfloat16() is True
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": True, name: False})
    assert has_bfloat16() is False


@pytest.mark.parametrize("asked", [None, True, False])
def test_matmuls_alone_are_computed_in_bfloat16(monkeypatch, asked):
    monkeypatch.setattr("flashlm_helpers.machine.numbers.has_bfloat16", lambda: True)
    x = torch.randn(4, 4)
    with matmul_autocast(asked):
        expected = torch.float32 if asked is False else torch.bfloat16
        assert (x @ x).dtype == expected
        assert x.softmax(-1).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


# ---- the allocator ----

FAULTS = """
import resource, torch
from flashlm_helpers.machine.allocator import disable_malloc_trim
torch.set_num_threads(1)
disable_malloc_trim()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        a, b = torch.ones(12_000_000), torch.ones(9_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(20))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_used_again_without_asking_the_system():
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000  # twenty turns of 84 MB are 410,000 pages


# ---- the compiler ----


@pytest.mark.parametrize("obstacle", ["a file", "a space", "it's", "a\\b"])
def test_programs_are_kept_elsewhere_where_they_cannot_be_in_data(tmp_path, monkeypatch, obstacle):
    home = tmp_path / ("home" if obstacle == "a file" else obstacle)
    (home / "data").mkdir(parents=True)
    if obstacle == "a file":
        (home / "data" / "compiled").write_text("")
    monkeypatch.setenv("FLASHLM_HOME", str(home))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    use_compile_cache()
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ

    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path / "free"))
    use_compile_cache()
    folder = os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    assert folder == str(tmp_path / "free" / "data" / "compiled")


def test_a_cache_that_is_chosen_already_stays(tmp_path, monkeypatch, home):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    use_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_a_compiler_is_looked_for_by_every_name(monkeypatch):
    there = set()
    monkeypatch.setattr(compiler.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.delenv("CXX", raising=False)
    assert has_cxx_compiler() is False
    there.add("clang++")
    assert has_cxx_compiler() is True

    there.clear()
    there.add("my-c++")
    assert has_cxx_compiler() is False
    monkeypatch.setenv("CXX", "my-c++")
    assert has_cxx_compiler() is True


@pytest.mark.parametrize("name", ["my folder", "it's", 'a"b', "a\\b", "a\tb"])
@pytest.mark.parametrize("place", ["torch", "cache"])
def test_a_folder_that_breaks_the_compiler_is_named_before_it_is_tried(name, place, monkeypatch):
    monkeypatch.setattr(compiler, "has_cxx_compiler", lambda: True)
    assert compiler.compile_obstacle() is None
    if place == "torch":
        monkeypatch.setattr(torch, "__file__", f"/{name}/torch/__init__.py")
    else:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"/{name}/torch")
    told = compile_network(torch.nn.Linear(2, 2), False)
    wanted = "torch.compile needs a folder without spaces and quotes in its name: "
    assert told == f"{wanted}/{name}/torch"


def test_a_folder_with_other_signs_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(compiler, "has_cxx_compiler", lambda: True)
    monkeypatch.setattr(torch, "__file__", "/$x%#é&;()*[a],b=c:d/torch/__init__.py")
    assert compiler.compile_obstacle() is None


def test_a_compilers_reason_is_found_behind_its_notes():
    said = "x.c: In function 'f':\nx.c:1: note: the ABI has changed\nx.c:2: error: no such thing\n"
    assert compiler.complaint(said) == "no such thing"


def test_a_failure_to_compile_is_one_short_line():
    error = RuntimeError("first\nsecond\n" + "third " * 100)
    line = compile_failure(error)
    assert line.startswith("torch.compile failed: first second third")
    assert "\n" not in line and len(line) < 200


# ---- set-up, and that nothing else touches what is global ----


@pytest.fixture
def restored():
    """Whatever a test does to threads and random numbers, the next one does not see it."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_setup_prepares_the_process_and_prints_what_it_did(
    monkeypatch, capsys, home, restored, name
):
    monkeypatch.setenv("FLASHLM_PROFILE", name)
    monkeypatch.setenv("FLASHLM_DATASET", "some/text")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    torch.set_num_threads(1)
    profile = fl.setup(seed=7)
    first = torch.rand(1)
    assert (profile.name, profile.dataset) == (name, "some/text")
    assert torch.get_num_threads() == usable_cores()
    assert torch.equal(first, torch.rand(1, generator=torch.Generator().manual_seed(7)))
    folder = os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
    assert folder == str(home / "data" / "compiled")

    table = capsys.readouterr().out
    for words in (name, profile.preset, "some/text", platform.python_version(), torch.__version__):
        assert words in table
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert rows["seed"] == "7"
    assert rows["threads"].startswith(f"{usable_cores()},")


def test_setup_leaves_alone_what_it_is_not_asked_for(capsys, home, restored):
    before = torch.get_rng_state()
    setup(threads=1, show=False)
    assert torch.get_num_threads() == 1
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"threads": -2}, "threads must be at least 1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**62}, "seed must be a whole number from 0"),
    ],
)
def test_setup_refuses_what_cannot_be_before_it_changes_anything(
    capsys, home, restored, arguments, complaint
):
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    with pytest.raises(FlashLMError, match=complaint):
        setup(**arguments)
    assert torch.get_num_threads() == 1
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr().out == ""


def test_setup_refuses_a_profile_that_does_not_exist(monkeypatch, home, restored):
    monkeypatch.setenv("FLASHLM_PROFILE", "quick")
    with pytest.raises(FlashLMError, match="'quick': choose one of smoke, full"):
        setup()


def global_state():
    return torch.get_num_threads(), dict(os.environ), torch.get_rng_state().tolist()


def test_no_constructor_touches_what_is_global(
    prepared, text_dir, model_config, tmp_path, home, restored
):
    torch.set_num_threads(usable_cores() + 1)  # a number that nobody would choose
    recipe = TrainConfig(epochs=0.11, validation_stories=2, seed=5)
    threads, environment, _ = global_state()
    network, optimizer = fresh(model_config, recipe, prepared.vocabulary)
    assert global_state()[:2] == (threads, environment)

    before = global_state()
    Trainer(network, optimizer, recipe, prepared, tmp_path)
    Experiment(text_dir, model_config, recipe)
    Experiment(["One story.", "Another one."] * 50, "tiny", recipe)
    assert global_state() == before


@pytest.mark.parametrize("stop", [None, 2], ids=["whole", "interrupted"])
def test_an_experiment_leaves_the_process_as_it_found_it(
    text_dir, model_config, tmp_path, home, restored, stop
):
    torch.set_num_threads(usable_cores() + 1)
    recipe = TrainConfig(epochs=0.11, validation_stories=2, seed=5)
    experiment = Experiment(text_dir, replace(model_config, vocabulary_size=1_000), recipe)
    before = global_state()
    experiment.run(tmp_path / "run", on_step=quiet if stop is None else interrupt_at(stop))
    assert global_state() == before


def test_an_experiment_that_fails_restores_the_random_state(
    text_dir, model_config, tmp_path, home, restored
):
    def broken(network, recipe):
        torch.rand(3)
        raise RuntimeError("no such optimizer")

    recipe = TrainConfig(epochs=0.11, seed=5)
    experiment = Experiment(text_dir, model_config, recipe, build_optimizer=broken)
    before = global_state()
    with pytest.raises(RuntimeError, match="no such optimizer"):
        experiment.run(tmp_path / "run")
    assert global_state() == before


def test_a_file_of_the_clone_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path / "home"))
    assert find_in_clone("benchmarks/training.py").is_file()

    # As an installed package is, with the clone somewhere above the working folder.
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "own.jsonl").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert find_in_clone("results/own.jsonl") == tmp_path / "results" / "own.jsonl"
    with pytest.raises(FlashLMError, match="there is no results/gone.jsonl"):
        find_in_clone("results/gone.jsonl")


# ---- threads that follow what other programs leave ----


class Machine:
    """Clocks of a machine of four cores, on which others use what a test says."""

    def __init__(self):
        self.now = threads.Usage(0.0, 0.0, 0.0)

    def pass_seconds(self, seconds, others, ours=1.0):
        now = self.now
        everyone = now.everyone + seconds * (others + ours)
        self.now = threads.Usage(now.clock + seconds, everyone, now.ours + seconds * ours)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(threads, "allowed_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(threads.time, "monotonic", lambda: machine.now.clock)
    follower = threads.Follower(lambda: machine.now)
    follower.limit(4)

    def watch(seconds, others):
        """Let time pass in which others use so many cores; returns the threads at its end."""
        for _ in range(seconds):
            machine.pass_seconds(1.0, others)
            follower.follow()
        return torch.get_num_threads()

    machine.follower = follower
    machine.watch = watch
    return machine


def test_threads_make_way_for_other_programs_and_come_back(machine, capsys):
    assert machine.watch(3, others=0.0) == 4
    assert machine.watch(5, others=2.1) == 2
    assert machine.watch(5, others=4.0) == 1  # one always remains
    assert machine.watch(8, others=0.0) == 4

    # Said once, however often it happens.
    assert machine.watch(8, others=3.0) == 1
    said = capsys.readouterr().err.split()
    assert said.count("computing") == 1


def test_a_part_of_a_core_or_a_short_burst_changes_nothing(machine, capsys):
    assert machine.watch(20, others=0.5) == 4
    machine.pass_seconds(0.5, others=4.0)
    assert machine.follower.follow() == 4
    assert capsys.readouterr().err == ""


def test_threads_never_exceed_their_limit_nor_change_before_one_is_set(machine):
    machine.follower.limit(2)
    assert machine.watch(5, others=0.0) == 2
    assert machine.watch(5, others=3.0) == 1
    machine.follower.most = None
    assert machine.watch(5, others=0.0) == 1


def test_held_threads_stay_whatever_others_do(machine):
    with machine.follower.hold(3):
        assert machine.watch(5, others=4.0) == 3
    assert machine.watch(5, others=4.0) == 1
    with machine.follower.hold(None):
        assert machine.watch(8, others=0.0) == 4


def test_a_busy_program_is_seen_on_this_machine():
    begin = threads.Usage.now()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(2.0)
        end = threads.Usage.now()
        busy.kill()
    seconds = end.clock - begin.clock
    assert (end.everyone - begin.everyone) - (end.ours - begin.ours) > 0.3 * seconds
    assert end.ours - begin.ours < 0.3 * seconds


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_a_number_of_threads_that_cannot_be_is_one_line(threads, capsys):
    try:
        status = main(["info", "--threads", threads])
    except SystemExit as end:  # what argparse refuses
        status = end.code
    assert status == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_flag_bounds_the_threads_of_every_runtime(tmp_path):
    code = (
        "import sys, torch; from flashlm_helpers.cli.main import main; "
        "from flashlm_helpers.machine.hardware import usable_cores; "
        "main(['info', '--threads', '1', '--json']); "
        "sys.exit(torch.get_num_threads() + usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 2


def test_omp_num_threads_is_an_upper_bound(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert usable_cores() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1000")
    assert 1 <= usable_cores() < 1000
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert usable_cores() >= 1


@pytest.mark.parametrize(
    "given, spins",
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_waiting_threads_spin_shortly_unless_a_person_has_said_otherwise(given, spins):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        environment.pop(name, None)
    code = "import os, flashlm_helpers; print(os.environ.get('GOMP_SPINCOUNT'))"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment | given, capture_output=True, text=True)
    assert run.stdout.strip() == str(spins)
