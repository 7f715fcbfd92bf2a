from dataclasses import asdict, replace

import pytest
import torch
from conftest import assert_same_run, interrupt_at, quiet, stir
from torch import nn
from torch.nn import functional as F

import flashlm_helpers as fl
from flashlm_helpers import registry
from flashlm_helpers.checkpoint import LAST, load_checkpoint
from flashlm_helpers.config import PRESETS, FlashLMError, ModelConfig, TrainConfig
from flashlm_helpers.experiments.experiment import Experiment
from flashlm_helpers.experiments.mixer_check import check_mixer
from flashlm_helpers.experiments.size import count_parameters, receptive_field
from flashlm_helpers.generation import generate
from flashlm_helpers.mixers import AttentionMixer, GatedConvMixer, map_state
from flashlm_helpers.model import FlashLM
from flashlm_helpers.quantization import BitLinear
from flashlm_helpers.registry import own_mixers, register_mixer
from flashlm_helpers.vocab import BOS, EOS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def one_line_of(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- the check ----


class Sum(nn.Module):
    """A mixer that keeps every promise: the sum of all positions so far; its state is the sum."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x, state=None):
        if state is None:
            state = x.new_zeros(x.shape[0], x.shape[-1])
        mixed = state[:, None] + x.cumsum(1)
        return mixed, mixed[:, -1]


class PaddedRight(Sum):
    def forward(self, x, state=None):
        mixed, state = super().forward(x, state)
        return mixed + F.pad(x, (0, 0, 0, 5))[:, 5:], state


class NormalizedOverTime(Sum):
    def forward(self, x, state=None):
        return super().forward(x - x.mean(1, keepdim=True), state)


class Stateless(Sum):
    def forward(self, x, state=None):
        return super().forward(x)[0], None


class Forgetful(Sum):
    def forward(self, x, state=None):
        return super().forward(x)


class HalfForgetful(Sum):
    """Right for one token at a time, wrong for several."""

    def forward(self, x, state=None):
        if state is None:
            state = torch.zeros_like(x[:, 0])
        return super().forward(x, state)[0], state + x[:, -1]


class Narrower(Sum):
    def forward(self, x, state=None):
        mixed, state = super().forward(x, state)
        return mixed[..., :-1], state


class Alone(Sum):
    def forward(self, x, state=None):
        return super().forward(x, state)[0]


class NormalizedOverBatch(Sum):
    def forward(self, x, state=None):
        mixed, state = super().forward(x, state)
        return mixed - x.mean(0), state


class Growing(Sum):
    def forward(self, x, state=None):
        earlier = x[:, :0] if state is None else state
        seen = torch.cat([earlier, x], dim=1)
        return seen.cumsum(1)[:, earlier.shape[1] :], seen


class InPlace(Sum):
    def forward(self, x, state=None):
        if state is None:
            state = torch.zeros_like(x[:, 0])
        mixed, _ = super().forward(x, state)
        return mixed, state.copy_(mixed[:, -1])


class StartsFromOnes(Sum):
    def forward(self, x, state=None):
        if state is None:
            state = torch.ones_like(x[:, 0])
        return super().forward(x, state)


class NotFinite(Sum):
    def forward(self, x, state=None):
        mixed, state = super().forward(x, state)
        return mixed / (mixed - mixed), state


class WithoutBatch(Sum):
    def forward(self, x, state=None):
        mixed, state = super().forward(x, None if state is None else state.T)
        return mixed, state.T


class Counting(Sum):
    def forward(self, x, state=None):
        count = 0 if state is None else state[1]
        mixed, total = super().forward(x, None if state is None else state[0])
        return mixed, (total, count + x.shape[1])


BROKEN = {
    PaddedRight: "sees the future: editing the stream from position 1 on",
    NormalizedOverTime: "sees the future",
    Stateless: "keeps no state: return a tensor, or a tuple of tensors",
    Forgetful: "token by token than all at once, from position 1 on: its state lacks",
    HalfForgetful: "in two pieces than all at once, from position 16 on: its state lacks",
    Narrower: r"changes the shape of the stream: \(3, 48, 32\) becomes \(3, 48, 31\)",
    Alone: "must return two things: the mixed stream and its state",
    NormalizedOverBatch: "mixes the texts of a batch",
    Growing: "a state that grows with the text",
    InPlace: "changes the state it is given",
    StartsFromOnes: "starts a text otherwise than from zeros",
    NotFinite: "numbers that are not finite",
    WithoutBatch: "without the batch in front",
    Counting: "keeps no state: return a tensor, or a tuple of tensors",
}


@pytest.mark.parametrize("mixer", ["conv", "attention", GatedConvMixer, AttentionMixer, Sum])
def test_a_mixer_that_keeps_every_promise_passes(mixer):
    before = torch.get_rng_state()
    line = check_mixer(mixer)
    name = mixer if isinstance(mixer, str) else mixer.__name__
    assert line.startswith(f"{name}: keeps the shape, sees no future")
    assert "\n" not in line
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "mixer, words", BROKEN.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_every_broken_promise_is_found_and_said_in_words(mixer, words):
    with pytest.raises(FlashLMError, match=words) as caught:
        check_mixer(mixer)
    assert one_line_of(caught).startswith(f"the mixer '{mixer.__name__}' ")


@pytest.mark.parametrize(
    "change", [{}, {"kernel_size": 1}, {"window": 1}, {"ternary": False}], ids=str
)
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_built_in_mixers_pass_at_any_size(name, change):
    sizes = ModelConfig(
        "sizes", width=12, blocks=1, hidden=8, sequence_length=21, window=7, heads=3
    )
    check_mixer(name, replace(sizes, **change))


def test_the_check_is_made_at_the_sizes_it_is_given():
    class LeaksLate(Sum):
        """Sees the future in texts that are longer than the check's own."""

        def forward(self, x, state=None):
            mixed, state = super().forward(x, state)
            late = F.pad(x, (0, 0, 0, 60))[:, 60:]
            return mixed + late, state

    check_mixer(LeaksLate)
    sizes = ModelConfig("sizes", width=4, blocks=1, hidden=4, sequence_length=70)
    with pytest.raises(FlashLMError, match="sees the future"):
        check_mixer(LeaksLate, sizes)


class BatchNormed(Sum):
    """Sound when it scores, but not when it trains."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.BatchNorm1d(config.width)

    def forward(self, x, state=None):
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2), state)


class Dropped(Sum):
    def forward(self, x, state=None):
        mixed, state = super().forward(x, state)
        return F.dropout(mixed, 0.5, self.training), state


def test_what_a_mixer_does_while_training_is_checked_as_well():
    with pytest.raises(FlashLMError, match=r"sees the future.*\(while training\)"):
        check_mixer(BatchNormed)
    check_mixer(Dropped)  # noise is no mistake


def test_a_mixer_that_changes_the_stream_it_is_given_is_found():
    class Doubling(Sum):
        def forward(self, x, state=None):
            return super().forward(x.mul_(2), state)

    with pytest.raises(FlashLMError, match="changes the stream it is given"):
        check_mixer(Doubling)


# ---- names ----


def make_class(name="Mine", factor=1.0):
    """Define a class as a notebook's cell does, anew each time."""

    class Mine(Sum):
        def forward(self, x, state=None):
            mixed, state = super().forward(x, state)
            return factor * mixed, state

    Mine.__qualname__ = name
    return Mine


def test_a_registered_name_makes_models():
    register_mixer("mine", Sum)
    config = ModelConfig(
        "own", width=8, blocks=3, hidden=8, sequence_length=8, mixers=("conv", "mine")
    )
    kinds = [type(block.mixer) for block in FlashLM(config).blocks]
    assert kinds == [GatedConvMixer, Sum, GatedConvMixer]
    assert check_mixer("mine").startswith("mine: ")
    assert own_mixers(config) == {"mine": f"{__name__}:Sum"}
    assert receptive_field(config) is None


@pytest.mark.parametrize("name", ["my mixer", "", "2nd", "a-b", "mine=x", "a:b"])
def test_a_name_that_is_not_a_word_is_refused(name):
    with pytest.raises(FlashLMError, match="choose a word such as mine") as caught:
        register_mixer(name, Sum)
    one_line_of(caught)


def test_a_name_that_is_taken_is_refused():
    for name in ("conv", "attention"):
        with pytest.raises(FlashLMError, match="belongs to flashlm_helpers.mixers:") as caught:
            register_mixer(name, Sum)
        assert one_line_of(caught).endswith("choose another one")
    register_mixer("mine", Sum)
    with pytest.raises(FlashLMError, match=f"'mine' belongs to {__name__}:Sum"):
        register_mixer("mine", make_class())


def test_a_cell_that_runs_twice_replaces_its_class():
    first = make_class(factor=1.0)
    second = make_class(factor=2.0)
    register_mixer("mine", first)
    register_mixer("mine", first)
    register_mixer("mine", second)
    config = ModelConfig("own", width=8, blocks=1, hidden=8, sequence_length=8, mixers=("mine",))
    assert type(FlashLM(config).blocks[0].mixer) is second


def test_a_mixer_can_be_named_by_its_module():
    register_mixer("other", "flashlm_helpers.mixers:GatedConvMixer")
    assert registry.find_mixer("other") is GatedConvMixer
    register_mixer("mine", Sum)
    register_mixer("mine", f"{__name__}:Sum")  # the same class


@pytest.mark.parametrize(
    "place",
    [
        "no_such_module:Class",
        "flashlm_helpers.mixers:NoSuchClass",
        "flashlm_helpers.mixers",
        "flashlm_helpers.mixers:map_state",
        "json:JSONDecoder",
        ":Class",
        "",
        "broken_module:Class",
        "unwritten_module:Class",
    ],
)
def test_a_module_that_holds_no_mixer_is_one_line(place, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "unwritten_module.py").write_text("class Class(\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FlashLMError, match="mixer") as caught:
        register_mixer("mine", place)
    one_line_of(caught)
    with pytest.raises(FlashLMError, match="not registered"):
        registry.find_mixer("mine")


@pytest.mark.parametrize("mixer", [nn.Linear(2, 2), lambda config: None, int, None])
def test_what_is_not_a_class_of_modules_is_refused(mixer):
    with pytest.raises(FlashLMError, match="class of nn.Module") as caught:
        register_mixer("mine", mixer)
    one_line_of(caught)


def test_an_unknown_mixer_is_one_line_that_says_what_to_do():
    config = ModelConfig("own", width=8, blocks=2, hidden=8, sequence_length=8, mixers=("convv",))
    for use in (FlashLM, count_parameters, receptive_field, own_mixers):
        with pytest.raises(FlashLMError, match="'convv' is not registered here") as caught:
            use(config)
        message = one_line_of(caught)
        assert "fl.register_mixer('convv', ...)" in message
        assert "--mixer convv=module:Class" in message


def test_an_unknown_mixer_stops_an_experiment_before_it_reads_any_text(tmp_path, home):
    def unread():
        raise AssertionError("the text was read")
        yield

    config = ModelConfig("own", width=8, blocks=2, hidden=8, sequence_length=8, mixers=("convv",))
    text = fl.corpus.Corpus("unread", "unread", lambda split: unread())
    experiment = Experiment(text, config, TrainConfig(epochs=1))
    with pytest.raises(FlashLMError, match="'convv' is not registered here"):
        experiment.run(tmp_path / "run")


# ---- patterns of mixers ----


def pattern(blocks, *names):
    sizes = {"width": 8, "hidden": 8, "sequence_length": 8}
    return ModelConfig("pattern", blocks=blocks, mixers=names, **sizes)


@pytest.mark.parametrize(
    "blocks, written, shortest",
    [
        (4, ("conv",), ("conv",)),
        (4, ("conv", "conv"), ("conv",)),
        (4, ("conv", "attention"), ("conv", "attention")),
        (4, ("conv", "attention", "conv", "attention"), ("conv", "attention")),
        (5, ("conv", "attention", "conv", "attention", "conv"), ("conv", "attention")),
        (5, ("conv", "conv", "attention"), ("conv", "conv", "attention")),
        (3, ("conv", "conv", "attention"), ("conv", "conv", "attention")),
        (4, ("conv", "conv", "conv", "mine"), ("conv", "conv", "conv", "mine")),
        (1, ("attention",), ("attention",)),
    ],
)
def test_a_pattern_is_kept_in_its_shortest_form(blocks, written, shortest):
    config = pattern(blocks, *written)
    assert config.mixers == shortest
    expected = [written[n % len(written)] for n in range(blocks)]
    assert config.block_mixers == tuple(expected)
    assert config == pattern(blocks, *config.block_mixers)
    assert hash(config) == hash(pattern(blocks, *config.block_mixers))
    assert ModelConfig.from_dict(asdict(config)) == config


def test_patterns_of_other_mixers_are_other_architectures():
    assert pattern(4, "conv", "attention") != pattern(4, "attention", "conv")
    assert pattern(4, "conv") != pattern(4, "conv", "mine")
    fewer = replace(pattern(4, "conv", "attention"), blocks=2)
    assert fewer == pattern(2, "conv", "attention")


@pytest.mark.parametrize(
    "attention, mixers",
    [
        ((), ("conv",)),
        ([1, 3], ("conv", "attention")),
        ((0, 2), ("attention", "conv")),
        ([0, 1, 2, 3], ("attention",)),
        ([3], ("conv", "conv", "conv", "attention")),
    ],
)
def test_a_config_that_lists_attention_is_read_as_a_pattern(attention, mixers):
    content = asdict(pattern(4, *mixers))
    del content["mixers"]
    content["attention"] = attention
    before = dict(content)
    assert ModelConfig.from_dict(content) == pattern(4, *mixers)
    assert content == before


def test_the_receptive_field_adds_up_over_the_blocks():
    sizes = ModelConfig("sizes", 8, 3, 8, 8, kernel_size=4, window=10)
    assert receptive_field(sizes) == 1 + 3 * 3
    one = replace(sizes, mixers=("conv", "attention", "conv"))
    assert receptive_field(one) == 1 + 3 * 3 + 9

    class Reaching(Sum):
        @staticmethod
        def reach(config):
            return 2 * config.kernel_size

    register_mixer("reaching", Reaching)
    register_mixer("endless", Sum)
    assert receptive_field(replace(sizes, mixers=("conv", "reaching", "conv"))) == 1 + 6 + 8
    assert receptive_field(replace(sizes, mixers=("conv", "endless"))) is None


# ---- every preset ----


@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_every_preset_sees_no_future_and_reads_in_pieces_what_it_reads_at_once(name):
    torch.manual_seed(0)
    config = replace(PRESETS[name], vocabulary_size=300)
    network = stir(FlashLM(config)).eval()
    T = 300 if "attention" in config.mixers else 90  # more than a window of 256
    ids = torch.randint(4, 300, (2, T))
    full, after = network.hidden(ids)
    tolerance = {"rtol": 1e-3, "atol": 1e-3}

    for t in (1, T // 3, T - 1):
        edited = ids.clone()
        edited[:, t:] = torch.randint(4, 300, (2, T - t))
        edited[:, t] = (ids[:, t] + 1) % 300
        hidden, _ = network.hidden(edited)
        torch.testing.assert_close(hidden[:, :t], full[:, :t], **tolerance)
        assert (hidden[:, t] - full[:, t]).abs().amax() > 1e-2

    states = None
    parts = []
    for piece in ids.split([1, 1, 7, T - 40, 29, 1, 1], dim=1):
        hidden, states = network.hidden(piece, states)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), full, **tolerance)
    for state, expected in zip(states, after, strict=True):
        parts = map_state(lambda a, b: (a - b).abs().amax(), state, expected)
        assert max(parts if isinstance(parts, tuple) else [parts]) < 1e-3


# ---- parts of one's own, through an experiment ----


class GatedRecurrence(nn.Module):
    """h_t = a_t * h_{t-1} + (1 - a_t) * v_t, all positions at once by a Hillis-Steele scan.

    The state is h, (B, D).
    """

    def __init__(self, config):
        super().__init__()
        D = config.width
        self.project_in = BitLinear(D, 3 * D, config.ternary)
        self.decay = nn.Parameter(torch.linspace(0, 4, D))
        self.project_out = BitLinear(D, D, config.ternary)

    def forward(self, x, state=None):
        value, decay, gate = self.project_in(x).float().chunk(3, dim=-1)
        a = torch.sigmoid(decay + self.decay)
        h = (1 - a) * value
        step = 1
        while step < x.shape[1]:
            h = h + a * F.pad(h, (0, 0, step, 0))[:, :-step]
            a = a * F.pad(a, (0, 0, step, 0), value=1.0)[:, :-step]
            step *= 2
        if state is not None:
            h = h + a * state[:, None]
        return self.project_out(h * torch.sigmoid(gate)), h[:, -1]


@pytest.fixture
def limited(model_config):
    return replace(model_config, vocabulary_size=1_000)


@pytest.fixture
def recipe(train_config):
    return replace(train_config, lr=1e-2, bfloat16=False)


@torch.no_grad()
def assert_greedy_is_the_full_pass(model, prompt="Once upon a time", tokens=12):
    """What a model writes greedily is the likeliest id of the full forward pass, each time."""
    [story] = generate(model, prompt, tokens=tokens, temperature=0)
    ids = [BOS, *model.vocabulary.encode(prompt)]
    for token in story.ids:
        hidden, _ = model.network.hidden(torch.tensor([ids]))
        logits = model.network.head(hidden)[0, -1]
        logits[:EOS] = -torch.inf
        assert logits[token] >= logits.max() - 1e-4
        ids.append(token)
    assert len(story.ids) == tokens or story.finished


def check_experiment(experiment, tmp_path, stories):
    """Train, stop and resume bit for bit, score and write with whatever parts there are."""
    still = replace(experiment, recipe=replace(experiment.recipe, lr=1e-30))
    untrained = still.run(tmp_path / "untrained", on_step=quiet)
    whole = experiment.run(tmp_path / "whole", on_step=quiet)
    assert whole.val_nats_per_token < untrained.val_nats_per_token - 0.1
    assert all(row.gradient_norm > 0 for row in whole.history.train)

    folder = tmp_path / "half"
    experiment.run(folder, on_step=interrupt_at(5))
    experiment.run(folder, resume=folder, on_step=quiet)
    ends = []
    for name in ("whole", "half"):
        ends.append(load_checkpoint(tmp_path / name, LAST, experiment.build_model))
    assert_same_run(*ends)

    report = fl.evaluate(whole.model, stories[100:])
    assert report.nats_per_token == pytest.approx(whole.val_nats_per_token, abs=0.3)
    assert_greedy_is_the_full_pass(whole.model)
    return whole


def test_a_mixer_of_ones_own_trains_scores_writes_and_resumes(
    text_dir, limited, recipe, stories, tmp_path, home
):
    register_mixer("recurrence", GatedRecurrence)
    check_mixer("recurrence")
    config = replace(limited, mixers=("conv", "recurrence"))
    report = check_experiment(Experiment(text_dir, config, recipe), tmp_path, stories)
    network = report.model.network
    assert isinstance(network.blocks[1].mixer, GatedRecurrence)
    assert report.config.model.block_mixers == ("conv", "recurrence")
    counts = count_parameters(network.config)
    assert counts.other == config.width  # the decays
    assert counts.total == sum(parameter.numel() for parameter in network.parameters())

    loaded = fl.load(tmp_path / "whole")
    assert generate(loaded, "One day", tokens=9) == generate(report.model, "One day", tokens=9)


def test_a_checkpoint_with_a_mixer_that_is_not_registered_is_one_line(
    text_dir, limited, recipe, tmp_path, home, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        register_mixer("recurrence", GatedRecurrence)
        config = replace(limited, mixers=("recurrence",))
        Experiment(text_dir, config, recipe).run(tmp_path / "run", on_step=interrupt_at(1))

    for load in (load_checkpoint, fl.load):
        with pytest.raises(FlashLMError, match="'recurrence' is not registered here") as caught:
            load(tmp_path / "run")
        message = one_line_of(caught)
        assert "fl.register_mixer('recurrence', ...)" in message
        assert message.endswith("--mixer recurrence=module:Class")
    register_mixer("recurrence", GatedRecurrence)
    assert fl.load(tmp_path / "run").network.config.mixers == ("recurrence",)


def momentum_sgd(network, recipe):
    return torch.optim.SGD(network.parameters(), lr=recipe.lr, momentum=0.9)


def test_an_optimizer_of_ones_own_trains_and_resumes(
    text_dir, limited, recipe, stories, tmp_path, home
):
    recipe = replace(recipe, lr=0.5)
    experiment = Experiment(text_dir, limited, recipe, build_optimizer=momentum_sgd)
    check_experiment(experiment, tmp_path, stories)
    last = load_checkpoint(tmp_path / "whole", LAST)
    assert {"momentum_buffer"} == set(last.optimizer["state"][0])

    # AdamW could not go on from there.
    experiment.run(tmp_path / "half", on_step=interrupt_at(5))
    with pytest.raises(FlashLMError, match="optimizer is of another kind") as caught:
        replace(experiment, build_optimizer=fl.build_optimizer).run(
            tmp_path / "half", resume=tmp_path / "half"
        )
    one_line_of(caught)


class SquaredReLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = BitLinear(config.width, config.hidden, config.ternary)
        self.down = BitLinear(config.hidden, config.width, config.ternary)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class ReLUFlashLM(FlashLM):
    """A FlashLM with another feed-forward half."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.glu = SquaredReLU(config)


class GRUModel(nn.Module):
    """A whole model that shares nothing with FlashLM but the four methods it needs."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.gru = nn.GRU(config.width, config.hidden, batch_first=True)
        self.output = nn.Linear(config.hidden, config.vocabulary_size)

    def hidden(self, ids, states=None):
        before = states[0][None] if states else None  # (1, B, H) for nn.GRU
        x, after = self.gru(self.embedding(ids), before)
        return x, [after[0]]

    def head(self, hidden):
        return self.output(hidden)

    def loss(self, ids, targets, ignore_index=-100):
        logits = self.head(self.hidden(ids)[0])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)

    def token_nll(self, hidden, targets):
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="none")


@pytest.mark.parametrize("build_model", [ReLUFlashLM, GRUModel])
def test_a_whole_model_of_ones_own_trains_scores_writes_and_resumes(
    text_dir, limited, recipe, stories, tmp_path, home, build_model
):
    experiment = Experiment(text_dir, limited, recipe, build_model=build_model)
    report = check_experiment(experiment, tmp_path, stories)
    assert type(report.model.network) is build_model

    # Its weights do not fit a FlashLM, and that is one line.
    with pytest.raises(FlashLMError, match="cannot be loaded") as caught:
        load_checkpoint(tmp_path / "whole")
    one_line_of(caught)


def test_a_model_of_ones_own_runs_for_a_time_with_nothing_decided(
    text_dir, limited, tmp_path, home
):
    recipe = TrainConfig(hours=2 / 3600, validation_stories=3, compile=True)
    report = Experiment(text_dir, limited, recipe, build_model=GRUModel).run(
        tmp_path, on_step=quiet
    )
    assert report.steps > 3
    assert report.config.training.compile is False  # it has nothing that says it is compiled
    assert (tmp_path / "report.json").is_file()
