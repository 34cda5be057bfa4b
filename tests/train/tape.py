"""CUDA graphs played on the CPU: records every operation, and replays it on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Stands for a torch.cuda.CUDAGraph; the recorded tensors are held, as a graph's pool does."""

    def __init__(self) -> None:
        super().__init__()
        self._played: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = op(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        self._played.append((op, args, kwargs, tensors))
        return given

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # whose casts are on the tape
    def replay(self) -> None:
        """Compute everything anew, from what lies in memory now."""
        for op, args, kwargs, tensors in self._played:
            given = [leaf for leaf in tree_leaves(op(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(tensors, given, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Stream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, other: object) -> None:
        pass


@contextmanager
def _recording(graph: Tape, **options: object) -> Iterator[None]:
    with graph:
        yield


def play_graphs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.cuda's graphs, and the streams that go with them, be tapes."""
    stand_ins = {
        "CUDAGraph": Tape,
        "graph": _recording,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
