"""What a Swin Transformer is, as data: sizes, depths, heads and windows, checked and comparable.

Everything that reads or writes a model (configs, checkpoints, the INT8 file, the engine) agrees on
this one record. Windows and shifts of a stage are derived here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from swinq.errors import ConfigError

SMALLEST_EPS = 2.0**-126  # what fp32 holds with all its digits
LARGEST_MLP_RATIO = 1024


@dataclass(frozen=True)
class Stage:
    """One resolution level, with the windows it really uses.

    A stage whose resolution is no larger than the window is one window: then window is the
    resolution and nothing is shifted. `shift` applies to the odd blocks of the stage.
    """

    index: int
    dim: int
    depth: int
    heads: int
    resolution: int  # tokens along one side
    window: int  # tokens along one side of the effective window
    shift: int
    merges: bool  # ends with patch merging: half the resolution, twice the channels
    pretrained_window: int  # v2: window that the log-spaced coordinates are scaled by; 0 = own


@dataclass(frozen=True)
class Architecture:
    """All that decides the shapes and the arithmetic of a Swin Transformer."""

    version: int
    img_size: int
    patch_size: int
    in_chans: int
    num_classes: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    mlp_ratio: float
    qkv_bias: bool
    pretrained_window_sizes: tuple[int, ...]
    norm_eps: float

    def stages(self) -> tuple[Stage, ...]:
        """The stages from the finest to the coarsest, with effective windows and shifts."""
        last = len(self.depths) - 1
        stages = []
        for index, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            resolution = self.img_size // self.patch_size // 2**index
            whole = resolution <= self.window_size
            stages.append(
                Stage(
                    index=index,
                    dim=self.embed_dim * 2**index,
                    depth=depth,
                    heads=heads,
                    resolution=resolution,
                    window=resolution if whole else self.window_size,
                    shift=0 if whole else self.window_size // 2,
                    merges=index < last,
                    pretrained_window=self.pretrained_window_sizes[index],
                )
            )
        return tuple(stages)

    def head_dims(self) -> tuple[int, ...]:
        """Channels of one attention head, for each stage."""
        return tuple(stage.dim // stage.heads for stage in self.stages())

    def validate(self) -> None:
        """Check that such a model can be built.

        Raises:
            ConfigError: names the field, its value and what would be accepted.
        """
        if self.version not in (1, 2):
            raise ConfigError(
                f"version is {self.version}; Swin has versions 1 and 2",
                "set MODEL.TYPE to swin or swinv2",
            )
        for name in ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim"):
            _require_positive(name, getattr(self, name))
        _require_positive("window_size", self.window_size)
        if not self.depths:
            raise ConfigError("depths is empty", "give at least one stage, such as (2, 2, 6, 2)")
        for name in ("depths", "num_heads"):
            for value in getattr(self, name):
                _require_positive(name, value)
        for name in ("num_heads", "pretrained_window_sizes"):
            if len(getattr(self, name)) != len(self.depths):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}: {len(getattr(self, name))} values for "
                    f"{len(self.depths)} stages (depths {self.depths})",
                    f"give one value of {name} per stage",
                )
        if min(self.pretrained_window_sizes) < 0:
            raise ConfigError(
                f"pretrained_window_sizes is {self.pretrained_window_sizes}; none may be negative",
                "use 0 for a stage whose window never changed",
            )
        if self.version == 1 and any(self.pretrained_window_sizes):
            raise ConfigError(
                f"pretrained_window_sizes is {self.pretrained_window_sizes}; version 1 has none",
                "leave them 0, or set MODEL.TYPE to swinv2",
            )
        if not SMALLEST_EPS <= self.norm_eps <= 1 or not 0 < self.mlp_ratio <= LARGEST_MLP_RATIO:
            raise ConfigError(
                f"norm_eps is {self.norm_eps}, wanted {SMALLEST_EPS:g} to 1, and mlp_ratio "
                f"{self.mlp_ratio}, wanted more than 0 and at most {LARGEST_MLP_RATIO}",
                "the official models use norm_eps 1e-5 and mlp_ratio 4",
            )
        if self.img_size % self.patch_size:
            raise ConfigError(
                f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}",
                "change DATA.IMG_SIZE",
            )
        for stage in self.stages():
            self._validate_stage(stage)

    def _validate_stage(self, stage: Stage) -> None:
        where = f"stage {stage.index}"
        if stage.resolution < 1 or stage.resolution % stage.window:
            raise ConfigError(
                f"window_size {self.window_size} does not divide the resolution "
                f"{stage.resolution} of {where} (img_size {self.img_size})",
                f"use an img_size that is a multiple of {self._img_size_step()}",
            )
        if stage.merges and stage.resolution % 2:
            raise ConfigError(
                f"{where} has resolution {stage.resolution}, which patch merging cannot halve "
                f"(img_size {self.img_size})",
                f"use an img_size that is a multiple of {self._img_size_step()}",
            )
        if stage.dim % stage.heads:
            raise ConfigError(
                f"num_heads {self.num_heads}: {stage.heads} heads do not divide the "
                f"{stage.dim} channels of {where}",
                f"the official models have 32 channels a head, so {max(stage.dim // 32, 1)} here",
            )
        if int(stage.dim * self.mlp_ratio) < 1:
            raise ConfigError(
                f"mlp_ratio {self.mlp_ratio} leaves {where} without hidden channels",
                "the official models use mlp_ratio 4",
            )

    def _img_size_step(self) -> int:
        return self.patch_size * self.window_size * 2 ** (len(self.depths) - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, booleans and lists, fit for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        """Build and validate the record that `to_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, a value has the wrong type, or the whole
                does not validate.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != set(known):
            present = set(values) if isinstance(values, dict) else set()
            raise ConfigError(
                f"architecture: unknown keys {sorted(map(str, present - set(known)))}, "
                f"missing keys {sorted(set(known) - present)}",
                "write the file again with this version of swinq",
            )
        architecture = cls(**{name: _typed(name, known[name], values[name]) for name in known})
        architecture.validate()
        return architecture

    def differences(self, other: Architecture) -> list[str]:
        """One line for each field that differs: `window_size: 7 here, 8 there`."""
        return [
            f"{field.name}: {_plain(getattr(self, field.name))} here, "
            f"{_plain(getattr(other, field.name))} there"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _require_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1", f"correct {name}")


def _typed(name: str, kind: str, value: Any) -> Any:
    """`value` as the field's type; JSON's lists become tuples, its whole numbers floats."""
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if kind == "int" and is_int:
        return value
    if kind == "float" and (is_int or isinstance(value, float)):
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "tuple[int, ...]" and isinstance(value, list | tuple):
        if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            return tuple(value)
    raise ConfigError(
        f"architecture: {name} is {value!r}, wanted {kind}",
        "write the file again with this version of swinq",
    )
