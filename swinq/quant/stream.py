"""The residual stream: where a Swin writes it, and rounding it to fp16 as the engine does.

Float models mark each write with an ``nn.Identity`` called ``stream``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from swinq.quant.linear import round_to_half


def stream_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name the modules through which every write to the residual stream passes."""
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] == "stream"}


@contextmanager
def half_stream(model: nn.Module) -> Iterator[nn.Module]:
    """Round the residual stream to fp16 inside the context."""

    def round_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return round_to_half(output)

    hooks = [m.register_forward_hook(round_output) for m in stream_modules(model).values()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
