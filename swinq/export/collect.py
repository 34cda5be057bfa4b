"""From a calibrated fake-quant model to the tensors of an INT8 checkpoint, or why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from swinq.errors import ExportError
from swinq.export.format import (
    FP16,
    INT8,
    MODES,
    ROUNDED_KINDS,
    UNROUNDED,
    UNROUNDED_IN_MODE_2,
    Layer,
    expected_tensors,
    has_output_scale,
    layers,
)
from swinq.models.architecture import Architecture
from swinq.quant.attention import QuantAttention
from swinq.quant.insert import quantized_layers
from swinq.quant.linear import QuantLinear
from swinq.quant.quantizer import TensorQuantizer
from swinq.quant.spec import QuantSpec

# The stream is fp16 in the engine, which ends at 65,504: half of it is kept as room for images
# that calibration has not seen.
LARGEST_RESIDUAL = 32768.0

_NAMES_SHOWN = 8


@dataclass(frozen=True)
class Collected:
    """What the writer writes, or the CUDA engine runs."""

    architecture: Architecture
    precision: dict[str, str]
    tensors: dict[str, Tensor]
    classes: list[str] | None = None
    transform: dict[str, Any] = field(default_factory=dict)


def collect(
    model: nn.Module, int8_mode: int, *, residual_max: Mapping[str, float] | None = None
) -> Collected:
    """Take the integers and scales out of a calibrated model. The model is not changed.

    Args:
        model: a Swin with quantizers, as `quantize_model` makes it, every range known.
        int8_mode: 1 or 2; which outputs are rounded follows from it and from the recipe, whatever
            mode the model is set to.
        residual_max: largest magnitude seen in each write to the residual stream.

    Raises:
        ExportError: the model has no quantizers, a recipe that no kernel computes, a quantizer
            without a range, one that saw only zeros, a residual too large for fp16, or a weight
            that is NaN, infinite or beyond fp16 where it becomes fp16.
    """
    if int8_mode not in MODES:
        raise ExportError(f"int8_mode is {int8_mode!r}, wanted 1 or 2", "give --int8-mode 1 or 2")
    arch = getattr(model, "arch", None)
    modules = quantized_layers(model)
    if not isinstance(arch, Architecture) or not modules:
        raise ExportError(
            f"{type(model).__name__} holds no quantizers, wanted a calibrated Swin",
            "calibrate it first: torchrun swinq/main.py --calib",
        )
    recipe = _recipe(model)
    _require_small_residual(residual_max or {})
    found = layers(arch)
    _require_all_layers(found, modules)
    precision = {layer.name: _precision(layer, modules[layer.name], int8_mode) for layer in found}
    _require_ranges(found, modules, precision, recipe.allow_dead)
    with torch.no_grad():
        tensors = float_tensors(model, arch)
        for layer in found:
            module = modules[layer.name]
            if isinstance(module, QuantAttention):
                tensors |= _attention_tensors(layer, module, precision[layer.name])
            else:
                tensors |= _linear_tensors(layer, module, precision[layer.name])
    specs = expected_tensors(arch, precision, int8_mode)
    plain = {
        name: tensors[name].detach().to("cpu", spec.dtype).contiguous().clone()
        for name, spec in specs.items()
    }
    require_finite(plain)
    return Collected(arch, precision, plain)


def _precision(layer: Layer, module: QuantLinear | QuantAttention, mode: int) -> str:
    if module.precision == FP16:
        return FP16
    if layer.kind in UNROUNDED_IN_MODE_2 and mode == 2:
        return UNROUNDED
    if isinstance(module, QuantLinear) and layer.kind in ROUNDED_KINDS:
        return INT8 if module.rounds_output else UNROUNDED
    return INT8


def float_tensors(model: nn.Module, arch: Architecture) -> dict[str, Tensor]:
    """Patch embedding, norms and head, under the model's own names."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    names = [f"patch_embed.{part}" for part in ("proj.weight", "proj.bias")]
    names += [name for name in own if "norm" in name.split(".")[-2]]
    tensors = {name: own[name] for name in names}
    tensors["head.weight"] = own["head.weight"]
    tensors["head.bias"] = own.get("head.bias", torch.zeros(arch.num_classes))
    return tensors


def _linear_tensors(layer: Layer, linear: QuantLinear, precision: str) -> dict[str, Tensor]:
    name = layer.name
    if precision == FP16:
        return {f"{name}.weight": linear.weight.half(), f"{name}.bias": linear.export_bias()}
    codes, weight_scale = linear.integer_weight()
    tensors = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": weight_scale,
        f"{name}.input_scale": linear.input_quantizer.scale()[0],
        f"{name}.bias": linear.export_bias(),
    }
    if has_output_scale(layer, precision):
        scale = linear.output_quantizer.scale()[0]
        tensors[f"{name}.output_scale"] = scale.expand(layer.out_features)
    return tensors


def _attention_tensors(
    layer: Layer, attention: QuantAttention, precision: str
) -> dict[str, Tensor]:
    name = layer.name
    tensors = {
        f"{name}.relative_position_bias_table": attention.compact_relative_position_bias(),
        f"{name}.softmax_scale": attention.softmax_scale(),
    }
    if precision == INT8:
        for part, shape in (("q", (layer.heads,)), ("k", (layer.heads,)), ("v", ())):
            scale, _ = _quantizer(attention, f"{part}_quantizer").scale()
            tensors[f"{name}.{part}_scale"] = scale.expand(shape)
    return tensors


def _quantizer(module: nn.Module, name: str) -> TensorQuantizer:
    found = getattr(module, name)
    assert isinstance(found, TensorQuantizer)
    return found


def _recipe(model: nn.Module) -> QuantSpec:
    """The recipe that the quantizers were made by, if a kernel can compute it."""
    recipe = getattr(model, "quant_spec", None)
    if not isinstance(recipe, QuantSpec):
        raise ExportError(
            "the model does not say which recipe its quantizers follow",
            "insert quantizers with swinq.quant.insert.quantize_model",
        )
    problem = recipe.exportable_problem()
    if problem:
        raise ExportError(
            f"this recipe cannot be exported: {problem}",
            "calibrate with configs/quant/int8.yaml, which has an INT8 kernel for everything",
        )
    return recipe


def _require_small_residual(residual_max: Mapping[str, float]) -> None:
    large = {
        name: value
        for name, value in residual_max.items()
        if not math.isfinite(value) or abs(value) > LARGEST_RESIDUAL
    }
    if large:
        shown = sorted(large.items(), key=lambda item: -abs(item[1]))[:_NAMES_SHOWN]
        raise ExportError(
            f"the residual stream exceeds {LARGEST_RESIDUAL:,.0f}, too close to the end of fp16: "
            + _listed([f"{name} reaches {value:g}" for name, value in shown], len(large)),
            "rescale the model, or serve it in float; INT8 would overflow on other images",
        )


def _require_all_layers(found: tuple[Layer, ...], modules: Mapping[str, nn.Module]) -> None:
    bare = [layer.name for layer in found if layer.name not in modules]
    if bare:
        raise ExportError(
            f"layers without quantizers: {_listed(bare)}",
            "insert quantizers with swinq.quant.insert.quantize_model; exclude a layer by "
            "precision fp16 in the recipe",
        )


def _require_ranges(
    found: tuple[Layer, ...],
    modules: Mapping[str, QuantLinear | QuantAttention],
    precision: Mapping[str, str],
    allow_dead: tuple[str, ...],
) -> None:
    """Refuse quantizers that were never calibrated, and those that saw nothing but zeros."""
    needed: dict[str, TensorQuantizer] = {}
    for layer in found:
        if precision[layer.name] == FP16:
            continue
        parts = ["input_quantizer", "weight_quantizer"]
        if layer.kind == "attention":
            parts = ["q_quantizer", "k_quantizer", "v_quantizer"]
        elif has_output_scale(layer, precision[layer.name]):
            parts.append("output_quantizer")
        for part in parts:
            needed[f"{layer.name}.{part}"] = _quantizer(modules[layer.name], part)
    unknown = [name for name, quantizer in needed.items() if not quantizer.calibrated]
    if unknown:
        raise ExportError(
            f"{len(unknown)} of {len(needed)} quantizers are not calibrated: {_listed(unknown)}",
            "run torchrun swinq/main.py --calib and export what it writes",
        )
    dead = [
        name
        for name, quantizer in needed.items()
        if quantizer.dead and not any(fnmatchcase(name, pattern) for pattern in allow_dead)
    ]
    if dead:
        raise ExportError(
            f"{len(dead)} quantizers saw nothing but zeros: {_listed(dead)}",
            "check that the checkpoint is a trained one; if they are meant to be zero, name them "
            "in the recipe's QUANT.ALLOW_DEAD",
        )


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ExportError, naming tensors, where a float is NaN or infinite in its own type."""
    bad = [
        name
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        half = " (as fp16, which ends at 65,504)" if tensors[bad[0]].dtype == torch.float16 else ""
        raise ExportError(
            f"NaN or infinite values{half} in {_listed(bad)}",
            "use a checkpoint whose weights are finite; these come from the model, not from "
            "calibration",
        )


def _listed(items: list[str], total: int | None = None) -> str:
    more = (len(items) if total is None else total) - _NAMES_SHOWN
    return ", ".join(items[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
