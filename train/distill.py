"""Distillation (Hinton et al. 2015, arXiv 1503.02531): the student learns from a teacher's outputs.

    logits:    KL(softmax(teacher / T) || softmax(student / T)) * T^2, a mean over the images
    features:  mean squared difference of each stage's normalised tokens, a mean over the stages

T^2 keeps the gradient's size when T changes. Both are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinq.errors import ConfigError
from swinq.models.layers import BasicLayer
from swinq.quant.insert import set_active
from swinq.train.parallel import compile_blocks as compile_each_block


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student's logits from the teacher's, times T^2: 0-dim fp32, nats.

    Args:
        student, teacher: logits (B, classes), any float type; no gradient goes to the teacher's.
        temperature: T, of both softmaxes.

    Raises:
        ConfigError: different numbers of classes.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"the student's logits are {list(student.shape)}, the teacher's {list(teacher.shape)}",
            "give a teacher of the same classes",
        )
    ours = F.log_softmax(student.float() / temperature, dim=-1)
    wanted = F.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return F.kl_div(ours, wanted, reduction="batchmean", log_target=True) * temperature**2


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How far the stages' tokens, each normalised to mean 0 and variance 1, lie apart: 0-dim fp32.

    Args:
        student, teacher: tokens (B, tokens, channels) of each stage; the teacher's get no gradient.

    Raises:
        ConfigError: stages of different number or sizes.
    """
    shapes = [[list(tokens.shape[1:]) for tokens in side] for side in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"the student's stages give {shapes[0]} (tokens, channels), the teacher's {shapes[1]}",
            "give a teacher of the same architecture, or set QAT.DISTILL.FEATURES to 0",
        )
    pairs = zip(student, teacher, strict=True)
    losses = [F.mse_loss(_normalised(ours), _normalised(wanted.detach())) for ours, wanted in pairs]
    return torch.stack(losses).mean()


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


class StageOutputs:
    """Keeps what the stages of a model gave in its latest forward, until it is taken."""

    def __init__(self, model: nn.Module) -> None:
        self._outputs: dict[int, Tensor] = {}
        stages = [module for module in model.modules() if isinstance(module, BasicLayer)]
        for index, stage in enumerate(stages):
            stage.register_forward_hook(self._keeper(index))

    def take(self) -> list[Tensor]:
        """Hand over the outputs (B, tokens, channels), and let go of their graph."""
        outputs, self._outputs = self._outputs, {}
        return [outputs[index] for index in sorted(outputs)]

    def _keeper(self, index: int) -> Any:  # noqa: ANN401  (a hook)
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._outputs[index] = output

        return keep


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a batch: logits (B, classes), and its stages' outputs if wanted."""

    logits: Tensor
    features: list[Tensor]


class Distillation:
    """A teacher, and the weighted losses of a student that learns from it."""

    def __init__(
        self,
        teacher: nn.Module,
        *,
        scale: float,
        temperature: float,
        features: float = 0.0,
        compile_blocks: bool = False,
    ) -> None:
        """Take over a float model, or a quantized one that from now on computes in float.

        Args:
            teacher: nobody else's; its parameters will never have gradients.
            scale, features: weights of the losses of logits and features; 0 leaves one out.
            temperature: of the loss of logits.
        """
        self.scale, self.temperature, self.features = scale, temperature, features
        self.teacher = set_active(teacher, False).eval().requires_grad_(False)
        self._taught = StageOutputs(self.teacher) if features else None
        self._learned: StageOutputs | None = None
        if compile_blocks:
            compile_each_block(self.teacher)

    def watch(self, student: nn.Module) -> None:
        """Compare this student's features, if features are compared."""
        if self.features:
            self._learned = StageOutputs(student)

    @torch.no_grad()
    def teach(self, images: Tensor) -> Lesson:
        """The teacher's outputs for images (B, 3, S, S), in the autocast that is on."""
        logits = self.teacher(images).float()
        return Lesson(logits, self._taught.take() if self._taught else [])

    def losses(self, logits: Tensor, lesson: Lesson) -> dict[str, Tensor]:
        """The weighted losses of the student's latest forward, 0-dim fp32 each."""
        found: dict[str, Tensor] = {}
        if self.scale:
            loss = distillation_loss(logits, lesson.logits, self.temperature)
            found["distillation"] = self.scale * loss
        if self._learned is not None:
            found["features"] = self.features * feature_loss(self._learned.take(), lesson.features)
        return found
