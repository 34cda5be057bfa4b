"""Write an INT8 checkpoint: collected, described, digested, synced, read back, renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from swinq import __version__
from swinq.errors import CheckpointError, ExportError
from swinq.export.collect import collect
from swinq.export.format import FORMAT, FORMAT_VERSION, decode, encode
from swinq.export.integrity import digests
from swinq.export.reader import read_checkpoint
from swinq.files import write_atomically
from swinq.models.architecture import Architecture


def write_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    int8_mode: int,
    calibration: dict[str, Any],
    classes: list[str] | None,
    transform: dict[str, Any],
    residual_max: dict[str, float],
) -> Path:
    """Export a calibrated model.

    Args:
        path: where to; `.safetensors` is usual. What is there is replaced only once the new file
            is complete and has been read back.
        model: a Swin with calibrated quantizers; not changed.
        int8_mode: 1 (every GEMM int8 in and out) or 2 (fc2 and reduction unrounded).
        calibration: how the ranges were found (method, percentile, images, sample_sha256, ...):
            plain JSON.
        classes: names of the classes in the order of the logits, if known.
        transform: the evaluation transform as plain JSON.
        residual_max: largest magnitude of each write to the residual stream, by stream name.

    Returns:
        The path written.

    Raises:
        ExportError: the model cannot be exported (see `collect`), the description is not JSON or
            does not fit, or the file cannot be written.
    """
    found = collect(model, int8_mode, residual_max=residual_max)
    if classes is not None and len(classes) != found.architecture.num_classes:
        raise ExportError(
            f"{len(classes)} class names for a head of {found.architecture.num_classes} classes",
            "give one name per class in the order of the logits, or none",
        )
    return write_tensors(
        path,
        found.tensors,
        architecture=found.architecture,
        precision=found.precision,
        int8_mode=int8_mode,
        calibration={**calibration, "residual_max": dict(residual_max)},
        classes=classes,
        transform=transform,
    )


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    architecture: Architecture,
    precision: Mapping[str, str],
    int8_mode: int,
    calibration: Mapping[str, Any],
    classes: list[str] | None,
    transform: Mapping[str, Any],
) -> Path:
    """Write tensors that are already those of an INT8 checkpoint; see `write_checkpoint`.

    Raises:
        ExportError: the reader would refuse the file, or it cannot be written.
    """
    description = {
        "architecture": architecture.to_dict(),
        "precision": dict(precision),
        "calibration": dict(calibration),
        "classes": classes,
        "transform": dict(transform),
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "int8_mode": str(int8_mode),
        "swinq_version": __version__,
    }
    for key, value in description.items():
        try:
            metadata[key] = encode(value)
        except (TypeError, ValueError) as error:
            raise ExportError(
                f"{key} of the checkpoint is not plain JSON: {error}",
                "pass numbers, texts, lists and dictionaries only, no NaN and no arrays",
            ) from error
    metadata["digests"] = encode(digests(tensors, metadata))
    data = reproducible(save({name: t.contiguous() for name, t in tensors.items()}, metadata))

    def verify(written: Path) -> None:
        try:
            read_checkpoint(written, int8_mode=int8_mode, architecture=architecture)
        except CheckpointError as error:
            problem = error.problem.replace(str(written), str(path))
            raise ExportError(
                f"what was written does not read back: {problem}",
                "nothing was replaced; if it names a number of the model, calibrate that again, if "
                "not, check the disk; then export again",
            ) from error

    return write_atomically(
        path, lambda written: written.write_bytes(data), size=len(data), verify=verify
    )


def reproducible(data: bytes) -> bytes:
    """The same safetensors file with its header sorted: the library's order changes by run."""
    stop = 8 + int.from_bytes(data[:8], "little")
    header = encode(decode(data[8:stop].decode())).encode()
    header += b" " * (-len(header) % 8)  # tensors stay aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[stop:]
