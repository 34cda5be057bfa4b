"""What a recipe says: granularities, which outputs are rounded, attention, precision by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from swinq.errors import ConfigError

PRECISIONS = ("int8", "int8-unrounded", "fp16")

# Every GEMM of a block, and the patch merging's, by the last part of its name.
LINEAR_KINDS = ("qkv", "proj", "fc1", "fc2", "reduction")

# int8_mode 2 leaves these outputs unrounded into what follows.
UNROUNDED_IN_MODE_2 = ("fc2", "reduction")


@dataclass(frozen=True)
class LayerRule:
    """A precision for every layer whose name matches an fnmatch pattern."""

    pattern: str
    precision: str


@dataclass(frozen=True)
class QuantSpec:
    """A quantization recipe, as data.

    Without arguments it is the plainest recipe that can be exported; the one in force is the
    configuration's QUANT section.

    Attributes:
        weight_granularity: "per_channel" (one scale per output row) or "per_tensor".
        migration: exponents tried per layer for an input-scale vector; none is always tried.
        output_granularity: of the int8 outputs, "per_channel" or "per_tensor".
        output_layers: the kinds of Linear whose outputs are rounded in mode 1.
        output_position: "after_bias", or "before_bias" as FasterTransformer rounds.
        output_method: "max" (running maximum) or "percentile" (a histogram; per_tensor only).
        output_headroom: factor on the running maximum of an output.
        probabilities: "row_max" (u8 codes of exp(s - max)) or "static" (calibrated softmax range).
        bias_correction: fold the mean error of each output channel into the bias.
        allow_dead: patterns of quantizers that may see only zeros.
        layers: ordered precision rules; later ones win.
    """

    weight_granularity: str = "per_channel"
    migration: tuple[float, ...] = ()
    output_granularity: str = "per_channel"
    output_layers: tuple[str, ...] = ("proj", "fc2", "reduction")
    output_position: str = "after_bias"
    output_method: str = "max"
    output_headroom: float = 1.1
    probabilities: str = "row_max"
    bias_correction: bool = False
    allow_dead: tuple[str, ...] = ()
    layers: tuple[LayerRule, ...] = ()

    @classmethod
    def from_config(cls, node: Mapping[str, Any]) -> QuantSpec:
        """Build a spec from the QUANT section of a configuration.

        Raises:
            ConfigError: a value outside its choices, or settings that exclude each other.
        """
        output = node["OUTPUT"]
        spec = cls(
            weight_granularity=node["WEIGHT"]["GRANULARITY"],
            migration=tuple(float(a) for a in node["INPUT"]["MIGRATION"] if float(a) != 0.0),
            output_granularity=output["GRANULARITY"],
            output_layers=tuple(output["LAYERS"]),
            output_position=output["POSITION"],
            output_method=output["METHOD"],
            output_headroom=float(output["HEADROOM"]),
            probabilities=node["ATTENTION"]["PROBABILITIES"],
            bias_correction=bool(node["BIAS_CORRECTION"]),
            allow_dead=tuple(node["ALLOW_DEAD"]),
            layers=tuple(LayerRule(r["PATTERN"], r["PRECISION"]) for r in node["LAYERS"]),
        )
        spec.validate()
        return spec

    def to_config(self) -> dict[str, Any]:
        """The QUANT section that `from_config` reads back to the same spec, as plain JSON."""
        return {
            "WEIGHT": {"GRANULARITY": self.weight_granularity},
            "INPUT": {"GRANULARITY": "per_tensor", "MIGRATION": list(self.migration)},
            "OUTPUT": {
                "GRANULARITY": self.output_granularity,
                "LAYERS": list(self.output_layers),
                "POSITION": self.output_position,
                "METHOD": self.output_method,
                "HEADROOM": self.output_headroom,
            },
            "ATTENTION": {"PROBABILITIES": self.probabilities},
            "BIAS_CORRECTION": self.bias_correction,
            "ALLOW_DEAD": list(self.allow_dead),
            "LAYERS": [{"PATTERN": r.pattern, "PRECISION": r.precision} for r in self.layers],
        }

    def validate(self) -> None:
        """Raise ConfigError for a value outside its choices or a combination without a meaning."""
        granularities = ("per_channel", "per_tensor")
        for key, value, choices in (
            ("QUANT.WEIGHT.GRANULARITY", self.weight_granularity, granularities),
            ("QUANT.OUTPUT.GRANULARITY", self.output_granularity, granularities),
            ("QUANT.OUTPUT.POSITION", self.output_position, ("after_bias", "before_bias")),
            ("QUANT.OUTPUT.METHOD", self.output_method, ("max", "percentile")),
            ("QUANT.ATTENTION.PROBABILITIES", self.probabilities, ("row_max", "static")),
            *(("QUANT.OUTPUT.LAYERS", kind, LINEAR_KINDS) for kind in self.output_layers),
            *((f"precision of {r.pattern!r}", r.precision, PRECISIONS) for r in self.layers),
        ):
            if value not in choices:
                raise ConfigError(
                    f"{key} is {value!r}; wanted one of {', '.join(choices)}", "correct the recipe"
                )
        if self.output_method == "percentile" and self.output_granularity == "per_channel":
            raise ConfigError(
                "QUANT.OUTPUT.METHOD percentile needs a histogram, which is kept per tensor only",
                "set QUANT.OUTPUT.GRANULARITY to per_tensor, or METHOD to max",
            )
        if self.output_headroom < 1.0:
            raise ConfigError(
                f"QUANT.OUTPUT.HEADROOM is {self.output_headroom}; wanted at least 1",
                "1.0 keeps the largest value seen, 1.1 leaves a tenth above it",
            )
        if any(not 0.0 < a <= 1.0 for a in self.migration):
            raise ConfigError(
                f"QUANT.INPUT.MIGRATION holds {list(self.migration)}; wanted exponents in (0, 1]",
                "0.5 moves half of a channel's range into the weights; [] never migrates",
            )

    def exportable_problem(self) -> str | None:
        """Say why no INT8 kernel computes this recipe, or None if one does."""
        if self.probabilities == "static":
            return "QUANT.ATTENTION.PROBABILITIES static exists as fake quantization only"
        if self.output_position == "before_bias":
            return "QUANT.OUTPUT.POSITION before_bias exists as fake quantization only"
        if set(self.output_layers) - {"proj", "fc2", "reduction"}:
            extra = sorted(set(self.output_layers) - {"proj", "fc2", "reduction"})
            return (
                f"QUANT.OUTPUT.LAYERS {', '.join(extra)} rounded exists as fake quantization only"
            )
        return None
