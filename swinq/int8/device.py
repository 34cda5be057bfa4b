"""Where libswinq runs: a CUDA device that it has kernels for, its current stream, its captures.

Everything but `require` takes any device, so that what is built on it can be tested without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from swinq.errors import ConfigError, EngineError
from swinq.int8.library import library


def require(device: str | torch.device) -> torch.device:
    """The CUDA device, with its index, if libswinq is there and has kernels for it.

    Raises:
        ConfigError: no such device.
        EngineError: another kind of device, no library, or a GPU that is too old.
    """
    device = _parsed(device)
    if device.type != "cuda":
        raise EngineError(
            f"the CUDA engine cannot run on {device}, wanted a CUDA device",
            "move the model to cuda, or run the reference there (engine='reference')",
        )
    loaded = library()
    require_present(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    loaded.check_device(index)
    return torch.device("cuda", index)


def require_present(device: str | torch.device) -> None:
    """Refuse a name that is no device's, and a device that PyTorch cannot use.

    Raises:
        ConfigError: no such device, or a GPU where none, or none of that number, is visible.
    """
    device = _parsed(device)
    if device.type != "cuda":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, ImportError) as error:
            raise ConfigError(
                f"device {device}: PyTorch cannot use it here ({str(error).splitlines()[0]})",
                "use device 'cpu'",
            ) from error
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"device {device}: no GPU is visible to PyTorch", "use device 'cpu'")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device}: {torch.cuda.device_count()} GPU(s) are visible",
            "name one of them, counted from cuda:0",
        )


def _parsed(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is not known", "use cpu, cuda or cuda:N") from error


def problem(device: str | torch.device) -> str:
    """Why libswinq cannot run on a device, in words; "" where it can."""
    try:
        require(device)
    except (ConfigError, EngineError) as error:
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
