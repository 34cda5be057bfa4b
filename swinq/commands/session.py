"""What the actions share: the model a configuration names, its images, the folders of a run."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinq import api, console, distributed, preflight
from swinq import config as configuration
from swinq.config import Config
from swinq.data.archive import ZipDataset
from swinq.data.dataset import ImageDataset, check_class_order
from swinq.data.datasets import open_dataset
from swinq.data.loader import BatchLoader
from swinq.data.sampling import calibration_indices
from swinq.data.transforms import EvalTransform, eval_transform
from swinq.demo.checkpoint import CHECKPOINT
from swinq.errors import ConfigError
from swinq.evaluate import Predictions, evaluate
from swinq.export.calibrated import write_calibrated
from swinq.flags import RANGE_ACTIONS
from swinq.int8 import choice
from swinq.int8.choice import IntegerModel
from swinq.models.architecture import Architecture
from swinq.report.environment import describe_file

# From this input size on, the official configurations squash images instead of cropping them.
SQUASHED_FROM = 384
# a training job that has begun keeps its batch
TRAINING_TOO_LARGE = "--opts QAT.CUDA_GRAPHS False; another --batch-size would be another job"


@dataclass(frozen=True)
class Session:
    """One run of one action.

    Attributes:
        config: resolved. device: of this rank. name: the model's, for folders and reports.
        folder: where results go. checkpoints: where calibrated and exported files go.
        action: what it does: calib, eval, export, throughput or train.
    """

    config: Config
    device: torch.device
    name: str
    folder: Path
    checkpoints: Path
    action: str

    @classmethod
    def open(cls, config: Config, action: str = "calib") -> Session:
        """Name the run; nothing is written before `begin`.

        Args:
            action: what train makes is called <model>_qat, in a folder qat if no tag is given.
        """
        if config.DEMO:
            torch.set_num_threads(1)  # the micro-Swin is too small to be worth sharing out
        weights = weights_of(config)
        name = config.MODEL.NAME
        if "MODEL.NAME" not in config.origins and weights is not None:  # it may be . or ..
            name = Path(os.path.abspath(weights)).stem.removesuffix("_calib")
        tag = config.TAG if action != "train" or "TAG" in config.origins else "qat"
        folder = Path(config.OUTPUT) / name / tag
        device = distributed.select_device(config.DEVICE)
        choice.require(config.ENGINE, device)  # before anything is computed
        return cls(
            config=config,
            device=device,
            name=f"{name}_qat" if action == "train" else name,
            folder=folder,
            checkpoints=Path(config.CALIB.OUTPUT_PATH or folder),
            action=action,
        )

    def begin(self) -> None:
        """On rank 0, make the folder and save the resolved configuration; all ranks call this.

        That of calib is config.yaml, another's config_<action>.yaml, so that a later look at a
        run's files does not replace what they were made with.

        Raises:
            SwinqError: results could not be written in the end, or not all ranks see their folder.
        """
        saved = "config.yaml" if self.action == "calib" else f"config_{self.action}.yaml"
        if distributed.is_main():
            if self.action in (*RANGE_ACTIONS, "export"):
                preflight.writable(self.checkpoints)
            configuration.save(self.config, self.folder / saved)
        if self.action in RANGE_ACTIONS:  # ranks read what rank 0 writes, at the latest then
            self.require_shared(self.folder / saved)

    def require_shared(self, *paths: Path) -> None:
        """Wait for files that rank 0 writes, and check that every rank finds them; all call this.

        Raises:
            SwinqError: this rank finds none at one of the paths, or another.
        """
        distributed.barrier()
        for path in paths:
            distributed.require_same(
                f"bytes at {path}",
                partial(_digest_at, path),
                "--output and --calib-output-path must lie on a disk that all nodes share",
            )

    @property
    def modes(self) -> tuple[int, ...]:
        """The int8_modes asked for: both, if none is named."""
        return (self.config.INT8.MODE,) if self.config.INT8.MODE else (1, 2)

    @property
    def workers(self) -> int:
        """Processes of this rank that decode images."""
        return distributed.loader_processes(self.config.DATA.NUM_WORKERS)

    def int8_path(self, mode: int) -> Path:
        """Where the INT8 checkpoint of a mode goes."""
        return self.checkpoints / f"{self.name}_int8_mode{mode}.safetensors"

    def trained_path(self) -> Path:
        """Where the best model of a training run goes, as a calibrated checkpoint."""
        return self.checkpoints / f"{self.name}.safetensors"

    def calibrated_path(self) -> Path:
        """Where the calibrated checkpoint goes."""
        return self.checkpoints / f"{self.name}_calib.safetensors"

    @property
    def training_folder(self) -> Path:
        """Where a training job keeps its checkpoints; other jobs may share the results' folder."""
        return self.folder / "training"

    def write_calibrated(
        self, path: Path, model: Any, *, judged: tuple[int, float] | None = None
    ) -> None:
        """Write a calibrated model with what a reader wants to know of it; rank 0 alone calls."""
        write_calibrated(
            path,
            model,
            calibration=api.describe_calibration(model.calibration),
            classes=getattr(model, "classes", None),
            transform=self.transform(model).to_dict(),
            judged=judged,
        )

    def spare_what_is_read(self, *written: Path, teacher: str = "") -> None:
        """Refuse to write over the checkpoint that a run starts from, or its teacher.

        Raises:
            ConfigError: one of them would be written.
        """
        start = preflight.weights_flag(self.config)
        for flag, path in ((start, weights_of(self.config)), ("--teacher", teacher)):
            if path and Path(path).resolve() in [file.resolve() for file in written]:
                raise ConfigError(
                    f"{flag} {path} is the file that this run would write: it could not be "
                    "repeated",
                    "choose another with --tag NAME, --output or --calib-output-path, or copy it "
                    "first",
                )

    def transform(self, model: Any) -> EvalTransform:
        """The evaluation transform: what the model's file records, or the configuration says.

        Flags and --opts override what is recorded; a --cfg file, which tells of the model at
        large, does not.
        """
        config = self.config
        interpolation = config.DATA.INTERPOLATION
        recorded = api.transform_of(model)
        if recorded is not None and not self._typed("EVAL.TRANSFORM", "TEST.CROP"):
            if self._typed("DATA.INTERPOLATION"):
                return replace(recorded, interpolation=interpolation)
            return recorded
        size = model.arch.img_size
        crop = config.TEST.CROP and ("TEST.CROP" in config.origins or size < SQUASHED_FROM)
        made = eval_transform(config.EVAL.TRANSFORM, size, crop)
        return replace(made, interpolation=interpolation)

    def _typed(self, *keys: str) -> bool:
        """Whether a flag or --opts states one of these keys."""
        return any(self.config.origins.get(key, "").startswith("--") for key in keys)

    def dataset(self, split: str, model: Any) -> ImageDataset:
        """Open the images of a split for a model."""
        data = self.config.DATA
        opened = open_dataset(
            data.DATA_PATH,
            split,
            self.transform(model),
            zip_mode=data.ZIP_MODE,
            cache_mode=data.CACHE_MODE,
            num_classes=model.arch.num_classes,
        )
        check_class_order(opened.classes, getattr(model, "classes", None), opened.description)
        distributed.require_same(
            f"{split} images at --data-path {data.DATA_PATH} ({len(opened):,} here)",
            lambda: opened.all_names_digest,
            "give every node the same images: copy them again, or use a disk that all share",
        )
        if split == "val" and self._typed("DATA.CACHE_MODE") and not isinstance(opened, ZipDataset):
            console.say(
                "note: --cache-mode changes nothing for images that lie in no zip", "warning"
            )
        return opened

    def evaluation_indices(self, dataset: ImageDataset) -> list[int] | None:
        """The images to evaluate on: all (None), or a seeded sample of EVAL.IMAGES."""
        wanted = self.config.EVAL.IMAGES
        if not wanted or wanted >= len(dataset):
            return None
        return calibration_indices(len(dataset), wanted, self.config.SEED)

    def predictions(self, model: Any, dataset: ImageDataset, label: str) -> Predictions:
        """Evaluate a model; every rank calls this."""
        return evaluate(
            model,
            dataset,
            batch_size=self.config.DATA.BATCH_SIZE,
            device=self.device,
            progress=console.progress,
            num_workers=self.workers,
            indices=self.evaluation_indices(dataset),
            label=label,
            if_too_large=TRAINING_TOO_LARGE if self.action == "train" else "",
        )


def _digest_at(path: Path) -> str:
    """SHA-256 of a file in hex; zeros where there is none."""
    return describe_file("file", path).sha256 if path.is_file() else "00" * 32


def weights_of(config: Config) -> Path | None:
    """The checkpoint that a configuration names, the demo's own, or None."""
    named = config.MODEL.RESUME or config.MODEL.PRETRAINED
    if named:
        return Path(named)
    return CHECKPOINT if config.DEMO else None


def load_model(session: Session, *, ranges: bool = True) -> Any:
    """Load what the configuration names and check it against everything that was claimed.

    Args:
        ranges: False takes the float model of a calibrated checkpoint.

    Raises:
        ConfigError: no checkpoint is named, or the model is not what the configuration states.
        CheckpointError: see `swinq.api.load`.
    """
    config = session.config
    path = weights_of(config)
    if path is None:
        raise ConfigError("no checkpoint is named", "give one with --resume")
    wanted = preflight.architecture(config) if "MODEL.TYPE" in config.origins else None
    started = time.monotonic()
    model = api.load(
        path,
        architecture=wanted,
        resize=bool(config.MODEL.PRETRAINED),
        ranges=ranges,
        device=session.device,
        engine=config.ENGINE,
    )
    claimed = config.MODEL.VERSION
    if claimed and claimed != model.arch.version:
        raise ConfigError(
            f"--version {claimed} is given, but {path} holds a Swin of version "
            f"{model.arch.version}",
            f"use --version {model.arch.version}, or leave it out",
        )
    if wanted is None:
        _require_stated_sizes(config, model.arch, path)
    took = time.monotonic() - started
    console.say(f"model: {describe(model)} from {path} ({took:.1f} s)")
    for note in getattr(model, "notes", []):
        console.say(f"note: {note}", "warning")
    return model


def _require_stated_sizes(config: Config, arch: Architecture, path: Path) -> None:
    """Refuse a size that was stated without a model (--opts) and is not the checkpoint's."""
    section = "MODEL.SWIN" if arch.version == 1 else "MODEL.SWINV2"
    keys = {f"{section}.{field.upper()}": field for field in arch.to_dict()}
    keys |= {"DATA.IMG_SIZE": "img_size", "MODEL.NUM_CLASSES": "num_classes"}
    values = dict(configuration.leaves(config))
    for key, field in keys.items():
        held = getattr(arch, field)
        held = list(held) if isinstance(held, tuple) else held
        if key in config.origins and values[key] != held:
            raise ConfigError(
                f"{key} is {values[key]} ({config.origins[key]}), but {path} holds a model with "
                f"{field} {held}",
                "leave it out, or fit the weights to a model: --cfg NAME --pretrained FILE",
            )


def describe(model: Any) -> str:
    """A model in a line: kind, version, size, input and classes, and what runs it in INT8."""
    arch: Architecture = model.arch
    kind, runs = "float", ""
    if isinstance(model, IntegerModel):
        kind, runs = f"INT8 mode {model.int8_mode}", f", run by {model.engine}"
    elif hasattr(model, "quant_spec"):
        kind = "calibrated"
    return (
        f"{kind} Swin v{arch.version}, {arch.embed_dim} channels, depths "
        f"{'-'.join(map(str, arch.depths))}, window {arch.window_size}, {arch.img_size} px, "
        f"{arch.num_classes} classes{runs}"
    )


class RankImages:
    """This rank's share of some images, one after the other, each (3, S, S) fp32."""

    def __init__(self, session: Session, dataset: ImageDataset, indices: list[int]) -> None:
        """Take every world-th of the indices, from this rank's on."""
        self.share = indices[distributed.rank() :: distributed.world_size()]
        size = session.config.CALIB.BATCH_SIZE
        batches = [self.share[i : i + size] for i in range(0, len(self.share), size)]
        self.loader = BatchLoader(dataset, batches, num_workers=session.workers)

    def __len__(self) -> int:
        return len(self.share)

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.chain.from_iterable(batch.images for batch in self.loader)
