"""Each equation of the specification against plain integers, fractions or float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swinq.int8 import reference

EPSILON = 2.0**-24  # half a unit in the last place, relative: one fp32 rounding


def single(value: float | Fraction) -> float:
    return float(np.float32(float(value)))


def test_half_rounds_to_even() -> None:
    x = torch.tensor([2049.0, 2051.0, 65519.0, 1e-8])
    assert reference.half(x).tolist() == [2048.0, 2052.0, 65504.0, 0.0]


def test_inverse_is_one_rounded_division_and_zero_for_zero() -> None:
    scale = torch.tensor([0.0, 3.0, 1 / 127, 2.0**-126])
    expected = [0.0, single(1 / 3), single(1 / single(1 / 127)), 2.0**126]
    assert reference.inverse_of(scale).tolist() == expected


@pytest.mark.parametrize(
    ("x", "code"),
    [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.5, 126), (127.5, 127), (1e9, 127)]
    + [(-127.5, -128), (-128.5, -128), (-1e9, -128)],
)
def test_codes_round_half_to_even_and_saturate(x: float, code: int) -> None:
    assert reference.quantize(torch.tensor([x]), torch.tensor(1.0)).item() == code


def test_code_is_one_rounded_multiply_then_one_rounding() -> None:
    x = torch.randn(4000) * 3
    inverse = reference.inverse_of(torch.tensor(3.7 / 127))
    product = x.numpy() * inverse.numpy()  # fp32
    expected = np.clip(np.rint(product), -128, 127)
    assert (reference.quantize(x, inverse).numpy() == expected).all()


def test_dead_scale_gives_code_zero() -> None:
    assert not reference.quantize(torch.randn(9) * 1e30, torch.zeros(9)).any()


def test_factor_is_one_product_or_the_weight_scale_alone() -> None:
    weight_scale = torch.rand(8) / 100
    scalar = torch.tensor(0.0317)
    expected = [single(Fraction(float(scalar)) * Fraction(s)) for s in weight_scale.tolist()]
    assert reference.gemm_factor(scalar, weight_scale).tolist() == expected
    assert reference.gemm_factor(torch.rand(4), weight_scale) is weight_scale


def test_epilogue_is_a_fused_multiply_add_of_the_accumulator_as_fp32() -> None:
    acc = torch.randint(-(2**27), 2**27, (50, 8), dtype=torch.int32)
    acc[0] = torch.tensor([0, 1, -1, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 99_123_456, 2**27 - 1])
    factor, bias = torch.rand(8) * 1e-5, torch.randn(8)
    found = reference.gemm_epilogue(acc, factor, bias)
    assert found.dtype == torch.float32
    for row, found_row in zip(acc.tolist(), found.tolist(), strict=True):
        for a, f, b, y in zip(row, factor.tolist(), bias.tolist(), found_row, strict=True):
            assert y == single(Fraction(single(a)) * Fraction(f) + Fraction(b))


def test_epilogue_takes_prepared_doubles() -> None:
    acc = torch.randint(-(2**20), 2**20, (50, 8), dtype=torch.int32)
    factor, bias = torch.rand(8) * 1e-5, torch.randn(8)
    plain = reference.gemm_epilogue(acc, factor, bias)
    assert torch.equal(plain, reference.gemm_epilogue(acc, factor.double(), bias.double()))


def test_half_gemm_sums_in_fp32() -> None:
    x, w = reference.half(torch.randn(40, 768)), reference.half(torch.randn(768, 30) / 28)
    bias = torch.randn(30)
    exact = x.double() @ w.double() + bias.double()
    # every one of the 768 additions rounds at most the running sum of magnitudes
    bound = 768 * EPSILON * (x.abs() @ w.abs() + bias.abs()).double()
    error = (reference.half_gemm(x, w, bias).double() - exact).abs()
    assert (error <= bound).all()
    assert float(error.max()) < 1e-5  # fp16 sums would be off by 1e-3


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_layernorm_is_that_of_the_population_with_the_models_eps(eps: float) -> None:
    x = torch.randn(20, 96) * 0.01 + torch.randn(20, 1)
    gamma, beta = torch.randn(96), torch.randn(96)
    wide = x.double()
    mean, variance = wide.mean(1, keepdim=True), wide.var(1, keepdim=True, unbiased=False)
    exact = (wide - mean) / (variance + eps).sqrt() * gamma + beta
    error = (reference.layernorm(x, gamma, beta, eps) - exact).abs()
    # x - mean cancels: an error of |x| / 2^24 in it is magnified by the reciprocal deviation
    magnified = (wide.abs().amax(1, keepdim=True) + 1) / (variance + eps).sqrt()
    bound = 8 * EPSILON * (magnified * gamma.abs() + beta.abs() + exact.abs())
    assert (error <= bound).all()


def test_gelu_is_that_of_erf() -> None:
    y = torch.linspace(-10, 10, 20001)
    exact = torch.tensor([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in y.tolist()])
    # 1 + erf loses up to 2^-24 absolutely, times |y| / 2; then three roundings
    bound = EPSILON * (2 * y.abs() + 4 * exact.abs())
    assert ((reference.gelu(y) - exact).abs() <= bound).all()


@pytest.mark.parametrize("make", [reference.gelu, torch.exp], ids=["gelu", "exp"])
def test_bits_do_not_depend_on_the_place_in_a_tensor(make: object) -> None:
    x = -torch.rand(3000) * 6
    whole = make(x)  # type: ignore[operator]
    for start in range(40):
        for length in (1, 7, 8, 15, 17, 31, 49, 100):
            part = x[start : start + length]
            assert torch.equal(make(part), whole[start : start + length])  # type: ignore[operator]


def test_normalise_divides_by_the_norm_of_a_head_and_survives_zeros() -> None:
    x = torch.randn(5, 7, 2, 3, 32) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1)
    x[0, 0, 0, 0] = 0
    x[0, 0, 0, 1] = 1e-15
    exact = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    found = reference.normalise(x)
    assert (found - exact).abs().max() <= 8 * EPSILON
    assert not found[0, 0, 0, 0].any()
    assert (found[0, 0, 0, 1].double() - 1e-3).abs().max() < 1e-9  # divided by the smallest norm


def attention_inputs(n: int = 49, heads: int = 3) -> tuple[Tensor, ...]:
    q, k, v = (torch.randint(-128, 128, (4, heads, n, 32)).float() for _ in range(3))
    factor = reference.attention_factor(
        torch.rand(heads) / 60, torch.rand(heads) / 60, torch.full((heads,), 32**-0.5)
    )
    bias = torch.randn(4, heads, n, n)
    bias[..., n // 2 :] -= 100.0
    return q, k, v, factor.view(-1, 1, 1), bias, torch.tensor(0.021)


def test_attention_factor_is_two_rounded_products() -> None:
    q, k, s = torch.rand(6), torch.rand(6), torch.rand(6) * 100
    for a, b, c, found in zip(q, k, s, reference.attention_factor(q, k, s), strict=True):
        first = single(Fraction(float(a)) * Fraction(float(b)))
        assert float(found) == single(Fraction(first) * Fraction(float(c)))


def test_probabilities_are_codes_of_exp_below_the_row_maximum() -> None:
    q, k, _, factor, bias, _ = attention_inputs()
    products = torch.einsum("whid,whjd->whij", q.long(), k.long())
    s = products.float() * factor + bias  # fp32: one product, one sum
    exact = 255 * (s.double() - s.amax(-1, keepdim=True).double()).exp()
    found = reference.probabilities(q, k, factor, bias)
    # exp is good to 1 ulp, s - m and the product by 255 round once: 1e-4 of a code at most
    assert ((found.double() - exact).abs() <= 0.5 + 255 * 3 * 2 * EPSILON).all()
    assert (found.amax(-1) == 255).all()
    assert not found[..., 25:].any()  # behind the mask of -100
    assert found.min() >= 0
    assert torch.equal(found, found.round())


def test_equal_logits_all_have_the_largest_code() -> None:
    zero = torch.zeros(1, 1, 9, 32)
    p = reference.probabilities(zero, zero, torch.ones(1, 1, 1), torch.zeros(1, 1, 9, 9))
    assert (p == 255).all()


@pytest.mark.parametrize("n", [49, 576])
def test_attention_output_is_integer_sums_and_two_roundings(n: int) -> None:
    q, k, v, factor, bias, v_scale = attention_inputs(n, heads=2)
    v[0, 0, :, 0] = -128
    p = reference.probabilities(q, k, factor, bias)
    sums = p.long() @ v.long()
    total = p.long().sum(-1, keepdim=True)
    expected = sums.numpy().astype(np.float32) * (
        v_scale.numpy() / total.numpy().astype(np.float32)
    )
    found = reference.integer_attention(q, k, v, factor, bias, v_scale)
    assert (found.numpy() == expected).all()


def test_output_never_leaves_the_range_of_v() -> None:
    q, k, v, factor, bias, v_scale = attention_inputs()
    o = reference.integer_attention(q, k, v, factor, bias, v_scale)
    assert o.max() <= v.max() * v_scale * (1 + 4 * EPSILON)
    assert o.min() >= v.min() * v_scale * (1 + 4 * EPSILON)


def test_half_attention_is_softmax_attention_up_to_fp16_probabilities() -> None:
    q, k, v = (reference.half(torch.randn(4, 3, 49, 32)) for _ in range(3))
    bias = torch.randn(1, 3, 49, 49)
    scale = torch.full((3, 1, 1), 32**-0.5)
    logits = q.double() @ k.double().transpose(-2, -1) * scale + bias
    exact = logits.softmax(-1) @ v.double()
    error = (reference.half_attention(q, k, v, scale, bias) - exact).abs()
    # each probability is off by 2^-11 at most, so is a mean weighted by them: times the spread of v
    assert float(error.max()) <= 2 * 2.0**-11 * float(v.abs().max())


def test_heads_are_split_and_joined_as_the_model_lays_them_out() -> None:
    qkv = torch.arange(2 * 5 * 3 * 4 * 8).view(2, 5, 96).float()
    q, k, v = reference.split_heads(qkv, 4)
    assert q.shape == (2, 4, 5, 8)
    assert torch.equal(k[1, 2, 3], qkv[1, 3, 32 + 16 : 32 + 24])
    assert torch.equal(reference.join_heads(v), qkv[..., 64:])


def test_patches_make_the_convolution_a_product() -> None:
    image, weight = torch.randn(3, 12, 12), torch.randn(8, 3, 4, 4)
    rows = reference.patches(image, 4) @ weight.flatten(1).t()
    exact = F.conv2d(image[None], weight, stride=4).flatten(2)[0].t()
    assert torch.allclose(rows, exact, atol=1e-5)


def test_merged_neighbours_have_the_original_order() -> None:
    x = torch.randn(2, 36, 5)
    grid = x.view(2, 6, 6, 5)
    corners = [grid[:, dy::2, dx::2] for dy, dx in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert torch.equal(reference.merge_neighbours(x, 6), torch.cat(corners, -1).view(2, 9, 20))


def test_head_takes_the_half_of_the_mean() -> None:
    tokens, weight, bias = torch.randn(49, 64), reference.half(torch.randn(64, 10)), torch.randn(10)
    mean = tokens.double().mean(0).float().half().double()
    exact = mean @ weight.double() + bias.double()
    found = reference.head(tokens, weight, bias)
    assert found.shape == (10,)
    # a mean on the edge between two halves may fall either way: one fp16 step of one channel
    step = 2.0**-11 * float(mean.abs().max() * weight.abs().max())
    assert (found - exact).abs().max() <= step + 64 * EPSILON * 64
