"""From the names of any library to microsoft's: which layout a state dict has, and how it maps.

layout          told by                                     differs in
official        patch_embed.proj, layers.0.downsample       -
timm            layers.1.downsample only, or head.fc        downsample opens the next stage
torchvision     features.0.0                                features.N.B, mlp.0 and mlp.3
transformers    embeddings.patch_embeddings.projection      query, key, value apart; two spellings
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swinq.errors import CheckpointError
from swinq.models.containers import Contents
from swinq.models.ranges import is_range_name, official_ranges, quantizer_family

_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")
_OUTER_PREFIXES = ("module.", "_orig_mod.", "model.")

# what stands in a name -> the model it belongs to, what to do instead
_REFUSED: tuple[tuple[str, str, str], ...] = (
    (r"(^|[._])moe", "Swin-MoE, a mixture of experts", "use a dense Swin or Swin V2 checkpoint"),
    (r"spatial_mlp", "Swin-MLP", "use a Swin or Swin V2 checkpoint, which has attention"),
    (
        r"absolute_pos_embed|position_embeddings",
        "a Swin with absolute position embedding (APE)",
        "use a model trained without it, as all released ones are",
    ),
    (
        r"mask_token|^decoder\.",
        "SimMIM pretraining: an encoder with a decoder of pixels",
        "fine-tune it for classification; the fine-tuned checkpoint loads",
    ),
    (
        r"pre_quant_scale",
        "a model smoothed by ModelOpt (pre_quant_scale)",
        "pass the float checkpoint; swinq searches input scales itself",
    ),
)

_TORCHVISION = (
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
_TRANSFORMERS = (
    (r"^swin(v2)?\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(self\.query|q_proj)\.", ".attn.qkv.0."),
    (r"\.attention\.(self\.key|k_proj)\.", ".attn.qkv.1."),
    (r"\.attention\.(self\.value|v_proj)\.", ".attn.qkv.2."),
    (r"\.attention\.(self|relative_position_bias)\.", ".attn."),
    (r"\.continuous_position_bias_mlp\.", ".cpb_mlp."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)
_OWN = ((r"\.attn\.qkv\.(q_bias|v_bias)$", r".attn.\1"),)  # where a quantized v2 model keeps them


@dataclass
class OfficialState:
    """A state dict in microsoft's names."""

    layout: str
    state: dict[str, Tensor]  # fp32
    buffers: dict[str, Tensor]  # indices, coordinates, masks: evidence of the windows
    ranges: dict[str, Tensor]  # quantizer name + "._amax" -> fp32 () or (n,)
    corrections: dict[str, Tensor] = field(default_factory=dict)  # "<linear>.bias_correction"
    notes: list[str] = field(default_factory=list)


def to_official(contents: Contents) -> OfficialState:
    """Recognise the layout and rename, concatenate and convert its tensors.

    Raises:
        CheckpointError: a model that swinq does not run, an unknown layout, integer weights, or a
            weight that is not finite.
    """
    path = contents.path
    tensors = _strip_outer(contents.tensors)
    _refuse_models(contents, tensors)
    base = _recognise(contents, tensors)
    family = quantizer_family(tensors, contents.metadata)
    result = OfficialState(layout=family or base, state={}, buffers={}, ranges={})
    ranges: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        official = _rename(base, name)
        last = official.rsplit(".", 1)[-1]
        if last == "k_bias":  # timm's buffer of zeros
            continue
        if is_range_name(official):
            home = ranges
        elif last == "bias_correction":
            home = result.corrections
        else:
            home = result.buffers if last in _BUFFERS else result.state
        if official in home and not torch.equal(home[official], tensor):
            raise CheckpointError(
                f"{path}: two different tensors for {official}, one of them {name}",
                "save the state dict of one model",
            )
        home[official] = tensor
    result.ranges, result.notes = official_ranges(path, ranges, family)
    result.state = _checked(contents, _join_projections(result.state))
    result.corrections = {name: t.float() for name, t in result.corrections.items()}
    if family and base != "official":
        result.notes.append(f"names of {base}")
    return result


def _strip_outer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel, torch.compile and Lightning put before all names."""
    while tensors:
        first = next(iter(tensors))
        prefix = next((p for p in _OUTER_PREFIXES if first.startswith(p)), None)
        if prefix is None or not all(name.startswith(prefix) for name in tensors):
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _refuse_models(contents: Contents, names: Iterable[str]) -> None:
    for pattern, what, fix in _REFUSED:
        found = next((name for name in names if re.search(pattern, name)), None)
        if found is not None:
            raise CheckpointError(f"{contents.path} holds {what} (tensor {found})", fix)
    model = _section(contents.training_config, "MODEL")
    kind = model.get("TYPE", "swin")
    section = _section(model, str(kind).upper())
    hub = contents.hub_config
    odd = {
        f"MODEL.TYPE {kind}": kind not in ("swin", "swinv2"),
        f"a custom QK_SCALE {section.get('QK_SCALE')}": section.get("QK_SCALE") is not None,
        "absolute position embedding (APE True)": bool(section.get("APE", False)),
        "no norm after the patch embedding (PATCH_NORM False)": not section.get("PATCH_NORM", True),
        f"hidden_act {hub.get('hidden_act')}": hub.get("hidden_act", "gelu") != "gelu",
        f"non-square images {hub.get('image_size')}": _not_square(hub.get("image_size")),
        "absolute position embedding": bool(hub.get("use_absolute_embeddings", False)),
    }
    for what in (said for said, wrong in odd.items() if wrong):
        raise CheckpointError(
            f"{contents.path} holds a model that swinq does not run: its configuration says {what}",
            "use a checkpoint of one of the official configurations (configs/swin, configs/swinv2)",
        )


def _section(tree: dict[Any, Any], name: str) -> dict[Any, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _not_square(size: Any) -> bool:
    return isinstance(size, list | tuple) and len(set(size)) > 1


def _recognise(contents: Contents, names: dict[str, Tensor]) -> str:
    if "features.0.0.weight" in names:
        return "torchvision"
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names):
        return "transformers"
    if "patch_embed.proj.weight" in names and any(n.startswith("layers.0.blocks.") for n in names):
        opens = any(name.startswith("layers.1.downsample.") for name in names)
        ends = any(name.startswith("layers.0.downsample.") for name in names)
        return "timm" if "head.fc.weight" in names or (opens and not ends) else "official"
    raise CheckpointError(
        f"{contents.path} has no layout that swinq knows; it begins with "
        f"{', '.join(list(names)[:4]) or 'nothing'}",
        "pass a Swin or Swin V2 classifier of microsoft, timm, torchvision or transformers",
    )


def _rename(layout: str, name: str) -> str:
    if layout == "timm":
        name = re.sub(
            r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.", name
        )
        return re.sub(r"^head\.fc\.", "head.", name)
    if layout == "torchvision":
        name = _substitute(_TORCHVISION, name)
        return re.sub(r"^features\.(\d+)\.", _torchvision_stage, name)
    return _substitute(_TRANSFORMERS if layout == "transformers" else _OWN, name)


def _torchvision_stage(match: re.Match[str]) -> str:
    """features.1.B is stage 0, features.2 the merging after it, features.3.B stage 1, ..."""
    stage, is_merge = divmod(int(match[1]) - 1, 2)
    return f"layers.{stage}.downsample." if is_merge else f"layers.{stage}.blocks."


def _substitute(rules: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _join_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one qkv; in version 2 its bias as q_bias and v_bias."""
    joined: dict[str, Tensor] = {}
    cosine = any(name.endswith(".attn.logit_scale") for name in state)
    for name, tensor in state.items():
        part = re.fullmatch(r"(.*\.attn\.qkv)\.([012])\.(weight|bias)", name)
        attn = name.removesuffix(".qkv.bias")
        if part is None and cosine and attn != name:  # torchvision: [q, ignored, v]
            query, _, value = tensor.chunk(3)
            joined |= {f"{attn}.q_bias": query, f"{attn}.v_bias": value}
        elif part is None:
            joined[name] = tensor
        elif cosine and part[3] == "bias":
            bias = {"0": "q_bias", "1": "k_bias", "2": "v_bias"}[part[2]]
            joined[f"{part[1].removesuffix('.qkv')}.{bias}"] = tensor
        elif part[2] == "0":
            three = [f"{part[1]}.{i}.{part[3]}" for i in range(3)]
            if all(one in state for one in three):  # else it is reported as missing
                joined[f"{part[1]}.{part[3]}"] = torch.cat([state[one] for one in three])
    return joined


def _checked(contents: Contents, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in fp32.

    Raises:
        CheckpointError: a tensor is not floating, or not finite.
    """
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{contents.path}: {name} is {tensor.dtype}; wanted floating weights",
                "pass the float checkpoint that this one was made from",
            )
    state = {name: tensor.to(torch.float32).contiguous() for name, tensor in state.items()}
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{contents.path}: {name} holds {int((~tensor.isfinite()).sum())} values that are "
                f"NaN or infinite, of {tensor.numel()}",
                "use an earlier checkpoint: this model diverged, or its file is damaged",
            )
    return state
