import pytest

from flashlm_helpers import hardware
from flashlm_helpers.hardware import GIB, choose_preset, describe_hardware, usable_cores, usable_memory


@pytest.mark.parametrize("cores, memory, preset", [
    (8, 32 * GIB, "v4-large"), (64, 512 * GIB, "v4-large"), (7, 64 * GIB, "v4-small"), (16, 31 * GIB, "v4-small")])
def test_the_preset_follows_cores_and_memory(cores, memory, preset):
    assert choose_preset(cores, memory) == preset


def test_a_cgroup_limits_cores_and_memory(monkeypatch):
    limits = {"cpu.max": ["max 100000"], "memory.max": ["max"]}
    monkeypatch.setattr(hardware, "_cgroup_values", lambda v2, v1: limits[v2])
    monkeypatch.setattr(hardware.psutil, "cpu_count", lambda logical: 16)
    monkeypatch.setattr(hardware.psutil.Process, "cpu_affinity", lambda self: list(range(32)), raising=False)
    assert usable_cores() == 16
    whole = usable_memory()
    limits.update({"cpu.max": ["max 100000", "150000 100000"], "memory.max": ["max", str(GIB)]})
    assert usable_cores() == 2 and usable_memory() == GIB < whole
    limits["cpu.max"] = ["50000 100000"]
    assert usable_cores() == 1
    limits["cpu.max"] = ["-1"]  # how the first version of cgroups says "no limit"
    monkeypatch.setattr(hardware.psutil.Process, "cpu_affinity", lambda self: [3], raising=False)
    assert usable_cores() == 1


def test_cgroup_files_of_every_level_are_read(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for folder, value in ((tmp_path, "max 1"), (tmp_path / "a", "7 1"), (tmp_path / "a" / "b", "9 1")):
        (folder / "cpu.max").write_text(value + "\n")
    group = tmp_path / "cgroup"
    group.write_text("0::/a/b\n")
    places = {"/proc/self/cgroup": group, "/sys/fs/cgroup": tmp_path}
    real = hardware.Path
    monkeypatch.setattr(hardware, "Path", lambda name: places.get(name) or real(name))
    assert hardware._cgroup_values("cpu.max", "cpu.cfs_quota_us") == ["9 1", "7 1", "max 1"]


def test_the_description_is_plain_and_complete():
    described = describe_hardware()
    assert described["cores"] >= 1 and described["memory_gib"] > 0
    assert described["matmul"] in ("bfloat16", "float32")
    assert all(isinstance(value, (str, int, float)) for value in described.values())
