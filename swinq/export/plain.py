"""From a float model to the tensors that the CUDA engine runs in FP16 or FP32: names as in INT8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swinq.errors import ExportError
from swinq.export.collect import Collected, float_tensors, require_finite
from swinq.export.format import FP16, Layer, layers
from swinq.models.architecture import Architecture

FP32 = "fp32"
_WEIGHTS = {FP16: torch.float16, FP32: torch.float32}  # of the matrices; vectors are fp32 always


def collect_plain(model: nn.Module, precision: str = FP16) -> Collected:
    """Take the weights out of a float model, every layer in one precision.

    The names and shapes are those of an INT8 checkpoint whose layers are all fp16; in fp32 the
    matrices are fp32 too.

    Args:
        model: a Swin of either version, without quantizers; not changed.
        precision: "fp16" or "fp32".

    Raises:
        ExportError: another precision, no float Swin, or a weight that is NaN, infinite or beyond
            fp16.
    """
    if precision not in _WEIGHTS:
        raise ExportError(f"precision is {precision!r}, wanted fp16 or fp32", "INT8: use collect")
    arch = getattr(model, "arch", None)
    if not isinstance(arch, Architecture) or hasattr(model, "quant_spec"):
        raise ExportError(
            f"{type(model).__name__} is no float Swin", "load a float checkpoint: swinq.load(PATH)"
        )
    with torch.no_grad():
        tensors = float_tensors(model, arch)
        for layer in layers(arch):
            tensors |= _layer_tensors(layer, model)
    matrices = [name for name, x in tensors.items() if name.endswith(".weight") and x.ndim > 1]
    dtypes = dict.fromkeys(matrices, _WEIGHTS[precision])
    plain = {
        name: x.detach().to("cpu", dtypes.get(name, torch.float32)).contiguous().clone()
        for name, x in tensors.items()
    }
    require_finite(plain)
    return Collected(arch, {layer.name: precision for layer in layers(arch)}, plain)


def _layer_tensors(layer: Layer, model: nn.Module) -> dict[str, Tensor]:
    module: Any = model.get_submodule(layer.name)
    if layer.kind == "attention":
        return {
            f"{layer.name}.relative_position_bias_table": module.compact_relative_position_bias(),
            f"{layer.name}.softmax_scale": module.softmax_scale(),
        }
    bias = module.bias
    if layer.kind == "qkv":
        attention: Any = model.get_submodule(layer.name.removesuffix(".qkv"))
        if hasattr(attention, "qkv_bias"):  # v2: [q_bias, 0, v_bias]
            bias = attention.qkv_bias()
    if bias is None:
        bias = module.weight.new_zeros(layer.out_features)
    return {f"{layer.name}.weight": module.weight, f"{layer.name}.bias": bias}
