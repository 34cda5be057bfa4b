"""Calibrates tiny Swins on this rank's share of images and saves every tensor that was found.

[torchrun --nproc_per_node N] tests/calib/rank_job.py FOLDER
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from swinq import distributed
from swinq.calib.calibrate import calibrate
from swinq.models.architecture import Architecture
from swinq.quant.insert import named_quantizers, quantize_model, quantized_layers
from swinq.quant.linear import QuantLinear
from tests.conftest import _tiny
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin

IMAGES = 21


def job(architecture: Architecture, method: str, images: int) -> dict[str, Tensor]:
    """Calibrate and return ranges, histograms, vectors, corrections and residual maxima."""
    torch.manual_seed(1)
    model = quantize_model(tiny_swin(architecture), recipe("int8", BIAS_CORRECTION=True))
    every = torch.randn(images, 3, 32, 32) * torch.linspace(0.2, 3.0, images).view(-1, 1, 1, 1)
    result = calibrate(model, every[distributed.rank() :: distributed.world_size()], method=method)
    assert result.images == images
    found = {name: q.amax for name, q in named_quantizers(model).items() if q.calibrated}
    found |= {f"{name}/histogram": counts for name, counts in result.histograms.items()}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, QuantLinear):
            found[f"{name}/bias correction"] = layer.bias_correction
    found["residual"] = torch.tensor(list(result.residual_max.values()))
    found["vectors"] = torch.tensor(list(result.vectors.values()))
    return found


def main() -> None:
    """Two versions of Swin on many images, and one on fewer images than ranks."""
    distributed.init("gloo")
    found = {
        "v1": job(_tiny(version=1), "entropy", IMAGES),
        "v2": job(_tiny(version=2), "mse", IMAGES),
        "one image": job(_tiny(version=1), "percentile", 1),
    }
    torch.save(found, Path(sys.argv[1], f"{distributed.rank()}.pt"))
    distributed.shutdown()


if __name__ == "__main__":
    main()
