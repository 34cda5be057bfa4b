"""Int8Module: a model of either engine as an nn.Module of one operator, for compile and export."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from swinq.errors import ConfigError
from swinq.int8 import ops
from swinq.int8.choice import IntegerModel

_numbers = itertools.count()


class Int8Module(nn.Module):
    """Images to logits through torch.ops.swinq.forward.

    Works under torch.compile(fullgraph=True) and torch.export. A graph holds the model's name, not
    its weights: whoever runs it keeps an Int8Module of that name alive.

    Attributes:
        model: the `CudaSwin` or `Int8Swin`. name: what graphs call it.
    """

    def __init__(self, model: IntegerModel, name: str = "", *, check: bool = True) -> None:
        """Give a model a name.

        Args:
            model: from `swinq.load` of an INT8 checkpoint, or from `swinq.cuda_model`.
            name: one of its own in this process; a number is taken if it is empty.
            check: refuse NaN after each forward; False for CUDA graphs, mode="reduce-overhead".

        Raises:
            ConfigError: another model has that name.
        """
        super().__init__()
        name = name or f"model {next(_numbers)}"
        if ops.MODELS.get(name, model) is not model:
            raise ConfigError(f"another model is called {name!r}", "choose another name")
        ops.MODELS[name] = model
        self.model, self.name = model, name
        self.check, self.classes = check, model.arch.num_classes

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_chans, S, S) on the model's device -> (B, classes) fp32."""
        logits: Tensor = torch.ops.swinq.forward(images, self.name, self.classes, self.check)
        return logits
