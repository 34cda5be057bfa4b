"""The shipped micro-Swin: what its file says of itself is true, and its script repeats itself."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from swinq.data.datasets import open_dataset
from swinq.data.sampling import sample_digest
from swinq.data.transforms import EvalTransform, eval_transform
from swinq.demo.checkpoint import CHECKPOINT
from swinq.evaluate import evaluate
from swinq.models.architecture import Architecture
from swinq.models.build import build_model

MIN_TOP1_PERCENT = 97.0
MIN_HELD_OUT_IMAGES = 300


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    """What the file says of itself, JSON values decoded."""
    with safe_open(CHECKPOINT, "pt") as file:
        text = file.metadata()
    structured = ("architecture", "classes", "transform", "held_out_result")
    return {key: json.loads(text[key]) if key in structured else text[key] for key in text}


@pytest.fixture(scope="module")
def training_script(repo_root: Path) -> ModuleType:
    """scripts/train_demo.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "train_demo", repo_root / "scripts" / "train_demo.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_weights_give_the_recorded_accuracy(metadata: dict[str, Any]) -> None:
    model = build_model(Architecture.from_dict(metadata["architecture"])).eval()
    model.load_state_dict({k: v.float() for k, v in load_file(CHECKPOINT).items()}, strict=True)
    held_out = open_dataset("digits", "val", EvalTransform.from_dict(metadata["transform"]))
    scores = evaluate(model, held_out, batch_size=64, device="cpu").scores()
    assert held_out.classes == metadata["classes"]
    assert scores.images == metadata["held_out_result"]["images"] >= MIN_HELD_OUT_IMAGES
    # one image may sit on the edge, on another processor
    assert abs(scores.top1 - metadata["held_out_result"]["top1"]) <= 1
    assert scores.top1_percent >= MIN_TOP1_PERCENT


def test_no_held_out_digit_was_trained_on(metadata: dict[str, Any]) -> None:
    transform = EvalTransform.from_dict(metadata["transform"])
    train = open_dataset("digits", "train", transform)
    held_out = open_dataset("digits", "val", transform)
    digest = sample_digest(train, range(len(train)))
    assert digest == metadata["training_sample_sha256"], "the split has moved: train the demo anew"
    numbers = [{d.path(i).split("_")[-1] for i in range(len(d))} for d in (train, held_out)]
    assert not numbers[0] & numbers[1]


def test_micro_swin_has_every_part_of_a_swin(metadata: dict[str, Any]) -> None:
    architecture = Architecture.from_dict(metadata["architecture"])
    stages = architecture.stages()
    assert set(architecture.head_dims()) == {32}
    assert stages[0].shift > 0
    assert stages[0].depth > 1, "the shifted block is the second one"
    assert stages[0].merges


def test_recorded_command_is_the_training_script(
    metadata: dict[str, Any], repo_root: Path, training_script: ModuleType
) -> None:
    words = metadata["command"].split()
    assert (repo_root / words[words.index("python") + 1]).is_file()
    assert training_script.ARCHITECTURE.to_dict() == metadata["architecture"]


def test_configuration_describes_the_shipped_model(
    metadata: dict[str, Any], repo_root: Path
) -> None:
    config = yaml.safe_load((repo_root / "configs" / "demo.yaml").read_text())
    architecture = Architecture.from_dict(metadata["architecture"])
    sizes = config["MODEL"]["SWIN"]
    assert config["DATA"]["DATA_PATH"] == "digits"
    assert config["DATA"]["IMG_SIZE"] == architecture.img_size
    assert config["MODEL"]["NUM_CLASSES"] == architecture.num_classes == len(metadata["classes"])
    for key, value in sizes.items():
        field = getattr(architecture, key.lower())
        assert value == (list(field) if isinstance(field, tuple) else field), key
    transform = eval_transform(
        config["EVAL"]["TRANSFORM"], architecture.img_size, config["TEST"]["CROP"]
    )
    assert transform.to_dict() == metadata["transform"]


def test_training_with_the_same_seed_gives_the_same_weights(training_script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 32, 32, generator=generator)
    labels = torch.arange(64) % 10
    options: dict[str, int] = {"epochs": 4, "batch_size": 32, "seed": 3}
    first, again = (training_script.train(images, labels, **options) for _ in range(2))
    other = training_script.train(images, labels, **{**options, "seed": 4})
    assert not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(first.head.weight, other.head.weight)


def test_augmentation_moves_every_image_its_own_way(training_script: ModuleType) -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[..., 12:20, 12:20] = 1.0
    moved = training_script.augment(image.repeat(4, 1, 1, 1), torch.Generator().manual_seed(0))
    assert moved.shape == (4, 3, 32, 32)
    assert all(not torch.equal(moved[0], moved[i]) for i in range(1, 4))
    mass = moved.sum(dim=(1, 2, 3)) / image.sum()
    assert ((mass > 0.7) & (mass < 1.4)).all(), "a digit must not leave the picture"
