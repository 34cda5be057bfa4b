"""INT8 checkpoints with made-up weights and plausible scales, for tests that need no training."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from swinq.export.format import default_precision, expected_tensors
from swinq.export.reader import Int8Checkpoint
from swinq.export.writer import write_tensors
from swinq.models.architecture import Architecture

CALIBRATION = {"method": "made-up", "percentile": 99.9, "images": 0, "sample_sha256": "0" * 64}
TRANSFORM = {"resize": 36, "crop": 32, "name": "official"}


def made_architecture(version: int = 1, **changes: object) -> Architecture:
    """Two stages, shifted 4x4 windows in the first, 32 channels a head."""
    fields: dict[str, object] = {
        "version": version,
        "img_size": 32,
        "patch_size": 2,
        "in_chans": 3,
        "num_classes": 10,
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "mlp_ratio": 2.0,
        "qkv_bias": True,
        "pretrained_window_sizes": (0, 0),
        "norm_eps": 1e-5,
    }
    arch = Architecture(**(fields | changes))  # type: ignore[arg-type]
    arch.validate()
    return arch


def overflowing_attention(version: int, row: int) -> Int8Checkpoint:
    """One whose only fp16 layer is an attention, between int8 ones, with a number too large.

    Args:
        row: of qkv's bias, which holds it: 32 channels of q, then of k, then of v.
    """
    arch = made_architecture(version)
    name = "layers.0.blocks.1.attn"
    checkpoint = made_checkpoint(arch, precision={**default_precision(arch, 1), name: "fp16"})
    checkpoint.tensors[f"{name}.qkv.bias"][row] = -1e6
    return checkpoint


def made_tensors(
    arch: Architecture, precision: Mapping[str, str], mode: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """A tensor for every name that such a file holds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _made(name, spec.dtype, spec.shapes[0], generator)
        for name, spec in expected_tensors(arch, precision, mode).items()
    }


def _made(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    kind = name.rpartition(".")[2]
    if dtype is torch.int8:  # one row reaches 127 somewhere, as real weights do
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    noise = torch.randn(shape, generator=generator)
    if kind == "weight" and "norm" in name.split(".")[-2]:
        return 1.0 + 0.1 * noise
    if kind == "weight":
        fan_in = noise[0].numel()
        return (noise * fan_in**-0.5).to(dtype)
    if kind == "weight_scale":  # uniform codes have a deviation of 73
        return torch.full(shape, 0.3 / 73) * (1 + 0.2 * noise.abs())
    if kind.endswith("_scale") and kind != "softmax_scale":
        top = 1.0 if kind in ("q_scale", "k_scale") else 4.0
        return (top * (1 + 0.2 * noise.abs())) / 127
    if kind == "softmax_scale":
        return torch.full(shape, 32**-0.5)
    return 0.1 * noise


def made_checkpoint(
    arch: Architecture,
    *,
    mode: int = 1,
    precision: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Int8Checkpoint:
    """Such a checkpoint, as the reader would return it."""
    table = dict(precision or default_precision(arch, mode))
    return Int8Checkpoint(
        tensors=made_tensors(arch, table, mode, seed=seed),
        architecture=arch,
        precision=table,
        int8_mode=mode,
        calibration=dict(CALIBRATION),
        classes=None,
        transform=dict(TRANSFORM),
        path=Path("made-up.safetensors"),
    )


def write_made(path: Path, arch: Architecture, *, mode: int = 1, **changes: object) -> Path:
    """Write such a checkpoint; `changes` replace arguments of `write_tensors`."""
    made = made_checkpoint(arch, mode=mode)
    arguments: dict[str, object] = {
        "architecture": arch,
        "precision": made.precision,
        "int8_mode": mode,
        "calibration": made.calibration,
        "classes": [f"class {i}" for i in range(arch.num_classes)],
        "transform": made.transform,
    }
    arguments |= changes
    tensors = arguments.pop("tensors", made.tensors)
    return write_tensors(path, tensors, **arguments)  # type: ignore[arg-type]
