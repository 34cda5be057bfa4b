"""Which ranges of a quantized model learn, by kind."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from swinq.errors import ConfigError
from swinq.quant.insert import named_quantizers, used_quantizers
from swinq.quant.quantizer import TensorQuantizer

# kind -> the quantizers of a layer that belong to it, by the last part of their names
_MEMBERS = {
    "input": ("input_quantizer",),
    "weight": ("weight_quantizer",),
    "output": ("output_quantizer",),
    "attention": (
        "q_quantizer",
        "k_quantizer",
        "v_quantizer",
        "mha_q_quantizer",
        "mha_k_quantizer",
    ),
    "probabilities": ("a_quantizer",),
}
KINDS = tuple(_MEMBERS)


def kind_of(quantizer: str) -> str:
    """The kind that a quantizer's name belongs to."""
    member = quantizer.rpartition(".")[2]
    return next(kind for kind, members in _MEMBERS.items() if member in members)


def learn_ranges(model: nn.Module, kinds: Collection[str]) -> list[nn.Parameter]:
    """Let the ranges of some kinds learn, in place, where the model and its int8_mode use them.

    Returns:
        The new parameters, logarithms of the ranges, in the order of the forward.

    Raises:
        ConfigError: see `learners`.
        CalibrationError: a range that is not known yet.
    """
    return [quantizer.learn_range() for quantizer in learners(model, kinds)]


def learners(model: nn.Module, kinds: Collection[str]) -> list[TensorQuantizer]:
    """The quantizers of some kinds that the model and its int8_mode use; none for no kinds.

    Raises:
        ConfigError: an unknown kind, kinds of which this model has no quantizer, or input ranges
            that are folded into weights whose own ranges stay.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(
            f"ranges of kind {unknown[0]!r} cannot learn; wanted some of {', '.join(KINDS)}",
            "correct QAT.LEARN_RANGES",
        )
    chosen = [
        quantizer for name, quantizer in used_quantizers(model).items() if kind_of(name) in kinds
    ]
    if kinds and not chosen:
        raise ConfigError(
            f"the model has no quantizer of the kinds that should learn: {', '.join(kinds)}",
            "name other kinds in QAT.LEARN_RANGES (probabilities have a range only where they are "
            "static), or [] to leave every range as it is",
        )
    vectors = [q for q in chosen if q.name.endswith("input_quantizer") and not q.per_tensor]
    if vectors and "weight" not in kinds:
        raise ConfigError(
            f"{len(vectors)} layers fold a scale per input channel into their weight, such as "
            f"{vectors[0].name}: as it grows, the weight would leave its fixed range",
            "let weight ranges learn with the input ranges: --opts QAT.LEARN_RANGES [input,weight]",
        )
    return chosen


def fix_ranges(model: nn.Module) -> None:
    """Keep every learned range as it is now, in place."""
    for quantizer in named_quantizers(model).values():
        quantizer.fix_range()
