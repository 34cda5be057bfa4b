"""CudaSwin: an INT8 checkpoint, or a float model in FP16 or FP32, on libswinq's CUDA kernels.

Called like `Int8Swin`. An image's logits are the same bits alone, in any batch, on any stream.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from swinq.errors import DataError, EngineError, SwinqError
from swinq.export.reader import read_checkpoint
from swinq.int8 import device as devices
from swinq.int8.images import require_finite, require_images
from swinq.int8.plan import Plan, Weights
from swinq.models.architecture import Architecture

ALIGNMENT = 16  # bytes, of the images


class CudaSwin:
    """A Swin of either version on the kernels of libswinq.

    Attributes:
        checkpoint: what it was made of: classes, transform, precision and so on. Its tensors stay
            where they were.
        arch: its architecture. device: the CUDA device, with its index. plan: the weights there.
        notes: what a user should hear of how it came to run.
    """

    def __init__(self, checkpoint: Weights, device: str | torch.device = "cuda") -> None:
        """Copy weights to a device; `load` reads them first.

        Args:
            checkpoint: an `Int8Checkpoint`, or `swinq.export.plain.collect_plain` of a float model.
            device: a CUDA device, the current one if it says no index.

        Raises:
            ConfigError: there is no such GPU.
            EngineError: libswinq is missing, or has no kernels for the device or the model.
        """
        self.device = devices.require(device)
        self.checkpoint = checkpoint
        self.arch: Architecture = checkpoint.architecture
        self.plan = Plan(checkpoint, self.device)
        self.notes: list[str] = []
        self._workspaces: dict[int, Tensor] = {}  # by stream; as large as any batch on it wanted
        self._enqueueing = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        int8_mode: int | None = None,
        architecture: Architecture | None = None,
        verify: bool = True,
        device: str | torch.device = "cuda",
    ) -> CudaSwin:
        """Read an INT8 checkpoint and copy it to a device; arguments as `Int8Swin.load` has them.

        Raises:
            CheckpointError: see `swinq.export.reader.read_checkpoint`.
            EngineError: as the constructor.
        """
        checkpoint = read_checkpoint(
            path, int8_mode=int8_mode, architecture=architecture, verify=verify
        )
        return cls(checkpoint, device)

    @property
    def engine(self) -> str:
        """What runs the model, for reports: libswinq and its version."""
        return f"libswinq {self.plan.library.version}"

    @property
    def int8_mode(self) -> int | None:
        """The mode that the file was exported in, 1 or 2; None of a float model."""
        return getattr(self.checkpoint, "int8_mode", None)

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of the logits, if they are known."""
        return self.checkpoint.classes

    def __call__(self, images: Tensor, *, check: bool = True) -> Tensor:
        """Logits of a batch.

        Args:
            images: (B, in_chans, S, S) floating point, transformed as for evaluation; fp16 and fp32
                on the model's device are read where they are, others are copied.
            check: wait for the logits and refuse NaN. Without it the call only enqueues work, and
                an image on which a non-finite number appeared has NaN logits.

        Returns:
            (B, num_classes) fp32, on `device`.

        Raises:
            DataError: another shape, not floats, or values that are no finite fp16 numbers.
            SwinqError: the residual stream or the logits of an image overflowed.
            EngineError: the device failed, or `check` while a CUDA graph is captured.
        """
        require_images(images, self.arch)
        images = self._placed(images)
        with devices.current(self.device):
            capturing = devices.capturing(self.device)
            if check and capturing:
                raise EngineError(
                    "check=True waits for the logits, which the capture of a CUDA graph forbids",
                    "capture model(images, check=False), and look for NaN after a replay",
                )
            logits = self._forward(images, keep=not capturing)
        if check:
            self._require_finite(images, logits)
        return logits

    def graph(self, batch: int, dtype: torch.dtype = torch.float32) -> Graph:
        """A CUDA graph of the forward of so many images of fp16 or fp32.

        While it is captured no other thread may allocate GPU memory, or CUDA ends the capture.

        Raises:
            DataError: no images, or of another type.
        """
        if batch < 1 or batch % 1 or dtype not in (torch.float16, torch.float32):
            raise DataError(
                f"a CUDA graph of {batch} images of {dtype}",
                "give 1 or more, of torch.float16 or torch.float32",
            )
        self.plan.prepare(batch)
        size = self.arch.img_size
        images = torch.zeros(batch, self.arch.in_chans, size, size, dtype=dtype, device=self.device)
        return Graph(images, lambda: self._forward(images, keep=False))

    def _placed(self, images: Tensor) -> Tensor:
        """The images as the kernels read them: on the device, fp16 or fp32, contiguous, aligned."""
        if images.dtype not in (torch.float16, torch.float32):
            images = images.float()
        images = images.to(self.device).contiguous()
        return images.clone() if images.data_ptr() % ALIGNMENT else images

    def _forward(self, images: Tensor, keep: bool) -> Tensor:
        """Enqueue the forward of images that are in place; `keep` as in `_workspace`."""
        logits = torch.empty(
            (len(images), self.arch.num_classes), dtype=torch.float32, device=self.device
        )
        if len(images):
            # threads may share a stream: their kernels must not mix in one workspace
            with self._enqueueing:
                # a capture may not load kernels: `graph` does that before, or the user by a call
                size = self.plan.prepare if keep else self.plan.workspace_size
                self.plan.forward(images, logits, self._workspace(size(len(images)), keep))
        return logits

    def _workspace(self, size: int, keep: bool) -> Tensor:
        """Memory for one forward on the current stream, kept for the next one there.

        Work on a stream is in order, so forwards on it share memory, and what is freed goes to
        later work on the same stream. A CUDA graph outlives this cache: it gets memory of its own.
        """
        stream = devices.stream(self.device)
        kept = self._workspaces.get(stream) if keep else None
        if kept is not None and kept.numel() >= size:
            return kept
        if kept is not None:
            del kept, self._workspaces[stream]  # or the device would have to hold both
        made = torch.empty(size, dtype=torch.uint8, device=self.device)
        if keep:
            self._workspaces[stream] = made
        return made

    def _require_finite(self, images: Tensor, logits: Tensor) -> None:
        finite = logits.isfinite().all(1)
        if bool(finite.all()):
            return
        require_finite(images)
        raise SwinqError(
            f"{getattr(self.checkpoint, 'path', 'the model')}: the residual stream or the logits "
            f"overflowed on image {int((~finite).nonzero()[0])} of the batch",
            "look at the image; if it is ordinary, calibrate on more of them and export again, "
            "which checks the largest residual",
        )


class Graph:
    """A captured forward: one launch for all of its kernels.

    Attributes:
        images: what a replay reads, (B, in_chans, S, S). logits: what it writes, (B, classes) fp32;
            NaN for an image on which a non-finite number appeared.
    """

    def __init__(self, images: Tensor, forward: Callable[[], Tensor]) -> None:
        """Capture `forward`, which reads `images` and whose kernels are loaded."""
        self.images = images
        self._forward = forward  # holds the weights, which replays read
        self._calling = threading.Lock()
        self._called = torch.cuda.Event()  # the end of work on `images` and `logits`
        with torch.cuda.device(images.device):
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.logits = forward()
            self._called.record()

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of a batch of exactly the captured size, enqueued on the current stream.

        Threads and streams may share a graph: its calls run one after the other.

        Raises:
            DataError: another shape, or not floating point.
        """
        if images.shape != self.images.shape or not images.is_floating_point():  # copy_ takes more
            raise DataError(
                f"the CUDA graph wants {tuple(self.images.shape)} floating point, got "
                f"{tuple(images.shape)} {images.dtype}",
                "capture one for this batch: model.graph(len(images))",
            )
        with self._calling:
            stream = torch.cuda.current_stream(self.images.device)
            stream.wait_event(self._called)
            self.images.copy_(images)
            self.replay()
            logits = self.logits.clone()  # the next call overwrites them
            self._called.record(stream)
        return logits

    def replay(self) -> None:
        """Run on what `images` holds, on the current stream; for one thread at a time."""
        self._graph.replay()
