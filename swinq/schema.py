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

# Known keys, as the official files hold them, that decide nothing without training: read from a
# file, refused where a person types them. The text says why.
_TRAINING = "belongs to --train, which is not in this version"
IDLE = {
    **dict.fromkeys(("TRAIN", "AUG", "AMP_ENABLE", "SAVE_FREQ", "PRINT_FREQ"), _TRAINING),
    **dict.fromkeys(
        ("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING"), _TRAINING
    ),
    **dict.fromkeys(("DATA.PIN_MEMORY", "TEST.SEQUENTIAL", "TEST.SHUFFLE"), "decides nothing here"),
}

# Keys whose default does not show the type: of the value, or of a list's items.
OPTIONAL = {"MODEL.SWIN.QK_SCALE": float, "AUG.CUTMIX_MINMAX": list}
ITEMS = {
    "AUG.CUTMIX_MINMAX": float,
    "QUANT.ALLOW_DEAD": str,
    "QUANT.LAYERS": dict,
    "TRAIN.LR_SCHEDULER.MULTISTEPS": int,
}
_NAMES = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

PRECISIONS = ("int8", "int8-unrounded", "fp16")
Rule = tuple[str, Callable[[Any], bool]]  # what is wanted in words, and whether a value is that


def _one_of(*choices: object) -> Rule:
    return "one of " + ", ".join(map(str, choices)), lambda value: value in choices


def _at_least(limit: float) -> Rule:
    return f"at least {limit}", lambda value: value >= limit


def _between(low: float, high: float) -> Rule:
    return f"from {low} to {high}", lambda value: low <= value <= high


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
    "MODEL.DROP_PATH_RATE": _between(0, 1),
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
    "TRAIN.EPOCHS": _at_least(0),
    "TRAIN.ACCUMULATION_STEPS": _at_least(1),
    "DIST.TIMEOUT": _at_least(1),
    "DEVICE": ("auto, cpu, cuda or cuda:N", lambda value: _is_device(value)),
    "ENGINE": _one_of("auto", "cuda", "reference"),
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
