"""Tiny Swins whose every part matters: v2's norms start at 0, which would hide its blocks."""

from torch import nn

from swinq.models.architecture import Architecture
from swinq.models.build import build_model


def tiny_swin(architecture: Architecture) -> nn.Module:
    """A float model in eval mode, its norms and biases drawn at random."""
    model = build_model(architecture).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.05)
    return model
