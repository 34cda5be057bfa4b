"""Random numbers as a function of the step, and the generators' states as tensors.

Every micro-batch seeds all generators from (seed, step, number), so a resumed job, or one with
another number of ranks, draws what the uninterrupted one drew. The states are saved all the same:
they show, and keep, what was drawn outside of the steps.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swinq import distributed


def seed_step(seed: int, step: int, number: int) -> None:
    """Seed python, numpy and torch (CPU and every GPU) for one micro-batch.

    Args:
        seed: the job's, 0 or more.
        step: the optimiser's, from 0.
        number: of the micro-batch in the step, counted over all ranks.
    """
    # O'Neill's hash of any number of words: neighbouring steps share nothing
    words = np.random.SeedSequence([seed, step, number]).generate_state(8)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:6])
    torch.manual_seed(int(words[6:].view(np.uint64)[0]))


def capture() -> dict[str, Tensor]:
    """The states of this rank's generators, on the CPU: python, numpy, torch and its GPU's."""
    version, words, normal = random.getstate()
    assert version == 3
    twister: dict[str, Any] = np.random.get_state(legacy=False)
    keys, position = twister["state"]["key"], twister["state"]["pos"]
    states = {
        "python": torch.tensor(words),  # (625,) int64
        "python_normal": _optional(normal),
        "numpy": torch.tensor([*keys.tolist(), position]),  # (625,) int64
        "numpy_normal": _optional(twister["gauss"] if twister["has_gauss"] else None),
        "torch": torch.get_rng_state(),  # (5056,) uint8
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()  # (16,) uint8, of the current device
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Put the generators where `capture` found them; a GPU's state needs a GPU and is else left."""
    words = states["python"].tolist()
    random.setstate((3, tuple(words), _value(states["python_normal"])))
    *keys, position = states["numpy"].tolist()
    normal = _value(states["numpy_normal"])
    kept = (int(normal is not None), normal or 0.0)
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, *kept))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def gather() -> dict[str, Tensor]:
    """The states of all ranks as random.<rank>.<generator>, on every rank; all ranks call."""
    own, rank = capture(), distributed.rank()
    found = {}
    for source in range(distributed.world_size()):
        for name, state in own.items():
            sent = state if source == rank else torch.empty_like(state)
            found[f"random.{source}.{name}"] = distributed.broadcast_(sent, source)
    return found


def restore_rank(tensors: Mapping[str, Tensor]) -> None:
    """Restore this rank's states out of `gather`'s; a rank that was not there then has none."""
    prefix = f"random.{distributed.rank()}."
    own = {
        name.removeprefix(prefix): state
        for name, state in tensors.items()
        if name.startswith(prefix)
    }
    if own:
        restore(own)


def _optional(value: float | None) -> Tensor:
    """A second normal number kept for later, or NaN: states have one size for all ranks."""
    return torch.tensor(float("nan") if value is None else value, dtype=torch.float64)


def _value(tensor: Tensor) -> float | None:
    return None if tensor.isnan() else float(tensor)
