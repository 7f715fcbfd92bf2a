import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flashlm_helpers.quantization import (
    BitLinear,
    freeze_ternary,
    latent_weight,
    pack_ternary,
    quantize_straight_through,
    ternarize,
    unpack_ternary,
)


@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_ternary_weights_follow_the_definition(seed, magnitude):
    weight = magnitude * torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    ternary, scale = ternarize(weight)
    assert ternary.dtype == torch.int8 and scale.shape == ()
    assert scale == weight.abs().mean()
    for w, t in zip(weight.flatten().tolist(), ternary.flatten().tolist(), strict=True):
        ratio = w / (float(scale) + 1e-8)
        if abs(abs(ratio) - 0.5) > 1e-5:
            assert t == (0 if abs(ratio) < 0.5 else 1 if ratio > 0 else -1)


def test_known_values_and_zeros():
    ternary, scale = ternarize(torch.tensor([[4.0, -4.0, 0.5, -0.5, 1.0, 2.0]]))
    assert scale == 2.0 and ternary.tolist() == [[1, -1, 0, 0, 0, 1]]
    ternary, scale = ternarize(torch.zeros(2, 2))
    assert scale == 0 and not ternary.any()


def test_the_forward_weight_is_exactly_ternary_and_the_gradient_passes_straight_through():
    weight = torch.randn(6, 9, requires_grad=True)
    quantized = quantize_straight_through(weight)
    ternary, scale = ternarize(weight.detach())
    assert torch.equal(quantized, ternary * scale)
    upstream = torch.randn(6, 9)
    quantized.backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_bitlinear_learns_as_a_linear_layer_with_its_ternary_weights():
    layer = BitLinear(8, 3)
    x = torch.randn(4, 8, requires_grad=True)
    reference = quantize_straight_through(layer.weight.detach()).requires_grad_()
    other = x.detach().clone().requires_grad_()
    upstream = torch.randn(4, 3)
    out = layer(x)
    (out * upstream).sum().backward()
    ((other @ reference.T) * upstream).sum().backward()
    torch.testing.assert_close(out, x @ reference.T)
    torch.testing.assert_close(layer.weight.grad, reference.grad)
    torch.testing.assert_close(x.grad, other.grad)
    assert layer.bias is None


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 100))
def test_multiplying_needs_additions_only(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = BitLinear(columns, rows)
    x = torch.randn(columns, generator=generator)
    ternary, scale = ternarize(layer.weight.detach())
    sums = torch.stack([x[t == 1].sum() - x[t == -1].sum() for t in ternary])
    torch.testing.assert_close(layer(x), scale * sums, rtol=1e-4, atol=1e-5)


def test_frozen_copies_compute_the_same_bits_and_leave_the_original_alone():
    inner = nn.Sequential(BitLinear(8, 2))
    model = nn.Sequential(BitLinear(8, 8), nn.ReLU(), inner)
    x = torch.randn(5, 8)
    frozen = freeze_ternary(model)
    assert torch.equal(frozen(x), model(x))
    assert not any(isinstance(layer, BitLinear) for layer in frozen.modules())
    assert isinstance(model[0], BitLinear) and model[0].weight.requires_grad
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert not torch.equal(frozen(x), model(x))
    with pytest.raises(RuntimeError):
        frozen(x).sum().backward()


@pytest.mark.parametrize(
    "model", [BitLinear(8, 2), nn.Sequential(BitLinear(8, 2, ternary=False))], ids=["lone", "float"]
)
def test_a_lone_layer_and_float_twins_are_copied_too(model):
    x = torch.randn(5, 8)
    frozen = freeze_ternary(model)
    before = model(x).detach()
    with torch.no_grad():
        next(model.parameters()).mul_(-3.0)
    assert torch.equal(frozen(x), before)
    assert next(model.parameters()).requires_grad


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60), st.integers(1, 4))
def test_packing_keeps_every_weight_at_five_per_byte(values, rows):
    ternary = torch.tensor(values * rows, dtype=torch.int8).view(rows, -1)
    packed = pack_ternary(ternary)
    assert packed.dtype == torch.uint8 and len(packed) == -(-ternary.numel() // 5)
    assert torch.equal(unpack_ternary(packed, tuple(ternary.shape)), ternary)
    with pytest.raises(ValueError, match="bytes are not"):
        unpack_ternary(packed, (rows, len(values) + 5))


@given(st.integers(0, 10_000), st.floats(1e-4, 10))
def test_a_latent_weight_is_ternarized_back(seed, size):
    weight = size * torch.randn(13, 17, generator=torch.Generator().manual_seed(seed))
    ternary, scale = ternarize(weight)
    again, same = ternarize(latent_weight(ternary, scale))
    assert torch.equal(again, ternary)
    torch.testing.assert_close(same, scale, rtol=1e-6, atol=0)
