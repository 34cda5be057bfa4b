"""Which engine runs an INT8 checkpoint: the CUDA kernels of libswinq, or the reference."""

from __future__ import annotations

import os

import torch

from swinq.errors import ConfigError, EngineError, EngineFailedError
from swinq.export.reader import Int8Checkpoint, read_checkpoint
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin
from swinq.int8.model import Int8Swin
from swinq.models.architecture import Architecture

AUTO, CUDA, REFERENCE = ENGINES = ("auto", "cuda", "reference")

IntegerModel = Int8Swin | CudaSwin


def load(
    path: str | os.PathLike[str],
    *,
    engine: str = AUTO,
    int8_mode: int | None = None,
    architecture: Architecture | None = None,
    verify: bool = True,
    device: str | torch.device = "cpu",
) -> IntegerModel:
    """Read an INT8 checkpoint and prepare it for an engine; see `prepare`.

    Args:
        int8_mode, architecture: what is wanted, if anything; a file that differs is refused.
        verify: compare the digest of every tensor.

    Raises:
        CheckpointError: see `swinq.export.reader.read_checkpoint`.
        ConfigError, EngineError: see `prepare`.
    """
    require(engine, device)
    checkpoint = read_checkpoint(
        path, int8_mode=int8_mode, architecture=architecture, verify=verify
    )
    return prepare(checkpoint, device, engine)


def prepare(
    checkpoint: Int8Checkpoint, device: str | torch.device, engine: str = AUTO
) -> IntegerModel:
    """A checkpoint on a device, ready to run.

    Args:
        engine: "cuda" wants libswinq, "reference" plain torch; "auto" takes libswinq on a CUDA
            device, and the reference where libswinq cannot be had, which then says why in `notes`.

    Raises:
        ConfigError: there is no such engine or device.
        EngineError: the engine is "cuda", and cannot be had; or the GPU failed.
    """
    require(engine, device)
    if engine == REFERENCE or (engine == AUTO and torch.device(device).type != "cuda"):
        return Int8Swin(checkpoint, device)
    try:
        return CudaSwin(checkpoint, device)
    except EngineError as error:
        if engine == CUDA or isinstance(error, EngineFailedError):
            raise
        model = Int8Swin(checkpoint, device)
        why = " ".join(error.problem.split())
        model.notes.append(f"the reference runs this model on {device}, not libswinq: {why}")
        return model


def require(engine: str, device: str | torch.device) -> None:
    """Refuse an engine that does not exist, or that was demanded and cannot run on the device.

    Raises:
        ConfigError: there is no such engine or device.
        EngineError: the engine is "cuda", and libswinq is missing or cannot run there.
    """
    if engine not in ENGINES:
        raise ConfigError(
            f"engine is {engine!r}, wanted one of {', '.join(ENGINES)}",
            "auto takes the CUDA kernels where they can run",
        )
    if engine == CUDA:
        devices.require(device)
    else:
        devices.require_present(device)
