"""Small Swins with quantizers whose ranges were found by a plain running maximum."""

import torch
from torch import Tensor, nn

from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.quant.insert import float_layers, named_quantizers, quantize_model
from swinq.quant.linear import QuantLinear
from swinq.quant.quantizer import TensorQuantizer
from swinq.quant.spec import QuantSpec


def lively_model(arch: Architecture, *, seed: int = 0) -> nn.Module:
    """A float Swin whose attention, biases and norms all matter (fresh weights are almost 0)."""
    torch.manual_seed(seed)
    model = build_model(arch).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.copy_(2 * torch.randn_like(parameter))
            elif name.endswith(("cpb_mlp.0.weight", "cpb_mlp.2.weight")):
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
            elif parameter.ndim > 1 and "logit_scale" not in name:
                parameter.mul_(2.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def calibrated_model(
    arch: Architecture,
    *,
    spec: QuantSpec | None = None,
    vectors: bool = False,
    seed: int = 0,
    on: Tensor | None = None,
) -> nn.Module:
    """The same with quantizers, calibrated on noise.

    Args:
        on: calibrate on these images instead.
        vectors: give qkv, fc1 and reduction an input scale for each channel.
    """
    model = quantize_model(lively_model(arch, seed=seed), spec or QuantSpec())
    largest: dict[str, Tensor] = {}
    for name, quantizer in named_quantizers(model).items():
        per_channel = vectors and name.endswith(
            ("qkv.input_quantizer", "fc1.input_quantizer", "reduction.input_quantizer")
        )
        quantizer.observer = _running_maximum(largest, name, quantizer, per_channel)
    with torch.no_grad(), float_layers(model):
        model(images(arch, 4, seed=seed + 1) if on is None else on)
    for name, quantizer in named_quantizers(model).items():
        quantizer.observer = None
        if name in largest:
            quantizer.load_calib_amax(largest[name])
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.calibrate_weight()
    return model


def _running_maximum(  # type: ignore[no-untyped-def]
    largest: dict[str, Tensor], name: str, quantizer: TensorQuantizer, per_channel: bool
):
    axis = -1 if per_channel else quantizer.descriptor.axis
    scalar = quantizer.amax.ndim == 0 and not per_channel

    def observe(x: Tensor) -> None:
        magnitude = x.abs().max() if scalar else x.abs().movedim(axis or 0, 0).flatten(1).amax(1)
        before = largest.get(name, torch.zeros_like(magnitude))
        largest[name] = torch.maximum(before, magnitude)

    return observe


def images(arch: Architecture, count: int, *, seed: int = 7) -> Tensor:
    """(count, in_chans, S, S) of noise with some structure: smooth, so that tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, arch.in_chans, 4, 4, generator=generator)
    fine = torch.randn(count, arch.in_chans, arch.img_size, arch.img_size, generator=generator)
    return nn.functional.interpolate(coarse, size=arch.img_size, mode="bicubic") + 0.3 * fine
