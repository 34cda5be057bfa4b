"""CUDA graphs of a student's stages: one launch runs a stage's forward, another its backward.

A step of Swin-L has thousands of kernels of a few microseconds. Launched one by one they keep the
host busy for longer than the GPU; a graph launches a stage of them at once. What lies between the
stages, the loss, DDP's exchange of gradients and the optimiser stay outside.

torch.cuda.make_graphed_callables does this too, but copies what passes from stage to stage, and
keeps its capture's autograd nodes: gradients then arrive on another stream than DDP expects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from swinq.errors import SwinqError
from swinq.models.layers import SwinBase
from swinq.train.precision import autocast

WARM_UPS = 3  # of a stage before its capture: compiles, tunes, and makes workspaces


def can_capture(device: torch.device, *, checkpointing: bool, sharded: bool) -> bool:
    """Whether a job's stages can be captured.

    Graphs want a GPU, keep what checkpointing would drop, and read weights where they once were.
    """
    return device.type == "cuda" and not checkpointing and not sharded


@dataclass
class _Stage:
    """What a captured stage reads and writes, always at the same place in memory."""

    parameters: tuple[nn.Parameter, ...]  # those that learn
    x: Tensor  # (B, tokens, C)
    forward: torch.cuda.CUDAGraph
    y: Tensor
    grad_y: Tensor
    backward: torch.cuda.CUDAGraph
    grads: tuple[Tensor | None, ...]  # of x, then of the parameters


class _Replay(torch.autograd.Function):
    """A captured stage as one node of the autograd graph."""

    @staticmethod
    def forward(ctx: Any, stage: _Stage, x: Tensor, *parameters: Tensor) -> Tensor:
        if x.shape != stage.x.shape:  # copying could stretch it
            raise ValueError(f"captured for {list(stage.x.shape)} tokens, got {list(x.shape)}")
        ctx.stage = stage
        _place(x, stage.x)
        stage.forward.replay()
        return stage.y.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        stage: _Stage = ctx.stage
        _place(grads[0], stage.grad_y)
        stage.backward.replay()
        return (None, *(None if grad is None else grad.detach() for grad in stage.grads))


def _place(tensor: Tensor, where: Tensor) -> None:
    if tensor.data_ptr() != where.data_ptr():  # the stage before or behind wrote it there
        where.copy_(tensor)


class CapturedStages:
    """The memory that a model's graphs read."""

    def __init__(self, student: SwinBase) -> None:
        self._student = student
        self._places = self._current()

    def require_unmoved(self) -> None:
        """Check that every weight, range and buffer is where the graphs read it.

        Raises:
            SwinqError: one was replaced, so that training would go on with what it had been.
        """
        for name, place in self._current().items():
            if place != self._places.get(name):
                raise SwinqError(
                    f"{name} has moved in memory since the stages were captured as CUDA graphs",
                    "train with --opts QAT.CUDA_GRAPHS False; this is a fault of swinq, report it",
                )

    def _current(self) -> dict[str, int]:
        layers = self._student.layers
        named = (*layers.named_parameters("layers"), *layers.named_buffers("layers"))
        return {name: tensor.data_ptr() for name, tensor in named}


def capture_stages(student: SwinBase, batch: int, amp: str) -> CapturedStages:
    """Make each stage of a model in training replay its kernels, in place.

    From then on every forward in training mode is one of exactly `batch` images, with its backward
    before the next forward, and all tensors stay where they are in memory. A stage in evaluation
    mode runs as before. Random numbers of drop path are drawn anew in every replay, from the
    current seed.

    A stage's gradients then are its graph's own tensors, which the next backward overwrites: where
    several are added up, `hold_gradients` must come before the first.

    Args:
        student: in training mode, on a GPU, not yet wrapped, without hooks on its stages.
        batch: images of a micro-batch.
        amp: type of the matrix products, one of AMP_TYPES.
    """
    arch, device = student.arch, next(student.parameters()).device
    shape = (batch, arch.in_chans, arch.img_size, arch.img_size)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    # a cached cast of a weight would be read by a graph and freed at the end of autocast
    with torch.cuda.stream(stream), autocast(device, amp, cache=False):
        x = student.patch_embed(torch.randn(shape, device=device)).detach()
        for layer, stage in zip(student.layers, _capture(student, x, stream), strict=True):
            layer.forward = _replaying(layer, stage, layer.forward)
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.empty_cache()  # what the warm-up took lies beside the graphs' own memory
    return CapturedStages(student)


def _capture(student: SwinBase, x: Tensor, stream: torch.cuda.Stream) -> list[_Stage]:
    """Capture all forwards, then all backwards, as a step runs them: they share their memory."""
    layers = list(student.layers)
    learning = [tuple(p for p in layer.parameters() if p.requires_grad) for layer in layers]
    sample = x
    for layer, parameters in zip(layers, learning, strict=True):
        sample = _warm_up(layer, parameters, sample)
    torch.cuda.synchronize()

    # NCCL's watchdog may look at its events meanwhile, which "global" would take for an error
    captured = partial(
        torch.cuda.graph,
        pool=torch.cuda.graph_pool_handle(),
        stream=stream,
        capture_error_mode="thread_local",
    )
    forwards: list[tuple[Tensor, torch.cuda.CUDAGraph, Tensor]] = []
    x = x.clone().requires_grad_()
    for layer in layers:
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            y = layer(x)
        forwards.append((x, graph, y))
        x = y.detach().requires_grad_()
    stages: list[_Stage] = []
    grad_y = torch.zeros_like(y)
    for (x, forward, y), parameters in reversed(list(zip(forwards, learning, strict=True))):
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            grads = torch.autograd.grad(y, (x, *parameters), grad_y, allow_unused=True)
        # detached: the autograd graph of the capture, and its nodes for the parameters, end here
        stages.append(_Stage(parameters, x.detach(), forward, y.detach(), grad_y, graph, grads))
        grad_y = grads[0]
    return stages[::-1]


def _warm_up(layer: nn.Module, parameters: tuple[nn.Parameter, ...], x: Tensor) -> Tensor:
    """Run a stage as it will be captured; returns what it gave."""
    x = x.clone().requires_grad_()
    for _ in range(WARM_UPS):
        y = layer(x)
        torch.autograd.grad(y, (x, *parameters), torch.ones_like(y), allow_unused=True)
    return y.detach()


def _replaying(
    layer: nn.Module, stage: _Stage, plain: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The forward of a stage that replays in training mode."""

    def forward(x: Tensor) -> Tensor:
        return _Replay.apply(stage, x, *stage.parameters) if layer.training else plain(x)

    return forward


def hold_gradients(student: nn.Module) -> None:
    """Give every parameter a gradient of zeros, which backwards then add to."""
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
