"""Puts quantizers into a float Swin, whose parts are found by name and shape, not by class."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import nn

from swinq.errors import ConfigError
from swinq.quant.attention import QuantAttention, QuantCosineAttention, QuantWindowAttention
from swinq.quant.linear import QuantLinear, QuantQkv
from swinq.quant.quantizer import TensorQuantizer
from swinq.quant.spec import LINEAR_KINDS, LayerRule, QuantSpec

QuantizedLayer = QuantLinear | QuantAttention


def quantize_model(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """Replace, in place, each block's Linears and attention and each merge's reduction.

    Patch embedding, norms, GELU and head stay float. The quantizers are uncalibrated.

    Returns:
        The same model, with ``model.quant_spec`` set.

    Raises:
        ConfigError: nothing to quantize (or already done), a layer rule that matches nothing, or
            a precision that a layer cannot have.
    """
    names = list(_float_layers(model))
    if not names:
        raise ConfigError(
            f"{type(model).__name__} has no float layer to quantize",
            "quantize a Swin from build_model, and only once",
        )
    precision = resolve_precisions(names, spec.layers)
    for name, module in list(_float_layers(model).items()):
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        if isinstance(module, nn.Linear):
            setattr(owner, last, _quant_linear(owner, module, last, spec, precision[name]))
    for name, module in list(_float_layers(model).items()):
        parent, _, last = name.rpartition(".")
        cosine = hasattr(module, "logit_scale")
        kind = QuantCosineAttention if cosine else QuantWindowAttention
        setattr(model.get_submodule(parent), last, kind(module, spec, precision[name]))
    for name, quantizer in named_quantizers(model).items():
        quantizer.name = name
    for pattern in spec.allow_dead:
        _matches(pattern, list(named_quantizers(model)), "quantizer")
    model.quant_spec = spec  # type: ignore[assignment]
    return model.to(next(model.parameters()).device)  # the quantizers' buffers too


def _quant_linear(
    owner: nn.Module, linear: nn.Linear, kind: str, spec: QuantSpec, precision: str
) -> QuantLinear:
    if kind == "qkv" and getattr(owner, "q_bias", None) is not None:
        q_bias, v_bias = owner.get_parameter("q_bias"), owner.get_parameter("v_bias")
        return QuantQkv(linear, q_bias, v_bias, kind=kind, spec=spec, precision=precision)
    return QuantLinear(linear, kind, spec, precision)


def _float_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name every float layer that quantize_model replaces: Linears, and attentions."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) and name.rpartition(".")[2] in LINEAR_KINDS
        is_attention = hasattr(module, "qkv") and hasattr(module, "relative_position_index")
        if is_linear or (is_attention and not isinstance(module, QuantAttention)):
            found[name] = module
    return found


def resolve_precisions(names: Sequence[str], rules: Sequence[LayerRule]) -> dict[str, str]:
    """Give each layer the precision of the last rule that matches it, int8 without one.

    Raises:
        ConfigError: a rule that matches no layer, or "int8-unrounded" for an output that the
            layer's consumer quantizes anyway.
    """
    precision = dict.fromkeys(names, "int8")
    for rule in rules:
        for name in _matches(rule.pattern, names, "layer"):
            kind = name.rpartition(".")[2]
            if rule.precision == "int8-unrounded" and kind not in ("proj", "fc2", "reduction"):
                raise ConfigError(
                    f"int8-unrounded for {name} (pattern {rule.pattern!r}): only the outputs of "
                    "proj, fc2 and reduction are ever rounded",
                    "use fp16 for this layer, or a narrower pattern",
                )
            precision[name] = rule.precision
    return precision


def _matches(pattern: str, names: Sequence[str], what: str) -> list[str]:
    """The names that match; a pattern that matches nothing is a mistake."""
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if not matched:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
        raise ConfigError(
            f"the recipe's pattern {pattern!r} matches no {what}",
            f"{what}s are named like {near[0]!r}" if near else f"the model has no {what}s",
        )
    return matched


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Name every quantized layer, in the order of the forward: qkv, the attention, proj, ..."""
    layers: dict[str, QuantizedLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantAttention):
            layers[f"{name}.qkv"] = module.qkv
            layers[name] = module
            layers[f"{name}.proj"] = module.proj
        elif isinstance(module, QuantLinear) and name not in layers:
            layers[name] = module
    return layers


def named_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """Name every TensorQuantizer of a model."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def used_quantizers(model: nn.Module, *, any_mode: bool = False) -> dict[str, TensorQuantizer]:
    """Name the quantizers that take part in the model, in the order of the forward.

    Precisions count, and the int8_mode that is set; with ``any_mode`` mode 1, which uses the most.
    """
    used: dict[str, TensorQuantizer] = {}
    for name, layer in quantized_layers(model).items():
        if layer.precision != "int8":
            continue
        for child, quantizer in layer.named_children():
            if isinstance(quantizer, TensorQuantizer):
                rounds = any_mode and child == "output_quantizer" and layer.rounds_output
                if quantizer.enabled or rounds:
                    used[f"{name}.{child}"] = quantizer
    return used


def set_int8_mode(model: nn.Module, mode: int) -> nn.Module:
    """Set int8_mode 1 (every GEMM int8 in and out) or 2 (fc2, reduction unrounded), in place.

    Raises:
        ConfigError: another mode.
    """
    if mode not in (1, 2):
        raise ConfigError(f"int8_mode is {mode!r}; wanted 1 or 2", "1 rounds every GEMM's output")
    for layer in quantized_layers(model).values():
        if isinstance(layer, QuantLinear):
            layer.set_int8_mode(mode)
    return model


def set_active(model: nn.Module, active: bool | Collection[str]) -> nn.Module:
    """Quantize all layers (True), none (False), or the named ones only, in place."""
    for name, layer in quantized_layers(model).items():
        layer.active = active if isinstance(active, bool) else name in active
    return model


@contextmanager
def float_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Compute in float inside the context, then put every layer back as it was."""
    layers = quantized_layers(model).values()
    before = [layer.active for layer in layers]
    set_active(model, False)
    try:
        yield model
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer.active = active
