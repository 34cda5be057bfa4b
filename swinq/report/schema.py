"""Everything a report holds, and its JSON form (schema version 3).

Units, the same in every format: accuracies and differences in percentage points, times in
milliseconds, SQNR in decibels, KL divergence in nats, shares between 0 and 1. JSON has no infinity:
a float that is not finite travels as the string "inf", "-inf" or "nan".
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from swinq.errors import DataError

SCHEMA_VERSION = "3"

Kind = Literal["float", "fake-quant", "int8"]
Level = Literal["good", "note", "warning", "bad"]
Subject = Literal["accuracy", "training", "speed", "ranges", "layers"]


@dataclass
class Environment:
    """Where the numbers were made."""

    device: str  # "NVIDIA H100 80GB HBM3" or the CPU's own name
    device_type: str  # "cpu" or "cuda"
    cpu: str
    threads: int  # torch.get_num_threads()
    ranks: int
    platform: str
    python: str
    torch: str
    packages: dict[str, str] = field(default_factory=dict)  # the rest: package -> version


@dataclass
class Run:
    """One call of the program."""

    command: str  # as it can be pasted into a shell
    date: str  # ISO 8601 with its offset from UTC
    swinq_version: str
    environment: Environment


@dataclass
class Configuration:
    """The resolved configuration, and who set what is not a default."""

    text: str  # YAML
    origins: dict[str, str] = field(default_factory=dict)  # "QUANT.METHOD" -> "--calibrator"


@dataclass
class InputFile:
    """A file that was read or written, with its digest."""

    role: str  # "checkpoint", "exported mode 1", ...
    path: str
    sha256: str
    size_bytes: int


@dataclass
class DataSummary:
    """A set of images and how they were prepared."""

    role: str  # "calibration" or "evaluation"
    source: str
    images: int
    classes: int
    transform: str
    sha256: str = ""  # of the sample; empty where no digest was taken
    class_names: list[str] = field(default_factory=list)


@dataclass
class ComparisonRow:
    """A model against the float one, paired on the same images."""

    images: int
    both_right: int
    only_reference: int  # right in float, wrong here
    only_other: int  # wrong in float, right here
    neither: int
    agreement_percent: float  # images with the same top-1 class, right or wrong
    difference: float  # points of top-1, negative is a loss
    low: float  # 95 % interval of the difference, points
    high: float
    p_value: float  # exact McNemar
    mean_kl: float  # KL(float || this), nats an image


@dataclass
class ModelRow:
    """What one form of the model scores."""

    name: str  # "float", "INT8 mode 1", ...
    kind: Kind
    images: int
    top1: float  # percent
    top5: float
    int8_mode: int | None = None
    comparison: ComparisonRow | None = None  # None for the reference itself
    size_bytes: int | None = None  # of its file
    device: str = ""  # where it ran, if not where the report says
    engine: str = ""  # what ran it, if not torch's own operations


@dataclass
class Range:
    """amax of a quantizer: one number, or a summary of its vector."""

    channels: int  # 1 for a scalar
    minimum: float
    median: float
    maximum: float


@dataclass
class Histogram:
    """Counts of |x| in bins that are even in log2.

    Bin i holds values in [2^(low + i/per_octave), 2^(low + (i+1)/per_octave)).
    """

    low: float  # log2 of the first edge
    per_octave: int
    counts: list[int]
    below: int = 0  # zeros, and what lies under the first edge


@dataclass
class QuantizerRow:
    """One quantizer after calibration."""

    name: str
    amax: Range
    method: str  # "percentile 99.99", "max", ...
    clipped_share: float | None = None  # of values beyond the outermost codes; None: not measured
    dead_channels: int = 0  # channels whose amax is 0
    histogram: Histogram | None = None


@dataclass
class LayerErrorRow:
    """Signal to quantization noise at a layer's output, decibels."""

    layer: str
    total: float
    minimum: float  # over channels
    percentile_1: float
    median: float
    channels: int  # channels that carry a signal
    dead_channels: int  # of these, the ones whose noise drowns the signal
    local_total: float | None = None  # the layer alone, fed with float inputs
    local_minimum: float | None = None


@dataclass
class SensitivityRow:
    """What one layer's quantization costs, KL to float logits."""

    layer: str
    only_this_quantized: float
    only_this_float: float


@dataclass
class Suggestion:
    """Layers worth leaving in fp16, and the recipe that does so."""

    layers: list[str]
    kl_before: float
    kl_after: float  # measured with all of them left float
    worth_it: bool
    reason: str
    recipe: str = ""  # YAML, empty when not worth it


@dataclass
class Sensitivity:
    """The sweep over layers."""

    images: int
    all_quantized: float  # KL with every layer quantized
    rows: list[SensitivityRow]
    suggestion: Suggestion | None = None


@dataclass
class LatencyRow:
    """Median time of a forward pass."""

    name: str
    kind: Kind
    batch: int
    median_ms: float
    images_per_second: float
    device: str = ""
    int8_mode: int | None = None
    engine: str = ""  # what ran it, if not torch's own operations


@dataclass
class TrainingPoint:
    """One step of a training curve."""

    step: int  # steps that are done, from 1
    loss: float
    rate: float  # learning rate of the weights


@dataclass
class ValidationPoint:
    """How the quantized model did after so many steps."""

    step: int  # 0: before training
    top1: float  # percent


@dataclass
class TrainingSummary:
    """How the quantized model was finetuned (QAT)."""

    source: str  # of the training images
    images: int  # in the training set
    epochs: int
    steps: int
    images_per_step: int  # over all ranks
    seconds: float  # of all runs of the job, evaluations and checkpoints included
    images_per_second: float
    precision: str  # of the matrix products: "bf16", "fp16" or "fp32"
    rate: float  # at its peak
    range_rate: float  # of the logarithms of learned ranges, at its peak
    learned_ranges: list[str] = field(default_factory=list)  # kinds; empty: all stayed
    teacher: str = ""  # "the float model" or a checkpoint; empty: learned from labels alone
    label_scale: float = 1.0  # weight of the loss against the labels; 0: the teacher alone
    best_step: int = 0  # validated best and exported; without validations the last is exported
    curve: list[TrainingPoint] = field(default_factory=list)
    validations: list[ValidationPoint] = field(default_factory=list)

    @property
    def exports_trained(self) -> bool:
        """Whether what was exported is a trained model, and not the calibrated one before it."""
        return self.best_step > 0 or not self.validations


@dataclass
class Verdict:
    """A judgement in plain English."""

    subject: Subject
    level: Level
    text: str


@dataclass
class Report:
    """Everything that is known about one quantized model."""

    model: str
    run: Run
    configuration: Configuration
    models: list[ModelRow]
    files: list[InputFile] = field(default_factory=list)
    data: list[DataSummary] = field(default_factory=list)
    quantizers: list[QuantizerRow] = field(default_factory=list)
    layer_errors: list[LayerErrorRow] = field(default_factory=list)
    layer_error_images: int = 0
    sensitivity: Sensitivity | None = None
    latency: list[LatencyRow] = field(default_factory=list)
    training: TrainingSummary | None = None  # None: the ranges alone were calibrated
    verdicts: list[Verdict] = field(default_factory=list)  # filled by verdict.judge
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema_version: str = SCHEMA_VERSION


def to_json(report: Report) -> str:
    """Strict JSON, indented by one space; equal reports give equal text."""
    plain = _encode(dataclasses.asdict(report))
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Report:
    """Read what `to_json` wrote.

    Raises:
        DataError: not JSON, another schema version, or a key that is missing, unknown or mistyped.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        problem = f"the report is not JSON: {error}"
        raise DataError(problem, "give the report.json of a run") from None
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"the report has schema version {version!r}, this swinq reads {SCHEMA_VERSION!r}",
            "make the report again with this version",
        )
    return _decode(Report, value, "report")


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    return value


T = TypeVar("T")


def _decode(hint: type[T], value: Any, place: str) -> T:
    """Rebuild `value` as `hint` says: dataclasses, lists, dicts, literals, optionals, scalars."""
    origin, inner = get_origin(hint), get_args(hint)
    decoded: Any = value
    if dataclasses.is_dataclass(hint):
        decoded = _decode_fields(hint, value, place)
    elif origin in (types.UnionType, typing.Union):
        given = next(kind for kind in inner if kind is not type(None))
        decoded = None if value is None else _decode(given, value, place)
    elif origin is list and isinstance(value, list):
        decoded = [_decode(inner[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        decoded = {key: _decode(inner[1], item, f"{place}.{key}") for key, item in value.items()}
    elif origin is Literal and value in inner:
        pass
    elif hint is float and (value in ("inf", "-inf", "nan") or type(value) in (int, float)):
        decoded = float(value)
    elif origin is not None or type(value) is not hint:
        raise DataError(f"{place} is {value!r:.60}, which is not {hint}", "is the file damaged?")
    return decoded


def _decode_fields(hint: Any, value: Any, place: str) -> Any:
    hints = get_type_hints(hint)
    if not isinstance(value, dict):
        raise DataError(f"{place} is {value!r:.60}, which is no object", "is the file damaged?")
    if odd := sorted(set(value) ^ set(hints)):
        raise DataError(f"{place}: missing or unknown {', '.join(odd)}", "is the file damaged?")
    fields = {name: _decode(kind, value[name], f"{place}.{name}") for name, kind in hints.items()}
    return hint(**fields)
