"""Random weights that make every part of a Swin matter, and tiny models with them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

if TYPE_CHECKING:
    from swinq.models.architecture import Architecture
    from swinq.models.layers import SwinBase


def _randomise(model: nn.Module) -> nn.Module:
    """Norms around 1 (version 2 starts them at 0), wide biases, one temperature past the clamp.

    Temperatures near the clamp everywhere would make a deep model amplify the rounding of fp32
    itself to 3e-5 (against fp64, timm's as much as ours); up to 33 leaves 2e-6.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.uniform_(1.0, 3.5)
                if name.startswith("layers.1.blocks.0."):
                    parameter[0] = 5.0  # the clamp is at ln 100 = 4.6
            elif name.endswith("relative_position_bias_table"):
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(mean=1.0, std=0.2)
            else:
                parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def randomise() -> Callable[[nn.Module], nn.Module]:
    return _randomise


@pytest.fixture
def tiny_model(tiny_architecture: "Architecture") -> "SwinBase":
    """A random two-stage Swin v1."""
    from swinq.models.build import build_model

    model = build_model(tiny_architecture)
    _randomise(model)
    return model


@pytest.fixture
def tiny_model_v2(tiny_architecture_v2: "Architecture") -> "SwinBase":
    """A random two-stage Swin v2."""
    from swinq.models.build import build_model

    model = build_model(tiny_architecture_v2)
    _randomise(model)
    return model
