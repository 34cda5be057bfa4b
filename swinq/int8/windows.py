"""Where tokens go: windows, shifts and masks as index tables; and how batches are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASKED = -100.0  # added between tokens that only the shift made neighbours; never -inf

# Elements of the widest tensor that are worked on at a time. On a CPU what one piece touches should
# stay near the cores, yet give each thread enough to do: with 2**17 two threads take 1.4 times as
# long (Swin-T, batch 8, Xeon with 2 MB of L2 a core), one thread the same. A GPU is to be filled.
PIECE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class Cut:
    """How the windows (or rows) of a batch are cut into pieces of work."""

    unit: int  # summed together in fp16 layers; a part of an image or one whole, in any batch
    step: int  # handled together: one unit, or those of several whole images


def cut(parts: int, elements: int, device: torch.device) -> Cut:
    """Cut images of so many parts, each of which takes so many elements at its widest."""
    most = max(1, PIECE_ELEMENTS.get(device.type, PIECE_ELEMENTS["cpu"]) // elements)
    unit = max(n for n in range(1, parts + 1) if parts % n == 0 and n <= most)
    if unit < parts:
        return Cut(unit, unit)
    return Cut(parts, parts * max(1, most // parts))


class Windows:
    """The windows of one block's map: order of tokens, and what is added to the logits."""

    def __init__(self, resolution: int, window: int, shift: int, table: Tensor) -> None:
        """Expand the index tables.

        Args:
            resolution, window, shift: tokens along one side; shift 0 for unshifted.
            table: relative position bias, ((2*window-1)**2, heads) fp32.
        """
        self.count = (resolution // window) ** 2  # windows of an image
        self.tokens = window * window  # of a window
        order = torch.arange(resolution * resolution).view(resolution, resolution)
        order = _partition(order.roll((-shift, -shift), (0, 1)), window)  # (nW, N)
        self._order = order.flatten().to(table.device)
        self._back = self._order.argsort()
        bias = table[relative_index(window).to(table.device)].permute(2, 0, 1)  # (heads, N, N)
        if not shift:
            self._tables, self._kinds = bias[None].contiguous(), None
            return
        # windows that no edge cuts share a mask: only the distinct ones are kept
        masks, kinds = torch.unique(
            shift_mask(resolution, window, shift), dim=0, return_inverse=True
        )
        self._tables = bias + masks.to(table.device)[:, None]  # (kinds, heads, N, N) fp32
        self._kinds = kinds.to(table.device)  # (nW,) int64

    def gather(self, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B * windows, N, C), a copy: roll and partition in one step."""
        b, _, c = x.shape
        return x.index_select(1, self._order).view(b * self.count, self.tokens, c)

    def scatter(self, x: Tensor) -> Tensor:
        """Undo `gather`: (B * windows, N, C) -> (B, H*W, C)."""
        return x.view(-1, self.count * self.tokens, x.shape[-1]).index_select(1, self._back)

    def bias(self, start: int, stop: int) -> Tensor:
        """Bias + mask of windows start to stop of a batch, (W, heads, N, N); (1, ...) unshifted."""
        if self._kinds is None:
            return self._tables
        index = torch.arange(start, stop, device=self._kinds.device) % self.count
        return self._tables.index_select(0, self._kinds[index])


def relative_index(window: int) -> Tensor:
    """Row of the compact table for query i and key j, (N, N) int64.

    The offset (dy, dx) of query from key has row (dy + window-1) * (2*window-1) + dx + window-1.
    """
    line = torch.arange(window)
    y, x = (axis.flatten() for axis in torch.meshgrid(line, line, indexing="ij"))  # (N,) each
    offset = window - 1
    return (y[:, None] - y + offset) * (2 * window - 1) + (x[:, None] - x + offset)


def shift_mask(resolution: int, window: int, shift: int) -> Tensor:
    """0 between tokens of one region of the rolled map, -100 between others: (nW, N, N) fp32."""
    line = torch.arange(resolution)
    region = (line >= resolution - window).long() + (line >= resolution - shift).long()
    regions = _partition(region[:, None] * 3 + region, window)  # (nW, N)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, MASKED)


def _partition(grid: Tensor, window: int) -> Tensor:
    """(H, W) -> (nW, N): windows row by row, tokens of a window row by row."""
    count = grid.shape[0] // window
    return grid.view(count, window, count, window).transpose(1, 2).reshape(-1, window * window)
