"""Exact products of integer matrices, on any CPU and on CUDA.

int8 x int8 goes through `torch._int_mm` where a test with the most extreme codes shows it to be
exact (oneDNN adds pairs of products in saturating 16 bits on CPUs without VNNI). Everywhere else
codes are multiplied as fp32 in slices of K so short that no partial sum leaves the integers that
fp32 holds: 1024 * 128 * 128 = 2**24 for two int8 operands, 512 * 255 * 128 < 2**24 for a u8 one.
Sums of such integers have one value in any order, and codes are exact in TF32 and bfloat16 too, so
the precision that the process allows its float products does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

SLICE_S8 = 1024  # longest K of an fp32 product of two int8 operands
SLICE_U8 = 512  # the same where one operand is u8

_LONGEST_K = 3072  # of the self-test: fc2 of Swin-T's last stage


class IntegerMatrix:
    """The weight of an integer GEMM: codes (out, in) int8, ready for repeated products."""

    def __init__(self, codes: Tensor) -> None:
        self._codes = codes.contiguous()
        self._floats: Tensor | None = None  # (in, out) fp32, only where _int_mm cannot be used

    def product(self, a: Tensor) -> Tensor:
        """a (M, in) int8 -> a @ codes.T, (M, out) int32, exact."""
        # its result is not to be trusted for K = 1
        if a.device.type == "cpu" and a.shape[-1] > 1 and int_mm_is_usable():
            return torch._int_mm(a, self._codes.t())
        if self._floats is None:
            self._floats = self._codes.t().float()
        return sliced_product(a.float(), self._floats, SLICE_S8)


def sliced_product(a: Tensor, b: Tensor, length: int) -> Tensor:
    """Codes a (..., M, K), b (..., K, N), held in fp32 -> a @ b int32, exact.

    Args:
        length: K of one fp32 product, `SLICE_S8` or `SLICE_U8`.
    """
    total = torch.matmul(a[..., :length], b[..., :length, :]).to(torch.int32)
    for start in range(length, a.shape[-1], length):
        stop = start + length
        total += torch.matmul(a[..., start:stop], b[..., start:stop, :]).to(torch.int32)
    return total


def float_product(a: Tensor, b: Tensor, length: int) -> Tensor:
    """`sliced_product` as fp32: the exact sum, rounded once (which short K never needs)."""
    if a.shape[-1] <= length:
        return torch.matmul(a, b)
    return sliced_product(a, b, length).float()


@lru_cache(maxsize=1)
def int_mm_is_usable() -> bool:
    """Whether `torch._int_mm` on this CPU sums the largest products without saturating.

    Not where it is a plain loop (no oneDNN) either: exact, but many times slower than fp32. Both
    ways give the same integers, so a clock may choose.
    """
    extremes = torch.tensor([[-128, -128], [127, 127], [-128, 127], [127, -128], [1, -1]])
    a = extremes.repeat(8, _LONGEST_K // 2).to(torch.int8)  # (40, K)
    b = a.clamp(min=-127)
    try:
        found = torch._int_mm(a, b.t())
        if not torch.equal(found.long(), a.long() @ b.long().t()):
            return False
        floats = a.float(), b.t().float()
        return _seconds(lambda: torch._int_mm(a, b.t())) < 4 * _seconds(
            lambda: sliced_product(*floats, SLICE_S8)
        )
    except (RuntimeError, AttributeError):  # a build of torch without it
        return False


def _seconds(run: Callable[[], Tensor]) -> float:
    """The quickest of a few runs."""
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
