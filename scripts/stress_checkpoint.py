"""Makes hard variants of a checkpoint, to see what quantization does with them.

    python scripts/stress_checkpoint.py swin.pth out.safetensors --rescale-norms 0
    python scripts/stress_checkpoint.py swinv2.pth out.safetensors --logit-scale 100

--rescale-norms multiplies the outputs of every LayerNorm that feeds a Linear, channel by channel,
by factors between 1/16 and 16, and divides the Linear's columns by them: the float function stays
the same, and one scale per tensor fits none of the channels (Swin v1, whose norms feed Linears).
--logit-scale sets the temperature of all of Swin v2's heads, 100 being the most that it allows.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from swinq.errors import ConfigError, SwinqError
from swinq.export.format import encode
from swinq.models.checkpoint import LoadedCheckpoint, load_checkpoint

OCTAVES = 4.0  # channels differ by at most 2**-4 to 2**4
_NORM_OF = {"attn.qkv": "norm1", "mlp.fc1": "norm2", "downsample.reduction": "downsample.norm"}


def rescale_norms(state: dict[str, Tensor], seed: int) -> None:
    """Rescale the channels between LayerNorm and Linear, in place; exact up to fp32 rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name in [n for n in state if n.endswith(".weight")]:
        for linear, norm in _NORM_OF.items():
            if name.endswith(f".{linear}.weight"):
                before = name.removesuffix(f"{linear}.weight") + norm
                octaves = torch.rand(state[name].shape[1], generator=generator) * 2 - 1
                factor = torch.exp2(octaves * OCTAVES)
                state[f"{before}.weight"] *= factor
                state[f"{before}.bias"] *= factor
                state[name] /= factor


def set_logit_scale(state: dict[str, Tensor], scale: float) -> None:
    """Give all heads of a Swin v2 one temperature, in place."""
    for name, tensor in state.items():
        if name.endswith(".logit_scale"):
            tensor.fill_(math.log(scale))


def stressed(loaded: LoadedCheckpoint, rescale_seed: int | None, scale: float | None) -> None:
    """Apply what was asked for to the loaded weights, in place.

    Raises:
        ConfigError: the model's version has nothing to change.
    """
    version = loaded.architecture.version if loaded.architecture else 0
    if (scale is not None and version != 2) or (rescale_seed is not None and version != 1):
        raise ConfigError(
            f"{loaded.source} is a Swin v{version}",
            "--logit-scale is for v2, --rescale-norms for v1",
        )
    if rescale_seed is not None:
        rescale_norms(loaded.state, rescale_seed)
    if scale is not None:
        set_logit_scale(loaded.state, scale)


def main() -> int:
    """Read, change, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--rescale-norms", type=int, metavar="SEED")
    parser.add_argument("--logit-scale", type=float, metavar="SCALE")
    args = parser.parse_args()
    try:
        loaded = load_checkpoint(args.source)
        stressed(loaded, args.rescale_norms, args.logit_scale)
    except SwinqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    assert loaded.architecture is not None
    metadata = {
        "format": "pt",
        "architecture": encode(loaded.architecture.to_dict()),
        "classes": encode(loaded.classes),
    }
    save_file(loaded.state, args.target, metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
