"""The 27 official models by name, and the other names they are known by.

A row here and a YAML file of the same name in configs/ describe the same model; a test compares
them. timm, torchvision and the released files spell the names differently: ALIASES has those.
"""

from __future__ import annotations

import re

from swinq.models.architecture import Architecture

IMAGENET_1K = 1000
IMAGENET_22K = 21841

# size: (embed_dim, depths, num_heads)
_SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "tiny_c24": (96, (2, 2, 6, 2), (4, 8, 16, 32)),  # 24 channels a head, the others have 32
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_NO_PRETRAINING = (0, 0, 0, 0)
_FROM_WINDOW_12 = (12, 12, 12, 6)  # pretrained on 192 x 192 images, whose last stage is 6 x 6


def _row(
    version: int,
    size: str,
    img_size: int,
    window_size: int,
    num_classes: int = IMAGENET_1K,
    pretrained: tuple[int, ...] = _NO_PRETRAINING,
) -> Architecture:
    embed_dim, depths, num_heads = _SIZES[size]
    return Architecture(
        version=version,
        img_size=img_size,
        patch_size=4,
        in_chans=3,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_size,
        mlp_ratio=4.0,
        qkv_bias=True,
        pretrained_window_sizes=pretrained,
        norm_eps=1e-5,
    )


VARIANTS: dict[str, Architecture] = {
    "swin_tiny_patch4_window7_224": _row(1, "tiny", 224, 7),
    "swin_tiny_patch4_window7_224_22k": _row(1, "tiny", 224, 7, IMAGENET_22K),
    "swin_tiny_patch4_window7_224_22kto1k_finetune": _row(1, "tiny", 224, 7),
    "swin_tiny_c24_patch4_window8_256": _row(1, "tiny_c24", 256, 8),
    "swin_small_patch4_window7_224": _row(1, "small", 224, 7),
    "swin_small_patch4_window7_224_22k": _row(1, "small", 224, 7, IMAGENET_22K),
    "swin_small_patch4_window7_224_22kto1k_finetune": _row(1, "small", 224, 7),
    "swin_base_patch4_window7_224": _row(1, "base", 224, 7),
    "swin_base_patch4_window7_224_22k": _row(1, "base", 224, 7, IMAGENET_22K),
    "swin_base_patch4_window7_224_22kto1k_finetune": _row(1, "base", 224, 7),
    "swin_base_patch4_window12_384_finetune": _row(1, "base", 384, 12),
    "swin_base_patch4_window12_384_22kto1k_finetune": _row(1, "base", 384, 12),
    "swin_large_patch4_window7_224_22k": _row(1, "large", 224, 7, IMAGENET_22K),
    "swin_large_patch4_window7_224_22kto1k_finetune": _row(1, "large", 224, 7),
    "swin_large_patch4_window12_384_22kto1k_finetune": _row(1, "large", 384, 12),
    "swinv2_tiny_patch4_window8_256": _row(2, "tiny", 256, 8),
    "swinv2_small_patch4_window8_256": _row(2, "small", 256, 8),
    "swinv2_base_patch4_window8_256": _row(2, "base", 256, 8),
    "swinv2_tiny_patch4_window16_256": _row(2, "tiny", 256, 16),
    "swinv2_small_patch4_window16_256": _row(2, "small", 256, 16),
    "swinv2_base_patch4_window16_256": _row(2, "base", 256, 16),
    "swinv2_base_patch4_window12_192_22k": _row(2, "base", 192, 12, IMAGENET_22K),
    "swinv2_large_patch4_window12_192_22k": _row(2, "large", 192, 12, IMAGENET_22K),
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": _row(
        2, "base", 256, 16, pretrained=_FROM_WINDOW_12
    ),
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft": _row(
        2, "large", 256, 16, pretrained=_FROM_WINDOW_12
    ),
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": _row(
        2, "base", 384, 24, pretrained=_FROM_WINDOW_12
    ),
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": _row(
        2, "large", 384, 24, pretrained=_FROM_WINDOW_12
    ),
}

ALIASES: dict[str, str] = {
    # torchvision
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_patch4_window8_256",
    "swin_v2_s": "swinv2_small_patch4_window8_256",
    "swin_v2_b": "swinv2_base_patch4_window8_256",
    # timm, and files released without the `_finetune` of their configuration
    "swin_base_patch4_window12_384": "swin_base_patch4_window12_384_finetune",
    "swin_large_patch4_window7_224": "swin_large_patch4_window7_224_22kto1k_finetune",
    "swin_large_patch4_window12_384": "swin_large_patch4_window12_384_22kto1k_finetune",
    **{
        name.removesuffix("_finetune"): name
        for name in VARIANTS
        if name.endswith("_22kto1k_finetune")
    },
    # timm leaves out the patch size, and the training data, of version 2
    **{
        name.replace("_patch4", "").removesuffix("_22kto1k_ft").removesuffix("_22k"): name
        for name in VARIANTS
        if name.startswith("swinv2")
    },
}

_KNOWN = {**{name: name for name in VARIANTS}, **ALIASES}


def variant_name(name: str) -> str | None:
    """The official name of a model known by any of its names; None if it is unknown.

    Accepts hub prefixes (`timm/...`), timm's tags (`.ms_in22k`) and hyphens for underscores.
    """
    plain, _, tag = name.strip().lower().rsplit("/", 1)[-1].replace("-", "_").partition(".")
    if tag == "ms_in22k":
        return _KNOWN.get(f"{plain}_22k", _KNOWN.get(plain))
    if tag == "ms_in22k_ft_in1k":
        return _KNOWN.get(f"{plain}_22kto1k_finetune", _KNOWN.get(plain))
    return _KNOWN.get(plain)


def find_variant(name: str) -> Architecture | None:
    """The architecture of a model known by any of its names; None if it is unknown."""
    official = variant_name(name)
    return None if official is None else VARIANTS[official]


def variant_in(text: str) -> str | None:
    """The official name of the longest known name that stands in a text, such as a file name."""
    plain = text.lower().replace("-", "_")
    found = (
        known
        for known in sorted(_KNOWN, key=len, reverse=True)
        if re.search(rf"(?<![a-z0-9]){known}(?![a-z0-9])", plain)
    )
    longest = next(found, None)
    return None if longest is None else _KNOWN[longest]


def nearest_variant(arch: Architecture) -> str:
    """The official name with the fewest fields that differ; the number of classes counts least."""

    def distance(name: str) -> tuple[int, bool]:
        differing = {line.split(":")[0] for line in arch.differences(VARIANTS[name])}
        return len(differing - {"num_classes"}), "num_classes" in differing

    return min(VARIANTS, key=distance)
