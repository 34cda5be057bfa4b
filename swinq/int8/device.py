"""Where libswinq runs: a CUDA device that it has kernels for, its current stream, its captures.

Everything but `require` takes any device, so that what is built on it can be tested without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from swinq.errors import EngineError
from swinq.int8.library import library


def require(device: str | torch.device) -> torch.device:
    """The CUDA device, with its index, if libswinq is there and has kernels for it.

    Raises:
        EngineError: another kind of device, no GPU, no library, or a GPU that is too old.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise EngineError(
            f"the CUDA engine cannot run on {device}, wanted a CUDA device",
            "move the model to cuda, or run the reference there (engine='reference')",
        )
    loaded = library()
    if not torch.cuda.is_available():
        raise EngineError("no GPU is visible to PyTorch", "run the reference on the CPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise EngineError(
            f"{device} does not exist: {torch.cuda.device_count()} GPU(s) are visible",
            "name one of them, counted from cuda:0",
        )
    loaded.check_device(index)
    return torch.device("cuda", index)


def problem(device: str | torch.device) -> str:
    """Why libswinq cannot run on a device, in words; "" where it can."""
    try:
        require(device)
    except EngineError as error:
        return error.problem
    return ""


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which the device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream(device: torch.device) -> int:
    """The handle of the device's current stream, as the C ABI wants it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether work enqueued now becomes part of a CUDA graph; call inside `current`."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
