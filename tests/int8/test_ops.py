"""torch.ops.swinq: every operator checked, its CPU kernel judged, compiled and exported."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swinq.errors import ConfigError, DataError, EngineError
from swinq.int8 import op_cuda, ops, reference
from swinq.int8.engine import CudaSwin
from swinq.int8.library import available
from swinq.int8.model import Int8Swin
from swinq.int8.module import Int8Module
from swinq.int8.windows import Windows
from tests.int8 import fake_engine
from tests.int8.made_checkpoint import made_architecture, made_checkpoint
from tests.int8.test_model import images

HEADS, WINDOW, RESOLUTION = 2, 4, 8
WIDTH = HEADS * 32
op = torch.ops.swinq


@pytest.fixture
def place(device: torch.device) -> torch.device:
    """Each device in turn; the GPU with the real library only."""
    if device.type == "cuda" and not available():
        pytest.skip("libswinq is not built")
    return device


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def scales(count: int) -> Tensor:
    return 0.01 * (1 + torch.rand(count))


def gemm_arguments(rows: int = 40, n: int = 3 * WIDTH, k: int = 96) -> tuple[Any, ...]:
    """a, weight (not packed), factor, bias, out_inverse."""
    weight = codes(n, k).clamp(min=-127)
    return codes(rows, k), weight, 1e-3 * scales(n), torch.randn(n), 1 / scales(n)


def samples() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every operator, on the CPU; weights and tables are still to be packed."""
    a, weight, factor, bias, inverse = gemm_arguments()
    table = torch.randn((2 * WINDOW - 1) ** 2, HEADS)
    tokens = 2 * RESOLUTION**2
    qkv = codes(tokens, 3, HEADS, 32)
    x = torch.randn(2, RESOLUTION**2, WIDTH).half()
    gamma, beta = torch.randn(WIDTH), torch.randn(WIDTH)
    stream = torch.randn(40, WIDTH).half()
    attend = (qkv, table, scales(HEADS), 0.02, RESOLUTION, WINDOW)
    wide = (torch.randn(4 * WIDTH), torch.randn(4 * WIDTH), 1 / scales(4 * WIDTH))
    narrow = (a, weight[:WIDTH], factor[:WIDTH], bias[:WIDTH], stream)
    norm = (gamma, beta, 1 / scales(WIDTH), 1e-5)
    return {
        "pack_gemm_weight": ((weight[:40],), {}),
        "gemm_int8": ((a, weight, factor, bias), {}),
        "gemm_int8 codes": ((a, weight, factor, bias, inverse), {}),
        "gemm_int8 gelu": ((a, weight, factor, bias, inverse, "gelu"), {}),
        "gemm_int8 normalize": ((a, weight, factor, bias, inverse, "normalize"), {}),
        "gemm_int8_residual": (narrow, {}),
        "gemm_int8_residual rounded": (
            narrow,
            {"out_inverse": 1 / scales(WIDTH), "out_scale": scales(WIDTH)},
        ),
        "pack_attention_bias": ((table, WINDOW), {}),
        "window_attention_int8": ((*attend, 0), {}),
        "window_attention_int8 shifted": ((*attend, 2), {"out_inverse": 1 / scales(WIDTH)}),
        "layernorm_quantize": ((x, *norm[:3], 1e-5, RESOLUTION), {}),
        "layernorm_quantize merge": ((x, *wide, 1e-5, RESOLUTION, True), {}),
        "layernorm_quantize plain": ((x, None, None, norm[2], 1e-5, RESOLUTION), {}),
        "add_layernorm_quantize": ((torch.randn(40, WIDTH), None, stream, *norm), {}),
        "add_layernorm_quantize codes": ((codes(40, WIDTH), scales(WIDTH), stream, *norm), {}),
    }


def placed(case: str, device: torch.device) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """An operator with its arguments on a device, packed there."""
    name = case.split()[0]
    arguments, options = samples()[case]
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    if name.startswith("gemm"):
        moved[1] = op.pack_gemm_weight(moved[1].contiguous())
    elif name.startswith("window"):
        moved[1] = op.pack_attention_bias(moved[1], WINDOW)
    options = {key: value.to(device) for key, value in options.items()}
    return getattr(op, name), tuple(moved), options


def test_there_is_a_sample_of_every_operator() -> None:
    registered = {
        name.removeprefix("swinq::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("swinq::")
    }
    assert registered == set(ops.OPERATORS)
    assert registered == {case.split()[0] for case in samples()} | {"forward"}


@pytest.mark.parametrize("case", samples())
def test_opcheck_passes(case: str, place: torch.device) -> None:
    operator, arguments, options = placed(case, place)
    torch.library.opcheck(operator.default, arguments, options)


@pytest.mark.gpu
@pytest.mark.skipif(not available(), reason="libswinq is not built")
@pytest.mark.parametrize("case", [case for case in samples() if not case.startswith("pack")])
def test_gpu_gives_the_codes_of_the_cpu(case: str) -> None:
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        torch.manual_seed(0)
        operator, arguments, options = placed(case, device)
        written = arguments[4 if case.startswith("gemm_int8_r") else 2]
        returned = operator(*arguments, **options)
        results.append([x.cpu() for x in (returned, written) if isinstance(x, Tensor)])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert on_cpu.dtype == on_gpu.dtype and on_cpu.shape == on_gpu.shape
        if on_cpu.dtype == torch.int8:  # exp, GELU and sums in fp32 may move a code by one
            moved = (on_cpu.int() - on_gpu.int()).abs()
            share = 0.02 if "gelu" in case or "attention" in case else 1e-3
            assert moved.max() <= 1 and (moved > 0).float().mean() <= share
        else:
            torch.testing.assert_close(on_gpu, on_cpu, rtol=2e-3, atol=2e-3)


def test_gemm_is_the_equation() -> None:
    a, weight, factor, bias, inverse = gemm_arguments()
    packed = op.pack_gemm_weight(weight)
    exact = a.long() @ weight.long().t()
    y = torch.addcmul(bias.double(), exact.double(), factor.double()).float()
    assert torch.equal(op.gemm_int8(a, packed, factor, bias), y)
    rounded = (y * inverse).round().clamp(-128, 127)
    assert torch.equal(op.gemm_int8(a, packed, factor, bias, inverse), rounded.to(torch.int8))
    gelu = reference.quantize(reference.gelu(y), inverse)
    assert torch.equal(op.gemm_int8(a, packed, factor, bias, inverse, "gelu").float(), gelu)
    found = op.gemm_int8(a, packed, factor, bias, torch.full_like(inverse, 127), "normalize")
    heads = y.view(-1, 3, HEADS, 32)
    wanted = nn.functional.normalize(heads[:, 1], dim=-1) * 127
    assert (found.view_as(heads)[:, 1] - wanted).abs().max() <= 0.51
    v = (heads[:, 2] * 127).round().clamp(-128, 127)
    assert torch.equal(found.view_as(heads)[:, 2].float(), v)
    assert op.pack_gemm_weight(weight[:40]).shape == (64, 96)


def test_residual_is_added_and_rounded_once() -> None:
    a, weight, factor, bias, inverse = gemm_arguments(n=WIDTH)
    packed = op.pack_gemm_weight(weight)
    y = op.gemm_int8(a, packed, factor, bias)
    before = torch.randn(len(a), WIDTH).half()
    stream = before.clone()
    op.gemm_int8_residual(a, packed, factor, bias, stream)
    assert torch.equal(stream, (before.float() + y).half())
    stream.copy_(before)
    op.gemm_int8_residual(a, packed, factor, bias, stream, inverse, 1 / inverse)
    rounded = (y * inverse).round().clamp(-128, 127) * (1 / inverse)
    assert torch.equal(stream, (before.float() + rounded).half())


@pytest.mark.parametrize("shift", [0, 2])
def test_attention_in_image_order_is_attention_in_windows(shift: int) -> None:
    tokens = 2 * RESOLUTION**2
    qkv, table = codes(tokens, 3, HEADS, 32), torch.randn((2 * WINDOW - 1) ** 2, HEADS)
    factor, v_scale = scales(HEADS), torch.tensor(0.02)
    windows = Windows(RESOLUTION, WINDOW, shift, table)
    gathered = windows.gather(qkv.float().view(2, RESOLUTION**2, -1))
    q, k, v = reference.split_heads(gathered, HEADS)
    o = reference.integer_attention(
        q, k, v, factor.view(-1, 1, 1), windows.bias(0, len(q)), v_scale
    )
    wanted = windows.scatter(reference.join_heads(o)).view(tokens, HEADS, 32)
    packed = op.pack_attention_bias(table, WINDOW)
    found = op.window_attention_int8(qkv, packed, factor, 0.02, RESOLUTION, WINDOW, shift)
    assert torch.equal(found, wanted.half())


def test_norms_are_those_of_the_reference() -> None:
    (x, gamma, beta, inverse, eps, _), _ = samples()["layernorm_quantize"]
    found = op.layernorm_quantize(x, gamma, beta, inverse, eps, RESOLUTION)
    normed = reference.layernorm(x.float(), gamma, beta, eps)
    assert torch.equal(found.float(), reference.quantize(normed, inverse))
    (x, *wide, eps, _, _), _ = samples()["layernorm_quantize merge"]
    merged = op.layernorm_quantize(x, *wide, eps, RESOLUTION, True)
    assert merged.shape == (2, RESOLUTION**2 // 4, 4 * WIDTH)
    (y, scale, stream, *norm), _ = samples()["add_layernorm_quantize codes"]
    after = (stream.float() + reference.layernorm(y.float() * scale, norm[0], norm[1], 1e-5)).half()
    found = op.add_layernorm_quantize(y, scale, stream, *norm)
    assert torch.equal(stream, after)
    assert torch.equal(found.float(), reference.quantize(after.float(), norm[2]))


def refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    """Calls that cannot be meant, and what is said of them."""
    a, weight, factor, bias, inverse = gemm_arguments()
    packed = op.pack_gemm_weight(weight)
    stream = torch.zeros(40, 3 * WIDTH).half()
    (qkv, table, f, v, r, w, _), _ = samples()["window_attention_int8"]
    (x, g, b, i, e, _), _ = samples()["layernorm_quantize"]
    bias_packed = op.pack_attention_bias(table, w)
    return {
        "a in fp32": (lambda: op.gemm_int8(a.float(), packed, factor, bias), "a is torch.float32"),
        "a transposed": (
            lambda: op.gemm_int8(codes(96, 40).t(), packed, factor, bias),
            "a is not contiguous",
        ),
        "another k": (
            lambda: op.gemm_int8(codes(4, 64), packed, factor, bias),
            r"weight is torch.int8 \[192, 96\] on cpu, wanted torch.int8 \[192, 64\]",
        ),
        "weight that was not packed": (
            lambda: op.gemm_int8(a, weight[:40], factor[:40], bias[:40]),
            r"wanted torch.int8 \[64, 96\]",
        ),
        "short factor": (lambda: op.gemm_int8(a, packed, factor[1:], bias), r"wanted .*\[192\]"),
        "gelu in fp32": (
            lambda: op.gemm_int8(a, packed, factor, bias, None, "gelu"),
            "'gelu' without out_inverse has no kernel",
        ),
        "relu": (lambda: op.gemm_int8(a, packed, factor, bias, inverse, "relu"), "'relu' with"),
        "half a head": (
            lambda: op.gemm_int8(a, packed[:64], factor[:64], bias[:64], inverse[:64], "normalize"),
            "normalize wants 3 [*] heads [*] 32 columns, got 64",
        ),
        "stream in fp32": (
            lambda: op.gemm_int8_residual(a, packed, factor, bias, stream.float()),
            "stream is torch.float32",
        ),
        "half a rounding": (
            lambda: op.gemm_int8_residual(a, packed, factor, bias, stream, inverse),
            "out_scale is missing: out_inverse and out_scale go together",
        ),
        "table of another window": (
            lambda: op.pack_attention_bias(table, 7),
            r"wanted torch.float32 \[169, any\]",
        ),
        "tokens of half a map": (
            lambda: op.window_attention_int8(qkv[:100].contiguous(), bias_packed, f, v, r, w, 0),
            "100 tokens are not whole maps of 8 x 8",
        ),
        "window that does not fit": (
            lambda: op.window_attention_int8(qkv, bias_packed, f, v, r, 3, 0),
            "3 x 3 tokens tile",
        ),
        "shift by a window": (
            lambda: op.window_attention_int8(qkv, bias_packed, f, v, r, w, 4),
            "shift is 4, wanted 0 to 3",
        ),
        "bias of smaller windows": (
            lambda: op.window_attention_int8(qkv, bias_packed, f, v, r, 8, 0),
            "bias holds 98 floats, too few for 2 heads",
        ),
        "bias of more windows": (
            lambda: op.window_attention_int8(qkv, torch.zeros(100), f, v, r, w, 0),
            r"bias is torch.float32 \[100\] on cpu, wanted torch.float32 \[98\]",
        ),
        "no heads": (
            lambda: op.window_attention_int8(qkv[:, :, :0], bias_packed, f[:0], v, r, w, 0),
            "factor is empty, wanted a number for each head",
        ),
        "window of no tokens": (
            lambda: op.pack_attention_bias(table, -3),
            "window is -3, wanted at least 1",
        ),
        "odd map to merge": (
            lambda: op.layernorm_quantize(x[:, :49].contiguous(), g, b, i, e, 7, True),
            "49 tokens are not whole maps",
        ),
        "gamma alone": (lambda: op.layernorm_quantize(x, g, None, i, e, r), "beta is missing"),
        "codes without scale": (
            lambda: op.add_layernorm_quantize(codes(2, WIDTH), None, x[0, :2], g, b, i, e),
            "y is torch.int8",
        ),
    }


@pytest.mark.parametrize("case", refusals())
def test_arguments_that_cannot_be_meant_are_named(case: str) -> None:
    call, said = refusals()[case]
    with pytest.raises(EngineError, match=said):
        call()


class Branch(nn.Module):
    """Kernels in a row, as a model has them: a norm, two GEMMs, a residual."""

    def __init__(self) -> None:
        super().__init__()
        (_, *norm, _, _), _ = samples()["layernorm_quantize"]
        self.norm = norm
        _, weight, factor, bias, inverse = gemm_arguments(n=2 * WIDTH, k=WIDTH)
        self.up = (op.pack_gemm_weight(weight), factor, bias, inverse)
        _, weight, factor, bias, _ = gemm_arguments(n=WIDTH, k=2 * WIDTH)
        self.down = (op.pack_gemm_weight(weight), factor, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 64, C) fp16 -> the same."""
        rows = op.layernorm_quantize(x, *self.norm, 1e-5, RESOLUTION).flatten(0, 1)
        hidden = op.gemm_int8(rows, *self.up, "gelu")
        stream = x.flatten(0, 1).clone()
        op.gemm_int8_residual(hidden, *self.down, stream)
        return stream.view_as(x)


def test_kernels_compile_and_export_with_any_batch() -> None:
    branch = Branch()
    batches = [torch.randn(n, RESOLUTION**2, WIDTH).half() for n in (2, 3)]
    wanted = [branch(x) for x in batches]
    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager", dynamic=True)
    exported = torch.export.export(
        branch, (batches[0],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    ).module()
    for x, y in zip(batches, wanted, strict=True):
        assert torch.equal(compiled(x), y)
        assert torch.equal(exported(x), y)


def reference_module(name: str = "") -> tuple[Int8Module, Tensor]:
    arch = made_architecture()
    return Int8Module(Int8Swin(made_checkpoint(arch)), name), images(arch, 2)


def test_model_is_one_operator_that_compiles_and_exports() -> None:
    module, batch = reference_module("tiny")
    wanted = module.model(batch)
    torch.library.opcheck(op.forward.default, (batch, "tiny", 10, True))
    assert torch.equal(module(batch), wanted)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch), wanted)
    program = torch.export.export(
        module, (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [
        op.forward.default
    ]
    run = program.module()
    assert torch.equal(run(batch[:1]), module.model(batch[:1]))
    assert not module(batch).is_inference()


def test_graph_runs_with_whatever_model_has_the_name() -> None:
    module, batch = reference_module("swin")
    run = torch.export.export(module, (batch,)).module()
    with pytest.raises(ConfigError, match="another model is called 'swin'"):
        reference_module("swin")
    wanted = run(batch)
    del module, run
    gc.collect()
    with pytest.raises(EngineError, match="no model is loaded as 'swin'"):
        op.forward(batch, "swin", 10)
    again, _ = reference_module("swin")
    assert torch.equal(op.forward(batch, "swin", 10), wanted)
    assert Int8Module(again.model, "swin").name == "swin"  # the same model may have two modules
    unnamed, other = reference_module()[0], reference_module()[0]
    assert unnamed.name != other.name


def test_engine_behind_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engine.use(fake_engine.built(tmp_path), monkeypatch)
    arch = made_architecture()
    model = CudaSwin(made_checkpoint(arch))
    batch = images(arch, 2)
    assert torch.equal(Int8Module(model)(batch), model(batch))
    batch[1] = float("nan")
    with pytest.raises(DataError, match="image 1"):
        Int8Module(model)(batch)
    assert Int8Module(model, check=False)(batch)[1].isnan().all()
    module = Int8Module(model, "here")
    with pytest.raises(DataError, match="the images are on meta, the model 'here' is on cpu"):
        ops.forward._init_fn(batch.to("meta"), module.name, 10)


def test_cuda_kernels_hand_their_arguments_to_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_engine.use(fake_engine.built(tmp_path), monkeypatch)
    a, weight, factor, bias, inverse = gemm_arguments(n=40)
    packed = op_cuda.pack_gemm_weight(weight)
    assert torch.equal(packed, op.pack_gemm_weight(weight))
    for rounding in (None, inverse):
        found = op_cuda.gemm_int8(a, packed, factor, bias, rounding)
        assert torch.equal(found, op.gemm_int8(a, packed, factor, bias, rounding))
    assert op_cuda.gemm_int8(a[:0], packed, factor, bias).shape == (0, 40)
    for window, floats in ((4, 2 * 49 + 2 + 2 * 49), (3, 52)):
        table = torch.randn((2 * window - 1) ** 2, HEADS)
        found = op_cuda.pack_attention_bias(table, window)
        assert torch.equal(found[: table.numel()], table.t().flatten())
        assert found.shape == (floats,)
    for case, name in {
        "window_attention_int8": "attention",
        "window_attention_int8 shifted": "attention",
        "layernorm_quantize": "prenorm",
        "layernorm_quantize plain": "prenorm",
        "add_layernorm_quantize": "postnorm",
        "add_layernorm_quantize codes": "postnorm",
    }.items():
        arguments, options = samples()[case]
        if name == "attention":
            packed = op_cuda.pack_attention_bias(arguments[1], WINDOW)
            arguments = (arguments[0], packed, *arguments[2:])
        with pytest.raises(EngineError, match=f"swinq_{name} is absent"):
            getattr(op_cuda, case.split()[0])(*arguments, **options)
    residual = (*gemm_arguments(n=WIDTH)[:4], torch.zeros(40, WIDTH).half())
    with pytest.raises(EngineError, match="output 3"):
        op_cuda.gemm_int8_residual(*residual)


@pytest.mark.gpu
@pytest.mark.skipif(not available(), reason="libswinq is not built")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_engine_compiles_and_exports_on_a_gpu(backend: str) -> None:
    arch = made_architecture()
    model = CudaSwin(made_checkpoint(arch))
    module, batch = Int8Module(model), images(arch, 2).cuda()
    wanted = model(batch)
    torch.library.opcheck(op.forward.default, (batch, module.name, 10, True))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    assert torch.equal(compiled(batch), wanted)
    assert torch.equal(torch.export.export(module, (batch,)).module()(batch), wanted)
