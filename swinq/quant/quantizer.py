"""TensorQuantizer: holds the range of one tensor, learns it if told to, and rounds to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinq.errors import CalibrationError
from swinq.quant.affine import (
    ACTIVATION_RANGE,
    SMALLEST_AMAX,
    at_most,
    quantize,
    scale_and_inverse,
)


@dataclass(frozen=True)
class QuantDescriptor:
    """How one tensor is quantized (the words of pytorch-quantization).

    Attributes:
        axis: the axis that has a scale per index, or None for one scale per tensor.
        calib_method: "histogram" (a search over the histogram of |x|) or "max".
        headroom: factor that calibration puts on the range of the "max" method.
        limit: the largest amax that makes sense, if there is one (1 for normalised q and k).
        low, high: the range of codes.
    """

    axis: int | None = None
    calib_method: str = "histogram"
    headroom: float = 1.0
    limit: float | None = None
    low: int = ACTIVATION_RANGE[0]
    high: int = ACTIVATION_RANGE[1]


class TensorQuantizer(nn.Module):
    """Fake-quantizes a tensor with the range in ``_amax``; NaN there means uncalibrated.

    ``_amax`` exists from construction: fp32, () for one scale per tensor or (n,) along the axis.
    A calibrator sets ``observer``, which then sees every tensor that passes.

    A learned range lives in the parameter ``log_amax``, natural logarithms, fp32 (n,) or (1,): a
    step of it is a relative one. ``_amax`` then keeps what learning started from. A state dict
    with ``log_amax`` loads into a quantizer that does not learn, too: it brings the range.
    """

    _amax: Tensor
    _scale: Tensor
    _inverse: Tensor
    log_amax: nn.Parameter | None

    def __init__(self, descriptor: QuantDescriptor, channels: int | None = None) -> None:
        """Make an uncalibrated, enabled quantizer; ``channels`` is n where there is an axis."""
        super().__init__()
        self.descriptor = descriptor
        self.enabled = True
        self.name = ""
        self.observer: Callable[[Tensor], None] | None = None
        self._scale_is_of: tuple[Tensor, int] | None = None
        shape = () if descriptor.axis is None or channels is None else (channels,)
        for name in ("_amax", "_scale", "_inverse"):
            unknown = torch.full(shape, float("nan"))
            self.register_buffer(name, unknown, persistent=name == "_amax")
        self.register_parameter("log_amax", None)

    @property
    def amax(self) -> Tensor:
        """The largest magnitude that is represented, fp32, () or (n,); NaN before calibration."""
        return self._amax if self.log_amax is None else self._bounded(self.log_amax.detach())

    @property
    def per_tensor(self) -> bool:
        """Whether there is one range for the whole tensor."""
        return self._amax.ndim == 0

    @property
    def calibrated(self) -> bool:
        """Whether every range is known."""
        return not bool(self._amax.isnan().any())  # learning starts from there

    @property
    def dead(self) -> bool:
        """Whether no value at all can be represented: the tensor was zero throughout."""
        return bool((self.amax < SMALLEST_AMAX).all())

    def load_calib_amax(self, amax: Tensor) -> None:
        """Take a range found by calibration: () for the tensor, or (n,) along the axis.

        A range that is being learned is fixed by it.

        Raises:
            CalibrationError: a range that is negative, infinite or NaN.
        """
        amax = amax.detach().to(self._amax.device, torch.float32)
        wrong = ~(torch.isfinite(amax) & (amax >= 0))
        if bool(wrong.any()):
            raise CalibrationError(
                f"{self.name or 'a quantizer'}: amax must be finite and not negative, "
                f"got {amax[wrong][:4].tolist()}",
                "look for NaN or infinite activations in this layer",
            )
        self.log_amax = None
        self._amax = amax.clone()
        self.refresh_scale()

    def learn_range(self) -> nn.Parameter:
        """Make the range a parameter, from where it is; a dead one has no gradient and stays.

        Raises:
            CalibrationError: the range is not known yet.
        """
        self._require_calibrated()
        # a dead channel keeps a finite logarithm: averages of parameters stay numbers
        amax = self.amax.clamp(min=SMALLEST_AMAX / 2)
        self.log_amax = nn.Parameter(amax.log().view(-1))
        return self.log_amax

    def fix_range(self) -> None:
        """Keep the learned range as it is now; nothing happens where none is learned."""
        if self.log_amax is not None:
            self.load_calib_amax(self.amax)

    def _bounded(self, log_amax: Tensor) -> Tensor:
        """The range that a logarithm stands for: within the limit, 0 if dead, of amax's shape."""
        amax = log_amax.exp()
        if self.descriptor.limit is not None:
            amax = amax.clamp(max=self.descriptor.limit)
        return torch.where(amax < SMALLEST_AMAX, 0.0, amax).view(self._amax.shape)

    def observe(self, x: Tensor) -> None:
        """Show x to the observer, if calibration has attached one."""
        if self.observer is not None:
            self.observer(x.detach())

    def scale(self) -> tuple[Tensor, Tensor]:
        """Return (scale, inverse), fp32, of amax's shape.

        Raises:
            CalibrationError: the range is not known yet.
        """
        if self.log_amax is not None:
            return scale_and_inverse(self.amax)
        if not torch.compiler.is_compiling():
            self.refresh_scale()
        return self._scale, self._inverse

    def refresh_scale(self) -> None:
        """Compute the scale anew if the range has changed, which compiled code does not look for.

        Raises:
            CalibrationError: the range is not known yet.
        """
        known = self._scale_is_of  # holds the tensor: an address alone may be used again
        if known is not None and known[0] is self._amax and known[1] == self._amax._version:
            return
        self._require_calibrated()
        with torch.inference_mode(False):  # it must also serve a backward later
            self._place(*scale_and_inverse(self._amax))
        self._scale_is_of = (self._amax, self._amax._version)

    def _place(self, scale: Tensor, inverse: Tensor) -> None:
        """Keep both where they were if they fit there: CUDA graphs of training read that memory."""
        old = self._scale
        fits = (old.shape, old.dtype, old.device) == (scale.shape, scale.dtype, scale.device)
        if fits and not old.is_inference():
            self._scale.copy_(scale)
            self._inverse.copy_(inverse)
        else:
            self._scale, self._inverse = scale, inverse

    def _require_calibrated(self) -> None:
        if not self.calibrated:
            raise CalibrationError(
                f"{self.name or 'a quantizer'} is enabled but has no range",
                "calibrate the model, or load a calibrated checkpoint",
            )

    def broadcast(self, value: Tensor, dims: int) -> Tensor:
        """Reshape a value (n,) to line up with the axis of a tensor of ``dims`` dimensions."""
        if value.ndim == 0:
            return value
        axis = -1 if self.descriptor.axis is None else self.descriptor.axis
        shape = [1] * dims
        shape[axis] = value.numel()
        return value.view(shape)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x's integer codes as an fp32 tensor, and the scale that broadcasts against it.

        The scale is a constant: the codes alone carry a learned range's gradient, see `quantize`.
        """
        scale, inverse = self.scale()
        low, high = self.descriptor.low, self.descriptor.high
        log_amax = None
        if self.log_amax is not None:
            log_amax = self.broadcast(self.log_amax.view(self._amax.shape), x.ndim)
            if self.descriptor.limit is not None:
                log_amax = at_most(log_amax, math.log(self.descriptor.limit))
        codes = quantize(x, self.broadcast(inverse, x.ndim), low, high, log_amax)
        return codes, self.broadcast(scale, x.ndim)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantize x (any shape, float): the nearest representable values; x if disabled."""
        if not self.enabled:
            return x
        codes, scale = self.codes(x)
        return codes * scale

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._scale_is_of = None  # a copy's tensors count their versions anew

    def extra_repr(self) -> str:
        """Show the state in a printed model."""
        known = "calibrated" if self.calibrated else "uncalibrated"
        known = known if self.log_amax is None else "learned"
        return f"{known}, axis={self.descriptor.axis}{'' if self.enabled else ', disabled'}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A range may be a scalar or a vector; the file decides, so the buffer takes its shape.
        saved = state_dict.get(prefix + "_amax")
        if isinstance(saved, Tensor) and not (self.per_tensor and saved.numel() == 1):
            self._amax = torch.empty_like(saved, device=self._amax.device, dtype=torch.float32)
        if self.log_amax is None and prefix + "log_amax" in state_dict:
            log_amax = state_dict.pop(prefix + "log_amax")
            state_dict[prefix + "_amax"] = self._bounded(log_amax)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.calibrated:
            self.refresh_scale()
