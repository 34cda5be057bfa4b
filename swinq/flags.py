"""The flags: which there are, what they set, how they are spelled, and which are refused."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from swinq import __version__
from swinq.config import leaves
from swinq.defaults import DEFAULTS
from swinq.errors import ConfigError

ACTIONS = {
    "calib": "find the ranges, export INT8, judge it and write the report",
    "eval": "top-1 and top-5 of a checkpoint: float, calibrated or INT8",
    "export": "write the INT8 checkpoint of a calibrated one",
    "throughput": "images per second and latency",
    "train": "calibrate, finetune with fake quantizers, export and judge like --calib",
}


@dataclass(frozen=True)
class Flag:
    """One flag: the configuration keys it sets, and the actions for which it does something."""

    name: str
    metavar: str | None  # None: a switch, which writes `sets`
    help: str
    keys: tuple[str, ...] = ()
    actions: tuple[str, ...] = tuple(ACTIONS)
    choices: tuple[str, ...] = ()
    sets: bool = True


DATA_ACTIONS = ("calib", "eval", "train")
RANGE_ACTIONS = ("calib", "train")  # a float checkpoint is calibrated before it is finetuned
TRAIN = ("train",)
GROUPS: dict[str, tuple[Flag, ...]] = {
    "model": (
        Flag("cfg", "FILE", "model: a YAML file or a shipped name"),
        Flag("resume", "FILE", "checkpoint, any layout; tells the model too", ("MODEL.RESUME",)),
        Flag("pretrained", "FILE", "weights to fit to another window", ("MODEL.PRETRAINED",)),
        Flag(
            "version",
            "N",
            "Swin version, 1 or 2, to be checked",
            ("MODEL.VERSION",),
            choices=("1", "2"),
        ),
        Flag("opts", "KEY VALUE", "set configuration keys, in pairs"),
    ),
    "data": (
        Flag(
            "data-path",
            "PATH",
            "ImageNet folder or zip, digits, fake",
            ("DATA.DATA_PATH",),
            DATA_ACTIONS,
        ),
        Flag("zip", None, "images lie in train.zip and val.zip", ("DATA.ZIP_MODE",), DATA_ACTIONS),
        Flag(
            "cache-mode",
            "MODE",
            "no, full or part of the zip in memory",
            ("DATA.CACHE_MODE",),
            DATA_ACTIONS,
        ),
        Flag(
            "batch-size",
            "N",
            "images per step and rank",
            ("DATA.BATCH_SIZE",),
            (*DATA_ACTIONS, "throughput"),
        ),
        Flag(
            "workers", "N", "loader processes; -1 = by cores", ("DATA.NUM_WORKERS",), DATA_ACTIONS
        ),
        Flag(
            "eval-transform", "NAME", "official, timm or squash", ("EVAL.TRANSFORM",), DATA_ACTIONS
        ),
        Flag("eval-images", "N", "evaluate a sample; 0 = all", ("EVAL.IMAGES",), DATA_ACTIONS),
    ),
    "calibration": (
        Flag("num-calib-batch", "N", "batches", ("CALIB.NUM_BATCHES",), RANGE_ACTIONS),
        Flag("calib-batchsz", "N", "images in a batch", ("CALIB.BATCH_SIZE",), RANGE_ACTIONS),
        Flag(
            "calibrator", "NAME", "max, percentile, mse, entropy", ("CALIB.METHOD",), RANGE_ACTIONS
        ),
        Flag("percentile", "P", "share of values kept", ("CALIB.PERCENTILE",), RANGE_ACTIONS),
        Flag(
            "seed",
            "N",
            "of the images drawn, and of training",
            ("CALIB.SEED", "SEED"),
            DATA_ACTIONS,
        ),
        Flag(
            "recipe",
            "FILE",
            "quantization recipe: a file or a shipped name",
            actions=RANGE_ACTIONS,
        ),
        Flag(
            "int8-mode",
            "N",
            "1 or 2; --calib exports both, --train 1",
            ("INT8.MODE",),
            choices=("1", "2"),
        ),
    ),
    "training": (
        Flag("num-epochs", "N", "passes over the training set", ("QAT.EPOCHS",), TRAIN),
        Flag("qat-lr", "LR", "peak rate at 512 images a step", ("QAT.LR",), TRAIN),
        Flag(
            "accumulation-steps",
            "N",
            "batches of each rank in a step",
            ("TRAIN.ACCUMULATION_STEPS",),
            TRAIN,
        ),
        Flag("distill", None, "learn from the float model", ("QAT.DISTILL.ENABLED",), TRAIN),
        Flag("teacher", "FILE", "learn from another checkpoint", ("QAT.DISTILL.TEACHER",), TRAIN),
        Flag(
            "distillation-loss-scale",
            "X",
            "factor of that loss",
            ("QAT.DISTILL.SCALE",),
            TRAIN,
        ),
        Flag(
            "optim",
            "NAME",
            "the only one",
            ("TRAIN.OPTIMIZER.NAME",),
            TRAIN,
            choices=("adamw",),
        ),
        Flag(
            "use-checkpoint",
            None,
            "recompute activations: less memory, more time",
            ("TRAIN.USE_CHECKPOINT",),
            TRAIN,
        ),
        Flag("amp-type", "NAME", "bf16 or fp16", ("QAT.AMP_TYPE",), TRAIN),
        Flag("disable-amp", None, "train in fp32", ("AMP_ENABLE",), TRAIN, sets=False),
    ),
    "results": (
        Flag("output", "DIR", "results go to DIR/<model>/<tag>", ("OUTPUT",)),
        Flag("tag", "NAME", "name of this run", ("TAG",)),
        Flag(
            "calib-output-path",
            "DIR",
            "checkpoints go here instead",
            ("CALIB.OUTPUT_PATH",),
            ("calib", "export", "train"),
        ),
        Flag("sensitivity-images", "N", "0 = none", ("REPORT.SENSITIVITY_IMAGES",), RANGE_ACTIONS),
    ),
    "running": (
        Flag("device", "NAME", "auto, cpu, cuda or cuda:N", ("DEVICE",)),
        Flag(
            "engine",
            "NAME",
            "what runs INT8: auto, cuda, reference",
            ("ENGINE",),
            ("calib", "eval", "throughput", "train"),
            choices=("auto", "cuda", "reference"),
        ),
        Flag("local-rank", "N", "from torch.distributed.launch; torchrun needs none"),
        Flag("dry-run", None, "check paths, checkpoint, disk and device; do nothing"),
        Flag("print-config", None, "print the resolved configuration as YAML and stop"),
    ),
}
FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}

_FUSED = "was for kernels of the official code; torch.compile fuses here"
_RECIPE = "was the ancestor's; layers, granularity and precision are stated in a recipe"
ABSENT: dict[str, str] = {
    **dict.fromkeys(("fused-window-process", "fused-layernorm"), _FUSED),
    "amp-opt-level": "was for Apex; --amp-type and --disable-amp are what --train knows",
    **dict.fromkeys(
        "wprec aprec quant-per-tensor quant-disable quant-disable-keyword fuse-qkv narrow-range "
        "quant-mode".split(),
        _RECIPE,
    ),
    "th-path": "loaded the ancestor's library; swinq runs its own, see --engine",
}
_FIXES = {
    _RECIPE: "choose one with --recipe, for example --recipe fastertransformer",
}
_TORCHRUN = (
    "nproc-per-node nnodes node-rank master-addr master-port rdzv-backend rdzv-endpoint rdzv-id "
    "standalone max-restarts".split()
)

_EXAMPLES = """\
examples:
  torchrun swinq/main.py --calib                          the embedded demo, no data needed
  torchrun swinq/main.py --calib --cfg swin_tiny_patch4_window7_224 --resume swin_tiny.pth \\
      --data-path /data/imagenet --num-calib-batch 10 --calib-batchsz 8
  torchrun --nproc_per_node 8 swinq/main.py --eval --resume out/int8_mode1.safetensors \\
      --data-path /data/imagenet --batch-size 128
  torchrun --nproc_per_node 8 swinq/main.py --train --resume swin_large.pth --distill \\
      --data-path /data/imagenet --num-epochs 2
  torchrun swinq/main.py --calib --resume swin_tiny.pth --data-path /data/imagenet --dry-run

Flags take - or _ between words and are never abbreviated. Precedence: defaults, --cfg, --recipe,
--opts, flags. SWINQ_DEBUG=1 shows tracebacks."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fix = "swinq/main.py --help lists the flags"
        if message.startswith("argument --version:"):
            fix = f"--version 1 or 2 is the Swin's version; this is swinq {__version__}"
        raise ConfigError(message, fix)


def parser() -> argparse.ArgumentParser:
    """The parser that --help shows; values stay texts until the configuration converts them."""
    made = _Parser(
        prog="swinq/main.py",
        usage="torchrun [--nproc_per_node N] swinq/main.py --calib [flags]",
        description="Calibrate, finetune, judge, export and run Swin Transformers in INT8.",
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=32, width=100
        ),
        allow_abbrev=False,
        add_help=False,
    )
    actions = made.add_argument_group("what to do (exactly one)")
    for name, text in ACTIONS.items():
        actions.add_argument(f"--{name}", action="store_true", help=text)
    defaults = dict(leaves(DEFAULTS))
    for title, flags in GROUPS.items():
        group = made.add_argument_group(title)
        for flag in flags:
            settings: dict[str, Any] = {"help": flag.help, "default": None}
            if flag.metavar is None:
                settings["action"] = "store_true"
            elif flag.name == "opts":
                settings |= {"metavar": flag.metavar, "nargs": "+", "action": "extend"}
            else:
                settings["metavar"] = flag.metavar
                default = defaults[flag.keys[0]] if flag.keys else ""
                if default not in ("", 0):
                    settings["help"] += f" [{default}]"
            group.add_argument(f"--{flag.name}", **settings)
    made.add_argument_group("help").add_argument("-h", "--help", action="help", help="this text")
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags as texts, plus `action`: the one asked for ("" is allowed with --print-config).

    Raises:
        ConfigError: an unknown, repeated, absent or misplaced flag, or not exactly one action.
    """
    words = [_flag_spelling(word) for word in argv]
    _check_repeats(words)
    args, rest = parser().parse_known_args(words)
    if rest:
        raise ConfigError(
            f"'{rest[0]}' does not belong to any flag",
            "put a flag before it, such as --cfg, --resume or --data-path; quote names with spaces",
        )
    chosen = [name for name in ACTIONS if getattr(args, name)]
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join('--' + name for name in chosen)} are both given, wanted one action",
            f"run them one after the other, --{chosen[0]} first",
        )
    if not chosen and not args.print_config:
        raise ConfigError(
            f"no action was asked for: wanted one of {', '.join('--' + name for name in ACTIONS)}",
            "try the demo: torchrun swinq/main.py --calib",
        )
    args.action = chosen[0] if chosen else ""
    return args


def _flag_spelling(word: str) -> str:
    """A flag with hyphens for underscores; anything else as it is.

    Raises:
        ConfigError: the word looks like a flag and is none of ours.
    """
    if word == "-h" or not word.startswith("-") or word == "-" or _is_number(word):
        return word
    name, equals, value = word.lstrip("-").partition("=")
    name = name.replace("_", "-")
    if word.startswith("--") and (name in FLAGS or name in ACTIONS or name == "help"):
        return f"--{name}{equals}{value}"
    written = word.partition("=")[0]
    if name in ABSENT:
        raise ConfigError(f"{written} {ABSENT[name]}", _FIXES.get(ABSENT[name], "leave it out"))
    if name in _TORCHRUN:
        raise ConfigError(
            f"{written} is a flag of torchrun, not of swinq/main.py",
            f"put it before the script: torchrun {written} ... swinq/main.py ...",
        )
    near = difflib.get_close_matches(name, [*FLAGS, *ACTIONS, *ABSENT], n=1, cutoff=0.5)
    fix = f"did you mean --{near[0]}?" if near else "swinq/main.py --help lists the flags"
    raise ConfigError(f"unknown flag {written}", fix)


def _check_repeats(words: Sequence[str]) -> None:
    """Refuses a flag given twice: the last one would silently win."""
    names = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name in dict.fromkeys(names):
        if names.count(name) > 1 and name != "--opts":
            raise ConfigError(f"{name} is given {names.count(name)} times", "keep one of them")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
