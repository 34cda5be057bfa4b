"""The 27 official models: YAML files, names, parameter counts, all buildable."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.variants import (
    ALIASES,
    VARIANTS,
    find_variant,
    nearest_variant,
    variant_in,
    variant_name,
)

# millions of parameters, as published (model hub of microsoft/Swin-Transformer, 1000 classes)
PUBLISHED = {
    "swin_tiny_patch4_window7_224": 28,
    "swin_small_patch4_window7_224": 50,
    "swin_base_patch4_window7_224": 88,
    "swin_base_patch4_window12_384_finetune": 88,
    "swin_large_patch4_window7_224_22kto1k_finetune": 197,
    "swin_large_patch4_window12_384_22kto1k_finetune": 197,
    "swin_tiny_c24_patch4_window8_256": 28,
    "swinv2_tiny_patch4_window8_256": 28,
    "swinv2_small_patch4_window16_256": 50,
    "swinv2_base_patch4_window8_256": 88,
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": 88,
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": 197,
}


def timm_name(name: str) -> str:
    """What timm calls an official model."""
    name = name.replace("_22kto1k_finetune", "").replace("_finetune", "")
    name = name.removesuffix("_22kto1k_ft").removesuffix("_22k")
    return name.replace("_patch4", "") if name.startswith("swinv2") else name


def _described(config: dict[str, Any]) -> Architecture:
    """The architecture of an official YAML file, with the defaults of microsoft's config.py."""
    model = config["MODEL"]
    version = {"swin": 1, "swinv2": 2}[model["TYPE"]]
    section = model[{1: "SWIN", 2: "SWINV2"}[version]]
    return Architecture(
        version=version,
        img_size=config.get("DATA", {}).get("IMG_SIZE", 224),
        patch_size=section.get("PATCH_SIZE", 4),
        in_chans=section.get("IN_CHANS", 3),
        num_classes=model.get("NUM_CLASSES", 1000),
        embed_dim=section["EMBED_DIM"],
        depths=tuple(section["DEPTHS"]),
        num_heads=tuple(section["NUM_HEADS"]),
        window_size=section.get("WINDOW_SIZE", 7),
        mlp_ratio=section.get("MLP_RATIO", 4.0),
        qkv_bias=section.get("QKV_BIAS", True),
        pretrained_window_sizes=tuple(section.get("PRETRAINED_WINDOW_SIZES", [0, 0, 0, 0])),
        norm_eps=1e-5,
    )


def test_each_official_model_has_one_yaml_file_and_no_file_is_left_over(repo_root: Path) -> None:
    files = [*repo_root.glob("configs/swin/*.yaml"), *repo_root.glob("configs/swinv2/*.yaml")]
    assert sorted(path.stem for path in files) == sorted(VARIANTS)
    assert len(VARIANTS) == 27


@pytest.mark.parametrize("name", VARIANTS)
def test_yaml_describes_exactly_the_architecture(repo_root: Path, name: str) -> None:
    arch = VARIANTS[name]
    folder = "swin" if arch.version == 1 else "swinv2"
    config = yaml.safe_load((repo_root / "configs" / folder / f"{name}.yaml").read_text())
    assert _described(config) == arch
    assert config["MODEL"]["NAME"] == name
    crops = config.get("TEST", {}).get("CROP", True)
    assert crops == (arch.img_size != 384)
    numbers = config.get("TRAIN", {}).values()
    assert all(isinstance(value, int | float) for value in numbers)


@pytest.mark.parametrize("name", VARIANTS)
def test_builds_on_the_meta_device_with_the_published_size(name: str) -> None:
    with torch.device("meta"):
        model = build_model(VARIANTS[name])
        count = sum(parameter.numel() for parameter in model.parameters())
        if timm.is_model(timm_name(name)):
            oracle = timm.create_model(timm_name(name), num_classes=VARIANTS[name].num_classes)
            assert count == sum(parameter.numel() for parameter in oracle.parameters())
    if name in PUBLISHED:
        assert abs(count / 1e6 - PUBLISHED[name]) < 1
    size = VARIANTS[name].img_size
    logits = model(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, VARIANTS[name].num_classes)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224"),
        ("timm/swin_base_patch4_window7_224.ms_in22k", "swin_base_patch4_window7_224_22k"),
        (
            "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
            "swin_base_patch4_window7_224_22kto1k_finetune",
        ),
        ("swin_base_patch4_window12_384", "swin_base_patch4_window12_384_finetune"),
        ("swinv2_tiny_window8_256.ms_in1k", "swinv2_tiny_patch4_window8_256"),
        (
            "swinv2_large_window12to24_192to384",
            "swinv2_large_patch4_window12to24_192to384_22kto1k_ft",
        ),
        ("microsoft/swinv2-base-patch4-window12-192-22k", "swinv2_base_patch4_window12_192_22k"),
        ("swin_v2_b", "swinv2_base_patch4_window8_256"),
        ("resnet50", None),
    ],
)
def test_names_of_other_libraries_find_the_official_model(name: str, official: str | None) -> None:
    assert variant_name(name) == official
    assert find_variant(name) == (None if official is None else VARIANTS[official])


def test_every_alias_of_timm_is_a_model_of_timm_with_the_same_sizes() -> None:
    for alias, official in ALIASES.items():
        if timm.is_model(alias):
            assert timm_name(official) == alias


@pytest.mark.parametrize(
    ("text", "official"),
    [
        ("swinv2_tiny_patch4_window8_256_imagenette.pth", "swinv2_tiny_patch4_window8_256"),
        (
            "my-swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth",
            "swinv2_base_patch4_window12to16_192to256_22kto1k_ft",
        ),
        ("swin_t-704ceda3.pth", "swin_tiny_patch4_window7_224"),
        ("swin_table.pth", None),
        ("checkpoint.pth", None),
    ],
)
def test_the_longest_known_name_in_a_file_name_is_found(text: str, official: str | None) -> None:
    assert variant_in(text) == official


@pytest.mark.parametrize("name", VARIANTS)
def test_the_nearest_variant_of_an_official_model_has_its_architecture(name: str) -> None:
    assert VARIANTS[nearest_variant(VARIANTS[name])] == VARIANTS[name]
