"""The weights' exponential moving average (EMA), which is judged and exported in their place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swinq.train.parallel import local, placed, whole


class Average:
    """Running averages of every parameter, learned ranges included, sharded as they are.

    timm's ModelEma copies the whole module, which a sharded or compiled one does not allow; the
    warm-up of the decay, (1 + step) / (10 + step) at first, is the one it takes from TensorFlow.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start from the parameters as they are; ``decay`` in (0, 1) is kept per step."""
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._averages = {n: p.detach().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step ``step``, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [local(tensor) for tensor in self._averages.values()]
        current = [local(parameter.detach()) for parameter in self._parameters.values()]
        torch._foreach_lerp_(averages, current, 1.0 - decay)

    def named(self) -> dict[str, Tensor]:
        """The averages where they lie, as average.<parameter>."""
        return {f"average.{name}": tensor for name, tensor in self._averages.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, whole, on the CPU; every rank calls this."""
        return {name: whole(tensor) for name, tensor in self._averages.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave."""
        for name, average in self._averages.items():
            average.copy_(placed(tensors[name], average))
