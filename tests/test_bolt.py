"""bolt.c, as a library and as a program: the same numbers as PyTorch, and no harm from any file."""

import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HYBRID, SMALL, lively, needs_compiler
from fuzz_packed import build, fuzz, mutate, reseal, small_models
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.generation import generate, sampling_distribution, stream
from flashlm_helpers.model import FlashLM
from flashlm_helpers.runtime import bolt as runtime
from flashlm_helpers.runtime.bolt import LANES, SOURCE, Bolt, RuntimeUnavailable
from flashlm_helpers.runtime.packed import VERSION, load_packed, save_packed
from flashlm_helpers.runtime.pytorch import PyTorchModel
from flashlm_helpers.vocab import BOS, BYTES, EOS, Vocabulary

SHAPES = {
    "v4": {},
    "hybrid": HYBRID,
    "other sizes": {"width": 80, "hidden": 16, "kernel_size": 3},
    "kernel of 1": {"kernel_size": 1},
    "window of 1": {"mixers": ("attention",), "heads": 1, "window": 1},
    "window of 40": {"mixers": ("attention", "conv"), "heads": 1, "window": 40},
}


@pytest.fixture(params=SHAPES)
def model(request, vocabulary):
    return lively(vocabulary, **SHAPES[request.param])


def text_ids(prepared, count=200):
    return [BOS, *prepared.valid.ids[1:count].tolist()]


def refused(path):
    """Both readers refuse a file, each in one line."""
    complaints = []
    for reader in (load_packed, Bolt):
        try:
            reader(path)
        except FlashLMError as error:
            assert "\n" not in str(error)
            complaints.append(str(error))
    return len(complaints) == 2


# The file


@needs_compiler
def test_damaged_and_truncated_files_are_refused(packed, tmp_path):
    content, numbers = packed.read_bytes(), random.Random(0)
    bad = tmp_path / "bad"
    for length in (0, 1, 8, 100, 191, 192, 193, len(content) // 2, len(content) - 1):
        bad.write_bytes(content[:length])
        assert refused(bad)
    bad.write_bytes(content + b"\0")
    assert refused(bad)
    for _ in range(200):
        place = numbers.randrange(len(content))
        if numbers.random() < 0.5:
            place %= 192
        bad.write_bytes(
            content[:place]
            + bytes([content[place] ^ 1 << numbers.randrange(8)])
            + content[place + 1 :]
        )
        assert refused(bad), place
    bad.write_bytes(reseal(bytearray(content[:8] + struct.pack("<I", VERSION + 1) + content[12:])))
    for reader in (load_packed, Bolt):
        with pytest.raises(FlashLMError, match=f"of version {VERSION + 1} .* export it anew"):
            reader(bad)


@needs_compiler
def test_hostile_files_with_true_checksums_harm_nobody(packed, tmp_path):
    content, numbers, bad = packed.read_bytes(), random.Random(1), tmp_path / "bad"
    opened = 0
    for _ in range(300):
        bad.write_bytes(mutate(content, numbers))
        refused(bad)
        try:
            bolt = Bolt(bad)
        except FlashLMError:
            continue
        opened += 1
        bolt.token_nats([[BOS, EOS, 5]])
        for temperature in (0.0, 1.0):
            prompts = ["Once, you're \u3000 42 !\U0001f642"] * numbers.choice([1, 9])
            generate(bolt, prompts, tokens=5, temperature=temperature)
    assert opened > 30


@needs_compiler
def test_a_space_that_is_no_white_space_hangs_nobody(packed, tmp_path):
    content = bytearray(packed.read_bytes())
    spaces = struct.pack("<4H", 9, 5, 18, 1)  # 9 to 13, then 32
    place = content.rindex(spaces)
    content[place + 4] = 19
    (tmp_path / "odd").write_bytes(reseal(content))
    assert Bolt(tmp_path / "odd").encode("Hi !") == Bolt(packed).encode("Hi !")


@needs_compiler
def test_hostile_files_do_nothing_that_a_sanitizer_would_stop(tmp_path):
    try:
        build(SOURCE, tmp_path / "bolt")
    except subprocess.CalledProcessError:
        pytest.skip("the compiler has no sanitizers")
    outcomes = fuzz(
        tmp_path / "bolt", small_models(tmp_path), 100
    )  # by hand: tests/fuzz_packed.py --files 10000
    assert outcomes["ran"] > 5 and outcomes["refused"] > 5


# The program


@pytest.mark.parametrize("compiler", ["gcc", "clang", "aarch64-linux-gnu-gcc"])
def test_every_compiler_builds_it_without_a_warning(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    subprocess.run(
        [
            compiler,
            "-std=c11",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-c",
            str(SOURCE),
            "-o",
            str(tmp_path / "bolt.o"),
        ],
        check=True,
    )


@needs_compiler
def test_c_computes_what_pytorch_computes(model, vocabulary, prepared, tmp_path):
    save_packed(tmp_path / "exact", model, bits=32)
    bolt, ids = Bolt(tmp_path / "exact"), text_ids(prepared)
    with torch.inference_mode():
        logits = model.network(torch.tensor([ids]))[0]
    torch.testing.assert_close(
        torch.from_numpy(bolt.logits([ids])[0]), logits, rtol=1e-4, atol=1e-4
    )
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    for scored in bolt.token_nats([ids, ids, ids[:40]]):
        torch.testing.assert_close(
            torch.from_numpy(scored).float(), nats[: len(scored)], rtol=1e-4, atol=1e-4
        )


@needs_compiler
def test_texts_side_by_side_do_not_touch_each_other(model, vocabulary, prepared, tmp_path):
    save_packed(tmp_path / "exact", model, bits=32)
    ids = torch.tensor(prepared.valid.ids[: LANES * 60].astype(int)).view(LANES, 60)
    with torch.inference_mode():
        logits = model.network(ids)
    torch.testing.assert_close(
        torch.from_numpy(Bolt(tmp_path / "exact").logits(ids)), logits, rtol=1e-4, atol=1e-4
    )


@needs_compiler
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])
def test_all_kernels_compute_the_same(
    kernels, bits, model, vocabulary, prepared, tmp_path, monkeypatch
):
    monkeypatch.setenv("BOLT_KERNELS", kernels)
    save_packed(tmp_path / "m", model, bits)
    bolt, ids = Bolt(tmp_path / "m"), torch.tensor([text_ids(prepared, 40)])
    capabilities = torch.cpu.get_capabilities()
    if kernels != "portable" and not capabilities.get(
        "avx512_bw" if kernels == "avx512" else kernels
    ):
        pytest.skip(f"this processor has no {kernels}")
    assert bolt.kernels == kernels
    with torch.inference_mode():
        unpacked = load_packed(tmp_path / "m").network
        hidden = unpacked.hidden(ids)[0]
        wanted, allowed = unpacked.head(hidden), 1e-4
        if bits == 8:  # what the head reads is rounded to 16 bits
            half_a_unit = hidden.abs().amax(-1, keepdim=True) / 32767 / 2
            allowed = 1e-4 + half_a_unit * unpacked.embedding.weight.abs().sum(1)
    for texts in (1, LANES):
        computed = torch.from_numpy(bolt.logits(ids.repeat(texts, 1)))
        assert ((computed - wanted).abs() <= allowed + 1e-4 * wanted.abs()).all()


@needs_compiler
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])
def test_integer_sums_do_not_overflow(kernels, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setenv("BOLT_KERNELS", kernels)
    sizes = {"width": 2048, "blocks": 1, "hidden": 16, "sequence_length": 8}
    wide = FlashLM(ModelConfig("wide", vocabulary_size=len(vocabulary), **sizes)).eval()
    with torch.no_grad():  # all that the head reads is as large as it gets, and so are its weights
        for parameter in wide.blocks.parameters():
            parameter.zero_()
        wide.embedding.weight.fill_(0.5)
    save_packed(tmp_path / "wide", PyTorchModel(wide, vocabulary))
    logits = Bolt(tmp_path / "wide").logits([[BOS, 7]] * LANES)
    np.testing.assert_allclose(logits, 1024, rtol=1e-2)  # the scale of a row has 8 bits


@needs_compiler
def test_greedy_stories_are_those_of_pytorch(model, tmp_path, monkeypatch):
    # One thread, so that places are taken over.
    monkeypatch.setattr("flashlm_helpers.runtime.bolt.usable_cores", lambda: 1)
    save_packed(tmp_path / "exact", model, bits=32)
    bolt = Bolt(tmp_path / "exact")
    prompts = ["One day, a cat", "Tom", "The big red ball rolled down"] * (LANES // 2)
    greedy = {"tokens": 60, "temperature": 0}
    told = generate(model, prompts, **greedy)
    alone = [generate(bolt, prompt, **greedy)[0] for prompt in prompts[:3]]
    for stories in (generate(bolt, prompts, **greedy), alone):
        for mine, other in zip(stories, told, strict=False):
            assert (mine.text, mine.ids, mine.finished) == (other.text, other.ids, other.finished)
            assert mine.surprise == pytest.approx(other.surprise, abs=1e-3)
            assert mine.entropy == pytest.approx(other.entropy, abs=1e-3)


@needs_compiler
@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_stream_grows_into_the_written_stories(count, packed):
    bolt = Bolt(packed)
    settings_ = {"tokens": 15, "seed": 4}
    grown = 0
    for stories in stream(bolt, ["Tom"] * count, **settings_):
        written = sum(len(story.ids) + story.finished for story in stories)
        assert written == grown + 1
        grown = written
    assert stories == generate(bolt, ["Tom"] * count, **settings_)
    assert all(len(s.ids) == len(s.surprise) == len(s.entropy) for s in stories)


@needs_compiler
@pytest.mark.parametrize("count", [1, 20])
def test_a_stream_of_stories_that_end_at_once_says_so(count, vocabulary, tmp_path):
    network = FlashLM(replace(SMALL, vocabulary_size=len(vocabulary))).eval()
    with torch.no_grad():  # EOS is the likeliest, whatever was read
        for parameter in network.blocks.parameters():
            parameter.zero_()
        network.embedding.weight.fill_(0.1)
        network.embedding.weight[EOS] = 1
    model = PyTorchModel(network, vocabulary)
    save_packed(tmp_path / "m", model)
    for runtime_ in (model, Bolt(tmp_path / "m")):
        stories = list(stream(runtime_, ["Tom"] * count, temperature=0))[-1]
        assert [(s.text, s.ids, s.finished) for s in stories] == [("Tom", [], True)] * count


@needs_compiler
def test_a_story_does_not_depend_on_those_beside_it(packed, monkeypatch):
    monkeypatch.setattr("flashlm_helpers.runtime.bolt.usable_cores", lambda: 1)
    bolt = Bolt(packed)
    many = generate(bolt, ["Tom"] * 20, tokens=20, seed=5)
    others = generate(bolt, ["A long and other beginning"] + ["Tom"] * 19, tokens=20, seed=5)
    assert others[1:] == many[1:]
    assert len({story.text for story in many}) > 10


@needs_compiler
def test_logits_come_for_one_text_or_sixteen(packed):
    for texts in (2, LANES - 1, LANES + 1):
        with pytest.raises(FlashLMError, match=f"not for {texts}"):
            Bolt(packed).logits([[BOS]] * texts)


@needs_compiler
def test_a_reader_that_leaves_a_stream_leaves_no_thread_behind(packed):
    threads = threading.active_count()
    for _ in stream(Bolt(packed), ["Tom"] * 5_000, tokens=400):  # minutes, if it went on
        break
    assert threading.active_count() == threads


@needs_compiler
def test_an_error_while_writing_reaches_the_reader(packed, monkeypatch):
    bolt = Bolt(packed)
    monkeypatch.setattr(bolt._bolt, "bolt_start", lambda model, texts: None)
    for ask in (generate, lambda *asked: list(stream(*asked))):
        with pytest.raises(MemoryError):
            ask(bolt, "Tom")


@needs_compiler
@pytest.mark.parametrize("temperature", [3e38, 1e300])
def test_what_is_written_is_in_the_vocabulary_at_any_temperature(temperature, vocabulary, tmp_path):
    extra = next(
        n for n in range(LANES) if (len(vocabulary) - n) % LANES == 5
    )  # so that 11 rows are none of its own
    dropped = [kept for kept in vocabulary.kept if kept >= BYTES][:extra]
    fewer = Vocabulary([kept for kept in vocabulary.kept if kept not in dropped])
    save_packed(tmp_path / "m", lively(fewer))
    hot = {"tokens": 50, "temperature": temperature, "top_p": 1}
    for story in generate(Bolt(tmp_path / "m"), ["Tom"] * 40, **hot):
        assert all(EOS < token < len(fewer) for token in story.ids)


@needs_compiler
def test_an_interrupt_need_not_wait_for_the_last_story(packed):
    began = time.monotonic()
    threading.Timer(
        1.0, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        generate(Bolt(packed), ["Tom"] * 50_000, tokens=400)  # minutes
    assert time.monotonic() - began < 20


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"tokens": 0},
        {"seed": -1},
        {"tokens": 3_000_000_000},
        {"prompts": ""},
        {"prompts": []},
    ],
)
def test_requests_that_cannot_be_met_are_refused(wrong, packed):
    with pytest.raises(FlashLMError):
        generate(Bolt(packed), **{"prompts": "Tom"} | wrong)


@needs_compiler
@pytest.mark.parametrize(
    "settings_",
    [(1.0, 0, 1e-50), (0.8, 0, 0.95), (1.0, 3, 1.0), (1.5, 0, 1.0), (0.5, 20, 0.5), (1e-3, 0, 1.0)],
)
def test_sampling_draws_from_the_distribution_it_should(settings_, packed):
    bolt = Bolt(packed)
    logits = torch.from_numpy(bolt.logits([[BOS, *bolt.encode("Tom")]]))[:, -1]
    logits[:, : BOS + 1] = -torch.inf
    wanted = sampling_distribution(logits, *settings_)[0]
    draws = 3000
    names = ("temperature", "top_k", "top_p")
    how = dict(zip(names, settings_, strict=True))
    told = generate(bolt, ["Tom"] * draws, tokens=1, **how)
    first = [story.ids[0] if story.ids else EOS for story in told]
    seen, expected = torch.bincount(torch.tensor(first), minlength=len(wanted)), draws * wanted
    assert not seen[wanted == 0].any()
    often = expected >= 5  # the others are taken together
    seen, expected = (
        torch.cat([counts[often], counts[~often].sum()[None]]) for counts in (seen, expected)
    )
    chi_square = ((seen - expected) ** 2 / expected.clamp(min=1)).sum()
    freedom = len(seen) - 1
    assert chi_square < freedom + 5 * (2 * max(freedom, 1)) ** 0.5  # about one in a million beyond


@needs_compiler
@given(
    text=st.text(
        alphabet=st.one_of(
            st.characters(exclude_categories=["Cs"]),
            st.sampled_from(" \n\t'sdmtlvre\u3000\u00a0é你🙂0٣"),
        ),
        max_size=80,
    )
)
@settings(max_examples=300, deadline=None)
def test_c_encodes_text_as_python_does(text, encoder, vocabulary):
    assert encoder.encode(text) == vocabulary.encode(text)


@pytest.fixture(scope="module")
def encoder(vocabulary, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "m"
    sizes = {"width": 16, "blocks": 1, "hidden": 16, "sequence_length": 32}
    network = FlashLM(ModelConfig("test", vocabulary_size=len(vocabulary), **sizes))
    save_packed(path, PyTorchModel(network, vocabulary))
    return Bolt(path)


@needs_compiler
def test_a_long_prompt_is_no_trouble(encoder, vocabulary):
    for text in ("a" * 100_000, "Once upon a time. " * 5_000, "\U0001f642" * 10_000):
        assert encoder.encode(text) == vocabulary.encode(text)


@needs_compiler
def test_ids_outside_the_vocabulary_are_refused(encoder):
    for ids in ([-1], [len(encoder.vocabulary)], [70_000]):
        with pytest.raises(FlashLMError, match="outside this vocabulary"):
            encoder.token_nats([ids])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "bolt"
    compiler = next(filter(None, map(shutil.which, runtime.COMPILERS)))
    subprocess.run(
        [compiler, "-O3", str(SOURCE), "-o", str(path)], check=True
    )  # as its first lines say
    return path


@needs_compiler
def test_the_program_tells_a_story_by_itself(program, packed):
    def run(*words):
        return subprocess.run([program, packed, *words], capture_output=True)

    done = run("One day", "-t", "0", "-n", "30")
    told = generate(load_packed(packed), "One day", tokens=30, temperature=0)[0]
    assert done.returncode == 0 and done.stdout.decode(errors="replace") == told.text + "\n"
    one, same, other = [run("One day", "-t", "3", "-s", seed).stdout for seed in "112"]
    assert one == same != other
    assert run("x" * 100_000, "-n", "1").returncode == 0


@needs_compiler
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["{model}"],
        ["{model}", ""],
        ["{model}", b"\xff"],
        ["{model}", b"\xed\xa0\x80"],
        ["no-such-file", "Hi"],
        [".", "Hi"],
        ["{model}", "Hi", "-n"],
        ["{model}", "Hi", "-n", "0"],
        ["{model}", "Hi", "-n", "2.5"],
        ["{model}", "Hi", "-p", "0"],
        ["{model}", "Hi", "-t", "nan"],
        ["{model}", "Hi", "-s", "-1"],
        ["{model}", "Hi", "-x", "1"],
        [sys.executable, "Hi"],
    ],
)
def test_mistakes_are_one_line_and_status_2(words, program, packed):
    words = [str(packed) if word == "{model}" else word for word in words]
    done = subprocess.run([program, *words], capture_output=True)
    assert done.returncode == 2 and done.stdout == b""
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


# Where it is built


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHLM_HOME", str(tmp_path))
    own_compiler(tmp_path, 'exec cc "$@" -O0', monkeypatch)  # in a second or two
    forget()
    yield tmp_path
    forget()


def forget():
    """What a process that starts does not know."""
    runtime.library.cache_clear()
    runtime._compile.cache_clear()


def test_without_a_compiler_it_says_what_to_do(unbuilt, monkeypatch):
    monkeypatch.setenv("PATH", str(unbuilt))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeUnavailable, match="no C compiler .install gcc or clang to have one"):
        runtime.library()


def own_compiler(folder, script, monkeypatch):
    path = folder / "own-cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("first line\nsecond line", "first line second line"),
        ("x.c: note: the ABI has changed\nx.c:2: error: no such type", "no such type"),
    ],
)
def test_a_compiler_that_fails_is_one_line(said, reason, unbuilt, monkeypatch):
    own_compiler(unbuilt, f"echo '{said}' >&2; exit 1", monkeypatch)
    with pytest.raises(RuntimeUnavailable, match=f"cannot build bolt.c .{reason}"):
        runtime.library()
    assert not list(unbuilt.rglob("*.so"))


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(unbuilt):
    (unbuilt / "data").write_text("in the way")
    assert runtime.library().bolt_open


LOAD = "from flashlm_helpers.runtime.bolt import library; assert library().bolt_open"


@needs_compiler
def test_a_damaged_library_is_built_anew(unbuilt):
    runtime.library()
    (kept,) = unbuilt.rglob("*.so")
    whole = kept.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:5_000], whole[: len(whole) // 2], whole[:-1], bytes(flipped)):
        # Not into the file that this process has mapped.
        kept.unlink()
        kept.write_bytes(damaged)
        runtime.library.cache_clear()
        assert runtime.library().bolt_open
        assert kept.read_bytes() == whole
    assert list(kept.parent.iterdir()) == [kept]


@needs_compiler
def test_a_library_in_a_folder_that_runs_no_programs_is_loaded_from_another(unbuilt, monkeypatch):
    def load(path):
        if path.startswith(str(unbuilt)):
            raise OSError("failed to map segment from shared object")
        return real(path)

    real = runtime.ctypes.CDLL
    monkeypatch.setattr(runtime.ctypes, "CDLL", load)
    assert runtime.library().bolt_open

    # If it runs nowhere, that is one line.
    runtime.library.cache_clear()
    monkeypatch.setattr(runtime, "_temporary_folder", lambda: SimpleNamespace(name=str(unbuilt)))
    with pytest.raises(RuntimeUnavailable, match="cannot be loaded .failed to map segment from"):
        runtime.library()


@needs_compiler
def test_several_processes_may_build_at_once(unbuilt):
    command = [sys.executable, "-c", LOAD]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (kept,) = (unbuilt / "data" / "compiled").iterdir()
    assert kept.suffix == ".so"


@needs_compiler
def test_a_link_in_the_place_of_the_library_is_replaced(unbuilt):
    runtime.library()
    (kept,) = unbuilt.rglob("*.so")
    elsewhere = unbuilt / "precious"
    elsewhere.write_text("mine")
    kept.unlink()
    kept.symlink_to(elsewhere)
    runtime.library.cache_clear()
    assert runtime.library().bolt_open
    assert elsewhere.read_text() == "mine"
    assert not kept.is_symlink()
