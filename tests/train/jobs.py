"""Tiny QAT jobs on made-up images: what the tests of the loop run, alone or on several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swinq import distributed
from swinq.calib.calibrate import calibrate
from swinq.data.augment import Augmented, train_transform
from swinq.data.datasets import open_dataset
from swinq.data.mixing import Mixing
from swinq.models.layers import SwinBase
from swinq.quant.insert import quantize_model
from swinq.train.distill import Distillation
from swinq.train.monitor import Monitor
from swinq.train.qat import Progress, Surroundings, train
from swinq.train.settings import Settings
from swinq.train.state import CheckpointFolder
from tests.conftest import _tiny
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin

IMAGES = 16
SETTINGS = Settings(
    epochs=2,
    seed=0,
    batch=4,
    accumulation=1,
    rate=1e-3,
    warmup=0.25,
    min_rate=0.01,
    weight_decay=0.05,
    betas=(0.9, 0.999),
    eps=1e-8,
    clip=5.0,
    learned=("output",),
    range_rate=1e-2,
    fix_ranges=1.0,
    ema=0.0,
    amp="fp32",
    drop_path=0.0,
    checkpointing=False,
    compile_blocks=False,
    cuda_graphs=False,
    parallel="ddp",
    deterministic=False,
    eval_epochs=1,
    save_steps=100,
    print_steps=1,
    distill=0.0,
    labels=1.0,
    temperature=3.0,
    features=0.0,
)


def tiny_calibrated(version: int = 1, seed: int = 1) -> SwinBase:
    """A calibrated tiny Swin with seeded weights."""
    torch.manual_seed(seed)
    model = quantize_model(tiny_swin(_tiny(version)), recipe("int8"))
    images = torch.randn(8, 3, 32, 32)
    calibrate(model, images[distributed.rank() :: distributed.world_size()])
    return model  # type: ignore[return-value]


class Judge:
    """Stands for the validation: gives scripted accuracies and remembers what it was shown."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores) or [50.0]
        self.seen: list[dict[str, torch.Tensor]] = []
        self.kept: list[dict[str, torch.Tensor]] = []

    def judge(self, model: nn.Module) -> float:
        self.seen.append({n: t.clone() for n, t in model.state_dict().items()})
        return self.scores[min(len(self.seen), len(self.scores)) - 1]

    def keep(self, model: nn.Module, step: int, top1: float) -> bool:
        self.kept.append({n: t.clone() for n, t in model.state_dict().items()})
        return True


def run_job(
    folder: Path,
    model: SwinBase,
    judge: Judge | None = None,
    *,
    augment: bool = True,
    distillation: Distillation | None = None,
    device: str = "cpu",
    **changes: Any,
) -> Progress:
    """Train a model in place with changes to SETTINGS."""
    settings = replace(SETTINGS, **changes)
    judge = judge or Judge()
    plain: dict[str, Any] = {"auto_augment": "none", "color_jitter": 0.0, "reprob": 0.0}
    transform = train_transform(32, squash=True, **({} if augment else plain))
    images = open_dataset(f"fake:{IMAGES}", "train", transform, num_classes=10)
    around = Surroundings(
        images=Augmented(images, settings.seed),
        mixing=Mixing(10, seed=settings.seed, **({} if augment else {"mixup": 0.0, "cutmix": 0.0})),
        distillation=distillation,
        workers=0,
        device=torch.device(device),
        folder=CheckpointFolder(folder / "training"),
        monitor=Monitor(
            None, total_steps=8, steps_per_epoch=4, images_per_step=4, print_every=1000
        ),
        identity={"model": "tiny"},
        judge=judge.judge,
        keep=judge.keep,
    )
    return train(model, around, settings)
