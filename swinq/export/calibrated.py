"""The calibrated checkpoint: float weights and ranges, from which INT8 is exported or finetuned.

One safetensors file: the parameters by microsoft's names, `<quantizer>._amax`,
`<linear>.bias_correction`, and in the metadata the architecture, the recipe, how the ranges were
found, class names and the evaluation transform.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from swinq import __version__
from swinq.errors import CheckpointError
from swinq.export.format import decode, encode
from swinq.export.integrity import digests
from swinq.export.reader import require_digests
from swinq.export.writer import reproducible
from swinq.files import write_atomically
from swinq.models.checkpoint import LoadedCheckpoint
from swinq.quant.insert import named_quantizers, quantize_model, quantized_layers, used_quantizers
from swinq.quant.linear import QuantLinear
from swinq.quant.quantizer import TensorQuantizer
from swinq.quant.spec import QuantSpec

FORMAT = "swinq-calibrated"
_NAMES_SHOWN = 4


def write_calibrated(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    calibration: dict[str, Any],
    classes: list[str] | None,
    transform: dict[str, Any],
    judged: tuple[int, float] | None = None,
) -> Path:
    """Write a calibrated model, whole or not at all.

    Args:
        path: where to; what is there is replaced only once the new file is complete.
        model: from `quantize_model`, every range known.
        calibration: how the ranges were found, plain JSON, with `residual_max` by stream.
        classes: names of the classes in the order of the logits, if known.
        transform: the evaluation transform, plain JSON.
        judged: of a trained model, the step it is of and the top-1 it had, in percent.

    Raises:
        ExportError: the file cannot be written.
    """
    tensors = {
        name.replace(".qkv.q_bias", ".q_bias").replace(".qkv.v_bias", ".v_bias"): tensor.detach()
        .cpu()
        .contiguous()
        for name, tensor in model.state_dict().items()
    }
    spec: QuantSpec = model.quant_spec  # type: ignore[assignment]
    metadata = {
        "format": FORMAT,
        "swinq_version": __version__,
        "architecture": encode(model.arch.to_dict()),  # type: ignore[operator,union-attr]
        "recipe": encode(spec.to_config()),
        "calibration": encode(calibration),
        "classes": encode(classes),
        "transform": encode(transform),
    }
    if judged is not None:
        step, top1 = judged
        metadata["judged"] = encode({"step": step, "top1": top1})
    metadata["digests"] = encode(digests(tensors, metadata))
    data = reproducible(save(tensors, metadata))
    return write_atomically(path, lambda written: written.write_bytes(data), size=len(data))


def spec_of(loaded: LoadedCheckpoint) -> QuantSpec | None:
    """The recipe that a calibrated checkpoint was made with, or None if it does not say."""
    text = loaded.metadata.get("recipe")
    if text is None:
        return None
    try:
        return QuantSpec.from_config(json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{loaded.source}: its metadata hold no sound recipe ({error})",
            "the file is damaged; calibrate again",
        ) from None


def judgement_of(loaded: LoadedCheckpoint) -> tuple[int, float] | None:
    """The step that a trained model is of, 0 if training made none better, and its top-1."""
    if loaded.metadata.get("format") != FORMAT or "judged" not in loaded.metadata:
        return None
    judged = decode(loaded.metadata["judged"])
    return int(judged["step"]), float(judged["top1"])


def restore_ranges(model: nn.Module, loaded: LoadedCheckpoint, spec: QuantSpec) -> nn.Module:
    """Quantize a float model that holds the checkpoint's weights, and set its ranges, in place.

    Raises:
        CheckpointError: a quantizer that the recipe uses has no range in the file, or one of
            another shape.
    """
    quantize_model(model, spec)
    for name, quantizer in named_quantizers(model).items():
        amax = loaded.amax.get(f"{name}._amax")
        if amax is None or bool(amax.isnan().any()):  # NaN: was never calibrated
            continue
        _require_shape(loaded, model, name, quantizer, amax)
        quantizer.load_calib_amax(amax)
    for name, layer in quantized_layers(model).items():
        correction = loaded.corrections.get(f"{name}.bias_correction")
        if correction is not None and isinstance(layer, QuantLinear):
            layer.bias_correction.copy_(correction)
    missing = [name for name, q in used_quantizers(model).items() if not q.calibrated]
    if missing:
        shown = ", ".join(missing[:_NAMES_SHOWN]) + (" ..." if len(missing) > _NAMES_SHOWN else "")
        raise CheckpointError(
            f"{loaded.source} ({loaded.layout} layout) has no range for {len(missing)} quantizers "
            f"of the recipe: {shown}",
            "calibrate it with this recipe: torchrun swinq/main.py --calib --resume FILE",
        )
    return model


def _require_shape(
    loaded: LoadedCheckpoint, model: nn.Module, name: str, quantizer: TensorQuantizer, amax: Tensor
) -> None:
    """One range for the tensor, or one for each channel that the recipe keeps apart."""
    owner, _, kind = name.rpartition(".")
    shapes = {(), tuple(quantizer.amax.shape)}
    if kind == "input_quantizer":  # a vector is always understood there
        shapes.add((int(model.get_submodule(owner).in_features),))  # type: ignore[arg-type]
    if tuple(amax.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in sorted(shapes))
        raise CheckpointError(
            f"{loaded.source}: {name}._amax has shape {list(amax.shape)}, the recipe wants "
            f"{wanted}",
            "calibrate it with this recipe: torchrun swinq/main.py --calib --resume FILE",
        )


def require_unchanged(loaded: LoadedCheckpoint) -> None:
    """Compare the digests that our own files carry; other libraries' files have none.

    Raises:
        CheckpointError: a tensor or the metadata are not those that were written.
    """
    if not {"digests", "recipe", "swinq_version"} & loaded.metadata.keys():
        return
    try:
        wanted = dict(decode(loaded.metadata["digests"]))
    except (KeyError, ValueError, TypeError):
        wanted = {}  # every tensor then differs from what was written
    tensors = {**loaded.state, **loaded.amax, **loaded.corrections}
    require_digests(Path(loaded.source), wanted, tensors, loaded.metadata)
