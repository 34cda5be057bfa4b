"""The Python API: every command in one call.

For example:

    import swinq

    model = swinq.load("swin_tiny_patch4_window7_224.pth")  # any layout, float
    quantized = swinq.calibrate(model, images)  # a fake-quantized copy
    swinq.export_model(quantized, "swin_tiny_int8.safetensors", int8_mode=1)
    int8 = swinq.load("swin_tiny_int8.safetensors")  # runs in integer arithmetic
    logits = swinq.run(int8, images)
    scores = swinq.evaluate_model(int8, "/data/imagenet").scores()
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinq import config as configuration
from swinq import config_files
from swinq.calib.calibrate import Calibration
from swinq.calib.calibrate import calibrate as run_calibration
from swinq.data.dataset import ImageDataset
from swinq.data.datasets import open_dataset
from swinq.data.transforms import EvalTransform, eval_transform
from swinq.errors import CheckpointError, ConfigError, SwinqError
from swinq.evaluate import Predictions
from swinq.evaluate import evaluate as run_evaluation
from swinq.export.calibrated import judgement_of, require_unchanged, restore_ranges, spec_of
from swinq.export.plain import collect_plain
from swinq.export.reader import is_int8_checkpoint
from swinq.export.writer import write_checkpoint
from swinq.int8 import choice
from swinq.int8.choice import IntegerModel
from swinq.int8.engine import CudaSwin
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.checkpoint import LoadedCheckpoint, load_checkpoint, load_into
from swinq.quant.insert import quantize_model
from swinq.quant.spec import QuantSpec

Model = nn.Module | IntegerModel

# Float means fp32: cuDNN would round the patch embedding's operands to TF32.
torch.backends.cudnn.allow_tf32 = False


@torch.inference_mode(False)  # ranges are watched by their tensors' versions, as these have none
def load(
    path: str | os.PathLike[str],
    *,
    architecture: Architecture | None = None,
    resize: bool = False,
    ranges: bool = True,
    device: torch.device | str = "cpu",
    engine: str = "auto",
) -> Any:
    """Load a checkpoint, recognised by its content.

    Args:
        path: a float checkpoint of any layout, a calibrated one, or an exported INT8 one.
        architecture: what the model must be; taken from the file if None.
        resize: fit a float checkpoint to other windows than its own (bias tables, bicubic).
        ranges: restore a calibrated checkpoint's ranges; False gives its float model.
        device: where the model goes.
        engine: what runs an INT8 checkpoint: "cuda" (the kernels of libswinq), "reference" (plain
            torch, on any device), or "auto": cuda on a CUDA device if it can be had.

    Returns:
        A float model; a fake-quantized one with its ranges; or a `CudaSwin` or `Int8Swin`. All map
        (B, 3, S, S) fp32 to logits (B, classes) fp32, and have `arch` and `classes`.

    Raises:
        CheckpointError: the file is missing, damaged, incomplete or of another architecture.
        ConfigError: there is no such engine or device.
        EngineError: the engine is "cuda", and libswinq is missing or cannot run there.
    """
    if is_int8_checkpoint(path):
        return choice.load(path, architecture=architecture, device=device, engine=engine)
    choice.require(engine, device)
    loaded = load_checkpoint(Path(path), architecture=None if resize else architecture)
    require_unchanged(loaded)
    model = float_model(loaded, architecture if resize else None)
    if loaded.amax and ranges:
        if resize and architecture != loaded.architecture:
            raise CheckpointError(
                f"{path} was calibrated at other windows than asked for: its ranges do not fit",
                "calibrate anew: torchrun swinq/main.py --calib --pretrained FILE --cfg MODEL",
            )
        spec = spec_of(loaded) or recipe_spec(
            "fastertransformer" if loaded.layout == "fastertransformer" else "int8"
        )
        restore_ranges(model, loaded, spec)
        model.calibration = read_calibration(loaded)  # type: ignore[assignment]
    return model.to(device).eval()


def cuda_model(
    model: nn.Module, precision: str = "fp16", device: torch.device | str = "cuda"
) -> CudaSwin:
    """A float model on the CUDA kernels of libswinq.

    Args:
        model: from `load`, without quantizers; not changed, and not needed afterwards.
        precision: "fp16" or "fp32", of every layer.
        device: a CUDA device.

    Raises:
        ConfigError: there is no such GPU.
        ExportError: no float Swin, or weights beyond fp16.
        EngineError: libswinq is missing, or has no kernels for the device or the model.
    """
    transform = transform_of(model)
    weights = replace(
        collect_plain(model, precision),
        classes=getattr(model, "classes", None),
        transform=transform.to_dict() if transform else {},
    )
    return CudaSwin(weights, device)


def float_model(loaded: LoadedCheckpoint, resized: Architecture | None = None) -> nn.Module:
    """Build the float model of a loaded checkpoint, at other windows if ``resized`` is given."""
    arch = resized or loaded.architecture
    assert arch is not None  # load_checkpoint always finds one
    model = build_model(arch)
    load_into(model, loaded, resize=resized is not None)
    model.classes = loaded.classes  # type: ignore[assignment]
    model.judged = judgement_of(loaded)  # type: ignore[assignment]
    model.notes = loaded.notes  # type: ignore[assignment]
    model.transform = _recorded_transform(loaded.metadata)  # type: ignore[assignment]
    return model.eval()


def _recorded_transform(metadata: Mapping[str, str]) -> EvalTransform | None:
    """The transform in a file's metadata; what another library calls so is not ours to read."""
    try:
        return EvalTransform.from_dict(json.loads(metadata["transform"]))
    except (KeyError, ValueError, TypeError, SwinqError):
        return None


def transform_of(model: Any) -> EvalTransform | None:
    """The evaluation transform that a model's file records, if it makes images of its size."""
    recorded = getattr(model, "transform", None)
    if isinstance(model, IntegerModel) and model.checkpoint.transform:
        recorded = EvalTransform.from_dict(model.checkpoint.transform)
    return recorded if recorded and recorded.img_size == model.arch.img_size else None


def recipe_spec(name: str | os.PathLike[str]) -> QuantSpec:
    """The spec of a recipe: a shipped name ("int8", "fastertransformer") or a YAML file.

    Raises:
        ConfigError: no such recipe, or a key or value that cannot be meant.
    """
    config = configuration.default_config()
    configuration.merge_recipe(config, config_files.find("recipe", os.fspath(name)))
    return QuantSpec.from_config(config.QUANT)


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    images: Iterable[Tensor],
    *,
    recipe: str | os.PathLike[str] | QuantSpec = "int8",
    method: str = "percentile",
    percentile: float = 99.99,
    on_image: Callable[[], Any] | None = None,
) -> nn.Module:
    """Quantize a copy of a float model and find its ranges.

    Args:
        model: a float model from `load`; not changed.
        images: (3, S, S) fp32 each, transformed as for evaluation; this rank's share.
        recipe: a shipped name, a YAML file or a spec.
        method: "max", "percentile", "mse" or "entropy".
        percentile: in (0, 100], for the method of that name.
        on_image: called after each image, for progress.

    Returns:
        The fake-quantized copy, in int8_mode 1, with `calibration`: a `Calibration`.

    Raises:
        CalibrationError: no images, NaN or infinite activations, a tensor that is zero throughout.
        ConfigError: the recipe, or the model is quantized already.
    """
    if hasattr(model, "quant_spec") or not isinstance(model, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} is quantized already, wanted a float model",
            "load the float checkpoint to calibrate it",
        )
    spec = recipe if isinstance(recipe, QuantSpec) else recipe_spec(recipe)
    quantized = quantize_model(copy.deepcopy(model), spec)
    found = run_calibration(
        quantized, images, method=method, percentile=percentile, on_image=on_image
    )
    quantized.calibration = found  # type: ignore[assignment]
    return quantized


def evaluate(
    model: Any,
    data: ImageDataset | str | os.PathLike[str],
    *,
    transform: EvalTransform | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Any = None,
) -> Predictions:
    """Run a model over labelled images; `.scores()` of the result has the exact accuracies.

    Args:
        model: from `load` or `calibrate`.
        data: a data set, or what `open_dataset` opens ("val" split).
        transform: for a path; if None the one that the model's file records, or the official one.

    Raises:
        DataError: no labelled images there, or unreadable ones.
    """
    arch: Architecture = model.arch
    if not isinstance(data, ImageDataset):
        official = eval_transform("official", arch.img_size, arch.img_size < 384)
        transform = transform or transform_of(model) or official
        data = open_dataset(data, "val", transform, num_classes=arch.num_classes)
    return run_evaluation(
        model,
        data,
        batch_size=batch_size,
        device=device_of(model),
        num_workers=num_workers,
        progress=progress,
    )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    int8_mode: int,
    transform: EvalTransform | None = None,
) -> Path:
    """Write the INT8 checkpoint of a model from `calibrate`, or of a calibrated checkpoint.

    Args:
        model: not changed.
        int8_mode: 1 (every GEMM int8 in and out) or 2 (fc2 and reduction unrounded).
        transform: the evaluation transform to record; the one that the model came with if None.

    Raises:
        ExportError: the model or recipe cannot be exported, or the file not be written.
    """
    found = getattr(model, "calibration", None)
    transform = transform or transform_of(model)
    return write_checkpoint(
        path,
        model,
        int8_mode=int8_mode,
        calibration=describe_calibration(found) if found is not None else {},
        classes=getattr(model, "classes", None),
        transform=transform.to_dict() if transform else {},
        residual_max=found.residual_max if found is not None else {},
    )


def describe_calibration(found: Calibration) -> dict[str, Any]:
    """How ranges were found, as plain JSON for a checkpoint's metadata; histograms stay behind."""
    described = asdict(found)
    described.pop("histograms")
    return described


def read_calibration(loaded: LoadedCheckpoint) -> Calibration:
    """What a calibrated checkpoint says of its calibration; unknown of other libraries' files."""
    said = json.loads(loaded.metadata.get("calibration", "{}"))
    known = {f.name for f in fields(Calibration)}
    unknown = {"method": "unknown", "percentile": 0.0, "images": 0}
    return Calibration(**{**unknown, **{k: v for k, v in said.items() if k in known}})


def run(model: Any, images: Tensor) -> Tensor:
    """Logits (B, classes) fp32, on the CPU, of images (B, 3, S, S) fp32.

    Raises:
        CheckpointError: ``model`` is a path to no checkpoint.
        DataError: images of another size.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load(model)
    if not callable(model):
        raise CheckpointError(f"{type(model).__name__} is no model", "give what swinq.load returns")
    with torch.inference_mode():
        return model(images.to(device_of(model))).float().cpu()


def device_of(model: Any) -> torch.device:
    """Where a model from `load` computes."""
    if isinstance(model, IntegerModel):
        return model.device
    return next(model.parameters()).device
