"""Layers follow the precision and the scales that the file gives them."""

import pytest
import torch
from torch import Tensor

from swinq.int8 import reference
from swinq.int8.layers import HalfAttention, HalfLinear, IntegerAttention, IntegerLinear, linear

ROWS, WIDTH_IN, WIDTH_OUT = 20, 48, 12


def tensors(*, vector: bool = False, rounded: bool = False) -> dict[str, Tensor]:
    """An int8 linear layer "fc"."""
    found = {
        "fc.weight": torch.randint(-127, 128, (WIDTH_OUT, WIDTH_IN), dtype=torch.int8),
        "fc.weight_scale": torch.rand(WIDTH_OUT) / 100 + 1e-3,
        "fc.input_scale": torch.rand(WIDTH_IN) / 30 + 0.01 if vector else torch.tensor(0.025),
        "fc.bias": torch.randn(WIDTH_OUT),
    }
    if rounded:
        found["fc.output_scale"] = torch.rand(WIDTH_OUT) / 30 + 0.01
    return found


@pytest.mark.parametrize("vector", [False, True])
def test_integer_linear_computes_on_codes(vector: bool) -> None:
    own, x = tensors(vector=vector), torch.randn(ROWS, WIDTH_IN)
    codes = (x * (1 / own["fc.input_scale"])).round().clamp(-128, 127)
    acc = codes.long() @ own["fc.weight"].long().t()
    factor = own["fc.weight_scale"] * (1 if vector else own["fc.input_scale"])
    expected = (acc.double() * factor.double() + own["fc.bias"].double()).float()
    assert torch.equal(IntegerLinear(own, "fc")(x, ROWS), expected)


def test_rounded_output_is_codes_times_the_scale_of_each_channel() -> None:
    own, x = tensors(rounded=True), torch.randn(ROWS, WIDTH_IN) * 3
    scale = own.pop("fc.output_scale")
    unrounded = IntegerLinear(own, "fc")(x, ROWS)
    codes = (unrounded * (1 / scale)).round().clamp(-128, 127)
    shown = {}
    found = IntegerLinear(own | {"fc.output_scale": scale}, "fc")(x, ROWS, shown.__setitem__)
    assert torch.equal(found, codes * scale)
    assert torch.equal(shown["fc.output"], codes.to(torch.int8))
    assert shown["fc.input"].dtype == torch.int8


def test_dead_input_channel_is_ignored() -> None:
    own, x = tensors(vector=True), torch.randn(ROWS, WIDTH_IN)
    own["fc.input_scale"][5] = 0
    found = IntegerLinear(own, "fc")(x, ROWS)
    x[:, 5] = 1e6
    assert torch.equal(IntegerLinear(own, "fc")(x, ROWS), found)


def test_dead_output_channel_has_its_bias() -> None:
    own = tensors()
    own["fc.weight_scale"][3] = 0
    found = IntegerLinear(own, "fc")(torch.randn(ROWS, WIDTH_IN), ROWS)
    assert (found[:, 3] == own["fc.bias"][3]).all()


def test_half_linear_rounds_its_input_and_sums_unit_by_unit() -> None:
    own = {"fc.weight": torch.randn(WIDTH_OUT, WIDTH_IN).half(), "fc.bias": torch.randn(WIDTH_OUT)}
    layer, x = HalfLinear(own, "fc"), torch.randn(ROWS, WIDTH_IN)
    found = layer(x, 5)
    assert torch.equal(found[5:10], layer(x[5:10], 5))
    exact = x.half().double() @ own["fc.weight"].double().t() + own["fc.bias"].double()
    assert (found - exact).abs().max() < 1e-5
    assert torch.equal(layer(reference.half(x), ROWS), layer(x, ROWS))


def test_leading_dimensions_are_kept() -> None:
    x = torch.randn(2, 10, WIDTH_IN)
    integer = IntegerLinear(tensors(rounded=True), "fc")
    assert integer(x, 10).shape == (2, 10, WIDTH_OUT)
    assert torch.equal(integer(x, 10)[1], integer(x[1], 10))


def test_precision_word_chooses_the_layer() -> None:
    half = {"fc.weight": torch.zeros(2, 2).half(), "fc.bias": torch.zeros(2)}
    assert isinstance(linear(half, {"fc": "fp16"}, "fc"), HalfLinear)
    assert isinstance(linear(tensors(), {"fc": "int8-unrounded"}, "fc"), IntegerLinear)


def test_attention_quantizes_each_head_with_its_own_scale() -> None:
    heads, dim, n = 3, 8, 4
    own = {
        "attn.q_scale": torch.tensor([0.01, 0.02, 0.03]),
        "attn.k_scale": torch.tensor([0.03, 0.01, 0.02]),
        "attn.v_scale": torch.tensor(0.02),
        "attn.softmax_scale": torch.tensor([0.3, 10.0, 100.0]),
    }
    qkv, bias = torch.randn(2, n, 3 * heads * dim), torch.randn(1, heads, n, n)
    shown = {}
    attention = IntegerAttention(own, "attn", heads * dim)
    found = attention(qkv, bias, 2, shown.__setitem__)
    assert torch.equal(found, attention(qkv, bias, 2))
    parts = reference.split_heads(qkv, heads)
    for part, x in zip("qk", parts, strict=False):
        inverse = (1 / own[f"attn.{part}_scale"]).view(heads, 1, 1)
        codes = (x * inverse).round().clamp(-128, 127).to(torch.int8)
        assert torch.equal(shown[f"attn.{part}"], codes)
    real = [shown[f"attn.{p}"].double() for p in "qkv"]
    scales = [own[f"attn.{p}_scale"].double().view(-1, 1, 1) for p in "qkv"]
    q, k, v = (codes * scale for codes, scale in zip(real, scales, strict=True))
    logits = q @ k.transpose(-2, -1) * own["attn.softmax_scale"].view(-1, 1, 1) + bias
    exact = reference.join_heads(logits.softmax(-1) @ v)
    # half a code of 255 in each probability, relative to the largest one
    assert (found - exact).abs().max() <= n * 0.5 / 255 * float(v.abs().max())


def test_half_attention_takes_units_of_windows_with_their_own_bias() -> None:
    own = {"attn.softmax_scale": torch.tensor([0.3, 0.4])}
    attention = HalfAttention(own, "attn")
    qkv, bias = torch.randn(6, 9, 3 * 2 * 8), torch.randn(6, 2, 9, 9)
    found = attention(qkv, bias, 2)
    assert torch.equal(found[2:4], attention(qkv[2:4], bias[2:4], 2))
    q, k, v = reference.split_heads(qkv.double(), 2)
    logits = q @ k.transpose(-2, -1) * own["attn.softmax_scale"].view(-1, 1, 1) + bias
    exact = reference.join_heads(logits.softmax(-1) @ v)
    assert (found - exact).abs().max() < 0.01  # fp16 operands: 2^-11 of values up to about 4
