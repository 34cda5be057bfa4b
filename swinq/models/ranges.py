"""Calibrated ranges (`_amax`) of pytorch-quantization, FasterTransformer and ModelOpt by our names.

here                            FasterTransformer                      ModelOpt
<linear>.input_quantizer        <linear>._input_quantizer              the same; weight ranges
<linear>.weight_quantizer       <linear>._weight_quantizer             are (n, 1) there
<linear>.output_quantizer       <linear>._aftergemm_quantizer
<attn>.q_quantizer  (k, v, a)   <attn>.matmul_q_input_quantizer
<attn>.mha_q_quantizer  (k)     <attn>.mha_q_input_quantizer
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from swinq.errors import CheckpointError

_RANGE = re.compile(r"(?P<module>.+)\.(?P<quantizer>\w*quantizer)\.(?P<what>.+)")
_LINEARS = (".attn.qkv", ".attn.proj", ".mlp.fc1", ".mlp.fc2", ".downsample.reduction")
_ON_LINEARS = ("input_quantizer", "weight_quantizer", "output_quantizer")
_FASTER_TRANSFORMER = {
    "_input_quantizer": "input_quantizer",
    "_weight_quantizer": "weight_quantizer",
    "_aftergemm_quantizer": "output_quantizer",
    "matmul_q_input_quantizer": "q_quantizer",
    "matmul_k_input_quantizer": "k_quantizer",
    "matmul_v_input_quantizer": "v_quantizer",
    "matmul_a_input_quantizer": "a_quantizer",
    "mha_q_input_quantizer": "mha_q_quantizer",
    "mha_k_input_quantizer": "mha_k_quantizer",
}


def is_range_name(name: str) -> bool:
    """Whether a tensor of this name belongs to a quantizer and not to the model."""
    return _RANGE.fullmatch(name) is not None


def quantizer_family(names: Iterable[str], metadata: dict[str, str]) -> str | None:
    """Who wrote the ranges: "swinq", "fastertransformer", "modelopt", or None without any."""
    found = [match for match in map(_RANGE.fullmatch, names) if match is not None]
    if any(key.startswith("swinq") or metadata[key].startswith("swinq") for key in metadata):
        return "swinq"
    if not found:
        return None
    if any(match["quantizer"] in _FASTER_TRANSFORMER for match in found):
        return "fastertransformer"
    on_attention = any(re.fullmatch("[qkv]_quantizer", match["quantizer"]) for match in found)
    return "swinq" if on_attention else "modelopt"


def official_ranges(
    path: Path, tensors: dict[str, Tensor], family: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Rename the ranges and flatten them to () or (n,), fp32; (1,) is as good as ().

    Returns:
        The ranges by `<module>.<quantizer>._amax`, and a note on those that have no place here.

    Raises:
        CheckpointError: a range is negative, infinite, or has more than one axis.
    """
    ranges: dict[str, Tensor] = {}
    dropped: dict[str, int] = {}
    for name, tensor in tensors.items():
        match = _RANGE.fullmatch(name)
        assert match is not None  # the caller sorted by is_range_name
        quantizer = _official_quantizer(match["module"], match["quantizer"], family)
        if quantizer is None or match["what"] != "_amax":
            label = match["quantizer"] if match["what"] == "_amax" else match["what"]
            dropped[label] = dropped.get(label, 0) + 1
            continue
        ranges[f"{match['module']}.{quantizer}._amax"] = _flat(path, name, tensor)
    notes = []
    if dropped:
        listed = ", ".join(f"{count} {label}" for label, count in sorted(dropped.items())[:8])
        notes.append(f"ranges without a place in swinq, dropped: {listed}")
    return ranges, notes


def _official_quantizer(module: str, quantizer: str, family: str | None) -> str | None:
    if family == "swinq":
        return quantizer
    if family == "fastertransformer":
        return _FASTER_TRANSFORMER.get(quantizer)
    return quantizer if quantizer in _ON_LINEARS and module.endswith(_LINEARS) else None


def _flat(path: Path, name: str, tensor: Tensor) -> Tensor:
    amax = tensor.detach().to(torch.float32)
    if amax.dim() > 1:  # (n, 1), (1, n) or (n, 1, 1, 1); a (1,) of ours keeps its shape
        amax = amax.squeeze()
    wrong = int((amax < 0).sum() + amax.isinf().sum())  # NaN stands for "not calibrated"
    if amax.dim() <= 1 and tensor.numel() and not wrong:
        return amax.clone()
    raise CheckpointError(
        f"{path}: {name} has shape {tuple(tensor.shape)} and {wrong} values that are negative or "
        "infinite; wanted ranges, one for the tensor or one for each channel",
        "calibrate again and save the file again",
    )
