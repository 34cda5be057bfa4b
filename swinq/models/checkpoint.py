"""Loads a float or calibrated Swin checkpoint of any library into microsoft's names.

containers.py opens the file, layouts.py and ranges.py translate its names, shapes.py finds the
architecture; here the whole is compared with what the architecture wants, name by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinq.errors import CheckpointError
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.containers import open_contents
from swinq.models.layouts import to_official
from swinq.models.ranges import is_range_name
from swinq.models.shapes import infer_architecture
from swinq.models.variants import VARIANTS, nearest_variant

MAX_LISTED = 5  # of an error; with header, count and fix it has 8 lines
_BIAS_TABLE = ".relative_position_bias_table"


@dataclass
class LoadedCheckpoint:
    """A checkpoint in microsoft's names, whatever it was saved as."""

    state: dict[str, Tensor]  # fp32 parameters, contiguous, on the CPU
    architecture: Architecture | None  # never None from load_checkpoint
    layout: str  # official, timm, torchvision, transformers, fastertransformer, modelopt, swinq
    amax: dict[str, Tensor] = field(default_factory=dict)  # "<module>.<quantizer>._amax", fp32
    classes: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file
    corrections: dict[str, Tensor] = field(default_factory=dict)  # "<linear>.bias_correction"
    source: str = ""  # the file, for messages


def load_checkpoint(
    path: str | Path, *, architecture: Architecture | None = None
) -> LoadedCheckpoint:
    """Read a checkpoint file or hub folder, recognised by its content; nothing in it is executed.

    Args:
        path: a .pth, a .safetensors, or a folder with model.safetensors.
        architecture: what the user asked for; without it, what the file tells is taken.

    Raises:
        CheckpointError: the file is missing, damaged, of an unknown or refused kind, incomplete,
            or holds another model than asked for.
    """
    contents = open_contents(Path(path))
    official = to_official(contents)
    found, notes = infer_architecture(contents, official, architecture)
    if architecture is not None:
        _require_same(contents.path, found, architecture)
    problems = _problems(_wanted_shapes(found), official.state)
    if problems:
        raise CheckpointError(
            f"{contents.path} does not hold the whole model:\n{_listed(problems)}",
            f"the nearest configuration is {_configuration(found)}; "
            "pass a checkpoint of the whole classifier",
        )
    return LoadedCheckpoint(
        state=official.state,
        architecture=architecture or found,
        layout=official.layout,
        amax=official.ranges,
        classes=_matching(contents.classes, found, notes),
        notes=[*contents.notes, *official.notes, *notes],
        metadata=contents.metadata,
        corrections=official.corrections,
        source=str(contents.path),
    )


def load_into(model: nn.Module, loaded: LoadedCheckpoint, *, resize: bool = False) -> None:
    """Copy the parameters into a model; its quantizers and their ranges are left alone.

    Args:
        model: a float or quantized Swin with microsoft's parameter names.
        resize: take a model of other windows: version 1's bias tables are resized (bicubic),
            version 2 computes its bias from coordinates and has none to resize.

    Raises:
        CheckpointError: a parameter is missing, left over or of another shape, or the windows
            differ and `resize` is off.
    """
    targets = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not is_range_name(name) and not name.endswith(".bias_correction")
    }
    values = {_own_name(name, targets): tensor for name, tensor in loaded.state.items()}
    if resize:
        for name, tensor in values.items():
            if name.endswith(_BIAS_TABLE) and name in targets:
                values[name] = resize_bias_table(tensor, targets[name].shape[0])
    arch = getattr(model, "arch", None)
    problems = _problems({name: tuple(t.shape) for name, t in targets.items()}, values)
    if not problems and not resize and arch is not None and loaded.architecture is not None:
        problems = _differences(loaded.architecture, arch)
    if problems:
        nearest = "" if loaded.architecture is None else _configuration(loaded.architecture)
        raise CheckpointError(
            f"{loaded.source or 'the checkpoint'} does not fit the model:\n{_listed(problems)}",
            f"build the model that the file holds: {nearest}",
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])


def resize_bias_table(table: Tensor, rows: int) -> Tensor:
    """A relative position bias table for another window: ((2W-1)^2, heads) -> (rows, heads).

    Bicubic over the two offsets, as microsoft's fine-tuning at a larger window does.
    """
    if table.shape[0] == rows:
        return table
    old, new = round(table.shape[0] ** 0.5), round(rows**0.5)
    image = table.t().reshape(1, -1, old, old)  # (1, heads, 2W-1, 2W-1)
    image = F.interpolate(image, size=(new, new), mode="bicubic")
    return image.flatten(2)[0].t().contiguous()


def _own_name(name: str, targets: dict[str, Tensor]) -> str:
    """A quantized version 2 model keeps q_bias and v_bias with its qkv."""
    attn, _, last = name.rpartition(".")
    inner = f"{attn}.qkv.{last}"
    return inner if last in ("q_bias", "v_bias") and name not in targets else name


def _wanted_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = build_model(arch)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _problems(wanted: dict[str, tuple[int, ...]], state: dict[str, Tensor]) -> list[str]:
    """One line for each parameter that is missing, left over, or of another shape."""
    missing = [f"missing: {name}" for name in wanted if name not in state]
    extra = [f"not in the model: {name}" for name in state if name not in wanted]
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {shape} in the model"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    return [*shapes, *missing, *extra]


def _listed(problems: list[str]) -> str:
    lines = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"  and {len(problems) - MAX_LISTED} more")
    return "\n".join(lines)


def _require_same(path: Path, found: Architecture, wanted: Architecture) -> None:
    problems = _differences(found, wanted)
    if problems:
        raise CheckpointError(
            f"{path} holds another model than asked for:\n{_listed(problems)}",
            f"use the configuration of the file: {_configuration(found)}",
        )


def _differences(found: Architecture, wanted: Architecture) -> list[str]:
    """Fields that differ; image and window size only as far as the stages' windows differ."""
    lines = found.differences(wanted)
    if _windows(found) == _windows(wanted):
        sizes = ("img_size:", "window_size:", "pretrained_window_sizes:")
        lines = [line for line in lines if not line.startswith(sizes)]
    return [
        line.replace(" here, ", " in the file, ").replace(" there", " wanted") for line in lines
    ]


def _windows(arch: Architecture) -> list[tuple[int, int]]:
    return [(s.window, s.pretrained_window or s.window) for s in arch.stages()]


def _configuration(arch: Architecture) -> str:
    """How to ask for an architecture, or for the nearest official one, on the command line."""
    name = nearest_variant(arch)
    folder = "swin" if arch.version == 1 else "swinv2"
    asked = f"--cfg configs/{folder}/{name}.yaml"
    if arch.num_classes != VARIANTS[name].num_classes:
        asked += f" --opts MODEL.NUM_CLASSES {arch.num_classes}"
    return asked


def _matching(classes: list[str] | None, arch: Architecture, notes: list[str]) -> list[str] | None:
    if classes is not None and len(classes) != arch.num_classes:
        notes.append(f"{len(classes)} class names for {arch.num_classes} outputs, ignored")
        return None
    return classes
