"""torch.ops.swinq: the INT8 kernels and whole models as operators that torch compiles and exports.

On a CPU a kernel is its equation (op_reference.py, where the arguments are described), on a GPU
libswinq's (op_cuda.py). Weights and bias tables are packed once, by the device that reads them, and
do not move to another one afterwards. Importing this module registers the operators.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import custom_op

from swinq.errors import DataError, EngineError
from swinq.int8 import op_checks as checks
from swinq.int8 import op_cuda, op_reference
from swinq.int8.choice import IntegerModel
from swinq.int8.engine import CudaSwin

MUTATED = {"gemm_int8_residual": ("stream",), "add_layernorm_quantize": ("stream",)}

MODELS: WeakValueDictionary[str, IntegerModel] = WeakValueDictionary()  # that `forward` may name


def fake_pack_gemm_weight(weight: Tensor) -> Tensor:
    """(n, k) -> (n padded to 32, k) int8."""
    return weight.new_empty((checks.padded(weight.shape[0]), weight.shape[1]))


def fake_gemm_int8(
    a: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    out_inverse: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """(m, n) int8, or fp32 without `out_inverse`."""
    dtype = torch.float32 if out_inverse is None else torch.int8
    return a.new_empty((a.shape[0], bias.shape[0]), dtype=dtype)


def fake_gemm_int8_residual(
    a: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    stream: Tensor,
    out_inverse: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """Writes `stream`."""


def fake_pack_attention_bias(table: Tensor, window: int) -> Tensor:
    """As many floats as the device's kernel reads."""
    if table.device.type == "cpu":
        return table.new_empty(table.shape[0] * table.shape[1])
    return table.new_empty(sum(op_cuda.attention_bias_size(window, table.shape[1])))


def fake_window_attention_int8(
    qkv: Tensor,
    bias: Tensor,
    factor: Tensor,
    v_scale: float,
    resolution: int,
    window: int,
    shift: int,
    out_inverse: Tensor | None = None,
) -> Tensor:
    """(tokens, heads, 32) int8, or fp16 without `out_inverse`."""
    dtype = torch.float16 if out_inverse is None else torch.int8
    return qkv.new_empty((qkv.shape[0], *qkv.shape[2:]), dtype=dtype)


def fake_layernorm_quantize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    inverse: Tensor,
    eps: float,
    resolution: int,
    merge: bool = False,
) -> Tensor:
    """(B, tokens, C) int8, or a quarter of the tokens with 4C."""
    batch, tokens, channels = x.shape
    squares = 4 if merge else 1
    return x.new_empty((batch, tokens // squares, channels * squares), dtype=torch.int8)


def fake_add_layernorm_quantize(
    y: Tensor,
    y_scale: Tensor | None,
    stream: Tensor,
    gamma: Tensor,
    beta: Tensor,
    inverse: Tensor,
    eps: float,
) -> Tensor:
    """(rows, C) int8; writes `stream`."""
    return y.new_empty(y.shape, dtype=torch.int8)


def _registered(name: str) -> Any:
    """torch.ops.swinq.<name>, with its kernels for both devices and its fake."""
    kernel = getattr(op_reference, name)
    operator = custom_op(
        f"swinq::{name}", kernel, mutates_args=MUTATED.get(name, ()), device_types="cpu"
    )
    operator.register_kernel("cuda", getattr(op_cuda, name))
    operator.register_fake(globals()[f"fake_{name}"])
    return operator


OPERATORS = {
    name: _registered(name)
    for name in (
        "pack_gemm_weight",
        "gemm_int8",
        "gemm_int8_residual",
        "pack_attention_bias",
        "window_attention_int8",
        "layernorm_quantize",
        "add_layernorm_quantize",
    )
}


@custom_op("swinq::forward", mutates_args=())
def forward(images: Tensor, model: str, classes: int, check: bool = True) -> Tensor:
    """Logits (B, classes) fp32 of a model that an `Int8Module` holds under that name.

    Args:
        images: as the model takes them, on its device.
        classes: of the model.
        check: as for a call of `CudaSwin`; the reference always checks.

    Raises:
        EngineError: no such model in this process.
        DataError: images on another device, or those that the model refuses.
    """
    held = MODELS.get(model)
    if held is None:
        raise EngineError(
            f"no model is loaded as {model!r}",
            f"keep an Int8Module(model, name={model!r}) alive in the process that runs the graph",
        )
    if images.device != held.device:
        raise DataError(
            f"the images are on {images.device}, the model {model!r} is on {held.device}",
            f"move them: images.to({str(held.device)!r})",
        )
    if isinstance(held, CudaSwin):
        return held(images, check=check)
    return held(images).clone()  # out of inference mode


@forward.register_fake
def fake_forward(images: Tensor, model: str, classes: int, check: bool = True) -> Tensor:
    """(B, classes) fp32."""
    return images.new_empty((images.shape[0], classes), dtype=torch.float32)


OPERATORS["forward"] = forward
