"""Packed files in PyTorch, load() and the commands that take any of our files to any runtime."""

import json
import random
import struct
from dataclasses import replace

import pytest
import torch
from conftest import HYBRID, SMALL, lively, needs_compiler
from fuzz_packed import mutate, reseal

from flashlm_helpers import registry
from flashlm_helpers.checkpoint import Checkpoint, save_checkpoint
from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.corpus import TextSource
from flashlm_helpers.evaluation import evaluate
from flashlm_helpers.generation import generate
from flashlm_helpers.mixers import GatedConvMixer
from flashlm_helpers.model import FlashLM
from flashlm_helpers.runtime import bolt, load
from flashlm_helpers.runtime.onnx import save_onnx
from flashlm_helpers.runtime.packed import (
    LIMITS,
    VERSION,
    is_packed,
    load_packed,
    load_vocabulary,
    save_packed,
    unsupported_reason,
)
from flashlm_helpers.runtime.pytorch import PyTorchModel

SHAPES = {
    "v4": {},
    "hybrid": HYBRID,
    "other sizes": {"width": 80, "hidden": 16, "kernel_size": 3},
    "kernel and window of 1": {"kernel_size": 1, "mixers": ("attention",), "heads": 1, "window": 1},
    "a long name": {"name": "naïve" * 8},
}


@pytest.fixture(params=SHAPES)
def model(request, vocabulary):
    return lively(vocabulary, **SHAPES[request.param])


# The file


@torch.inference_mode()
def test_a_packed_model_is_the_same_model(model, prepared, tmp_path):
    path = tmp_path / "exact"
    save_packed(path, model, bits=32)
    loaded = load_packed(path)
    assert is_packed(path)
    assert loaded.vocabulary.hash == load_vocabulary(path).hash == model.vocabulary.hash
    name = model.network.config.name.encode()[:32].decode(errors="ignore")
    assert loaded.network.config == replace(model.network.config, name=name)
    ids = torch.tensor(prepared.valid.ids[None, :200].astype(int))
    torch.testing.assert_close(loaded.network(ids), model.network(ids), rtol=1e-4, atol=1e-5)


def test_the_embedding_at_8_bits_is_off_by_half_a_step_at_most(model, tmp_path):
    rows = model.network.embedding.weight
    with torch.no_grad():
        rows[7] = 0
    save_packed(tmp_path / "small", model)
    kept = load_packed(tmp_path / "small").network.embedding.weight
    steps = rows.abs().amax(1, keepdim=True) / 127
    assert ((rows - kept).abs() <= 0.56 * steps).all()
    assert not kept[7].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ternary": False}, "float weights"),
        ({"width": 8208}, "width is 8,208 and a packed model has at most 8,192"),
        ({"width": 40}, "multiples of 16"),
        ({"hidden": 50}, "multiples of 16"),
        ({"mixers": ("attention", "conv"), "heads": 4}, "the width of a head"),
        ({"width": 4128, "mixers": ("attention",), "heads": 1}, "heads are too wide"),
        ({"width": 4096, "mixers": ("attention",), "window": 65_536}, "state would be too large"),
        ({"mixers": ("conv", "mine")}, "mixer 'mine' cannot be packed: bolt.c knows conv and att"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes, reason, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setitem(registry._REGISTRY, "mine", GatedConvMixer)
    config = replace(SMALL, vocabulary_size=len(vocabulary), **changes)
    assert reason in unsupported_reason(config)
    with torch.device("meta"):
        model = PyTorchModel(FlashLM(config), vocabulary)
    with pytest.raises(FlashLMError) as refusal:
        save_packed(tmp_path / "no", model)
    assert str(refusal.value) == unsupported_reason(config)
    assert not (tmp_path / "no").exists()


def test_the_limits_are_sizes_of_a_model():
    largest = replace(SMALL, **{name: LIMITS[name] for name in ("blocks", "kernel_size")})
    assert unsupported_reason(largest) is None
    assert unsupported_reason(replace(largest, blocks=65)) is not None


def test_networks_of_ones_own_and_other_bits_are_refused(vocabulary, tmp_path):
    class Mine(FlashLM):
        pass

    model = lively(vocabulary)
    with pytest.raises(FlashLMError, match="8 or 32 bits per value, not 16"):
        save_packed(tmp_path / "no", model, bits=16)
    mine = PyTorchModel(Mine(model.network.config), vocabulary)
    with pytest.raises(FlashLMError, match="^Mine cannot be packed: bolt.c knows FlashLM only"):
        save_packed(tmp_path / "no", mine)
    assert not list(tmp_path.iterdir())


def refused(path):
    """Whether a file is refused, by both readers in the same line."""
    complaints = []
    for reader in (load_packed, load_vocabulary):
        try:
            reader(path)
        except FlashLMError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
            complaints.append(str(error))
    return complaints[0] if complaints else None


def test_damaged_and_truncated_files_are_refused(packed, tmp_path):
    content = packed.read_bytes()
    numbers = random.Random(0)
    bad = tmp_path / "bad"
    middle = len(content) // 2
    for length in (0, 1, 8, 100, 191, 192, 193, middle, len(content) - 1):
        bad.write_bytes(content[:length])
        assert refused(bad)
    bad.write_bytes(content + b"\0")
    assert "truncated, or longer" in refused(bad)

    # A bit anywhere.
    for _ in range(100):
        place = numbers.randrange(len(content))
        if numbers.random() < 0.5:
            place %= 192
        flipped = content[place] ^ 1 << numbers.randrange(8)
        bad.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        assert refused(bad), place


def test_a_file_of_another_version_says_what_to_do(packed):
    content = packed.read_bytes()
    later = content[:8] + struct.pack("<I", VERSION + 1) + content[12:]
    packed.write_bytes(reseal(bytearray(later)))
    with pytest.raises(FlashLMError, match=f"of version {VERSION + 1} .* export it anew"):
        load_packed(packed)


def test_hostile_files_with_true_checksums_are_refused_or_read(packed, tmp_path):
    content = packed.read_bytes()
    numbers = random.Random(1)
    outcomes = []
    for _ in range(200):
        bad = tmp_path / "bad"
        bad.write_bytes(mutate(content, numbers))
        outcomes.append(bool(refused(bad)))
    assert any(outcomes)
    assert not all(outcomes)


def test_missing_files_and_folders_are_no_packed_models(tmp_path):
    assert not is_packed(tmp_path)
    assert not is_packed(tmp_path / "missing")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FlashLMError, match="^cannot read "):
            load_packed(path)


# From any file to any runtime


GREEDY = {"tokens": 20, "temperature": 0}
SOURCE = TextSource("builtin", limit=100)


@pytest.fixture(scope="module")
def files(vocabulary, tmp_path_factory):
    """A folder with the same model in all formats, without rounding; exporting takes seconds."""
    folder = tmp_path_factory.mktemp("files")
    model = lively(vocabulary, **HYBRID)
    checkpoint = Checkpoint(model.network, TrainConfig(hours=1), vocabulary, SOURCE)
    save_checkpoint(folder / "model.pt", checkpoint)
    save_packed(folder / "model.flashlm", model, bits=32)
    save_onnx(folder / "model.onnx", model, low_bit=False)
    return folder


@pytest.fixture(scope="module")
def wanted(files):
    return generate(load(files / "model.pt"), "One day", **GREEDY)[0].ids


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        ("model.pt", "torch"),
        ("model.onnx", "onnx"),
        ("model.flashlm", "torch"),
        pytest.param("model.flashlm", "c", marks=needs_compiler),
    ],
)
def test_every_file_tells_the_same_story(name, runtime, files, wanted, vocabulary):
    model = load(files / name, runtime)
    assert model.runtime == runtime
    assert model.vocabulary.hash == vocabulary.hash
    assert model.source == (SOURCE if name == "model.pt" else None)
    assert generate(model, "One day", **GREEDY)[0].ids == wanted


@needs_compiler
def test_every_file_has_a_runtime_of_its_own(files):
    runtimes = [load(files / f"model.{kind}").runtime for kind in ("pt", "flashlm", "onnx")]
    assert runtimes == ["torch", "c", "onnx"]


@pytest.mark.parametrize("runtime", [pytest.param("c", marks=needs_compiler), "onnx"])
def test_a_checkpoint_is_turned_into_what_a_runtime_needs(runtime, files, stories):
    checkpoint = load(files / "model.pt")
    model = load(files / "model.pt", runtime)
    assert (model.runtime, model.source) == (runtime, SOURCE)
    wanted = evaluate(checkpoint, stories[:3]).nats_per_token
    assert evaluate(model, stories[:3]).nats_per_token == pytest.approx(wanted, rel=0.03)


def test_a_network_of_ones_own_is_loaded_by_its_class(files):
    class Mine(FlashLM):
        pass

    assert type(load(files / "model.pt", build_model=Mine).network) is Mine


def test_load_refuses_what_it_cannot_do(files, tmp_path):
    for runtime in ("torch", "c"):
        with pytest.raises(FlashLMError, match="an ONNX model, which only --runtime onnx can run"):
            load(files / "model.onnx", runtime)
    with pytest.raises(FlashLMError, match="no runtime 'rust': choose one of torch, c, onnx"):
        load(files / "model.pt", "rust")
    for name in ("missing.pt", "missing.flashlm", "missing.onnx"):
        with pytest.raises(FlashLMError):
            load(tmp_path / name)


# The command line


@pytest.fixture
def tell(capsys):
    def run(*words):
        """What a command prints with --json, and its notices."""
        assert main([*map(str, words), "--json"]) == 0
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    return run


STORY = ["--prompt", "One day", "--tokens", "20", "--temperature", "0"]


@needs_compiler
@pytest.mark.parametrize(("kind", "runtime"), [("packed", "c"), ("onnx", "onnx")])
def test_an_exported_model_tells_the_story_of_its_checkpoint(
    kind, runtime, files, wanted, tell, tmp_path
):
    out = tmp_path / f"model.{kind}"
    checkpoint = files / "model.pt"
    report, _ = tell(
        "export", "--checkpoint", checkpoint, "--format", kind, "--out", out, "--exact"
    )
    assert report["bytes"] == out.stat().st_size
    told, _ = tell("generate", "--checkpoint", out, *STORY)
    assert told["runtime"] == runtime
    assert told["ids"] == wanted


@needs_compiler
def test_every_runtime_finds_the_same_bits(files, text_dir, tell):
    bits = {}
    for kind in ("pt", "flashlm", "onnx"):
        words = ["--checkpoint", files / f"model.{kind}", "--text", text_dir / "valid.txt"]
        found, _ = tell("eval-bpc", *words, "--no-baselines")
        bits[found["runtime"]] = found["bpb"]
    assert bits["c"] == pytest.approx(bits["torch"], rel=0.01)
    assert bits["onnx"] == pytest.approx(bits["torch"], rel=0.01)


def test_without_a_compiler_pytorch_computes(files, tell, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    bolt.library.cache_clear()
    bolt._compile.cache_clear()
    try:
        story, notices = tell(
            "generate", "--checkpoint", files / "model.pt", "--runtime", "c", *STORY
        )
    finally:
        bolt.library.cache_clear()
    assert story["runtime"] == "torch"
    assert notices.count("\n") == 1
    assert "no C compiler" in notices


def test_a_packed_file_is_described_and_runs_in_pytorch(files, tell):
    packed = files / "model.flashlm"
    described, _ = tell("info", "--checkpoint", packed)
    assert described["bytes"]["checkpoint"] == packed.stat().st_size
    told, _ = tell("generate", "--checkpoint", packed, "--runtime", "torch", *STORY)
    assert told["runtime"] == "torch"


@needs_compiler
@pytest.mark.parametrize(
    "words",
    [
        "generate --checkpoint FILES/model.onnx --runtime torch",
        "generate --checkpoint FILES/model.onnx --runtime c",
        "generate --checkpoint TMP/bad.onnx",
        "generate --checkpoint TMP/no.onnx",
        "generate --checkpoint TMP/bad.flashlm",
        "generate --checkpoint TMP/bad.flashlm --runtime torch",
        "generate --checkpoint FILES/model.flashlm --prompt EMPTY",
        "generate --checkpoint FILES/model.onnx --prompt EMPTY",
        "export --checkpoint FILES/model.pt --format compact --exact --out TMP/c.pt",
        "export --checkpoint FILES/model.onnx --format packed --out TMP/p",
        "export --checkpoint FILES/model.pt --format onnx --out TMP/model.bin",
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(words, files, tmp_path, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    (tmp_path / "bad.flashlm").write_bytes(b"FLASHLM\0 but no more")
    words = words.replace("FILES", str(files)).replace("TMP", str(tmp_path)).split()
    assert main(["" if word == "EMPTY" else word for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
