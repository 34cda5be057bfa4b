"""The peers: timm's Swins with random weights on PyTorch, in every form that FORMS lists.

Head included, fp16 weights and images, inference mode. What the model computes from weights alone
(position bias, masks) is folded before the compiled forms run, by inductor's freezing.
"""

from __future__ import annotations

import importlib
import os
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarking.cases import Model
from benchmarking.timing import Call, Step
from benchmarking.turn import Turn

TRACE_WARM_UP = 4  # TorchScript profiles the first runs, then compiles
# Linear layers that swinq runs in INT8, and the rank of what they read in timm
_QUANTIZED = {
    ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"): 3,
    ("downsample.reduction",): 4,
}


def runs(
    model: Model,
    forms: tuple[str, ...],
    batches: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    turn: Turn,
) -> Iterator[Step]:
    """What there is to time, one after the other."""
    # inference tensors, which inference mode would make, are not what a user's model holds
    with torch.inference_mode(False), turn.borrow():
        net = build(model, device, dtype, fused=forms == ("compile-sdpa",))
    for batch in batches:
        shape = (batch, 3, model.img_size, model.img_size)
        with torch.inference_mode(False), turn.borrow():
            images = torch.randn(shape, device=device, dtype=dtype)
        for form in forms:
            about: dict[str, Any] = {}
            yield Step(form, batch, partial(made, form, net, images, turn, about), about)


def build(
    model: Model, device: torch.device, dtype: torch.dtype, *, fused: bool = False, **sizes: Any
) -> nn.Module:
    """timm's model with random weights.

    Args:
        fused: scaled_dot_product_attention, where timm has it.
        sizes: arguments of timm's constructor that make a smaller one.
    """
    import timm
    from timm.layers import set_fused_attn

    set_fused_attn(fused, experimental=fused)
    torch.manual_seed(0)
    with torch.device(device):
        net = timm.create_model(model.timm, **sizes)
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):  # v2 starts with zeros, which no trained model has
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return net.to(device, dtype).eval().requires_grad_(False)


def made(form: str, net: nn.Module, images: Tensor, turn: Turn, about: dict[str, Any]) -> Call:
    """The call of a form.

    Args:
        turn: borrowed for what torch.compile runs on the GPU, because it tunes kernels there.
        about: gets what a reader should know of this form.
    """
    if form == "eager":
        return lambda: net(images)
    if form == "graph":
        return graphed(net, images)
    if form == "trace":
        traced = torch.jit.trace(net, images, check_trace=False)
        for _ in range(TRACE_WARM_UP):
            traced(images)
        return lambda: traced(images)
    if form.startswith("torchao"):
        with turn.borrow():
            quantize(net, images, static=form == "torchao-static", tuned=form == "torchao-tuned")
    return compiled(net, images, turn, about)


def graphed(net: nn.Module, images: Tensor) -> Call:
    """Replays of the model's kernels on images that stay in place."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            net(images)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = net(images)

    def replay() -> Tensor:
        graph.replay()
        return kept

    return replay


def compiled(net: nn.Module, images: Tensor, turn: Turn, about: dict[str, Any]) -> Call:
    """torch.compile(mode="reduce-overhead") with freezing, or without where that fails."""
    import torch._inductor.config as settings
    from torch._inductor import freezing as folding
    from torch._inductor.runtime import benchmarking

    timer: Any = benchmarking.benchmarker
    timer.benchmark_gpu = turn.borrowing(timer.benchmark_gpu)
    folding.freeze = turn.borrowing(folding.freeze)
    for freezing in (True, False):
        settings.freezing = freezing
        torch._dynamo.reset()
        call = torch.compile(net, backend=_inductor(turn), fullgraph=True)
        try:
            for _ in range(3):  # compile, record, replay
                call(images)
            about["freezing"] = freezing
            break
        except Exception as error:  # whatever a compiler can raise
            if not freezing:
                raise
            about["freezing_failed"] = f"{type(error).__name__}: {error}"[:500]
    return lambda: call(images)


def _inductor(turn: Turn) -> Callable[..., Any]:
    """Inductor, whose result waits for the turn before its first kernel: compiling needs none."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    options = dict(list_mode_options("reduce-overhead"))

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        run: Any = compile_fx(graph, inputs, config_patches=options)

        def call(*arguments: Any) -> Any:
            turn.take()
            return run(*arguments)

        return call

    return backend


def quantize(net: nn.Module, images: Tensor, *, static: bool, tuned: bool) -> None:
    """Give the layers that swinq runs in INT8 torchao's INT8 activations and weights.

    Args:
        static: one made-up scale for each activation instead of one for each token.
        tuned: dequantize in Triton GEMMs that inductor tunes, as torchao's own settings have it;
            its search of tile sizes by coordinate descent is left out.
    """
    import torch._inductor.config as settings

    torchao = importlib.import_module("torchao.quantization")
    v2: Any = importlib.import_module("timm.models.swin_transformer_v2")
    # timm's v2 gives F.linear its weight by keyword, where torchao looks for it by position
    v2.F = types.SimpleNamespace(**{**vars(F), "linear": _positional_linear})
    settings.force_fuse_int_mm_with_mul = tuned
    for names, rank in _QUANTIZED.items():
        config = torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        if static:
            shape = (1,) * rank
            scale = torch.full(shape, 3.0 / 127, device=images.device, dtype=images.dtype)
            config = torchao.Int8StaticActivationInt8WeightConfig(
                act_quant_scale=scale,
                granularity=[torchao.PerTensor(), torchao.PerRow()],
                set_inductor_config=False,
            )
        torchao.quantize_(net, config, lambda module, name, ends=names: name.endswith(ends))


def _positional_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(input, weight, bias)


def versions() -> dict[str, str]:
    """Of what the peers are made of."""
    from importlib import metadata

    found = {"torch": str(torch.__version__)}
    for name in ("timm", "torchao", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found["cuda"] = str(torch.version.cuda)
    return found


def one_thread_compiles() -> dict[str, str]:
    """Environment of a process that compiles beside others like it."""
    return {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
