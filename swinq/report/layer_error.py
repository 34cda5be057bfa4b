"""How much noise quantization adds at each layer: SQNR in decibels, in total and per channel.

    SQNR = 10 log10( sum y^2 / sum (y' - y)^2 )

y is a layer's output in the float network and y' the same layer's output in the quantized one, both
networks running end to end on the same images, so the noise of all earlier layers is in y'. The
local figure feeds the quantized layer with the float network's own input instead: its noise alone.
An attention's output is what its proj reads, since proj has a row of its own. A channel's SQNR sums
over tokens and images. The total is dominated by the loudest channels and can look healthy while
quiet ones are gone, hence the minimum, the first percentile and the median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from swinq.report.schema import LayerErrorRow

DEAD_DB = 3.0  # under it noise is more than half of the signal: the channel says next to nothing
MICRO_BATCH = 4  # the float network's outputs of one micro-batch are in memory together


class ErrorSums:
    """Signal and noise of one layer, summed in float64 per channel."""

    def __init__(self) -> None:
        self.signal = torch.zeros(0, dtype=torch.float64)  # (C,)
        self.noise = torch.zeros(0, dtype=torch.float64)  # (C,)

    def add(self, reference: Tensor, other: Tensor) -> None:
        """Add two outputs of shape (..., C)."""
        y = reference.detach().reshape(-1, reference.shape[-1]).double()  # (n, C)
        noise = other.detach().reshape(y.shape).double() - y
        if self.signal.numel() == 0:
            self.signal, self.noise = y.new_zeros(y.shape[1]), y.new_zeros(y.shape[1])
        self.signal += y.square().sum(0)
        self.noise += noise.square().sum(0)

    def total(self) -> float:
        """SQNR over all channels, dB."""
        return decibels(self.signal.sum(), self.noise.sum()).item()

    def per_channel(self) -> Tensor:
        """SQNR of the channels that carry anything, dB: (<= C,) float64 on the CPU."""
        audible = (self.signal > 0) | (self.noise > 0)
        return decibels(self.signal[audible], self.noise[audible]).cpu()

    def row(self, layer: str, local: ErrorSums | None = None) -> LayerErrorRow:
        """Summary of the sums; a layer without any signal has no channels and infinite SQNR."""
        channels = self.per_channel()
        minimum, percentile_1, median = _nearest_rank(channels, (0.0, 0.01, 0.5))
        return LayerErrorRow(
            layer=layer,
            total=self.total(),
            minimum=minimum,
            percentile_1=percentile_1,
            median=median,
            channels=len(channels),
            dead_channels=int((channels < DEAD_DB).sum()),
            local_total=local.total() if local else None,
            local_minimum=_nearest_rank(local.per_channel(), (0.0,))[0] if local else None,
        )


def decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """10 log10(signal / noise): inf without noise, -inf where there is noise alone."""
    ratio = 10.0 * (signal.log10() - noise.log10())
    return torch.where(noise > 0, ratio, torch.full_like(ratio, float("inf")))


def measure_layer_errors(
    reference: nn.Module,
    other: nn.Module,
    layers: Sequence[str],
    batches: Iterable[Tensor],
    *,
    micro_batch: int = MICRO_BATCH,
    local: bool = True,
) -> list[LayerErrorRow]:
    """Compare same-named layers of two networks on the same images.

    Args:
        reference: the float network, in eval mode.
        other: the quantized one, with the same submodule names, on the same device.
        layers: submodule names, in the order of the result.
        batches: images (B, 3, S, S) on the networks' device; iterated once.
        micro_batch: images that go through the networks at once. It bounds the memory and changes
            the sums by no more than float64 rounding.
        local: also run each layer of `other` on the float network's input.

    Returns:
        A row per layer that both networks call as a module; one that neither calls is left out.

    Raises:
        AttributeError: a network has no submodule of that name.
    """
    accumulated = {name: ErrorSums() for name in layers}
    alone = {name: ErrorSums() for name in layers}
    expected: dict[str, Tensor] = {}

    def compare_alone(name: str) -> Callable[..., None]:
        def forward_hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            def compare(name: str, output: Tensor) -> None:
                alone[name].add(expected[name], output)

            with observed(other, [name], compare):
                other.get_submodule(name)(*args, **kwargs)

        return forward_hook

    def compare(name: str, output: Tensor) -> None:
        if name in expected:
            accumulated[name].add(expected.pop(name), output)

    with torch.no_grad():
        for images in (part for batch in batches for part in batch.split(micro_batch)):
            with observed(reference, layers, expected.__setitem__), ExitStack() as stack:
                for name in layers if local else ():  # after `observed`: its hooks run first
                    layer = reference.get_submodule(name)
                    hook = layer.register_forward_hook(compare_alone(name), with_kwargs=True)
                    stack.callback(hook.remove)
                reference(images)
            with observed(other, layers, compare):
                other(images)
            expected.clear()
    return [
        sums.row(name, alone[name] if local else None)
        for name, sums in accumulated.items()
        if sums.signal.numel()
    ]


@contextmanager
def observed(
    model: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call see(name, output (..., C)) for each named layer that runs."""

    def output_hook(name: str, bias: Tensor | None) -> Callable[..., None]:
        return lambda module, args, output: see(name, output if bias is None else output + bias)

    def input_hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, args[0])

    with ExitStack() as stack:
        for name in layers:
            layer = model.get_submodule(name)
            proj = getattr(layer, "proj", None)
            if isinstance(proj, nn.Module) and hasattr(layer, "qkv"):  # an attention
                handle = proj.register_forward_pre_hook(input_hook(name))
            else:
                handle = layer.register_forward_hook(output_hook(name, _bias_outside(model, name)))
            stack.callback(handle.remove)
        yield


def _bias_outside(model: nn.Module, name: str) -> Tensor | None:
    """(3C,) that Swin v2's attention adds to what its qkv, a Linear without bias, returns."""
    parent, _, leaf = name.rpartition(".")
    attention: Any = model.get_submodule(parent)
    if leaf != "qkv" or not callable(getattr(attention, "qkv_bias", None)):
        return None
    if getattr(model.get_submodule(name), "bias", None) is not None:
        return None
    bias = attention.qkv_bias()
    return None if bias is None else bias.detach()


def measure_clipping(
    model: nn.Module, quantizers: Sequence[str], batches: Iterable[Tensor]
) -> dict[str, float]:
    """Share of the values that each activation quantizer clips, over given images.

    Args:
        model: the fake-quantized network, in eval mode.
        quantizers: names of its TensorQuantizers.
        batches: images (B, 3, S, S).

    Returns:
        Name -> share in [0, 1]; a quantizer that is disabled or that no value reaches is left out.
    """
    clipped = dict.fromkeys(quantizers, 0)
    seen = dict.fromkeys(quantizers, 0)

    def counter(name: str, quantizer: Any) -> Callable[[Tensor], None]:
        def count(x: Tensor) -> None:
            if not quantizer.enabled:
                return
            inverse = quantizer.broadcast(quantizer.scale()[1], x.ndim)
            low, high = quantizer.descriptor.low, quantizer.descriptor.high
            clipped[name] += clipped_values(x, inverse, low, high)
            seen[name] += x.numel()

        return count

    def restore(quantizer: Any, observer: Any) -> None:
        quantizer.observer = observer

    with torch.no_grad(), ExitStack() as stack:
        for name in quantizers:
            quantizer: Any = model.get_submodule(name)
            count = counter(name, quantizer)
            # An input is shown to the observer, an output is passed to the quantizer as a module.
            stack.callback(restore, quantizer, quantizer.observer)
            quantizer.observer = count
            hook = quantizer.register_forward_pre_hook(lambda module, args, see=count: see(args[0]))
            stack.callback(hook.remove)
        for images in batches:
            model(images)
    return {name: clipped[name] / seen[name] for name in quantizers if seen[name]}


def clipped_values(x: Tensor, inverse: Tensor, low: int = -128, high: int = 127) -> int:
    """How many codes rint(x * inverse) lie outside [low, high], so that clamping changes them."""
    codes = (x.float() * inverse).round()
    return int(((codes < low) | (codes > high)).sum())


def _nearest_rank(values: Tensor, at: Sequence[float]) -> list[float]:
    """Quantiles by nearest rank, which stay defined among infinities; inf for no values."""
    if not len(values):
        return [float("inf")] * len(at)
    ordered = values.sort().values
    ranks = (torch.tensor(at, dtype=torch.float64) * len(ordered)).ceil().long().clamp(min=1) - 1
    return ordered[ranks].tolist()
