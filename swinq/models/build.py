"""From an Architecture to a float model."""

from __future__ import annotations

from swinq.models.architecture import Architecture
from swinq.models.layers import SwinBase
from swinq.models.swin import SwinTransformer
from swinq.models.swin_v2 import SwinTransformerV2

MODELS: dict[int, type[SwinTransformer] | type[SwinTransformerV2]] = {
    1: SwinTransformer,
    2: SwinTransformerV2,
}


def build_model(arch: Architecture, drop_path_rate: float = 0.0) -> SwinBase:
    """The float model of an architecture, freshly initialised, in training mode.

    Raises:
        ConfigError: the architecture does not validate.
    """
    arch.validate()
    return MODELS[arch.version](arch, drop_path_rate)
