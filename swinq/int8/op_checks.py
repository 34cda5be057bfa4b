"""What the INT8 operators want of their arguments; the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from swinq.errors import EngineError
from swinq.int8 import abi

HEAD_DIM = 32  # channels of an attention head; narrower heads are padded with zeros
ROW_GROUP = 32  # rows of a packed weight are padded to a multiple of it


def padded(rows: int) -> int:
    """Rows of a packed weight."""
    return -(-rows // ROW_GROUP) * ROW_GROUP


def require(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
) -> None:
    """Refuse a tensor of another type, shape (None: any size), device or order in memory.

    Raises:
        EngineError: names the tensor, what it is and what was wanted.
    """
    if any(size > abi.LARGEST_INT for size in tensor.shape):
        raise EngineError(
            f"{name} is {list(tensor.shape)}, and kernels count up to {abi.LARGEST_INT}",
            "split the batch",
        )
    same = len(tensor.shape) == len(shape) and all(
        want in (None, size) for size, want in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype == dtype and same and device in (None, tensor.device):
        if tensor.is_contiguous():
            return
        raise EngineError(f"{name} is not contiguous in memory", f"pass {name}.contiguous()")
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    fix = "its shape follows from those of the other arguments: correct one of them"
    if same:
        fix = f"pass {name}.to({dtype})"
    if same and tensor.dtype == dtype:
        fix = f"pass {name}.to('{device}')"
    raise EngineError(
        f"{name} is {tensor.dtype} [{', '.join(map(str, tensor.shape))}] on {tensor.device}, "
        f"wanted {dtype} [{wanted}] on {device or tensor.device}",
        fix,
    )


def require_vectors(width: int, device: torch.device, **vectors: Tensor | None) -> None:
    """Refuse vectors that are not (width,) fp32; None is none."""
    for name, vector in vectors.items():
        if vector is not None:
            require(name, vector, torch.float32, (width,), device)


def require_both(**pair: Tensor | None) -> None:
    """Refuse one of two arguments that mean something together only."""
    absent = [name for name, tensor in pair.items() if tensor is None]
    if len(absent) == 1:
        raise EngineError(
            f"{absent[0]} is missing: {' and '.join(pair)} go together", "pass both or neither"
        )


def require_gemm(a: Tensor, weight: Tensor, factor: Tensor, bias: Tensor) -> None:
    """Refuse operands that do not multiply."""
    require("a", a, torch.int8, (None, None))
    require("weight", weight, torch.int8, (padded(bias.numel()), a.shape[1]), a.device)
    require_vectors(bias.numel(), a.device, factor=factor, bias=bias)


def require_activation(activation: str, out_inverse: Tensor | None, width: int) -> None:
    """Refuse what no epilogue computes."""
    if activation not in abi.ACTIVATIONS or (activation != "none" and out_inverse is None):
        raise EngineError(
            f"activation {activation!r} {'without' if out_inverse is None else 'with'} "
            "out_inverse has no kernel; wanted none, or gelu or normalize with out_inverse",
            "pass activation='none', or the inverses of the output's scales",
        )
    if activation == "normalize" and width % (3 * HEAD_DIM):
        raise EngineError(
            f"normalize wants 3 * heads * {HEAD_DIM} columns, got {width}",
            f"pad heads to {HEAD_DIM} channels with zero weights",
        )


def require_attention(
    qkv: Tensor, bias: Tensor, factor: Tensor, resolution: int, window: int, shift: int
) -> None:
    """Refuse tokens that are not whole maps, and windows that do not tile them."""
    require("qkv", qkv, torch.int8, (None, 3, factor.numel(), HEAD_DIM))
    require("bias", bias, torch.float32, (None,), qkv.device)
    require_vectors(factor.numel(), qkv.device, factor=factor)
    require_map(len(qkv), resolution, window)
    if not factor.numel():
        raise EngineError(
            "factor is empty, wanted a number for each head", "pass those of one head or more"
        )
    if not 0 <= shift < window:
        raise EngineError(
            f"shift is {shift}, wanted 0 to {window - 1}", "0 is none; Swin's is half a window"
        )
    if bias.numel() < factor.numel() * (2 * window - 1) ** 2:
        raise EngineError(
            f"bias holds {bias.numel()} floats, too few for {factor.numel()} heads and windows of "
            f"{window} x {window} tokens",
            "pack it with torch.ops.swinq.pack_attention_bias(table, window)",
        )


def require_table(table: Tensor, window: int) -> None:
    """Refuse a relative position bias table of other windows."""
    if window < 1:
        raise EngineError(f"window is {window}, wanted at least 1", "pass tokens along one side")
    require("table", table, torch.float32, ((2 * window - 1) ** 2, None))


def require_map(tokens: int, resolution: int, step: int) -> None:
    """Refuse tokens that are not whole square maps, or a step that does not divide their side."""
    if resolution < 1 or step < 1 or tokens % resolution**2 or resolution % step:
        raise EngineError(
            f"{tokens} tokens are not whole maps of {resolution} x {resolution} tokens that "
            f"{step} x {step} tokens tile",
            "pass the side of the token map as resolution, and a window that divides it",
        )


def require_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    inverse: Tensor,
    resolution: int,
    merge: bool,
) -> None:
    """Refuse a stream that is no map, or a norm of another width."""
    require("x", x, torch.float16, (None, resolution**2, None))
    require_map(x.shape[1], resolution, 2 if merge else 1)
    width = x.shape[2] * (4 if merge else 1)
    require_vectors(width, x.device, gamma=gamma, beta=beta, inverse=inverse)
    require_both(gamma=gamma, beta=beta)


def require_add_norm(
    y: Tensor,
    y_scale: Tensor | None,
    stream: Tensor,
    gamma: Tensor,
    beta: Tensor,
    inverse: Tensor,
) -> None:
    """Refuse a branch that does not fit the stream."""
    dtype = torch.float32 if y_scale is None else torch.int8
    require("y", y, dtype, (None, None))
    require("stream", stream, torch.float16, tuple(y.shape), y.device)
    require_vectors(y.shape[1], y.device, y_scale=y_scale, gamma=gamma, beta=beta, inverse=inverse)
