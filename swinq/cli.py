"""The command line: flags into a configuration, one action each, and errors that say what to type.

Nothing here imports torch before the command line has been understood, so a typing mistake costs
a tenth of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from swinq import __version__, config_files, console, distributed, schema
from swinq import config as configuration
from swinq.config import Config
from swinq.errors import ConfigError, SwinqError
from swinq.flags import DATA_ACTIONS, FLAGS, Flag, parse

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
ANCESTORS_SCALE = 1000.0  # from here on a distillation scale can only be meant for its loss
ECHO_DELAY_S = 1.5  # torchrun has stopped the other ranks by then, if rank 0 failed the same way


def resolve(args: argparse.Namespace) -> tuple[Config, dict[str, str]]:
    """The configuration that the flags mean, frozen, and the origin of each stated key.

    Raises:
        ConfigError: a file, key or value that cannot be meant, or flags that contradict each other.
    """
    config = configuration.default_config()
    cfg = "demo" if _names_nothing(args) else args.cfg
    if cfg is not None:
        path = config_files.find("model", cfg)
        configuration.merge_file(config, path)
        if path == config_files.find("model", "demo") and not _names_weights(args):
            configuration.put(config, "DEMO", True, "--cfg demo" if args.cfg else "no other flag")
    if args.recipe is not None:
        configuration.merge_recipe(config, config_files.find("recipe", args.recipe))
    configuration.merge_pairs(config, args.opts or [])
    for flag in FLAGS.values():
        value = getattr(args, flag.name.replace("-", "_"))
        if value in (None, False) or flag.name == "opts":
            continue
        _check_text(flag, value)
        for key in flag.keys:
            written = flag.sets if flag.metavar is None else value
            configuration.put(config, key, written, f"--{flag.name}")
    if args.action == "train":
        _complete_training(config)
    _use_local_rank(args.local_rank)
    if args.action:
        _check_model_and_data(config, args)
    _check_agreement(config, args)
    config.freeze()
    return config, config.origins


def unused(args: argparse.Namespace) -> list[str]:
    """The flags and keys given that do nothing for this action."""
    flags = [
        f"--{flag.name}"
        for flag in FLAGS.values()
        if getattr(args, flag.name.replace("-", "_")) and args.action not in (*flag.actions, "")
    ]
    keys = (args.opts or [])[::2] if args.action not in ("train", "") else []
    return flags + [
        f"--opts {key}"
        for key in keys
        if any(configuration.under(key, section) for section in schema.TRAINING)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake, 130 when interrupted."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except SwinqError as error:
        return _failed(error, EXIT_MISTAKE)
    except KeyboardInterrupt as error:
        return _failed(error, EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (kept until the interpreter has flushed)
        return EXIT_MISTAKE
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        fix = "check the path, the permissions and the free space"
        return _failed(SwinqError(f"{named}{error.strerror or error}", fix), EXIT_MISTAKE, error)


def _main(argv: Sequence[str]) -> int:
    args = parse(argv)
    if args.print_config:
        config, _ = resolve(args)
        if distributed.is_main():
            print(configuration.dump(config), end="")
        return 0
    console.say(f"swinq {__version__} --{args.action}: starting", "title")
    config, origins = resolve(args)
    console.say(configuration.describe(config, origins))
    for name in unused(args):
        console.say(f"note: {name} changes nothing for --{args.action}", "warning")
    if args.action == "train" and config.QAT.DISTILL.SCALE >= ANCESTORS_SCALE:
        scale = config.QAT.DISTILL.SCALE
        console.say(
            f"note: a distillation scale of {scale:g} is the ancestor's, whose loss was a mean "
            f"over batch and 1000 classes without T^2; the same weight is {scale / 9000:.2g} here",
            "warning",
        )
    if config.DEMO:
        digits = args.action in DATA_ACTIONS and config.DATA.DATA_PATH == "digits"
        data = " on scikit-learn's handwritten digits" if digits else ""
        console.say(
            f"demo: the shipped micro-Swin{data}; these are not ImageNet numbers", "warning"
        )
    if args.dry_run:
        from swinq import preflight

        return 0 if preflight.run(args.action, config) else EXIT_MISTAKE
    return _run(args.action, config)


def _run(action: str, config: Config) -> int:
    """Joins the ranks and runs the action; torchrun is told of the first error."""
    import torch
    from torch.distributed.elastic.multiprocessing.errors import record

    from swinq import commands

    def work() -> int | SwinqError:
        try:
            device = distributed.select_device(config.DEVICE)
            backend = "nccl" if device.type == "cuda" else "gloo"
            distributed.init(backend, timeout_s=config.DIST.TIMEOUT)
            return commands.run(action, config)
        except SwinqError as error:
            return error  # of those that pass through it, record keeps a traceback

    try:
        ended = record(work)() if "TORCHELASTIC_ERROR_FILE" in os.environ else work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        fix = f"use --batch-size {max(config.DATA.BATCH_SIZE // 2, 1)}"
        if action == "train":  # a job that has begun goes on with it
            fix += ", which is another job: with another --tag"
            if not config.TRAIN.USE_CHECKPOINT:
                fix = f"--use-checkpoint; then {fix}"
        raise SwinqError(
            f"out of memory with {config.DATA.BATCH_SIZE} images a step on {config.DEVICE}", fix
        ) from error
    if isinstance(ended, SwinqError):
        raise ended
    distributed.shutdown()
    code = int(ended or 0)
    if not distributed.is_main():
        _leave(code)  # nothing is left to do, and gloo's threads may abort an interpreter that ends
    return code


def _leave(code: int) -> NoReturn:
    """Ends this rank as it is."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _failed(error: BaseException, code: int, cause: BaseException | None = None) -> int:
    """Says what went wrong, in at most ten lines, and ends this rank without waiting for others."""
    if os.environ.get("SWINQ_DEBUG") == "1":
        raise cause or error
    since = time.time()
    try:
        many = distributed.world_size() > 1
        echo = not distributed.is_main()
    except SwinqError:  # the environment itself is the mistake
        many = echo = False
    if echo:
        time.sleep(ECHO_DELAY_S)
    if isinstance(error, KeyboardInterrupt):
        console.complain("interrupted; no file was left half written", label="")
    else:
        text = "\n".join(str(error).splitlines()[:10])
        console.complain(text)
        _tell_torchrun(text, since)
    if many:  # other threads may hang in a collective that this rank will never join
        _leave(code)
    return code


def _tell_torchrun(text: str, since: float) -> None:
    """Leaves the error where torchrun looks for it: its closing summary shows the earliest."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": text, "extraInfo": {"timestamp": str(int(since))}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}))


def _check_text(flag: Flag, value: str | bool) -> None:
    if value == "":
        raise ConfigError(f"--{flag.name} is empty", "give a value: is a shell variable unset?")
    if flag.choices and value not in flag.choices:
        raise ConfigError(
            f"--{flag.name} is '{value}', wanted {' or '.join(flag.choices)}",
            f"--{flag.name} {flag.choices[0]}",
        )


def _complete_training(config: Config) -> None:
    """States what --train means where nothing else says it."""
    distill = config.QAT.DISTILL
    if distill.TEACHER and "QAT.DISTILL.ENABLED" not in config.origins:
        configuration.put(
            config, "QAT.DISTILL.ENABLED", True, config.origins["QAT.DISTILL.TEACHER"]
        )
    if not config.INT8.MODE:  # weights and ranges are trained for one form
        configuration.put(config, "INT8.MODE", 1, "--train")


def _names_nothing(args: argparse.Namespace) -> bool:
    """Whether a command names no model, no weights and no data, and so means the demo."""
    named = _names_weights(args) or "DATA.DATA_PATH" in (args.opts or [])[::2]
    return bool(args.action) and not named and (args.cfg, args.data_path) == (None, None)


def _names_weights(args: argparse.Namespace) -> bool:
    """Whether a command names a checkpoint."""
    keys = {"MODEL.RESUME", "MODEL.PRETRAINED"} & set((args.opts or [])[::2])
    return bool(keys) or (args.resume, args.pretrained) != (None, None)


def _use_local_rank(text: str | None) -> None:
    """Takes --local-rank where the environment does not say it; refuses a contradiction."""
    if text is None:
        return
    if not text.isdecimal():
        raise ConfigError(f"--local-rank is '{text}', wanted a number from 0", "--local-rank 0")
    stated = os.environ.setdefault("LOCAL_RANK", text)
    if stated != text:
        raise ConfigError(
            f"--local-rank is {text}, but the environment says LOCAL_RANK={stated}",
            "leave --local-rank out: torchrun sets LOCAL_RANK",
        )


def _check_model_and_data(config: Config, args: argparse.Namespace) -> None:
    """Refuses half a command: a model without weights, weights without images, and so on."""
    weights = config.MODEL.RESUME or config.MODEL.PRETRAINED
    named = args.cfg is not None or weights
    if config.DEMO:
        return  # its weights are shipped
    if not named:
        raise ConfigError(
            f"--data-path is '{config.DATA.DATA_PATH}', but no model is named",
            "add --resume CHECKPOINT, or leave --data-path out for the embedded demo",
        )
    if not weights and args.action != "throughput":
        raise ConfigError(
            f"--{args.action} needs trained weights, and only --cfg {args.cfg} is given",
            "add --resume CHECKPOINT",
        )
    if not config.DATA.DATA_PATH and args.action in DATA_ACTIONS:
        raise ConfigError(
            f"--{args.action} of {weights} needs images, and no data path is given",
            "add --data-path /data/imagenet (a folder or zip), or --data-path digits or fake",
        )


def _check_agreement(config: Config, args: argparse.Namespace) -> None:
    """Refuses values that are each right and together contradict."""
    origins, model = config.origins, config.MODEL
    if model.RESUME and model.PRETRAINED:
        raise ConfigError(
            f"two checkpoints: --resume {model.RESUME} and --pretrained {model.PRETRAINED}",
            "keep --resume; --pretrained is for weights of another window",
        )
    if model.PRETRAINED and "MODEL.TYPE" not in origins:
        raise ConfigError(
            f"--pretrained {model.PRETRAINED} is fitted to a model, and none is named",
            "add --cfg NAME, or use --resume to take the model from the checkpoint",
        )
    claimed = {1: "swin", 2: "swinv2"}.get(model.VERSION)
    if claimed and "MODEL.TYPE" in origins and claimed != model.TYPE:
        raise ConfigError(
            f"--version {model.VERSION} means {claimed}, but the model is a {model.TYPE} "
            f"({origins['MODEL.TYPE']})",
            "leave --version out, or name the --cfg of the other version",
        )
    if "CALIB.PERCENTILE" in origins and config.CALIB.METHOD != "percentile":
        if origins["CALIB.PERCENTILE"] in ("--percentile", "--opts"):
            raise ConfigError(
                f"percentile {config.CALIB.PERCENTILE} is given, but the calibrator is "
                f"{config.CALIB.METHOD}",
                "leave --percentile out, or use --calibrator percentile",
            )
    if args.action == "train":
        _check_training(config)
    for key in ("DATA.ZIP_MODE", "DATA.CACHE_MODE"):
        if origins.get(key, "").startswith("--") and configuration.is_embedded(
            config.DATA.DATA_PATH
        ):
            raise ConfigError(
                f"{origins[key]} is given, but the data '{config.DATA.DATA_PATH}' lie in no zip",
                "leave it out, or give --data-path FOLDER",
            )


def _check_training(config: Config) -> None:
    """Refuses training that contradicts itself."""
    origins, distill = config.origins, config.QAT.DISTILL
    if config.TRAIN.OPTIMIZER.NAME != "adamw":
        raise ConfigError(
            f"the optimizer is {config.TRAIN.OPTIMIZER.NAME} "
            f"({origins.get('TRAIN.OPTIMIZER.NAME', 'set in Python')}), and QAT has adamw",
            "--optim adamw",
        )
    if not config.AMP_ENABLE and _typed(config, "QAT.AMP_TYPE"):
        raise _contradiction(config, "QAT.AMP_TYPE", "AMP_ENABLE", "trains in fp32")
    if config.QAT.CUDA_GRAPHS and _typed(config, "QAT.CUDA_GRAPHS"):
        uncaptured = {
            "TRAIN.USE_CHECKPOINT": config.TRAIN.USE_CHECKPOINT,
            "QAT.COMPILE": config.QAT.COMPILE == "no",
            "QAT.PARALLEL": config.QAT.PARALLEL == "fsdp",
        }
        for key, without in uncaptured.items():
            if without:
                raise _contradiction(config, "QAT.CUDA_GRAPHS", key, "trains without CUDA graphs")
    if not distill.ENABLED:
        switch = "QAT.DISTILL.ENABLED"
        stated = [key for key in origins if configuration.under(key, "QAT.DISTILL")]
        typed = [key for key in stated if _typed(config, key) and key != switch]
        if typed:
            why = f": {_stated(config, switch)}" if switch in origins else ""
            raise ConfigError(
                f"{_stated(config, typed[0])} is given, but nothing is distilled{why}",
                "add --distill, or leave it out",
            )
    elif not distill.SCALE + distill.FEATURES:
        raise ConfigError(
            f"the teacher has no effect: both {_stated(config, 'QAT.DISTILL.SCALE')} and "
            f"{_stated(config, 'QAT.DISTILL.FEATURES')} leave its loss out",
            "give one of them a weight, such as --distillation-loss-scale 1, or train without "
            "--distill and --teacher",
        )


def _typed(config: Config, key: str) -> bool:
    """Whether a flag or --opts states a key."""
    return config.origins.get(key, "").startswith("--")


def _stated(config: Config, key: str) -> str:
    """A key with its value, as it was stated: by the flag that was typed, or with its origin."""
    origin = config.origins.get(key, "the default")
    value = schema.shown(dict(configuration.leaves(config))[key])
    flag = FLAGS.get(origin.removeprefix("--"))
    if flag is None or flag.name == "opts":
        return f"{key} {value} ({origin})"
    return f"{origin} {value}" if flag.metavar else origin


def _contradiction(config: Config, key: str, other: str, meaning: str) -> ConfigError:
    """The error for a key that was typed and that another one makes meaningless."""
    return ConfigError(
        f"{_stated(config, key)} is given, but {_stated(config, other)} {meaning}",
        "leave one of them out",
    )
