"""What each configuration key accepts: its type, its range, and the error when a value has neither.

Types follow from the defaults (config.py); the tables here say what the defaults cannot.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from swinq.errors import ConfigError

# Keys of the ancestors' dumps that decide nothing here: read, named once, and left out.
FOREIGN = (
    "MODEL.SWIN_MOE",
    "MODEL.SWIN_MLP",
    "MODEL.SIMMIM",
    "TRAIN.MOE",
    "DATA.MASK_PATCH_SIZE",
    "DATA.MASK_RATIO",
    "AMP_OPT_LEVEL",
    "EVAL_MODE",
    "FUSED_LAYERNORM",
    "FUSED_WINDOW_PROCESS",
    "LOCAL_RANK",
    "THROUGHPUT_MODE",
)

# Known keys, as the official files hold them, that decide nothing here: read from a file, refused
# where a person types them. The text says why.
_SCRATCH = "belongs to training from scratch; QAT has its own: "
IDLE = {
    "TRAIN.EPOCHS": f"{_SCRATCH}QAT.EPOCHS",
    "TRAIN.BASE_LR": f"{_SCRATCH}QAT.LR",
    **dict.fromkeys(("TRAIN.WARMUP_EPOCHS", "TRAIN.WARMUP_LR"), f"{_SCRATCH}QAT.WARMUP"),
    "TRAIN.MIN_LR": f"{_SCRATCH}QAT.MIN_LR",
    "TRAIN.LR_SCHEDULER": f"{_SCRATCH}a warm-up, then a cosine",
    "TRAIN.OPTIMIZER.MOMENTUM": "belongs to SGD; QAT uses AdamW",
    "TRAIN.LAYER_DECAY": "decides nothing here: all layers learn at one rate",
    **dict.fromkeys(
        ("TRAIN.START_EPOCH", "TRAIN.AUTO_RESUME"),
        "decides nothing here: --train goes on from its newest checkpoint",
    ),
    "SAVE_FREQ": "counts epochs; QAT.SAVE_STEPS counts steps",
    "MODEL.DROP_RATE": "decides nothing here: no official model has dropout",
    **dict.fromkeys(("DATA.PIN_MEMORY", "TEST.SEQUENTIAL", "TEST.SHUFFLE"), "decides nothing here"),
}

# Sections and keys that only --train reads.
TRAINING = (
    "QAT",
    "TRAIN",
    "AUG",
    "MODEL.DROP_PATH_RATE",
    "MODEL.LABEL_SMOOTHING",
    "AMP_ENABLE",
    "PRINT_FREQ",
)

# Keys whose default does not show the type: of the value, or of a list's items.
OPTIONAL = {"MODEL.SWIN.QK_SCALE": float, "AUG.CUTMIX_MINMAX": list}
ITEMS = {
    "AUG.CUTMIX_MINMAX": float,
    "QAT.LEARN_RANGES": str,
    "QUANT.ALLOW_DEAD": str,
    "QUANT.LAYERS": dict,
    "TRAIN.LR_SCHEDULER.MULTISTEPS": int,
}
_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

RANGE_KINDS = ("input", "weight", "output", "attention", "probabilities")
PRECISIONS = ("int8", "int8-unrounded", "fp16")
Rule = tuple[str, Callable[[Any], bool]]  # what is wanted in words, and whether a value is that


def _one_of(*choices: object) -> Rule:
    return "one of " + ", ".join(map(str, choices)), lambda value: value in choices


def _at_least(limit: float) -> Rule:
    return f"at least {limit}", lambda value: value >= limit


def _between(low: float, high: float) -> Rule:
    return f"from {low} to {high}", lambda value: low <= value <= high


def _share(value: float) -> bool:
    return 0 <= value < 1


_POSITIVE: Rule = ("above 0", lambda value: value > 0)


def _each(rule: Rule) -> Rule:
    return f"a list of values {rule[0]}", lambda values: all(map(rule[1], values))


_SIZES: Rule = ("a list of one positive integer per stage", lambda v: bool(v) and min(v) >= 1)

RULES: dict[str, Rule] = {
    "DATA.BATCH_SIZE": _at_least(1),
    "DATA.CACHE_MODE": _one_of("no", "full", "part"),
    "DATA.DATASET": _one_of("imagenet", "imagenet22K"),
    "DATA.IMG_SIZE": _at_least(1),
    "DATA.INTERPOLATION": _one_of("bicubic", "bilinear"),
    "DATA.NUM_WORKERS": _at_least(-1),
    "MODEL.TYPE": _one_of("swin", "swinv2"),
    "MODEL.VERSION": _one_of(0, 1, 2),
    "MODEL.NUM_CLASSES": _at_least(1),
    "MODEL.DROP_RATE": _between(0, 1),
    "MODEL.DROP_PATH_RATE": ("from 0 to below 1", _share),
    "MODEL.LABEL_SMOOTHING": ("from 0 to below 1", _share),
    "MODEL.SWIN.QK_SCALE": ("empty (another scale of q.k is not supported)", lambda v: v is None),
    "MODEL.SWINV2.PRETRAINED_WINDOW_SIZES": _each(_at_least(0)),
    "QUANT.WEIGHT.GRANULARITY": _one_of("per_channel", "per_tensor"),
    "QUANT.INPUT.GRANULARITY": _one_of("per_tensor"),
    "QUANT.INPUT.MIGRATION": _each(_between(0, 1)),
    "QUANT.OUTPUT.GRANULARITY": _one_of("per_channel", "per_tensor"),
    "QUANT.OUTPUT.LAYERS": _each(_one_of("qkv", "proj", "fc1", "fc2", "reduction")),
    "QUANT.OUTPUT.POSITION": _one_of("after_bias", "before_bias"),
    "QUANT.OUTPUT.HEADROOM": _at_least(1),
    "QUANT.OUTPUT.METHOD": _one_of("max", "percentile"),
    "QUANT.ATTENTION.PROBABILITIES": _one_of("row_max", "static"),
    "QUANT.LAYERS": (
        "a list of {PATTERN: ..., PRECISION: " + "|".join(PRECISIONS) + "}",
        lambda layers: all(_is_layer(layer) for layer in layers),
    ),
    "CALIB.NUM_BATCHES": _at_least(1),
    "CALIB.BATCH_SIZE": _at_least(1),
    "CALIB.SEED": _at_least(0),
    "CALIB.METHOD": _one_of("max", "percentile", "mse", "entropy"),
    "CALIB.PERCENTILE": ("above 0 and at most 100", lambda value: 0 < value <= 100),
    "INT8.MODE": _one_of(0, 1, 2),
    "EVAL.TRANSFORM": _one_of("official", "timm", "squash"),
    "EVAL.IMAGES": _at_least(0),
    "REPORT.SENSITIVITY_IMAGES": _at_least(0),
    "REPORT.LATENCY_BATCH": _at_least(1),
    "QAT.EPOCHS": _at_least(1),
    "QAT.LR": _POSITIVE,
    "QAT.WARMUP": ("from 0 to below 1", _share),
    "QAT.MIN_LR": _between(0, 1),
    "QAT.LEARN_RANGES": _each(_one_of(*RANGE_KINDS)),
    "QAT.RANGE_LR": _POSITIVE,
    "QAT.FIX_RANGES": _between(0, 1),
    "QAT.EMA": ("from 0 to below 1", _share),
    "QAT.AMP_TYPE": _one_of("bf16", "fp16"),
    "QAT.COMPILE": _one_of("auto", "yes", "no"),
    "QAT.PARALLEL": _one_of("ddp", "fsdp"),
    "QAT.SAVE_STEPS": _at_least(0),
    "QAT.KEEP": _at_least(1),
    "QAT.EVAL_EPOCHS": _at_least(1),
    "QAT.DISTILL.SCALE": _at_least(0),
    "QAT.DISTILL.LABEL_SCALE": _at_least(0),
    "QAT.DISTILL.TEMPERATURE": _POSITIVE,
    "QAT.DISTILL.FEATURES": _at_least(0),
    "TRAIN.EPOCHS": _at_least(0),
    "TRAIN.WEIGHT_DECAY": _at_least(0),
    "TRAIN.CLIP_GRAD": _at_least(0),
    "TRAIN.ACCUMULATION_STEPS": _at_least(1),
    "TRAIN.OPTIMIZER.EPS": _POSITIVE,
    "TRAIN.OPTIMIZER.BETAS": (
        "two numbers from 0 to below 1",
        lambda betas: len(betas) == 2 and all(map(_share, betas)),
    ),
    "AUG.COLOR_JITTER": _at_least(0),
    "AUG.REPROB": _between(0, 1),
    "AUG.REMODE": _one_of("const", "rand", "pixel"),
    "AUG.RECOUNT": _at_least(1),
    "AUG.MIXUP": _at_least(0),
    "AUG.CUTMIX": _at_least(0),
    "AUG.CUTMIX_MINMAX": (
        "empty, or two different shares of a side, the smaller first",
        lambda v: v is None or (len(v) == 2 and 0 <= v[0] < v[1] <= 1),
    ),
    "AUG.MIXUP_PROB": _between(0, 1),
    "AUG.MIXUP_SWITCH_PROB": _between(0, 1),
    "AUG.MIXUP_MODE": _one_of("batch", "pair", "elem"),
    "DIST.TIMEOUT": _at_least(1),
    "DEVICE": ("auto, cpu, cuda or cuda:N", lambda value: _is_device(value)),
    "ENGINE": _one_of("auto", "cuda", "reference"),
    "PRINT_FREQ": _at_least(1),
    "OUTPUT": ("the name of a folder", lambda value: bool(value)),
    "TAG": ("a name without slashes", lambda v: bool(v) and v not in (".", "..") and "/" not in v),
    "SEED": _at_least(0),
}
for _section in ("MODEL.SWIN", "MODEL.SWINV2"):
    for _name in ("PATCH_SIZE", "IN_CHANS", "EMBED_DIM", "WINDOW_SIZE"):
        RULES[f"{_section}.{_name}"] = _at_least(1)
    for _name in ("DEPTHS", "NUM_HEADS"):
        RULES[f"{_section}.{_name}"] = _SIZES
    RULES[f"{_section}.APE"] = (
        "false (absolute position embedding is not supported)",
        lambda v: not v,
    )
    RULES[f"{_section}.PATCH_NORM"] = (
        "true (a patch embedding without norm is not supported)",
        bool,
    )
    RULES[f"{_section}.MLP_RATIO"] = ("above 0", lambda value: value > 0)


def checked(key: str, value: object, default: object, origin: str) -> Any:
    """The value in the key's type, if it can be read so and is in range.

    Args:
        key: with dots.
        value: as a file holds it, or a text from the command line.
        default: the key's default, whose type is wanted.
        origin: what stated the value, for the message.

    Raises:
        ConfigError: names the key, the value and what is wanted.
    """
    kind = OPTIONAL.get(key, type(default))
    item = ITEMS.get(key) or (type(default[0]) if isinstance(default, list) and default else None)
    if key in OPTIONAL and (value is None or str(value).lower() in ("", "none", "null")):
        converted = None
    else:
        try:
            converted = _as_type(value, kind, item)
        except (ValueError, TypeError, OverflowError, yaml.YAMLError, RecursionError):
            raise _refused(key, value, _wanted_type(kind, item), default, origin) from None
    wanted, holds = RULES.get(key, ("", None))
    if holds is not None and not holds(converted):
        raise _refused(key, value, wanted, default, origin)
    return converted


def shown(value: object) -> str:
    """A value for a message: at most one short line, whatever was given."""
    text = value if isinstance(value, str) else _short.repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 90 else text[:87] + "..."


_short = reprlib.Repr()
_short.maxlist = _short.maxdict = 12
_short.maxstring = _short.maxother = 80


def _as_type(value: Any, kind: type, item: type | None = None) -> Any:
    """Converts between what a person would call the same value.

    Raises:
        ValueError: the value is not of that kind.
    """
    if kind is bool:
        return _as_bool(value)
    if kind is str:
        if isinstance(value, (list, tuple, Mapping)):
            raise ValueError("not a text")
        if isinstance(value, bool):  # YAML 1.1 reads the words yes and no so
            return "yes" if value else "no"
        return "" if value is None else str(value)
    if kind in (int, float):
        return _as_number(value, kind)
    if isinstance(value, str):  # a list on the command line: --opts MODEL.SWIN.DEPTHS [2,2,6,2]
        value = yaml.safe_load(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError("not a list")
    if item is dict:
        return [dict(entry) for entry in value]
    return [_as_type(entry, item or str) for entry in value]


def _as_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError("neither true nor false")
    return word in _TRUE


def _as_number(value: Any, kind: type) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("not a number")
    number = kind(value)
    if number != (float(value) if isinstance(value, str) else value):
        raise ValueError("not a whole number")
    if not abs(number) < 2**31:  # also NaN
        raise ValueError("not a number that anything here can count to")
    return number


def _is_layer(entry: Mapping[str, Any]) -> bool:
    pattern, precision = entry.get("PATTERN"), entry.get("PRECISION")
    return len(entry) == 2 and isinstance(pattern, str) and precision in PRECISIONS


def _is_device(name: str) -> bool:
    kind, _, index = name.partition(":")
    return name in ("auto", "cpu", "cuda") or (kind == "cuda" and index.isdecimal())


def _wanted_type(kind: type, item: type | None) -> str:
    if kind is not list:
        return _NAMES[kind]
    plural = {int: "integers", float: "numbers", str: "texts", dict: "{PATTERN, PRECISION}"}
    return f"a list of {plural[item or str]}"


def _refused(key: str, value: object, wanted: str, default: object, origin: str) -> ConfigError:
    """The error for a bad value, with the default as the example of a good one."""
    example = shown(default) if default not in ("", None, []) else ""
    if origin.startswith("--") and origin != "--opts":
        problem, fix = (
            f"{origin} is '{shown(value)}' ({key}), wanted {wanted}",
            f"{origin} {example}",
        )
    else:
        problem = f"{key} is '{shown(value)}' ({origin}), wanted {wanted}"
        fix = f"--opts {key} {example}" if origin == "--opts" else f"write {key}: {example}"
    return ConfigError(problem, f"for example {fix}" if example else f"leave {key} out")
