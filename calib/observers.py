"""Observers: what calibration collects about a tensor while the float model runs.

Everything here is a maximum or an integer count, and a value's bin depends on the value alone. So
batches, their order and the number of ranks cannot change a single bit of the result.
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from swinq.distributed import all_reduce_max_, all_reduce_sum_

# A bin is a float32's exponent and its 8 leading mantissa bits: 256 bins an octave, a bin is
# 1/256 to 1/512 as wide as its values. Bins are ordered as the values are.
DROPPED_BITS = 23 - 8
BINS = 0x7F800000 >> DROPPED_BITS  # the next bin would hold infinity


def bin_edges(device: torch.device | str = "cpu") -> Tensor:
    """The BINS + 1 edges of the histogram, fp64 ascending from 0; the last one is 2**128."""
    bits = torch.arange(BINS, dtype=torch.int32, device=device) << DROPPED_BITS
    last = torch.tensor([2.0**128], dtype=torch.float64, device=device)
    return torch.cat([bits.view(torch.float32).double(), last])


class MaxObserver:
    """The largest magnitude seen: one number, or one per index of an axis.

    Attributes:
        maximum: () or (n,) fp32.
    """

    def __init__(self, axis: int | None, channels: int | None, device: torch.device) -> None:
        """``axis`` of the observed tensors keeps its n = ``channels`` indices apart."""
        self.axis = axis
        shape = () if axis is None or channels is None else (channels,)
        self.maximum = torch.zeros(shape, device=device)

    def __call__(self, x: Tensor) -> None:
        """Collect x (float, any shape with the axis)."""
        others = self._other_dimensions(x)
        self._join(torch.maximum(x.amax(others), -x.amin(others)))  # x.abs() would be a copy

    def _other_dimensions(self, x: Tensor) -> list[int]:
        return [d for d in range(x.ndim) if self.axis is None or d != self.axis % x.ndim]

    def _join(self, largest: Tensor) -> None:
        self.maximum = torch.maximum(self.maximum, largest.float())

    @property
    def peak(self) -> Tensor:
        """The largest magnitude of all, () fp32; NaN if one was seen."""
        return self.maximum.amax()

    def reduce(self) -> None:
        """Join what all ranks have seen."""
        all_reduce_max_(self.maximum)

    def reset(self) -> None:
        """Forget everything."""
        self.maximum.zero_()


class Scratch:
    """Memory for one tensor at a time, which observers share: fresh pages cost more than a pass."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def like(self, x: Tensor) -> Tensor:
        """Contiguous fp32 memory of x's shape on its device; what was there before is lost."""
        if self._buffer.numel() < x.numel() or self._buffer.device != x.device:
            self._buffer = torch.empty(x.numel(), device=x.device)
        return self._buffer[: x.numel()].view(x.shape)


class HistogramObserver(MaxObserver):
    """The maximum, and exact counts of |x| in bins that depend on the value alone.

    Attributes:
        counts: (BINS,) int64, on the model's device.
    """

    def __init__(
        self,
        axis: int | None,
        channels: int | None,
        device: torch.device,
        scratch: Scratch | None = None,
    ) -> None:
        """See MaxObserver; the histogram is of the whole tensor."""
        super().__init__(axis, channels, device)
        self._scratch = scratch or Scratch()
        self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)

    def __call__(self, x: Tensor) -> None:
        """Collect x; infinities and NaN show in ``peak``, not in the counts."""
        magnitude = torch.abs(x.float(), out=self._scratch.like(x))
        self._join(magnitude.amax(self._other_dimensions(x)))
        index = magnitude.view(torch.int32).bitwise_right_shift_(DROPPED_BITS)
        counts = torch.bincount(index.view(-1))[:BINS]
        self.counts[: len(counts)] += counts

    def reduce(self) -> None:
        """Join what all ranks have seen."""
        super().reduce()
        all_reduce_sum_(self.counts)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.counts.zero_()


class RowSampler:
    """Keeps evenly spaced rows (tokens) of a Linear's input, the same ones of every image.

    The rows end in the order of their digests: as if shuffled, but by their values alone, so that
    what is computed from them, or from the first of them, depends neither on images nor ranks.
    """

    def __init__(self, rows_per_image: int, width: int) -> None:
        """Keep ``rows_per_image`` rows of ``width`` values from each tensor."""
        self.rows_per_image, self.width = rows_per_image, width
        self._kept: list[Tensor] = []
        self._index = torch.empty(0, dtype=torch.int64)
        self._tokens = -1  # that the index was made for

    def __call__(self, x: Tensor) -> None:
        """Collect rows of x, (..., width)."""
        rows = x.reshape(-1, self.width)
        if self._tokens != len(rows):
            self._tokens = len(rows)
            step = torch.arange(self.rows_per_image, device=x.device) * len(rows)
            self._index = step // self.rows_per_image
        self._kept.append(rows.index_select(0, self._index).float().cpu())

    def gather(self, image_counts: list[int], rank: int) -> Tensor:
        """All ranks' rows in their own order, (images * rows_per_image, width) fp32 on the CPU."""
        total = sum(image_counts) * self.rows_per_image
        bits = torch.zeros(total, self.width, dtype=torch.int64)
        if self._kept:
            start = sum(image_counts[:rank]) * self.rows_per_image
            mine = torch.cat(self._kept).view(torch.int32).long()
            bits[start : start + len(mine)] = mine
        all_reduce_sum_(bits)  # each row has one rank's bits and zeros, so the sum is exact
        rows = bits.to(torch.int32).view(torch.float32)
        digests = [blake2b(row, digest_size=16).digest() for row in rows.numpy()]
        return rows[sorted(range(total), key=digests.__getitem__)]
