"""A plan of libswinq: weights laid out on a GPU for its kernels, freed with the object."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from swinq.errors import EngineError
from swinq.int8 import abi
from swinq.int8 import device as devices
from swinq.int8.library import library
from swinq.models.architecture import Architecture


class Weights(Protocol):
    """What a plan is made of; an `Int8Checkpoint` is one, `swinq.export.plain` makes others."""

    @property
    def architecture(self) -> Architecture:
        """The model."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names of docs/checkpoint-format.md."""

    @property
    def precision(self) -> dict[str, str]:
        """Layer name -> int8, int8-unrounded, fp16 or fp32."""

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of the logits, if they are known."""

    @property
    def transform(self) -> dict[str, Any]:
        """The evaluation transform as plain JSON; empty if it is not known."""


class Plan:
    """Weights on a device, and the forward that reads them.

    Several streams may run it at once, each with a workspace of its own.

    Attributes:
        library: what made it. device: where the weights are.
    """

    def __init__(self, weights: Weights, device: torch.device) -> None:
        """Copy the weights to the device.

        Raises:
            EngineError: a tensor is missing or malformed, no kernel exists for a size, or the
                device's memory does not hold the weights.
        """
        self.device = device
        self.library = library()
        held = {name: x.detach().cpu().contiguous() for name, x in weights.tensors.items()}
        model = _model(weights.architecture, held, weights.precision)
        handle = ctypes.c_void_p()
        with devices.current(device):
            self.library.plan_create(ctypes.byref(model), device.index or 0, ctypes.byref(handle))
        self._handle = handle
        self._prepared: dict[int, int] = {}  # batch -> bytes of workspace
        weakref.finalize(self, self.library.plan_destroy, handle)

    def workspace_size(self, batch: int) -> int:
        """Bytes that a forward of so many images needs.

        Raises:
            EngineError: more images than kernels can count, or fewer than none.
        """
        _require_batch(batch)
        size = ctypes.c_size_t()
        self.library.workspace_size(self._handle, batch, ctypes.byref(size))
        return size.value

    def prepare(self, batch: int) -> int:
        """Load the kernels of a forward of so many images, once: CUDA waits while it does that.

        Returns:
            As `workspace_size`.
        """
        if batch not in self._prepared:
            size = self.workspace_size(batch)
            self.library.prepare(self._handle, batch)
            self._prepared[batch] = size
        return self._prepared[batch]

    @property
    def weight_bytes(self) -> int:
        """Bytes of device memory that the weights take."""
        size = ctypes.c_size_t()
        self.library.weight_bytes(self._handle, ctypes.byref(size))
        return size.value

    def launches(self, batch: int) -> int:
        """Kernels that a forward of so many images launches.

        Raises:
            EngineError: as `workspace_size`.
        """
        _require_batch(batch)
        count = ctypes.c_int()
        self.library.launch_count(self._handle, batch, ctypes.byref(count))
        return count.value

    def forward(self, images: Tensor, logits: Tensor, workspace: Tensor) -> None:
        """Enqueue a forward on the device's current stream.

        Args:
            images: (B, in_chans, S, S) fp16 or fp32, contiguous, 16-byte aligned.
            logits: (B, classes) fp32, written.
            workspace: uint8, at least `workspace_size(B)`.
        """
        self.library.forward(
            self._handle,
            images.data_ptr(),
            abi.TYPES[images.dtype],
            len(images),
            logits.data_ptr(),
            workspace.data_ptr(),
            workspace.numel(),
            devices.stream(self.device),
        )


def _model(
    arch: Architecture, tensors: Mapping[str, Tensor], precision: Mapping[str, str]
) -> abi.ModelStruct:
    """The C description of a model; it points into `tensors`, which must outlive it."""
    described = (abi.TensorStruct * len(tensors))(
        *(_tensor(name, tensor) for name, tensor in tensors.items())
    )
    layers = (abi.LayerStruct * len(precision))(
        *(abi.LayerStruct(name.encode(), abi.PRECISIONS[word]) for name, word in precision.items())
    )
    return abi.ModelStruct(_architecture(arch), described, len(tensors), layers, len(precision))


def _tensor(name: str, tensor: Tensor) -> abi.TensorStruct:
    if tensor.dtype not in abi.TYPES or tensor.ndim > 4:
        raise EngineError(
            f"{name} is {tensor.dtype} with {tensor.ndim} dimensions, wanted int8, float16 or "
            "float32 with at most 4"
        )
    shape = (ctypes.c_int64 * 4)(*tensor.shape)
    kind: Any = abi.TYPES[tensor.dtype]
    return abi.TensorStruct(name.encode(), kind, tensor.ndim, shape, tensor.data_ptr())


def _require_batch(batch: int) -> None:
    if not 0 <= batch <= abi.LARGEST_INT:
        raise EngineError(f"a batch of {batch} images", f"give 0 to {abi.LARGEST_INT}, or split it")


def _architecture(arch: Architecture) -> abi.ArchitectureStruct:
    for name, value in arch.to_dict().items():
        if max(value if isinstance(value, list) else [value]) > abi.LARGEST_INT:
            raise EngineError(
                f"{name} is {value}, and the CUDA engine counts up to {abi.LARGEST_INT}",
                f"correct {name}",
            )
    if len(arch.depths) > abi.MAX_STAGES:
        raise EngineError(
            f"the model has {len(arch.depths)} stages, the CUDA engine runs up to {abi.MAX_STAGES}",
            "run the reference (engine='reference')",
        )
    stages = ctypes.c_int32 * abi.MAX_STAGES
    return abi.ArchitectureStruct(
        arch.version,
        arch.img_size,
        arch.patch_size,
        arch.in_chans,
        arch.num_classes,
        arch.embed_dim,
        len(arch.depths),
        stages(*arch.depths),
        stages(*arch.num_heads),
        arch.window_size,
        arch.mlp_ratio,
        arch.norm_eps,
    )
