"""Our engine with made-up weights: time does not depend on them, as no kernel skips anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarking.cases import STREAM, Model
from benchmarking.timing import Call, Step
from swinq.export.format import FP16, default_precision, expected_tensors, layer_names
from swinq.int8.engine import CudaSwin
from swinq.models.architecture import Architecture
from swinq.models.variants import find_variant

_UNIFORM_DEVIATION = 73.0  # of codes drawn evenly from -127 to 127


@dataclass(frozen=True)
class MadeUp:
    """What a plan is made of: a checkpoint without a file."""

    architecture: Architecture
    tensors: dict[str, Tensor]
    precision: dict[str, str]
    int8_mode: int | None
    classes: list[str] | None = None
    transform: dict[str, Any] = field(default_factory=dict)


def made_up(arch: Architecture, mode: int | None, *, seed: int = 0) -> MadeUp:
    """Random weights whose activations stay near one, in INT8 mode 1 or 2, or FP16 for None."""
    if mode is None:
        precision = dict.fromkeys(layer_names(arch), FP16)
    else:
        precision = default_precision(arch, mode)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _tensor(name, spec.dtype, spec.shapes[0], arch.version, generator)
        for name, spec in expected_tensors(arch, precision, mode or 1).items()
    }
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale"):
            fan_in = tensors[f"{name.removesuffix('_scale')}"].shape[1]
            tensor.fill_(fan_in**-0.5 / _UNIFORM_DEVIATION)
    return MadeUp(arch, tensors, precision, mode)


def _tensor(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    version: int,
    generator: torch.Generator,
) -> Tensor:
    kind = name.rpartition(".")[2]
    if dtype is torch.int8:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    if kind == "softmax_scale":
        return torch.full(shape, 32**-0.5 if version == 1 else 10.0)
    if kind.endswith("_scale"):
        return torch.full(shape, (1.0 if kind in ("q_scale", "k_scale") else 4.0) / 127)
    noise = torch.randn(shape, generator=generator)
    if kind == "weight" and "norm" in name.split(".")[-2]:
        return 1.0 + 0.1 * noise
    if kind == "weight":
        return (noise * noise[0].numel() ** -0.5).to(dtype)
    return 0.1 * noise


def mode_of(form: str) -> int | None:
    """The INT8 mode of a form's name; None of FP16."""
    return next((mode for mode in (1, 2) if f"int8-{mode}" in form), None)


def engine(model: Model, form: str, device: torch.device) -> CudaSwin:
    """A plan on the device.

    Raises:
        EngineError: libswinq is missing or refuses.
    """
    arch = find_variant(model.name)
    assert arch is not None  # a test compares MODELS with the variants
    return CudaSwin(made_up(arch, mode_of(form)), device)


def runs(
    model: Model,
    forms: tuple[str, ...],
    batches: tuple[int, ...],
    device: torch.device,
) -> Iterator[Step]:
    """What there is to time, one after the other; a mode's forms share a plan."""
    engines: dict[int | None, CudaSwin] = {}

    def make(form: str, batch: int, about: dict[str, Any]) -> Call:
        mode = mode_of(form)
        if mode not in engines:
            engines[mode] = engine(model, form, device)
        running = engines[mode]
        about["launches"] = running.plan.launches(batch)
        about["weight_bytes"] = running.plan.weight_bytes
        images = torch.randn(
            batch, 3, model.img_size, model.img_size, device=device, dtype=torch.float16
        )
        if form.endswith(STREAM):
            return lambda: running(images, check=False)
        graph = running.graph(batch, torch.float16)
        graph.images.copy_(images)

        def replay() -> Tensor:
            graph.replay()
            return graph.logits

        return replay

    for batch in batches:
        for form in forms:
            about: dict[str, Any] = {}
            yield Step(form, batch, partial(make, form, batch, about), about)
