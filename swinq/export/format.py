"""Every name, dtype and shape in an INT8 checkpoint, derived from what the checkpoint says it is.

The writer, the reader and the tests ask this file and nothing else; docs/checkpoint-format.md says
the same in words. A change of anything here that an older reader would misread raises
`FORMAT_VERSION`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from swinq.models.architecture import Architecture

FORMAT = "swinq-int8"
FORMAT_VERSION = 1

# Key of the metadata's own digest, among those of the tensors. It is the name that safetensors
# gives to the metadata, so no tensor can have it.
METADATA_DIGEST = "__metadata__"

# Metadata keys whose value is a JSON text, and those that are plain words.
JSON_KEYS = ("architecture", "precision", "calibration", "classes", "transform", "digests")
PLAIN_KEYS = ("format", "format_version", "int8_mode", "swinq_version")

MODES = (1, 2)
INT8 = "int8"  # int8 in; the output is rounded to int8 where the layer has an output scale
UNROUNDED = "int8-unrounded"  # int8 in, fp32 out, also where mode 1 would round
FP16 = "fp16"

# What writes into the residual stream. Its output is rounded to int8, unless its precision says
# otherwise; mode 2 leaves the last two unrounded.
ROUNDED_KINDS = ("proj", "fc2", "reduction")
UNROUNDED_IN_MODE_2 = ("fc2", "reduction")

# fp32 holds 1/scale down to here; below, an amax counts as zero and so does its stored scale.
SMALLEST_SCALE = 2.0**-126
# Far beyond what a trained model has. Up to here no product of scales, no sum and no square of an
# output leaves fp32: codes have no infinity, so an overflow would not be seen.
LARGEST_SCALE = 2.0**14
LARGEST_NUMBER = 2.0**50


@dataclass(frozen=True)
class Layer:
    """Something with a precision of its own: a linear layer, or the arithmetic of an attention."""

    name: str
    kind: str  # attention, qkv, proj, fc1, fc2 or reduction
    in_features: int
    out_features: int
    heads: int
    window: int  # tokens along one side; 0 for a reduction


@dataclass(frozen=True)
class TensorSpec:
    """What one tensor of the file must look like."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]  # any one of them
    is_scale: bool = False  # zero, or from SMALLEST_SCALE to LARGEST_SCALE

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {' or '.join(str(list(s)) for s in self.shapes)}"


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.int8` as `int8`."""
    return str(dtype).removeprefix("torch.")


def layers(arch: Architecture) -> tuple[Layer, ...]:
    """Every layer with a precision of its own, in the order in which the model runs them."""
    found = []
    for stage in arch.stages():
        dim, hidden = stage.dim, int(stage.dim * arch.mlp_ratio)
        for block in range(stage.depth):
            prefix = f"layers.{stage.index}.blocks.{block}"
            for suffix, kind, n_in, n_out in (
                ("attn", "attention", dim, dim),
                ("attn.qkv", "qkv", dim, 3 * dim),
                ("attn.proj", "proj", dim, dim),
                ("mlp.fc1", "fc1", dim, hidden),
                ("mlp.fc2", "fc2", hidden, dim),
            ):
                name = f"{prefix}.{suffix}"
                found.append(Layer(name, kind, n_in, n_out, stage.heads, stage.window))
        if stage.merges:
            name = f"layers.{stage.index}.downsample.reduction"
            found.append(Layer(name, "reduction", 4 * dim, 2 * dim, 0, 0))
    return tuple(found)


def layer_names(arch: Architecture) -> list[str]:
    """Names of `layers(arch)`: the keys of the `precision` table."""
    return [layer.name for layer in layers(arch)]


def allowed_precisions(layer: Layer, mode: int) -> tuple[str, ...]:
    """What the `precision` table may say of a layer in that int8 mode, the usual word first."""
    if layer.kind not in ROUNDED_KINDS:
        return (INT8, FP16)  # nothing is rounded behind these but codes of what follows
    if mode == 2 and layer.kind in UNROUNDED_IN_MODE_2:
        return (UNROUNDED, FP16)
    return (INT8, UNROUNDED, FP16)


def default_precision(arch: Architecture, mode: int) -> dict[str, str]:
    """The table in which nothing is left out of quantization."""
    return {layer.name: allowed_precisions(layer, mode)[0] for layer in layers(arch)}


def precision_problems(arch: Architecture, precision: Mapping[str, str], mode: int) -> list[str]:
    """One line for each way in which a `precision` table does not fit; none if it does."""
    wanted = {layer.name: layer for layer in layers(arch)}
    problems = [f"{name}: no precision given" for name in wanted if name not in precision]
    problems += [f"{name}: not a layer of this model" for name in precision if name not in wanted]
    for name in wanted.keys() & precision.keys():
        allowed = allowed_precisions(wanted[name], mode)
        if precision[name] not in allowed:
            problems.append(
                f"{name}: {precision[name]!r}, wanted {' or '.join(allowed)} in int8 mode {mode}"
            )
    return sorted(problems)


def has_output_scale(layer: Layer, precision: str) -> bool:
    """Whether the layer's output is rounded to int8 before it reaches the residual stream."""
    return precision == INT8 and layer.kind in ROUNDED_KINDS


def expected_tensors(
    arch: Architecture, precision: Mapping[str, str], mode: int
) -> dict[str, TensorSpec]:
    """Name -> dtype and shape of every tensor that the file must hold, and no other.

    Args:
        arch: the model.
        precision: layer name -> int8, int8-unrounded or fp16, for every one of `layer_names`.
        mode: int8 mode, 1 or 2.

    Raises:
        ValueError: the precision table does not fit; see `precision_problems`.
    """
    problems = precision_problems(arch, precision, mode)
    if problems:
        raise ValueError("; ".join(problems))
    specs: dict[str, TensorSpec] = {}
    patch = (arch.embed_dim, arch.in_chans, arch.patch_size, arch.patch_size)
    specs["patch_embed.proj.weight"] = TensorSpec(torch.float16, (patch,))
    specs["patch_embed.proj.bias"] = _fp32(arch.embed_dim)
    specs |= _norm("patch_embed.norm", arch.embed_dim)
    for stage in arch.stages():
        for block in range(stage.depth):
            for norm in ("norm1", "norm2"):
                specs |= _norm(f"layers.{stage.index}.blocks.{block}.{norm}", stage.dim)
        if stage.merges:
            width = 4 * stage.dim if arch.version == 1 else 2 * stage.dim
            specs |= _norm(f"layers.{stage.index}.downsample.norm", width)
    for layer in layers(arch):
        add = _attention if layer.kind == "attention" else _linear
        specs |= add(layer, precision[layer.name])
    last = arch.stages()[-1].dim
    specs |= _norm("norm", last)
    specs["head.weight"] = TensorSpec(torch.float16, ((arch.num_classes, last),))
    specs["head.bias"] = _fp32(arch.num_classes)
    return specs


def _linear(layer: Layer, precision: str) -> dict[str, TensorSpec]:
    n_in, n_out = layer.in_features, layer.out_features
    dtype = torch.float16 if precision == FP16 else torch.int8
    specs = {
        f"{layer.name}.weight": TensorSpec(dtype, ((n_out, n_in),)),
        f"{layer.name}.bias": _fp32(n_out),
    }
    if precision == FP16:
        return specs
    specs[f"{layer.name}.weight_scale"] = _scale((n_out,))
    specs[f"{layer.name}.input_scale"] = _scale((), (n_in,))
    if has_output_scale(layer, precision):
        specs[f"{layer.name}.output_scale"] = _scale((n_out,))
    return specs


def _attention(layer: Layer, precision: str) -> dict[str, TensorSpec]:
    specs = {
        f"{layer.name}.relative_position_bias_table": _fp32(
            (2 * layer.window - 1) ** 2, layer.heads
        ),
        f"{layer.name}.softmax_scale": _fp32(layer.heads),
    }
    if precision == INT8:
        specs[f"{layer.name}.q_scale"] = _scale((layer.heads,))
        specs[f"{layer.name}.k_scale"] = _scale((layer.heads,))
        specs[f"{layer.name}.v_scale"] = _scale(())
    return specs


def _norm(name: str, width: int) -> dict[str, TensorSpec]:
    return {f"{name}.weight": _fp32(width), f"{name}.bias": _fp32(width)}


def _fp32(*shape: int) -> TensorSpec:
    return TensorSpec(torch.float32, (tuple(shape),))


def _scale(*shapes: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(torch.float32, shapes, is_scale=True)


def encode(value: Any) -> str:
    """A metadata value as JSON: sorted, so that equal values are equal texts; no NaN or infinity.

    Raises:
        ValueError, TypeError: the value is not plain JSON.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def decode(text: str) -> Any:
    """The value that `encode` wrote.

    Raises:
        ValueError: not JSON, or JSON with NaN or infinity, or nested too deeply to read.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number here")
