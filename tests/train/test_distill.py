"""Distillation: both losses against float64, and a teacher that never has gradients."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinq.errors import ConfigError
from swinq.models.architecture import Architecture
from swinq.quant.insert import quantize_model
from swinq.train.distill import Distillation, StageOutputs, distillation_loss, feature_loss
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def student_of(model: nn.Module) -> nn.Module:
    student = quantize_model(copy.deepcopy(model), recipe("int8"))
    set_ranges_to_maxima(student, IMAGES)
    return student


def kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """The definition, image by image, in float64."""
    total = 0.0
    for s, t in zip(student.double(), teacher.double(), strict=True):
        p = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
        q = torch.exp(s / temperature) / torch.exp(s / temperature).sum()
        total += float((p * (p / q).log()).sum())
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_logits_is_the_divergence_times_the_squared_temperature(
    temperature: float, dtype: torch.dtype
) -> None:
    student, teacher = torch.randn(5, 10).to(dtype), 2 * torch.randn(5, 10).to(dtype)
    loss = distillation_loss(student, teacher, temperature)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert float(loss) == pytest.approx(kl(student, teacher, temperature), rel=1e-4)
    assert float(distillation_loss(teacher, teacher, temperature)) == pytest.approx(0.0, abs=1e-6)


def test_the_loss_is_a_mean_over_images_and_its_gradient_keeps_its_size_when_t_grows() -> None:
    student, teacher = torch.randn(4, 1000), torch.randn(4, 1000)
    one = distillation_loss(student, teacher, 3.0)
    two = distillation_loss(student.repeat(2, 1), teacher.repeat(2, 1), 3.0)
    assert float(one) == pytest.approx(float(two), rel=1e-5)
    norms = []
    for temperature in (10.0, 40.0):
        logits = student.clone().requires_grad_()
        distillation_loss(logits, teacher, temperature).backward()
        assert logits.grad is not None
        norms.append(float(logits.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_other_classes_than_the_teachers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 10\].*\[2, 1000\]"):
        distillation_loss(torch.zeros(2, 10), torch.zeros(2, 1000), 1.0)


def test_the_loss_of_features_compares_normalised_tokens() -> None:
    ours = [torch.randn(2, 16, 8), torch.randn(2, 4, 16)]
    theirs = [torch.randn(2, 16, 8), torch.randn(2, 4, 16)]
    wanted = []
    for a, b in zip(ours, theirs, strict=True):
        a, b = (
            (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
            for x in (a.double(), b.double())
        )
        wanted.append(float((a - b).square().mean()))
    assert float(feature_loss(ours, theirs)) == pytest.approx(sum(wanted) / 2, rel=1e-5)
    moved = [3.0 * x + 5.0 for x in ours]
    assert float(feature_loss(moved, ours)) == pytest.approx(0.0, abs=1e-5)


def test_features_of_another_architecture_are_refused() -> None:
    ours, theirs = [torch.zeros(2, 16, 8)], [torch.zeros(2, 16, 12)]
    with pytest.raises(ConfigError, match=r"\[16, 8\].*\[16, 12\]") as caught:
        feature_loss(ours, theirs)
    assert "FEATURES" in caught.value.fix


@pytest.mark.parametrize("quantized_teacher", [False, True])
def test_the_teacher_computes_in_float_and_never_has_gradients(
    quantized_teacher: bool, tiny_architecture: Architecture
) -> None:
    model = tiny_swin(tiny_architecture)
    student = student_of(model).train()
    teacher = student_of(model) if quantized_teacher else copy.deepcopy(model)
    distillation = Distillation(
        teacher.train(), scale=2.0, temperature=3.0, features=0.5, compile_blocks=False
    )
    distillation.watch(student)
    lesson = distillation.teach(IMAGES)
    assert torch.equal(lesson.logits, model(IMAGES).detach())
    losses = distillation.losses(student(IMAGES), lesson)
    assert sorted(losses) == ["distillation", "features"]
    torch.stack(list(losses.values())).sum().backward()
    assert not lesson.logits.requires_grad and not any(f.requires_grad for f in lesson.features)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_the_weights_scale_the_losses_and_zero_leaves_one_out(
    tiny_architecture: Architecture,
) -> None:
    model = tiny_swin(tiny_architecture)
    student = student_of(model)
    found = {}
    for scale, features in ((1.0, 0.0), (3.0, 0.0), (0.0, 1.0), (1.0, 4.0)):
        distillation = Distillation(
            copy.deepcopy(model), scale=scale, temperature=3.0, features=features
        )
        distillation.watch(student)
        lesson = distillation.teach(IMAGES)
        losses = distillation.losses(student(IMAGES), lesson)
        found[scale, features] = {name: float(loss.detach()) for name, loss in losses.items()}
    assert list(found[1.0, 0.0]) == ["distillation"] and list(found[0.0, 1.0]) == ["features"]
    assert found[3.0, 0.0]["distillation"] == pytest.approx(3 * found[1.0, 0.0]["distillation"])
    assert found[1.0, 4.0]["features"] == pytest.approx(4 * found[0.0, 1.0]["features"])
    assert found[0.0, 1.0]["features"] > 0


def test_stage_outputs_are_the_stages_and_are_not_held_once_taken(
    tiny_architecture: Architecture,
) -> None:
    model = tiny_swin(tiny_architecture)
    outputs = StageOutputs(model)
    logits = model(IMAGES)
    taken = outputs.take()
    assert [tuple(t.shape) for t in taken] == [(2, 64, 64), (2, 64, 64)]  # merged, last
    last = model.norm(taken[1]).mean(1)
    assert torch.equal(F.linear(last, model.head.weight, model.head.bias), logits)
    held = weakref.ref(taken[0])
    del taken, last, logits
    assert held() is None and outputs.take() == []
