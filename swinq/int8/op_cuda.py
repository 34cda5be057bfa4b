"""The INT8 operators on a GPU: the kernels of libswinq one by one; see ops.py.

The library refuses tensors that are not aligned to 16 bytes, and sizes that no kernel exists for.
Work is enqueued on the current stream of the tensors' device.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from swinq.int8 import abi
from swinq.int8 import device as devices
from swinq.int8 import op_checks as checks
from swinq.int8.library import library

_VECTOR = 4  # floats of 16 bytes


def pack_gemm_weight(weight: Tensor) -> Tensor:
    """(n, k) int8 -> (n padded to 32, k) int8, in the kernel's order; waits for the device."""
    checks.require("weight", weight, torch.int8, (None, None))
    n, k = weight.shape
    host = weight.cpu().contiguous()
    packed = torch.empty(checks.padded(n), k, dtype=torch.int8)
    library().gemm_layout(abi.INT8, host.data_ptr(), n, k, packed.data_ptr())
    return packed.to(weight.device)


def gemm_int8(
    a: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    out_inverse: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """See `op_reference.gemm_int8`."""
    checks.require_gemm(a, weight, factor, bias)
    checks.require_activation(activation, out_inverse, len(bias))
    checks.require_vectors(len(bias), a.device, out_inverse=out_inverse)
    dtype = torch.float32 if out_inverse is None else torch.int8
    out = a.new_empty((len(a), len(bias)), dtype=dtype)
    arguments = _gemm(a, weight, factor, bias, out)
    arguments.activation = abi.ACTIVATIONS[activation]
    arguments.output = abi.FLOATS if out_inverse is None else abi.CODES
    arguments.out_inverse = _pointer(out_inverse)
    _run("gemm", arguments, a)
    return out


def gemm_int8_residual(
    a: Tensor,
    weight: Tensor,
    factor: Tensor,
    bias: Tensor,
    stream: Tensor,
    out_inverse: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> None:
    """See `op_reference.gemm_int8_residual`."""
    checks.require_gemm(a, weight, factor, bias)
    checks.require("stream", stream, torch.float16, (len(a), len(bias)), a.device)
    checks.require_vectors(len(bias), a.device, out_inverse=out_inverse, out_scale=out_scale)
    checks.require_both(out_inverse=out_inverse, out_scale=out_scale)
    arguments = _gemm(a, weight, factor, bias, stream)
    arguments.output = abi.RESIDUAL
    arguments.out_inverse, arguments.out_scale = _pointer(out_inverse), _pointer(out_scale)
    _run("gemm", arguments, a)


def attention_bias_size(window: int, heads: int) -> tuple[int, int]:
    """Floats of a packed bias: of the table, padded to 16 bytes, and of its expansion."""
    expanded = ctypes.c_int64()
    library().attention_bias_size(window, heads, ctypes.byref(expanded))
    return -(-heads * (2 * window - 1) ** 2 // _VECTOR) * _VECTOR, expanded.value


def pack_attention_bias(table: Tensor, window: int) -> Tensor:
    """((2W-1)^2, heads) -> the table by heads, then its expansion; waits for the device."""
    checks.require_table(table, window)
    heads = table.shape[1]
    held, expanded = attention_bias_size(window, heads)
    packed = torch.zeros(held + expanded)
    packed[: table.numel()] = table.t().reshape(-1).cpu()
    start = packed.data_ptr()
    library().attention_bias(start, window, heads, start + 4 * held)
    return packed.to(table.device)


def window_attention_int8(
    qkv: Tensor,
    bias: Tensor,
    factor: Tensor,
    v_scale: float,
    resolution: int,
    window: int,
    shift: int,
    out_inverse: Tensor | None = None,
) -> Tensor:
    """See `op_reference.window_attention_int8`."""
    checks.require_attention(qkv, bias, factor, resolution, window, shift)
    checks.require_vectors(len(factor) * checks.HEAD_DIM, qkv.device, out_inverse=out_inverse)
    tokens, _, heads, width = qkv.shape
    dtype = torch.float16 if out_inverse is None else torch.int8
    out = qkv.new_empty((tokens, heads, width), dtype=dtype)
    held, expanded = attention_bias_size(window, heads)
    checks.require_vectors(held + expanded, qkv.device, bias=bias)
    arguments = abi.AttentionArguments(
        type=abi.INT8,
        out_type=abi.TYPES[dtype],
        qkv=qkv.data_ptr(),
        out=out.data_ptr(),
        bias_table=bias.data_ptr(),
        bias=bias.data_ptr() + 4 * held if expanded else None,
        factor=factor.data_ptr(),
        v_scale=v_scale,
        out_inverse=_pointer(out_inverse),
        batch=tokens // resolution**2,
        resolution=resolution,
        window=window,
        shift=shift,
        heads=heads,
    )
    _run("attention", arguments, qkv)
    return out


def layernorm_quantize(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    inverse: Tensor,
    eps: float,
    resolution: int,
    merge: bool = False,
) -> Tensor:
    """See `op_reference.layernorm_quantize`."""
    checks.require_norm(x, gamma, beta, inverse, resolution, merge)
    batch, tokens, channels = x.shape
    squares = 4 if merge else 1
    out = x.new_empty((batch, tokens // squares, channels * squares), dtype=torch.int8)
    arguments = abi.PrenormArguments(
        stream=abi.HALF,
        operand=abi.INT8,
        x=x.data_ptr(),
        out=out.data_ptr(),
        gamma=_pointer(gamma),
        beta=_pointer(beta),
        inverse=inverse.data_ptr(),
        eps=eps,
        batch=batch,
        resolution=resolution,
        channels=channels,
        merge=merge,
    )
    _run("prenorm", arguments, x)
    return out


def add_layernorm_quantize(
    y: Tensor,
    y_scale: Tensor | None,
    stream: Tensor,
    gamma: Tensor,
    beta: Tensor,
    inverse: Tensor,
    eps: float,
) -> Tensor:
    """See `op_reference.add_layernorm_quantize`."""
    checks.require_add_norm(y, y_scale, stream, gamma, beta, inverse)
    out = y.new_empty(y.shape, dtype=torch.int8)
    arguments = abi.PostnormArguments(
        y_type=abi.TYPES[y.dtype],
        stream=abi.HALF,
        y=y.data_ptr(),
        y_scale=_pointer(y_scale),
        x=stream.data_ptr(),
        operand=out.data_ptr(),
        inverse=inverse.data_ptr(),
        gamma=gamma.data_ptr(),
        beta=beta.data_ptr(),
        eps=eps,
        rows=len(y),
        channels=y.shape[1],
        residual=1,
    )
    _run("postnorm", arguments, y)
    return out


def _gemm(
    a: Tensor, weight: Tensor, factor: Tensor, bias: Tensor, out: Tensor
) -> abi.GemmArguments:
    return abi.GemmArguments(
        operand=abi.INT8,
        stream=abi.HALF,
        a=a.data_ptr(),
        w=weight.data_ptr(),
        out=out.data_ptr(),
        factor=factor.data_ptr(),
        bias=bias.data_ptr(),
        m=len(a),
        n=len(bias),
        k=a.shape[1],
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(name: str, arguments: ctypes.Structure, x: Tensor) -> None:
    """Enqueue a kernel where its input lies; an empty input has no address, and needs none."""
    if x.numel():
        with devices.current(x.device):
            getattr(library(), name)(ctypes.byref(arguments), devices.stream(x.device))
