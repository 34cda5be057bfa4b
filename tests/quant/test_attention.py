"""Quantized attention against numpy, equation by equation: codes, probabilities, output."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swinq.models.swin import WindowAttention
from swinq.models.swin_v2 import CosineWindowAttention
from swinq.quant import attention as attention_module
from swinq.quant.attention import QuantAttention, QuantCosineAttention, QuantWindowAttention
from swinq.quant.insert import quantize_model
from swinq.quant.spec import LayerRule, QuantSpec
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.recipes import recipe

HEADS, HEAD_DIM, WINDOW, IMAGES, MASKS = 2, 32, 7, 4, 4
DIM, TOKENS = HEADS * HEAD_DIM, WINDOW * WINDOW
F32 = np.float32


class Holder(nn.Module):
    """A model of nothing but one attention."""

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.attn(x, mask)


def float_attention(version: int, logit_scale: float = 10.0) -> nn.Module:
    attn: nn.Module
    if version == 1:
        attn = WindowAttention(DIM, HEADS, WINDOW, True)
        nn.init.normal_(attn.get_parameter("relative_position_bias_table"), std=0.5)
    else:
        attn = CosineWindowAttention(DIM, HEADS, WINDOW, 0, True)
        with torch.no_grad():
            attn.logit_scale.fill_(math.log(logit_scale))
        nn.init.normal_(attn.q_bias), nn.init.normal_(attn.v_bias)
    with torch.no_grad():
        attn.get_submodule("qkv").weight.mul_(3.0)
    return attn


def inputs(masked: bool = True) -> tuple[Tensor, Tensor | None]:
    mask = torch.where(torch.rand(MASKS, TOKENS, TOKENS) < 0.3, -100.0, 0.0)
    return torch.randn(IMAGES * MASKS, TOKENS, DIM), mask if masked else None


def quantized(
    attn: nn.Module, data: tuple[Tensor, Tensor | None], spec: QuantSpec | None = None
) -> QuantAttention:
    holder = quantize_model(Holder(copy.deepcopy(attn)).eval(), spec or QuantSpec())
    set_ranges_to_maxima(holder, *data, share=0.95)
    assert isinstance(holder.attn, QuantAttention)
    return holder.attn


class Trace:
    """What one forward of a quantized attention passed between its steps."""

    def __init__(self, attn: QuantAttention, monkeypatch: pytest.MonkeyPatch) -> None:
        original = attn.attend_codes

        def attend_codes(q: Any, k: Any, v: Any, mask: Any, softmax_scale: Tensor) -> Tensor:
            self.q, self.k, self.v = (pair[0].numpy() for pair in (q, k, v))
            self.out = original(q, k, v, mask, softmax_scale)
            return self.out

        def keep_qkv(module: nn.Module, args: Any, output: Tensor) -> None:
            self.qkv = output.numpy()

        def round_half_even(x: Tensor) -> Tensor:
            self.p = x.round()
            return self.p

        attn.qkv.register_forward_hook(keep_qkv)
        monkeypatch.setattr(attn, "attend_codes", attend_codes)
        monkeypatch.setattr(attention_module, "round_half_even", round_half_even)


def split(qkv: np.ndarray) -> tuple[np.ndarray, ...]:
    windows = qkv.reshape(-1, TOKENS, 3, HEADS, HEAD_DIM).transpose(2, 0, 3, 1, 4)
    return windows[0], windows[1], windows[2]  # (windows, heads, tokens, head_dim)


def code(x: np.ndarray, amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = F32(amax) / F32(127)
    return np.clip(np.rint(F32(x) * (F32(1) / scale)), -128, 127).astype(np.int64), scale


def expanded_bias(attn: nn.Module, mask: Tensor | None) -> np.ndarray:
    bias = attn.relative_position_bias().detach().numpy()  # (heads, N, N)
    if mask is None:
        return bias[None]
    return np.tile(bias[None] + mask.numpy()[:, None], (IMAGES, 1, 1, 1))


def apart(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """Largest distance, and the share of codes that differ at all."""
    distance = np.abs(a.astype(np.int64) - b.astype(np.int64))
    return int(distance.max()), float((distance > 0).mean())


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no mask"])
@pytest.mark.parametrize(("version", "logit_scale"), [(1, 0.0), (2, 10.0), (2, 1000.0)])
def test_codes_and_output_follow_the_equations(
    version: int, logit_scale: float, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_attn, data = float_attention(version, logit_scale), inputs(masked)
    attn = quantized(float_attn, data)
    trace = Trace(attn, monkeypatch)
    with torch.no_grad():
        attn(*data)

    q, k, v = split(trace.qkv)
    if version == 2:
        q, k = (
            x / np.maximum(np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True), 1e-12)
            for x in (q, k)
        )
    per_head = (lambda a: a.reshape(-1, 1, 1)) if version == 2 else (lambda a: a)
    codes, scale = {}, {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        amax = attn.get_submodule(f"{name}_quantizer").amax.numpy()
        codes[name], scale[name] = code(x, per_head(amax) if name != "v" else amax)
        furthest, share = apart(getattr(trace, name), codes[name])
        assert furthest <= 1 and share <= (1e-4 if version == 2 else 0.0)
        codes[name] = getattr(trace, name).astype(np.int64)  # go on from the layer's own codes

    softmax = np.full((HEADS, 1, 1), F32(HEAD_DIM**-0.5))
    if version == 2:
        softmax = np.full((HEADS, 1, 1), F32(min(logit_scale, 100.0)))
    factor = F32(F32(scale["q"] * scale["k"]) * softmax)
    product = codes["q"] @ codes["k"].swapaxes(-1, -2)  # int64
    s = F32(F32(F32(product) * factor) + expanded_bias(float_attn, data[1]))
    s = s.astype(np.float64)
    p = np.rint(255 * np.exp(s - s.max(-1, keepdims=True)))
    furthest, share = apart(trace.p.numpy(), p)
    assert furthest <= 1 and share <= 1e-4
    assert p.max(-1).min() == 255

    p = trace.p.numpy().astype(np.int64)
    out = (p @ codes["v"]) * (float(scale["v"]) / p.sum(-1, keepdims=True))
    out = out.transpose(0, 2, 1, 3).reshape(-1, TOKENS, DIM)
    np.testing.assert_allclose(trace.out.numpy(), out, rtol=1e-6, atol=1e-7)


def test_a_masked_key_gets_probability_code_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    data = inputs()
    attn = quantized(float_attention(1), data)
    trace = Trace(attn, monkeypatch)
    with torch.no_grad():
        attn(*data)
    masked = (data[1] == -100.0)[None, :, None].expand(IMAGES, MASKS, HEADS, TOKENS, TOKENS)
    assert trace.p.view(IMAGES, MASKS, HEADS, TOKENS, TOKENS)[masked].eq(0).all()


@pytest.mark.parametrize("spec", [QuantSpec(), recipe("fastertransformer")], ids=["int8", "ft"])
@pytest.mark.parametrize("version", [1, 2])
def test_inactive_attention_is_the_models_own(version: int, spec: QuantSpec) -> None:
    float_attn, data = float_attention(version), inputs()
    attn = quantized(float_attn, data, spec)
    attn.qkv.active = attn.proj.active = attn.active = False
    with torch.no_grad():
        torch.testing.assert_close(attn(*data), float_attn(*data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_names_and_values_that_export_reads_are_the_models(version: int) -> None:
    float_attn = float_attention(version, logit_scale=1000.0)
    attn = quantized(float_attn, inputs())
    assert isinstance(attn, QuantWindowAttention if version == 1 else QuantCosineAttention)
    assert torch.equal(attn.softmax_scale(), float_attn.softmax_scale())
    if version == 2:
        assert attn.softmax_scale().tolist() == pytest.approx([100.0] * HEADS, rel=1e-6)
    for name in ("compact_relative_position_bias", "relative_position_bias"):
        assert torch.equal(getattr(attn, name)(), getattr(float_attn, name)())
    assert torch.equal(attn.relative_position_index, float_attn.relative_position_index)


def test_v2_keeps_one_scale_per_head_and_v1_one_per_tensor() -> None:
    v1, v2 = (quantized(float_attention(version), inputs()) for version in (1, 2))
    assert v1.q_quantizer.amax.ndim == v1.k_quantizer.amax.ndim == v1.v_quantizer.amax.ndim == 0
    assert v2.q_quantizer.amax.shape == v2.k_quantizer.amax.shape == (HEADS,)
    assert v2.v_quantizer.amax.ndim == 0
    for quantizer in (v2.q_quantizer, v2.k_quantizer):
        assert quantizer.descriptor.limit == 1.0 and quantizer.descriptor.axis == 1


@pytest.mark.parametrize("version", [1, 2])
def test_an_fp16_attention_rounds_operands_and_probabilities_to_half(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_attn, data = float_attention(version), inputs()
    attn = quantized(float_attn, data, QuantSpec(layers=(LayerRule("*attn", "fp16"),)))
    assert attn.precision == "fp16" and attn.qkv.precision == "int8"
    trace = Trace(attn, monkeypatch)
    seen: list[Tensor] = []
    attn.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        attn(*data)

    q, k, v = split(trace.qkv)
    if version == 2:
        q, k = (
            x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), F32(1e-12)) for x in (q, k)
        )
    q, k, v = (x.astype(np.float16).astype(np.float64) for x in (q, k, v))
    scale = float_attn.softmax_scale().detach().numpy().reshape(-1, 1, 1)
    s = (q @ k.swapaxes(-1, -2)) * scale + expanded_bias(float_attn, data[1])
    p = np.exp(s - s.max(-1, keepdims=True)).astype(np.float16).astype(np.float64)
    out = (p @ v) / p.sum(-1, keepdims=True)
    out = out.transpose(0, 2, 1, 3).reshape(-1, TOKENS, DIM)
    # a probability at a tie of halves may fall the other way: 2**-11 of one of 49 terms
    np.testing.assert_allclose(seen[0].numpy(), out, rtol=1e-3, atol=1e-3)
    assert np.abs(seen[0].numpy() - out).mean() < 1e-5


@pytest.mark.parametrize("precision", ["int8", "fp16"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_fastertransformer_recipe_rounds_as_it_did(
    version: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [{"PATTERN": "attn", "PRECISION": precision}]
    float_attn, data = float_attention(version), inputs()
    attn = quantized(float_attn, data, recipe("fastertransformer", LAYERS=layers))
    trace = Trace(attn, monkeypatch)
    with torch.no_grad():
        out, wanted = attn(*data), float_attn(*data)
    # its static range, one for all heads, costs a good deal; that is what it is there to show
    assert float((out - wanted).norm() / wanted.norm()) < 0.2
    assert hasattr(trace, "q") is (precision == "int8")
    if precision == "int8":
        assert attn.a_quantizer.calibrated
        assert not hasattr(trace, "p")  # no row-maximum codes
        expected = ["mha_k_quantizer", "mha_q_quantizer"] if version == 2 else []
        assert sorted(n for n, _ in attn.named_children() if n.startswith("mha")) == expected


def test_v2_under_fastertransformers_recipe_takes_the_logit_scale_into_q() -> None:
    data = inputs()
    attn = quantized(float_attention(2, logit_scale=50.0), data, recipe("fastertransformer"))
    assert 20.0 < float(attn.mha_q_quantizer.amax) <= 50.0
    assert float(attn.mha_k_quantizer.amax) <= 1.0


def test_row_maximum_codes_keep_flat_rows_that_a_static_range_loses() -> None:
    shape = (8, HEADS, TOKENS, HEAD_DIM)
    pairs = [(torch.randint(-128, 128, shape).float(), torch.tensor(0.004)) for _ in "qkv"]
    bias = torch.zeros(HEADS, TOKENS, TOKENS)
    q, k, v = (codes.double() * scale.double() for codes, scale in pairs)
    wanted = ((q @ k.transpose(-2, -1)) * HEAD_DIM**-0.5).softmax(-1) @ v
    errors = {}
    for probabilities in ("row_max", "static"):
        spec = QuantSpec(probabilities=probabilities)
        attn = quantized(float_attention(1), inputs(), spec)
        attn.relative_position_bias = lambda: bias  # type: ignore[method-assign]
        if probabilities == "static":
            attn.a_quantizer.load_calib_amax(torch.tensor(1.0))  # some row elsewhere is sharp
        with torch.no_grad():
            out = attn.attend_codes(*pairs, mask=None, softmax_scale=attn.softmax_scale())
        wanted_rows = wanted.transpose(1, 2).flatten(2)
        errors[probabilities] = float((out - wanted_rows).norm() / wanted_rows.norm())
    assert errors["row_max"] < 0.01 < 10 * errors["row_max"] < errors["static"]


@pytest.mark.parametrize("version", [1, 2])
def test_gradients_of_the_quantized_attention_point_where_the_floats_point(version: int) -> None:
    float_attn, data = float_attention(version), inputs()
    attn = quantized(float_attn, data, QuantSpec(output_layers=()))
    grads = []
    for module in (attn, float_attn):
        x = (0.9 * data[0]).requires_grad_()
        module(x, data[1]).square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad.flatten())
        assert module.get_submodule("qkv").weight.grad is not None
    assert torch.cosine_similarity(*grads, dim=0) > 0.95


def test_an_attention_without_qkv_bias_works_too() -> None:
    data = inputs()
    for attn in (
        WindowAttention(DIM, HEADS, WINDOW, False),
        CosineWindowAttention(DIM, HEADS, WINDOW, 0, False),
    ):
        fake = quantized(attn, data)
        assert fake.qkv.full_bias() is None
        with torch.no_grad():
            wanted = attn(*data)
            assert float((fake(*data) - wanted).norm() / wanted.norm()) < 0.05
