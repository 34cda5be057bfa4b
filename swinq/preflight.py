"""What --dry-run looks at before hours are spent: model, checkpoint, data, output, disk, device.

Only directories and headers are read, so that the largest checkpoint and data set cost
milliseconds. What is read in full later is checked in full by whoever reads it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swinq import config as configuration
from swinq import console, distributed
from swinq.config import Config
from swinq.data.images import is_image_name
from swinq.errors import CheckpointError, DataError, SwinqError
from swinq.flags import DATA_ACTIONS, RANGE_ACTIONS
from swinq.models.architecture import Architecture

MAX_HEADER_BYTES = 100_000_000  # the limit that the safetensors library has
REPORT_BYTES = 16 << 20  # report, pictures and TensorBoard
# of a folder as from the hub; swinq.models.containers reads the same, but imports torch
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
_PYTORCH_OLD = (b"\x80\x02", b"\x80\x04")  # a bare pickle: torch.save before 1.6


def run(action: str, config: Config) -> bool:
    """Prints a checklist and tells whether everything on it is in order.

    Args:
        action: "calib", "eval", "export", "throughput" or "train".
        config: the resolved configuration.
    """
    failed = 0
    looks = checks(action, config)
    for name, look in looks.items():
        try:
            console.say(f"  ok    {name}: {look()}", "good")
        except SwinqError as error:
            failed += 1
            console.say(f"  FAIL  {name}: " + str(error).replace("\n", "\n      "), "error")
    verdict = (
        f"{failed} of {len(looks)} checks failed" if failed else f"all {len(looks)} checks passed"
    )
    console.say(f"dry run: {verdict}; nothing was done", "error" if failed else "good")
    return not failed


def checks(action: str, config: Config) -> dict[str, Callable[[], str]]:
    """What is looked at for an action: each returns what it found, or raises a SwinqError."""
    looks: dict[str, Callable[[], str]] = {}
    weights = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if "MODEL.TYPE" in config.origins:
        looks["model"] = lambda: _model(config)
    if weights:
        flag = weights_flag(config)
        looks["checkpoint"] = lambda: _checkpoint(Path(weights), flag, action, config.INT8.MODE)
    if action == "train" and config.QAT.DISTILL.TEACHER:
        looks["teacher"] = lambda: _checkpoint(
            Path(config.QAT.DISTILL.TEACHER), "--teacher", action
        )
    if action in DATA_ACTIONS or config.DATA.DATA_PATH:
        splits = ("train", "val") if action in RANGE_ACTIONS else ("val",)
        looks["data"] = lambda: _data(config, splits, labels=action == "train")
    for folder in filter(None, (config.OUTPUT, config.CALIB.OUTPUT_PATH)):
        looks[f"folder {folder}"] = lambda folder=folder: writable(Path(folder))  # type: ignore[misc]
    if action in (*RANGE_ACTIONS, "export"):
        file = _file_of(Path(weights)) if weights else None
        size = file.stat().st_size if file and file.is_file() else 0
        modes = 1 if config.INT8.MODE else 2
        written = 2 * size + modes * size // 2 + REPORT_BYTES  # a half-precision file doubles
        place = Path(config.CALIB.OUTPUT_PATH or config.OUTPUT)
        looks["disk"] = lambda: _disk(place, written)
        if action == "train":
            # weights and both moments of AdamW, perhaps an average; one more while one is written
            states = (config.QAT.KEEP + 1) * size * (4 if config.QAT.EMA else 3)
            looks["disk for training"] = lambda: _disk(Path(config.OUTPUT), states)
    looks["device"] = lambda: _device(config.DEVICE)
    if action != "export":
        looks["engine"] = lambda: _engine(config.ENGINE, config.DEVICE)
    return looks


def weights_flag(config: Config) -> str:
    """The flag that names the weights."""
    return "--pretrained" if config.MODEL.PRETRAINED and not config.MODEL.RESUME else "--resume"


def architecture(config: Config) -> Architecture:
    """The model that the configuration describes, checked.

    Raises:
        ConfigError: the sizes contradict each other; the message names the field.
    """
    two = config.MODEL.TYPE == "swinv2"
    sizes = config.MODEL.SWINV2 if two else config.MODEL.SWIN
    depths = tuple(sizes.DEPTHS)
    stated = tuple(sizes.PRETRAINED_WINDOW_SIZES) if two else ()
    made = Architecture(
        version=2 if two else 1,
        img_size=config.DATA.IMG_SIZE,
        patch_size=sizes.PATCH_SIZE,
        in_chans=sizes.IN_CHANS,
        num_classes=config.MODEL.NUM_CLASSES,
        embed_dim=sizes.EMBED_DIM,
        depths=depths,
        num_heads=tuple(sizes.NUM_HEADS),
        window_size=sizes.WINDOW_SIZE,
        mlp_ratio=sizes.MLP_RATIO,
        qkv_bias=sizes.QKV_BIAS,
        # the default is four zeros, whatever the number of stages: no zero says anything
        pretrained_window_sizes=stated if any(stated) else (0,) * len(depths),
        norm_eps=1e-5,  # nn.LayerNorm's, which every official model was trained with
    )
    made.validate()
    return made


def _model(config: Config) -> str:
    made = architecture(config)
    depths = "-".join(map(str, made.depths))
    return (
        f"{config.MODEL.NAME}: Swin v{made.version}, {made.img_size} px, "
        f"window {made.window_size}, {made.embed_dim} channels, blocks {depths}, "
        f"{made.num_classes} classes"
    )


def _checkpoint(path: Path, flag: str, action: str, int8_mode: int = 0) -> str:
    """Recognises the container by its first bytes and reads its directory, no tensor.

    What kind of checkpoint a PyTorch file holds shows only when it is read.
    """
    path = _file_of(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise CheckpointError(
                f"{path} is a folder without {' or '.join(FOLDER_FILES)}", "name the file itself"
            )
        with open(path, "rb") as file:
            head = file.read(8)
            if head[:4] == b"PK\x03\x04":
                return _pytorch(path, size)
            if head[:2] in _PYTORCH_OLD:
                raise CheckpointError(
                    f"{path} is in PyTorch's format of before 1.6, which is a bare pickle",
                    "load it where you trust it and torch.save it again",
                )
            length = int.from_bytes(head, "little")
            if len(head) == 8 and 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                return _safetensors(path, size, file.read(length), action, int8_mode)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error.strerror}", f"check {flag}"
        ) from error
    raise CheckpointError(
        f"{path} ({size} bytes) is neither a PyTorch nor a safetensors checkpoint",
        "is it complete? download or copy it again",
    )


def _file_of(path: Path) -> Path:
    """The checkpoint in a folder that holds one as the hub names it; else the path itself."""
    if path.is_dir():
        return next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    return path


def _pytorch(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} ({size} bytes) is a damaged PyTorch checkpoint: {error}",
            "it was cut short or changed: download or copy it again",
        ) from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip file, but no PyTorch checkpoint",
            "images are given with --data-path, weights with --resume",
        )
    tensors = sum("/data/" in name for name in names)
    return f"{path.name}, PyTorch, {tensors} tensors, {_megabytes(size)}"


def _safetensors(path: Path, size: int, header: bytes, action: str, int8_mode: int) -> str:
    damaged = CheckpointError(
        f"{path} ({size} bytes) is a damaged safetensors file", "download or copy it again"
    )
    try:
        entries: Any = json.loads(header)
        metadata: Mapping[str, str] = entries.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in entries.values()]
        whole = max(ends, default=0) + len(header) + 8 == size
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise damaged from error
    if not whole:
        raise damaged
    kind = "safetensors"
    if metadata.get("format") == "swinq-int8":
        if action in (*RANGE_ACTIONS, "export"):
            raise CheckpointError(
                f"{path} is an exported INT8 checkpoint; its float weights are gone",
                "give the float or calibrated checkpoint it was made from",
            )
        mode = metadata.get("int8_mode", "?")
        kind = f"INT8 mode {mode}"
        if int8_mode and mode != str(int8_mode):
            raise CheckpointError(
                f"{path} was exported with int8_mode {mode}, and --int8-mode is {int8_mode}",
                f"use --int8-mode {mode}, or the file of the other mode",
            )
    elif action == "export" and not any("quantizer." in name for name in entries):
        raise CheckpointError(
            f"{path} is not a calibrated checkpoint",
            "calibrate it first: torchrun swinq/main.py --calib --resume FILE --data-path IMAGES",
        )
    return f"{path.name}, {kind}, {len(entries)} tensors, {_megabytes(size)}"


def _data(config: Config, splits: tuple[str, ...], *, labels: bool) -> str:
    """Whether each split is there in one of the forms that are read; no image is opened."""
    data_path, zip_mode = config.DATA.DATA_PATH, config.DATA.ZIP_MODE
    if configuration.is_embedded(data_path):
        return data_path
    path = Path(os.path.expanduser(data_path))
    if not os.path.exists(path):
        raise DataError(f"there is nothing at --data-path {data_path}", "check the path")
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is a file, but no zip", "give a folder, or a zip of images")
        return f"{path.name}, one zip"
    missing = [split for split in splits if not _has_split(path, split, zip_mode)]
    if not missing:
        for split in splits:
            _require_classes(path, split, zip_mode)
        return f"{path}, {' and '.join(splits)}"
    if zip_mode:
        raise DataError(
            f"--zip wants {missing[0]}.zip and {missing[0]}_map.txt in {path}",
            "add them, or leave --zip out for folders",
        )
    names = os.listdir(path)
    if {"train", "val"} <= set(missing) and any(map(is_image_name, names)) and not labels:
        return f"{path}, images without labels: enough to calibrate, not to evaluate"
    archive = next((name for name in sorted(names) if name.lower().endswith(".zip")), None)
    raise DataError(
        f"{path} has neither {missing[0]}/ nor {missing[0]}.zip with {missing[0]}_map.txt",
        f"name the zip itself: --data-path {path / archive}"
        if archive
        else f"wanted {' and '.join(f'{split}/<class>/<image>' for split in splits)}",
    )


def _has_split(path: Path, split: str, zip_mode: bool) -> bool:
    zipped = all((path / name).is_file() for name in (f"{split}.zip", f"{split}_map.txt"))
    return zipped or (not zip_mode and (path / split).is_dir())


def _require_classes(path: Path, split: str, zip_mode: bool) -> None:
    """That the folder of a split, where that is what will be read, has a folder in it."""
    folder = path / split
    if zip_mode or not folder.is_dir():
        return
    try:
        with os.scandir(folder) as entries:
            found = any(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}", "check its rights") from error
    if not found:
        raise DataError(
            f"{folder} has no class folders", f"sort the images into {folder}/<class>/<image>"
        )


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.exists():
            return place
    return Path("/")


def writable(folder: Path) -> str:
    """Writes and removes a file where results will go (or where their folder will be made).

    Raises:
        SwinqError: none can be written there.
    """
    place = _existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".swinq-"):
            pass
    except OSError as error:
        raise SwinqError(
            f"cannot write to {folder}: {place}: {error.strerror}",
            "choose another folder with --output or --calib-output-path",
        ) from error
    return "writable" if place == folder.absolute() else f"will be made in {place}"


def _disk(folder: Path, needed: int) -> str:
    """Compares the free space with the bytes that a run writes there."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise SwinqError(
            f"{folder} has {_megabytes(free)} free, and this run writes about {_megabytes(needed)}",
            "free some space, or choose another folder with --output",
        )
    return f"{_megabytes(free)} free, about {_megabytes(needed)} needed"


def _device(name: str) -> str:
    if name == "cpu":
        return "cpu"  # without the seconds that importing torch takes
    return str(distributed.select_device(name))


def _engine(engine: str, device_name: str) -> str:
    """What would run an INT8 checkpoint."""
    if engine == "reference" or (engine == "auto" and device_name == "cpu"):
        return "the reference"
    from swinq.int8 import device as devices  # imports torch

    device = distributed.select_device(device_name)
    if engine == "cuda":
        devices.require(device)
    if device.type == "cpu":
        return "the reference"
    problem = devices.problem(device)
    return f"the reference, as {problem}" if problem else "libswinq"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
