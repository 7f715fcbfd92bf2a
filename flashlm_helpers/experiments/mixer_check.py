"""A check that says in words what is wrong with a mixer, before anyone trains with it."""

import torch
from torch import Tensor, nn

from flashlm_helpers.config import FlashLMError, ModelConfig
from flashlm_helpers.mixers import State, map_state
from flashlm_helpers.registry import find_mixer

_CHECK_CONFIG = ModelConfig("check", width=32, blocks=1, hidden=32, sequence_length=48, heads=2)
_TEXTS = 3
_TOLERANCE = 1e-4  # sums in another order differ by rounding, mistakes by far more


@torch.no_grad()
def check_mixer(mixer: str | type[nn.Module], config: ModelConfig = _CHECK_CONFIG) -> str:
    """Check that a mixer keeps what the package relies on; return a line that says what holds.

    mixer: a registered name or a class. config: the sizes to build it with.
    It edits the future and other texts of the batch, and compares reading token by token, and
    going on from a state, with reading all at once.
    Raises FlashLMError with one line on the first promise that is broken.
    """
    name = mixer if isinstance(mixer, str) else mixer.__name__
    kind = find_mixer(mixer) if isinstance(mixer, str) else mixer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind(config).eval()
        x = torch.randn(_TEXTS, config.sequence_length, config.width)

    for promise in (
        _keeps_shape,
        _sees_no_future,
        _keeps_texts_apart,
        _has_state,
        _streams,
        _trains_alike,
    ):
        if broken := promise(module, x):
            raise FlashLMError(f"the mixer {name!r} {broken}")
    return (
        f"{name}: keeps the shape, sees no future, keeps texts apart, and writes token by token "
        "what it reads at once, from a state of fixed size"
    )


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Return where two streams (B, T, D) differ by more than rounding, (B, T)."""
    size = other.abs().max().clamp(min=1.0)
    return ((one - other).abs() > _TOLERANCE * size).any(-1)


def _mix(module: nn.Module, x: Tensor) -> Tensor:
    """Return the mixed stream of x (B, T, D), with the same dropout every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return module(x)[0]


def _keeps_shape(module: nn.Module, x: Tensor) -> str | None:
    given = x.clone()
    result = module(given)
    if not torch.equal(given, x):
        return "changes the stream it is given: make a new one instead"
    if not (isinstance(result, tuple) and len(result) == 2):
        return "must return two things: the mixed stream and its state"
    mixed, _ = result
    if not isinstance(mixed, Tensor) or mixed.shape != x.shape:
        shape = tuple(getattr(mixed, "shape", ()))
        return f"changes the shape of the stream: {tuple(x.shape)} becomes {shape}"
    if not mixed.isfinite().all():
        return "returns numbers that are not finite"
    return None


def _sees_no_future(module: nn.Module, x: Tensor) -> str | None:
    before = _mix(module, x)
    for t in range(1, x.shape[1]):
        edited = x.clone()
        edited[:, t:] = torch.randn(edited[:, t:].shape, generator=torch.Generator().manual_seed(t))
        changed = differs(_mix(module, edited), before)[:, :t].nonzero()
        if len(changed):
            position = int(changed[0, 1])
            return (
                f"sees the future: editing the stream from position {t} on changes its output at "
                f"position {position}; a mixer must not read later positions"
            )
    return None


def _keeps_texts_apart(module: nn.Module, x: Tensor) -> str | None:
    before = _mix(module, x)
    edited = x.clone()
    edited[-1] += 1
    if differs(_mix(module, edited), before)[:-1].any():
        return "mixes the texts of a batch: editing one text changes the output of another"
    return None


def _has_state(module: nn.Module, x: Tensor) -> str | None:
    half = x.shape[1] // 2
    mixed, state = module(x)
    parts = [state] if isinstance(state, Tensor) else state
    if not isinstance(parts, list | tuple) or not all(isinstance(p, Tensor) for p in parts):
        return "keeps no state: return a tensor, or a tuple of tensors, of what it must remember"
    if any(part.ndim == 0 or len(part) != len(x) for part in parts):
        return "has a state without the batch in front: its tensors must be (B, ...)"

    # One size for good, however long the text; zeros are the start of one.
    earlier = map_state(torch.Tensor.clone, module(x[:, :half])[1])
    earlier_parts = [earlier] if isinstance(earlier, Tensor) else earlier
    sizes = [part.shape for part in parts]
    if sizes != [part.shape for part in earlier_parts]:
        return "has a state that grows with the text: a token must cost the same at any position"
    if differs(module(x, map_state(torch.zeros_like, state))[0], mixed).any():
        return "starts a text otherwise than from zeros: a state of zeros must equal no state"
    return None


def _streams(module: nn.Module, x: Tensor) -> str | None:
    # Read all at once, and then in pieces that hand their state on.
    whole = module(x)[0]
    T = x.shape[1]
    ways = {"token by token": [1] * T, "in two pieces": [T // 3, T - T // 3]}
    for words, lengths in ways.items():
        state = None
        mixed = []
        for piece in x.split(lengths, dim=1):
            kept = state if state is None else map_state(torch.Tensor.clone, state)
            out, after = module(piece, state)
            if state is not None and not _same_state(state, kept):
                return "changes the state it is given: make a new one instead"
            mixed.append(out)
            state = after
        wrong = differs(torch.cat(mixed, dim=1), whole).nonzero()
        if len(wrong):
            position = int(wrong[:, 1].min())
            return (
                f"writes something else {words} than all at once, from position {position} on: "
                "its state lacks something it needs of the past"
            )
    return None


def _trains_alike(module: nn.Module, x: Tensor) -> str | None:
    # A BatchNorm, for one, is sound when it scores, and looks at the whole batch when it trains.
    module.train()
    broken = _sees_no_future(module, x) or _keeps_texts_apart(module, x)
    return broken and f"{broken} (while training)"


def _same_state(one: State, other: State) -> bool:
    equal = map_state(lambda a, b: torch.tensor(torch.equal(a, b)), one, other)
    return bool(equal if isinstance(equal, Tensor) else all(equal))
