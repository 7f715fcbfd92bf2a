"""Damaged and hostile files of every kind: refused in a line or built anew, never used wrongly."""

import json
import pickle
import random
import resource
import zipfile

import numpy as np
import pytest
import torch
from conftest import lively, times

from flashlm_helpers.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from flashlm_helpers.config import FlashLMError, TrainConfig
from flashlm_helpers.machine.files import atomic_write
from flashlm_helpers.runtime.compact import save_compact
from flashlm_helpers.runtime.packed import load_packed, save_packed
from flashlm_helpers.tokens import TokenFile
from flashlm_helpers.vocab import Vocabulary

IDENTITY = {"corpus": "c", "split": "train", "vocabulary": "v"}
KINDS = ("checkpoint", "compact", "packed", "vocabulary", "tokens")


@pytest.fixture(scope="module")
def written(vocabulary, stories, tmp_path_factory):
    """A folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    model = lively(vocabulary)
    checkpoint = Checkpoint(model.network, TrainConfig(hours=1), vocabulary)
    save_checkpoint(folder / "checkpoint", checkpoint)
    save_compact(folder / "compact", checkpoint)
    save_packed(folder / "packed", model)
    vocabulary.save(folder / "vocabulary")
    TokenFile.build(folder / "tokens", IDENTITY, stories[:20], vocabulary)
    return folder


def what_it_holds(kind, path):
    """All that a program would use of a file."""
    if kind == "tokens":
        tokens = TokenFile(path, IDENTITY)
        return [tokens.n_tokens, tokens.n_stories, tokens.n_bytes, tokens.ids.tobytes()]
    if kind == "vocabulary":
        return Vocabulary.load(path).kept
    loaded = load_packed(path) if kind == "packed" else load_checkpoint(path)
    weights = [weight.numpy().tobytes() for weight in loaded.network.state_dict().values()]
    return [loaded.network.config, loaded.vocabulary.kept, weights]


def harm(content, numbers):
    """A file that is cut off, prolonged, or has wrong bytes, often near one of its ends."""
    if numbers.random() < 0.2:
        return content[: numbers.randrange(len(content))]
    if numbers.random() < 0.1:
        return content + numbers.randbytes(numbers.randrange(1, 100))
    harmed = bytearray(content)
    for _ in range(numbers.choice([1, 1, 2, 8])):
        span = min(len(content), numbers.choice([600, len(content)]))
        place = numbers.randrange(span)
        if numbers.random() < 0.5:
            place = len(content) - 1 - place
        harmed[place] ^= 1 << numbers.randrange(8)
    return bytes(harmed)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_or_means_the_same(kind, written, tmp_path):
    content = (written / kind).read_bytes()
    whole = what_it_holds(kind, written / kind)
    numbers = random.Random(kind)
    refused = 0
    for trial in range(times(6, 2_000)):
        bad = tmp_path / "bad"
        bad.write_bytes(harm(content, numbers))
        try:
            found = what_it_holds(kind, bad)
        except FlashLMError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # as where nothing but padding changed, or the text of a token that is for people
            assert found == whole, trial
    assert refused > trial / 3


# Made to do harm


class Evil:
    """Leaves a file behind when it is loaded by pickle."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("form", ["torch", "pickle", "zip"])
def test_a_strangers_pickle_runs_nothing(form, tmp_path):
    bad = tmp_path / "evil.pt"
    evil = Evil(tmp_path / "trace")
    if form == "torch":
        torch.save({"format": "flashlm-checkpoint-2", "model": evil}, bad)
    elif form == "pickle":
        bad.write_bytes(pickle.dumps(evil))
    else:
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps(evil))
            archive.writestr("../../outside", "x")
    with pytest.raises(FlashLMError, match="cannot be loaded"):
        load_checkpoint(bad)
    assert list(tmp_path.iterdir()) == [bad]


def nested(depth, width):
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


def larger(content, **sizes):
    content["model_config"] |= sizes


def expanded(content):
    larger(content, width=1_000_000, hidden=1_000_000)
    for name in content["model"]:
        content["model"][name] = torch.zeros(1).expand(1_000_000, 1_000_000)


HOSTILE = {
    "a width of terabytes": lambda content: larger(content, width=10_000_000),
    "a hidden width of terabytes": lambda content: larger(content, hidden=2**40),
    "a vocabulary of terabytes": lambda content: larger(content, vocabulary_size=10**12),
    "a kernel of terabytes": lambda content: larger(content, kernel_size=10**11),
    "thousands of blocks": lambda content: larger(content, blocks=4096, width=4096),
    "weights that repeat one value": expanded,
    "a vocabulary that doubles": lambda content: content["vocabulary"].update(kept=nested(60, 2)),
    "curves that double": lambda content: content.update(progress={"history": nested(60, 2)}),
    "a deep vocabulary": lambda content: content["vocabulary"].update(kept=nested(300, 1)),
    "a path among the weights": lambda content: content["model"].update(
        {"../../etc/x": torch.zeros(1)}
    ),
    "weights that are text": lambda content: content["model"].update({"norm.weight": "x"}),
    "no weights": lambda content: content.update(model={}),
    "another format": lambda content: content.update(format=3),
}


@pytest.mark.parametrize("harmful", HOSTILE)
def test_a_hostile_checkpoint_is_refused_without_much_memory(harmful, written, tmp_path):
    content = torch.load(written / "checkpoint", weights_only=True)
    HOSTILE[harmful](content)
    torch.save(content, tmp_path / "bad.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FlashLMError, match="cannot be loaded") as refusal:
        load_checkpoint(tmp_path / "bad.pt")
    assert "\n" not in str(refusal.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # KiB
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_an_archive_that_is_larger_inside_is_refused(written, tmp_path):
    with zipfile.ZipFile(written / "checkpoint") as archive:
        records = {one.filename: archive.read(one) for one in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "bad.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    with pytest.raises(FlashLMError, match="not as torch.save"):
        load_checkpoint(tmp_path / "bad.pt")


BOMBS = ["[" * 100_000, '{"a":' * 100_000, "9" * 10**6, "[" + "1," * 10**7]


@pytest.mark.parametrize("text", BOMBS, ids=["lists", "objects", "digits", "entries"])
def test_a_hostile_vocabulary_is_refused(text, tmp_path):
    (tmp_path / "vocabulary.json").write_text(text)
    with pytest.raises(FlashLMError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "vocabulary.json")


@pytest.mark.parametrize(
    "header", [{}, [], {"checksum": 0}, {"checksum": 1, "magic": "flashlm-tokens-2"}, "[" * 512]
)
def test_a_hostile_token_file_is_refused(header, tmp_path):
    text = header if isinstance(header, str) else json.dumps(header)
    (tmp_path / "bad").write_bytes(text.encode().ljust(512) + bytes(100))
    with pytest.raises(FlashLMError, match="not a token file"):
        TokenFile(tmp_path / "bad", IDENTITY)


def test_a_wrong_id_is_found_before_it_is_trained_on(written, tmp_path):
    content = bytearray((written / "tokens").read_bytes())
    content[600:602] = np.array([60_000], "<u2").tobytes()
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(FlashLMError, match="it is damaged.: delete it and it is built anew"):
        TokenFile(tmp_path / "bad", IDENTITY)


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    target = tmp_path / "folder" / "last.pt"
    target.parent.mkdir()
    target.symlink_to(precious)
    with atomic_write(target) as file:
        file.write(b"ours")
    assert precious.read_text() == "mine"
    assert target.read_bytes() == b"ours"
