"""The architecture of a state dict: from the shapes of its tensors, and from hints for the rest.

Widths, depths, heads and version follow from shapes. A version 1 window follows from the bias
table. A version 2 window leaves no trace in the weights: it comes from buffers, from a stored
configuration or from a model's name. The image size is the smallest with those windows, which is
right for every official model, unless masks or a hint say more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor

from swinq.errors import CheckpointError, ConfigError
from swinq.models.architecture import Architecture
from swinq.models.containers import Contents
from swinq.models.layouts import OfficialState
from swinq.models.variants import VARIANTS, variant_in

DEFAULT_NORM_EPS = 1e-5
GIVEN = "given configuration"


@dataclass(frozen=True)
class Hint:
    """What something other than the tensors says about windows; None where it is silent."""

    source: str
    img_size: int | None = None
    window_size: int | None = None
    pretrained: tuple[int, ...] | None = None
    norm_eps: float | None = None
    variant: Architecture | None = None  # the whole of it, if it names an official model


@dataclass(frozen=True)
class _Evidence:
    """What the tensors say. The windows are the effective ones of the stages."""

    base: Architecture  # with image and window size still open
    windows: tuple[int, ...] | None
    img_size: int | None  # from the number of windows in a mask
    pretrained: tuple[int, ...] | None


def infer_architecture(
    contents: Contents, official: OfficialState, given: Architecture | None
) -> tuple[Architecture, list[str]]:
    """Find the architecture that tensors and hints agree on.

    Args:
        given: the architecture that the user asked for; it settles what the file leaves open.

    Returns:
        The architecture, and notes on where its windows come from.

    Raises:
        CheckpointError: the tensors contradict each other, or the windows cannot be known.
    """
    evidence = _evidence(contents, official)
    notes = []
    for hint in _hints(contents, given):
        found = _agree(evidence, hint)
        if found is not None:
            if evidence.windows is None:
                notes += _how_known(contents, hint, found)
            return found, notes
        if hint.window_size is not None and hint.source != GIVEN:
            notes.append(
                f"{hint.source} says window {hint.window_size}, image {hint.img_size}; "
                "the tensors do not agree, ignored"
            )
    if evidence.windows is None:
        raise CheckpointError(
            f"{contents.path} is a Swin V2 whose window size is not stored in it, and neither "
            "its name nor a config.json tells it",
            "name the configuration: --cfg configs/swinv2/<name>.yaml",
        )
    raise CheckpointError(
        f"{contents.path} has windows {evidence.windows} in its stages; swinq runs models whose "
        "stages share one window size",
        "use a model of configs/swin or configs/swinv2",
    )


def _how_known(contents: Contents, hint: Hint, found: Architecture) -> list[str]:
    """Where a version 2 window comes from, since nothing in the weights could contradict it."""
    if hint.source != GIVEN:
        return [f"window {found.window_size} from the {hint.source}"]
    return [
        f"the {source} says {name}, the given configuration window {found.window_size}: "
        "the weights cannot tell which is right"
        for source, name in ((source, variant_in(text)) for source, text in contents.model_names)
        if name is not None and VARIANTS[name].window_size != found.window_size
    ]


def _hints(contents: Contents, given: Architecture | None) -> list[Hint]:
    """From the most to the least trustworthy; the last one is silent and always there."""
    hints = []
    stored = contents.metadata.get("architecture")
    if stored is not None:
        hints.append(_own_hint(contents, stored))
    model = contents.training_config.get("MODEL")
    data = contents.training_config.get("DATA")
    if isinstance(model, dict) and isinstance(data, dict):
        section = model.get(str(model.get("TYPE")).upper())
        section = section if isinstance(section, dict) else {}
        hints.append(
            Hint(
                "stored training configuration",
                _int(data.get("IMG_SIZE")),
                _int(section.get("WINDOW_SIZE")),
                _ints(section.get("PRETRAINED_WINDOW_SIZES")),
            )
        )
    hub = contents.hub_config
    if hub.get("model_type") in ("swin", "swinv2"):
        eps = hub.get("layer_norm_eps")
        hints.append(
            Hint(
                "config.json",
                _int(hub.get("image_size")),
                _int(hub.get("window_size")),
                _ints(hub.get("pretrained_window_sizes")),
                eps if isinstance(eps, float) and eps > 0 else None,
            )
        )
    if given is not None:
        hints.append(_whole_hint(GIVEN, given))
    for source, text in contents.model_names:
        name = variant_in(text)
        if name is not None:
            hints.append(replace(_whole_hint(source, VARIANTS[name]), variant=VARIANTS[name]))
    return [*hints, Hint("tensors")]


def _own_hint(contents: Contents, stored: str) -> Hint:
    try:
        return _whole_hint("stored architecture", Architecture.from_dict(json.loads(stored)))
    except (ValueError, ConfigError, RecursionError) as error:
        raise CheckpointError(
            f"{contents.path}: its metadata holds no sound architecture ({error})",
            "copy the file again, or calibrate again",
        ) from None


def _whole_hint(source: str, arch: Architecture) -> Hint:
    return Hint(
        source, arch.img_size, arch.window_size, arch.pretrained_window_sizes, arch.norm_eps
    )


def _int(value: Any) -> int | None:
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ints(value: Any) -> tuple[int, ...] | None:
    if isinstance(value, list | tuple) and all(_int(v) is not None for v in value):
        return tuple(value)
    return None


def _agree(evidence: _Evidence, hint: Hint) -> Architecture | None:
    """The architecture with the hint's windows, or None if the tensors say otherwise."""
    base, windows = evidence.base, evidence.windows
    stages = len(base.depths)
    if hint.variant is not None and (
        (hint.variant.version, hint.variant.embed_dim, hint.variant.depths, hint.variant.num_heads)
        != (base.version, base.embed_dim, base.depths, base.num_heads)
    ):
        return None
    window_size = hint.window_size or (max(windows) if windows else None)
    smallest = windows[-1] * base.patch_size * 2 ** (stages - 1) if windows else None
    img_size = evidence.img_size or hint.img_size or smallest
    if window_size is None or img_size is None:
        return None
    pretrained = hint.pretrained
    if pretrained is None or len(pretrained) < stages:
        pretrained = evidence.pretrained or (0,) * stages
    arch = replace(
        base,
        img_size=img_size,
        window_size=window_size,
        pretrained_window_sizes=pretrained[:stages],
        norm_eps=hint.norm_eps or DEFAULT_NORM_EPS,
    )
    try:
        arch.validate()
    except ConfigError:
        return None
    if windows is not None and tuple(stage.window for stage in arch.stages()) != windows:
        return None
    if evidence.pretrained is not None and _spans(arch) != _spans(
        replace(arch, pretrained_window_sizes=evidence.pretrained)
    ):
        return None
    return arch


def _spans(arch: Architecture) -> list[int]:
    """Windows that the coordinates of version 2 are scaled by."""
    return [stage.pretrained_window or stage.window for stage in arch.stages()]


def _evidence(contents: Contents, official: OfficialState) -> _Evidence:
    state = official.state
    patch = _need(contents, state, "patch_embed.proj.weight", 4)  # (E, in_chans, p, p)
    if patch.shape[2] != patch.shape[3]:
        _impossible(contents, f"patches of {patch.shape[2]} x {patch.shape[3]}: not square")
    depths = _depths(contents, state)
    version = 2 if "layers.0.blocks.0.attn.logit_scale" in state else 1
    per_head = "logit_scale" if version == 2 else "relative_position_bias_table"
    heads: list[int] = []
    windows: list[int | None] = []
    pretrained: list[int | None] = []
    for stage in range(len(depths)):
        attn = f"layers.{stage}.blocks.0.attn"
        table = _need(contents, state, f"{attn}.{per_head}", 3 if version == 2 else 2)
        heads.append(table.shape[0] if version == 2 else table.shape[1])
        if version == 1:
            windows.append(_side_of_table(contents, table.shape[0], attn))
        else:
            windows.append(_side_from_buffers(contents, official.buffers, attn))
            pretrained.append(_pretrained_window(official.buffers, attn))
        if patch.shape[0] * 2**stage % heads[-1]:
            _impossible(contents, f"{heads[-1]} heads in {attn}, which do not divide its channels")
    hidden = _need(contents, state, "layers.0.blocks.0.mlp.fc1.weight", 2).shape[0]
    if "head.weight" not in state:
        _impossible(contents, "no classifier (head.weight): it ends at the features")
    qkv_bias = f"layers.0.blocks.0.attn.{'q_bias' if version == 2 else 'qkv.bias'}"
    base = Architecture(
        version=version,
        img_size=0,
        patch_size=patch.shape[2],
        in_chans=patch.shape[1],
        num_classes=_need(contents, state, "head.weight", 2).shape[0],
        embed_dim=patch.shape[0],
        depths=depths,
        num_heads=tuple(heads),
        window_size=0,
        mlp_ratio=hidden / max(patch.shape[0], 1),
        qkv_bias=qkv_bias in state,
        pretrained_window_sizes=(0,) * len(depths),
        norm_eps=DEFAULT_NORM_EPS,
    )
    known = tuple(window for window in windows if window is not None)
    tables = tuple(window for window in pretrained if window is not None)
    complete = known if len(known) == len(depths) else None
    return _Evidence(
        base=base,
        windows=complete,
        img_size=None if complete is None else _img_size_of_masks(base, complete, official.buffers),
        pretrained=tables if len(tables) == len(depths) else None,
    )


def _depths(contents: Contents, state: dict[str, Tensor]) -> tuple[int, ...]:
    blocks: dict[int, int] = {}
    for name in state:
        parts = name.split(".")
        if parts[0] == "layers" and parts[2:3] == ["blocks"] and len(parts) > 4:
            if parts[1].isdecimal() and parts[3].isdecimal() and len(parts[1] + parts[3]) < 8:
                stage, block = int(parts[1]), int(parts[3])
                blocks[stage] = max(blocks.get(stage, 0), block + 1)
    if sorted(blocks) != list(range(len(blocks))) or len(blocks) > 8:
        _impossible(contents, f"blocks in the stages {sorted(blocks)[:9]} only")
    if sum(blocks.values()) > 10 * len(state):
        _impossible(contents, f"{sum(blocks.values())} blocks in {len(state)} tensors")
    return tuple(blocks[stage] for stage in range(len(blocks)))


def _side_of_table(contents: Contents, rows: int, where: str) -> int:
    side = math.isqrt(rows)  # 2W - 1
    if side * side != rows or side % 2 == 0:
        _impossible(contents, f"a bias table of {rows} rows in {where}: not of a square window")
    return (side + 1) // 2


def _side_from_buffers(contents: Contents, buffers: dict[str, Tensor], attn: str) -> int | None:
    coordinates = buffers.get(f"{attn}.relative_coords_table")  # (1, 2W-1, 2W-1, 2)
    index = buffers.get(f"{attn}.relative_position_index")  # (N, N), or (N*N,) in torchvision
    if coordinates is not None and coordinates.dim() == 4:
        return _side_of_table(contents, coordinates.shape[1] * coordinates.shape[2], attn)
    if index is None:
        return None
    tokens = math.isqrt(index.numel())
    side = math.isqrt(tokens)
    if side**4 != index.numel():
        _impossible(contents, f"windows of {tokens} tokens in {attn}: not square")
    return side


def _pretrained_window(buffers: dict[str, Tensor], attn: str) -> int | None:
    """Window that the largest coordinate was scaled by; 0 if it is the window itself."""
    table = buffers.get(f"{attn}.relative_coords_table")
    if table is None or table.dim() != 4 or not table.is_floating_point():
        return None
    window = (table.shape[1] + 1) // 2
    largest = 2.0 ** (3.0 * float(table.max())) - 1.0  # 8 * (W - 1) / (pretrained W - 1)
    if not largest > 0 or not math.isfinite(largest):
        return 0
    span = round(8.0 * (window - 1) / largest) + 1
    return 0 if span == window else span


def _img_size_of_masks(
    base: Architecture, windows: tuple[int, ...], buffers: dict[str, Tensor]
) -> int | None:
    for stage, window in enumerate(windows):
        mask = buffers.get(f"layers.{stage}.blocks.1.attn_mask")  # (nW, N, N)
        if mask is not None and mask.dim() == 3:
            side = math.isqrt(mask.shape[0])
            if side * side == mask.shape[0]:
                return side * window * base.patch_size * 2**stage
    return None


def _need(contents: Contents, state: dict[str, Tensor], name: str, dims: int) -> Tensor:
    tensor = state.get(name)
    if tensor is None:
        _impossible(contents, f"no tensor {name}")
    if tensor.dim() != dims or 0 in tensor.shape:
        _impossible(contents, f"{name} of shape {tuple(tensor.shape)}, which has {dims} axes")
    return tensor


def _impossible(contents: Contents, what: str) -> NoReturn:
    raise CheckpointError(
        f"{contents.path} is not a whole Swin classifier: it has {what}",
        "pass a checkpoint of the whole classifier, as the training script saved it",
    )
