"""Distributions that activations have, and some that they should not have but do."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

COUNT = 6000


def _normal(*shape: int) -> Tensor:
    return torch.randn(*(shape or (COUNT,)))


def _with(x: Tensor, *outliers: float) -> Tensor:
    return torch.cat([x, torch.tensor(outliers)])


def _sparse(share: float) -> Tensor:
    return _normal() * (torch.rand(COUNT) < share)


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": _normal,
    "wide normal": lambda: 37.3 * _normal(),
    "laplace": lambda: _normal().sign() * torch.empty(COUNT).exponential_(),
    "cauchy": lambda: torch.empty(COUNT).cauchy_(),
    "student, 3 degrees": lambda: _normal() / _normal(3, COUNT).square().mean(0).sqrt(),
    "log-normal": lambda: (1.5 * _normal()).exp(),
    "gelu": lambda: F.gelu(2 * _normal()),
    "relu": lambda: F.relu(_normal()),
    "softmax": lambda: (3 * _normal(COUNT // 49, 49)).softmax(-1).flatten(),
    "layer norm": lambda: F.layer_norm(_normal(COUNT // 96, 96) ** 3, (96,)).flatten(),
    "normalised": lambda: F.normalize(_normal(COUNT // 32, 32), dim=-1).flatten(),
    "uniform": lambda: torch.rand(COUNT),
    "uniform, far from 0": lambda: 5 + torch.rand(COUNT),
    "triangular": lambda: torch.rand(COUNT) - torch.rand(COUNT),
    "bimodal": lambda: torch.cat([1 + 0.1 * _normal(), 8 + 0.2 * _normal()]),
    "three lumps": lambda: torch.cat([_normal() * 0.01, 1 + 0.01 * _normal(), _normal() + 30]),
    "one outlier": lambda: _with(_normal(), 100.0),
    "many outliers": lambda: _with(_normal(), *(50.0 + i for i in range(20))),
    "huge outlier": lambda: _with(_normal(), -20000.0),
    "constant": lambda: torch.full((COUNT,), 3.7),
    "power of two": lambda: torch.full((COUNT,), -1.0),
    "two values": lambda: torch.tensor([0.25, -6.0]).repeat(COUNT // 2),
    "sparse": lambda: _sparse(0.05),
    "very sparse": lambda: _sparse(0.002),
    "integers": lambda: torch.randint(-9, 10, (COUNT,)).float(),
    "negative": lambda: -torch.rand(COUNT).square(),
    "tiny": lambda: 1e-20 * _normal(),
    "huge": lambda: 1e30 * _normal(),
    "one value": lambda: torch.tensor([0.3]),
}


def sample(name: str) -> Tensor:
    """The named distribution's values, fp32, the same ones each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        return DISTRIBUTIONS[name]()
