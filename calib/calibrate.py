"""Calibrate: run the float model over images, collect, reduce over ranks, set every range.

Each image goes through the model alone. So nothing depends on how images are put into batches or
spread over ranks; sums are of integers, maxima are exact, and the searches see rows in an order of
their own. On one kind of device `_amax` is the same bits for any batch size, order and number of
ranks. (Intel's MKL needs MKL_CBWR=AUTO,STRICT for that, which `import swinq` sets.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from swinq.calib.methods import find_amax
from swinq.calib.migration import choose_input_range
from swinq.calib.observers import HistogramObserver, MaxObserver, RowSampler, Scratch
from swinq.distributed import all_reduce_sum_, broadcast_, rank, world_size
from swinq.errors import CalibrationError
from swinq.quant.affine import SMALLEST_AMAX
from swinq.quant.insert import float_layers, quantized_layers, used_quantizers
from swinq.quant.linear import QuantLinear
from swinq.quant.quantizer import TensorQuantizer
from swinq.quant.spec import QuantSpec
from swinq.quant.stream import stream_modules

SAMPLED_ROWS = 2048  # of each Linear's input, over all images; at least one of every image

# A channel's largest value among fewer tokens says too little of what other images hold: with 384
# tokens vectors were measured to cost accuracy, with 1,280 they gain it.
TOKENS_FOR_VECTORS = 1024


@dataclass
class Calibration:
    """What calibration found, beside the ranges that are now in the model.

    Attributes:
        method, percentile: how amax was searched. images: how many, over all ranks.
        histograms: counts (BINS,) int64 of each quantizer that has one, on the CPU.
        residual_max: the largest magnitude of each write to the residual stream.
        vectors: layers whose input has a scale per channel, and the error relative to one scale.
        notes: what a user should know, such as dead channels.
        sample_sha256: digest of the images, if whoever chose them took one.
    """

    method: str
    percentile: float
    images: int
    histograms: dict[str, Tensor] = field(default_factory=dict)
    residual_max: dict[str, float] = field(default_factory=dict)
    vectors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sample_sha256: str = ""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    method: str = "percentile",
    percentile: float = 99.99,
    on_image: Callable[[], Any] | None = None,
) -> Calibration:
    """Find and set the ranges of a model from ``quantize_model``: those that an int8_mode uses.

    Quantizers of fp16 layers, and of outputs that no mode rounds, stay uncalibrated.

    Args:
        model: in eval mode afterwards; the forwards run in float, whatever is active.
        images: this rank's share, (3, S, S) fp32 each.
        method: "max", "percentile", "mse" or "entropy", of the quantizers that keep a histogram.
        percentile: in (0, 100].
        on_image: called after each image, for progress.

    Raises:
        CalibrationError: no image at all, NaN or infinite activations (with the layer's name), or
            a tensor that is zero throughout and not in the recipe's ALLOW_DEAD.
    """
    spec: QuantSpec = model.quant_spec  # type: ignore[assignment]
    find_amax(method, torch.zeros(1, 1), torch.zeros(1), percentile)  # checks the arguments early
    shares = list(images) if not hasattr(images, "__len__") else images
    counts = _image_counts(len(shares))  # type: ignore[arg-type]
    if sum(counts) == 0:
        raise CalibrationError("there are 0 calibration images", "give at least one")
    model.eval()
    collected = _Collected(model, max(1, SAMPLED_ROWS // sum(counts)), spec)
    device = next(model.parameters()).device
    with float_layers(model), collected.attached():
        for number, image in enumerate(shares):
            if not isinstance(image, Tensor) or image.ndim != 3:
                shape = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise CalibrationError(
                    f"calibration image {number} is {shape}, wanted a tensor (3, S, S)",
                    "give images alone, one by one: batches are split, labels left out",
                )
            model(image.unsqueeze(0).to(device))
            collected.check(number)
            if on_image is not None:
                on_image()
    collected.reduce()
    result = Calibration(method, percentile, sum(counts))
    _set_histogram_ranges(collected, result)
    _set_linear_ranges(model, collected, counts, spec, result)
    _report_dead(collected.quantizers, spec, result)
    result.residual_max = collected.residual_maxima()
    for quantizer in collected.quantizers.values():
        broadcast_(quantizer.amax)
    return result


@torch.no_grad()
def measure_residual(model: nn.Module, images: Iterable[Tensor]) -> dict[str, float]:
    """The largest magnitude of each write to the residual stream, of a model as it now computes.

    Weights that have been finetuned reach other values than those that were calibrated.

    Args:
        model: put into eval mode. images: this rank's share, (3, S, S) fp32 each.

    Raises:
        CalibrationError: a value is NaN or infinite; the first write of that kind is named.
    """
    model.eval()
    device = next(model.parameters()).device
    streams = stream_modules(model)
    observers = {name: MaxObserver(None, None, device) for name in streams}
    hooks = [
        module.register_forward_hook(partial(_show_output, observers[name]))
        for name, module in streams.items()
    ]
    try:
        for image in images:
            model(image.unsqueeze(0).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    for observer in observers.values():
        observer.reduce()
    found = {name: float(observer.peak) for name, observer in observers.items()}
    for name, peak in found.items():
        if not math.isfinite(peak):
            raise CalibrationError(
                f"{name} saw {peak} in the calibration images", "train with a lower rate"
            )
    return found


def _image_counts(mine: int) -> list[int]:
    counts = torch.zeros(world_size(), dtype=torch.int64)
    counts[rank()] = mine
    return [int(c) for c in all_reduce_sum_(counts)]


class _Collected:
    """The observers of one calibration, by quantizer."""

    def __init__(self, model: nn.Module, rows_per_image: int, spec: QuantSpec) -> None:
        device = next(model.parameters()).device
        self.quantizers = used_quantizers(model, any_mode=True)
        self.observers: dict[str, MaxObserver] = {}
        self.samplers: dict[str, RowSampler] = {}
        self.streams = stream_modules(model)
        self.stream_observers = {n: MaxObserver(None, None, device) for n in self.streams}
        wants_rows = bool(spec.migration) or spec.bias_correction
        scratch = Scratch()
        for name, quantizer in self.quantizers.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            kind = name.rpartition(".")[2]
            if kind == "weight_quantizer":
                continue
            if kind == "input_quantizer" and isinstance(layer, QuantLinear):
                self.observers[name] = HistogramObserver(-1, layer.in_features, device, scratch)
                if wants_rows:
                    self.samplers[name] = RowSampler(rows_per_image, layer.in_features)
            elif quantizer.descriptor.calib_method == "histogram":
                self.observers[name] = HistogramObserver(None, None, device, scratch)
            else:
                channels = quantizer.amax.numel() if quantizer.amax.ndim else None
                axis = None if channels is None else quantizer.descriptor.axis
                self.observers[name] = MaxObserver(axis, channels, device)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Show every tensor to its observers inside the context."""
        hooks = []
        try:
            for name, observer in self.observers.items():
                watchers: list[Callable[[Tensor], None]] = [observer]
                if name in self.samplers:
                    watchers.append(self.samplers[name])
                self.quantizers[name].observer = partial(_show, watchers)
            for name, module in self.streams.items():
                hook = partial(_show_output, self.stream_observers[name])
                hooks.append(module.register_forward_hook(hook))
            yield
        finally:
            for quantizer in self.quantizers.values():
                quantizer.observer = None
            for attached in hooks:
                attached.remove()

    def check(self, image: int) -> None:
        """Stop if a tensor is not finite; the first in the model's order of modules is named."""
        watched = {**self.observers, **self.stream_observers}
        peaks = torch.stack([o.peak for o in watched.values()])
        if bool(torch.isfinite(peaks).all()):
            return
        first = int((~torch.isfinite(peaks)).nonzero()[0])
        raise CalibrationError(
            f"{list(watched)[first]} saw {float(peaks[first])} in calibration image {image} of "
            f"rank {rank()}",
            "check the checkpoint and that image; a float evaluation shows the same",
        )

    def reduce(self) -> None:
        """Join what all ranks have seen."""
        for observer in (*self.observers.values(), *self.stream_observers.values()):
            observer.reduce()

    def residual_maxima(self) -> dict[str, float]:
        """The largest magnitude of each write to the residual stream."""
        return {n: float(o.peak) for n, o in self.stream_observers.items()}


def _show(watchers: Sequence[Callable[[Tensor], None]], x: Tensor) -> None:
    for watcher in watchers:
        watcher(x)


def _show_output(observer: MaxObserver, module: nn.Module, inputs: Any, output: Tensor) -> None:
    observer(output)


def _set_histogram_ranges(collected: _Collected, result: Calibration) -> None:
    """Search all histograms at once; running maxima take the descriptor's headroom and limit."""
    with_counts = {n: o for n, o in collected.observers.items() if isinstance(o, HistogramObserver)}
    if with_counts:  # there are none where every layer is fp16
        counts = torch.stack([o.counts for o in with_counts.values()])
        peaks = torch.stack([o.peak for o in with_counts.values()])
        found = find_amax(result.method, counts, peaks, result.percentile)
        for name, amax in zip(with_counts, found, strict=True):
            collected.quantizers[name].load_calib_amax(amax)
            result.histograms[name] = with_counts[name].counts.cpu()
    for name, observer in collected.observers.items():
        if name not in with_counts:
            descriptor = collected.quantizers[name].descriptor
            amax = observer.maximum * descriptor.headroom
            if descriptor.limit is not None:
                amax = amax.clamp(max=descriptor.limit)
            collected.quantizers[name].load_calib_amax(amax)


def _set_linear_ranges(
    model: nn.Module,
    collected: _Collected,
    counts: list[int],
    spec: QuantSpec,
    result: Calibration,
) -> None:
    """Per Linear: choose an input vector, set the weight's range, correct the bias."""
    untried = 0
    for name, layer in quantized_layers(model).items():
        if not isinstance(layer, QuantLinear) or layer.precision != "int8":
            continue
        source = f"{name}.input_quantizer"
        if source in collected.samplers:
            observer: HistogramObserver = collected.observers[source]  # type: ignore[assignment]
            enough = int(observer.counts.sum()) >= TOKENS_FOR_VECTORS * layer.in_features
            untried += not enough and bool(spec.migration)
            choice = choose_input_range(
                collected.samplers.pop(source).gather(counts, rank()).to(layer.weight.device),
                layer.weight,
                layer.input_quantizer.amax,
                observer.maximum,
                spec.migration if enough else (),
                per_row_weight=layer.weight_quantizer.descriptor.axis == 0,
            )
            layer.input_quantizer.load_calib_amax(choice.amax)
            if choice.amax.ndim:
                result.vectors[name] = choice.ratio
            if spec.bias_correction:
                layer.bias_correction.copy_(-choice.mean_error)
        layer.calibrate_weight()
        broadcast_(layer.bias_correction)
    if untried:
        result.notes.append(
            f"no input-scale vectors for {untried} layers: they saw fewer than "
            f"{TOKENS_FOR_VECTORS} tokens; calibrate with more images"
        )


def _report_dead(
    quantizers: dict[str, TensorQuantizer], spec: QuantSpec, result: Calibration
) -> None:
    dead = []
    for name, quantizer in quantizers.items():
        channels = int((quantizer.amax < SMALLEST_AMAX).sum())
        if quantizer.dead and not any(fnmatchcase(name, p) for p in spec.allow_dead):
            dead.append(name)
        elif channels:
            result.notes.append(f"{name}: {channels} of {quantizer.amax.numel()} channels are zero")
    if dead:
        raise CalibrationError(
            f"{len(dead)} tensors are zero in every image: {', '.join(dead[:4])}"
            + (" ..." if len(dead) > 4 else ""),
            "check the checkpoint; if that is meant, name them under QUANT.ALLOW_DEAD",
        )
