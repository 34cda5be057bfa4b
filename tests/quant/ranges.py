"""Ranges by the largest magnitude, so that these tests need no calibration of ours."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swinq.quant.insert import float_layers, named_quantizers, quantized_layers
from swinq.quant.linear import QuantLinear


def set_ranges_to_maxima(model: nn.Module, *inputs: Any, share: float = 1.0) -> None:
    """Set every range to ``share`` of the largest magnitude in a float run of ``inputs``."""

    def keep_maximum(name: str) -> Callable[[Tensor], None]:
        axis = named_quantizers(model)[name].descriptor.axis
        per_index = named_quantizers(model)[name].amax.ndim > 0

        def observe(x: Tensor) -> None:
            kept = [] if not per_index else [(axis or 0) % x.ndim]
            largest = x.abs().amax([d for d in range(x.ndim) if d not in kept])
            maxima[name] = torch.maximum(maxima.get(name, largest), largest)

        return observe

    maxima: dict[str, Tensor] = {}
    for name, quantizer in named_quantizers(model).items():
        quantizer.observer = keep_maximum(name)
    with torch.no_grad(), float_layers(model):
        model(*inputs)
    for name, quantizer in named_quantizers(model).items():
        quantizer.observer = None
        if name in maxima:
            quantizer.load_calib_amax(share * maxima[name])
    for layer in quantized_layers(model).values():
        if isinstance(layer, QuantLinear):
            layer.calibrate_weight()
