"""AdamW with Swin's parameter groups, and a cosine schedule: a function of the step alone."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW

from swinq.train.settings import Settings

# microsoft/Swin-Transformer's no_weight_decay_keywords, of both versions
NEVER_DECAYED = ("relative_position_bias_table", "cpb_mlp", "logit_scale")


def build_optimizer(model: nn.Module, settings: Settings) -> AdamW:
    """AdamW over three groups: decayed weights, everything else, and learned ranges.

    As in the official training, biases, norms and all that have one axis are not decayed, nor are
    position biases and logit scales. Ranges have a rate of their own and no decay.

    Args:
        model: wrapped already, if it is to be: its parameters are those that are optimised.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    ranged: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(".log_amax"):
            ranged.append(parameter)
        elif parameter.ndim <= 1 or any(word in name for word in NEVER_DECAYED):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "weight_decay": settings.weight_decay},
        {"name": "plain", "params": plain, "weight_decay": 0.0},
        {"name": "ranges", "params": ranged, "weight_decay": 0.0, "lr": settings.range_rate},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=settings.rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=decayed[0].is_cuda,
    )


class Schedule:
    """Sets every group's rate at a step: a linear rise, then a cosine down to the minimum.

    The ranges' rate becomes 0 for the last share of the steps, so that the weights settle on them.
    """

    def __init__(self, optimizer: AdamW, total: int, settings: Settings) -> None:
        """Attach to an optimiser whose groups hold their peak rates; ``total`` is in steps."""
        self.optimizer = optimizer
        self.fixed_from = round(settings.fix_ranges * total)
        warmup = round(settings.warmup * total)
        self._cosine = CosineLRScheduler(
            optimizer,
            t_initial=max(total - warmup, 1),
            lr_min=settings.min_rate * settings.rate,
            warmup_t=warmup,
            warmup_lr_init=settings.min_rate * settings.rate,
            warmup_prefix=True,
            t_in_epochs=False,
        )

    def set(self, step: int) -> float:
        """Set the rates of step ``step``, from 0; return that of the weights."""
        self._cosine.step_update(step)
        for group in self.optimizer.param_groups:
            if group["name"] == "ranges" and step >= self.fixed_from:
                group["lr"] = 0.0
        return float(self.optimizer.param_groups[0]["lr"])


def parameters_of(optimizer: AdamW, *, ranges: bool) -> list[torch.Tensor]:
    """The learned ranges, or all other parameters: their gradient is clipped apart from ranges'."""
    return [
        parameter
        for group in optimizer.param_groups
        if (group["name"] == "ranges") is ranges
        for parameter in group["params"]
    ]
