"""The Architecture record: effective windows, checks with names and fixes, JSON, differences."""

import json
from dataclasses import replace

import pytest

from swinq.errors import ConfigError
from swinq.models.architecture import Architecture
from swinq.models.variants import VARIANTS

# (img_size, window_size) -> windows and shifts that microsoft's block code ends up with
EFFECTIVE = {
    (224, 7): ((7, 7, 7, 7), (3, 3, 3, 0)),
    (256, 8): ((8, 8, 8, 8), (4, 4, 4, 0)),
    (384, 12): ((12, 12, 12, 12), (6, 6, 6, 0)),
    (256, 16): ((16, 16, 16, 8), (8, 8, 0, 0)),
    (192, 12): ((12, 12, 12, 6), (6, 6, 0, 0)),
    (384, 24): ((24, 24, 24, 12), (12, 12, 0, 0)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_effective_windows_and_shifts_are_the_official_ones(name: str) -> None:
    arch = VARIANTS[name]
    stages = arch.stages()
    windows, shifts = EFFECTIVE[arch.img_size, arch.window_size]
    assert tuple(stage.window for stage in stages) == windows
    assert tuple(stage.shift for stage in stages) == shifts
    assert [stage.merges for stage in stages] == [True, True, True, False]
    assert [stage.resolution for stage in stages] == [arch.img_size // 4 // 2**i for i in range(4)]


def test_head_dimension_is_32_except_for_the_c24_model() -> None:
    for name, arch in VARIANTS.items():
        assert set(arch.head_dims()) == {24 if "c24" in name else 32}, name


def test_dict_round_trip_survives_json(tiny_architecture: Architecture) -> None:
    text = json.dumps(tiny_architecture.to_dict())
    assert Architecture.from_dict(json.loads(text)) == tiny_architecture


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": 1}, "colour"),
        ({"depths": 2}, "depths"),
        ({"qkv_bias": 1}, "qkv_bias"),
        ({"img_size": "32"}, "img_size"),
        ({"embed_dim": True}, "embed_dim"),
        ({"norm_eps": 0}, "norm_eps"),
    ],
)
def test_from_dict_names_what_it_rejects(
    tiny_architecture: Architecture, change: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Architecture.from_dict(tiny_architecture.to_dict() | change)


def test_from_dict_names_missing_keys(tiny_architecture: Architecture) -> None:
    values = tiny_architecture.to_dict()
    del values["norm_eps"]
    with pytest.raises(ConfigError, match="missing keys .*norm_eps"):
        Architecture.from_dict(values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 3}, "version is 3"),
        ({"img_size": 33}, "img_size 33"),
        ({"img_size": 40}, "window_size 4 does not divide"),
        ({"img_size": 24, "window_size": 3, "depths": (2,) * 4, "num_heads": (1,) * 4,
          "pretrained_window_sizes": (0,) * 4}, "cannot halve"),
        ({"num_heads": (1, 3)}, "3 heads do not divide the 64 channels of stage 1"),
        ({"num_heads": (1,)}, "num_heads"),
        ({"depths": (2, 0)}, "depths is 0"),
        ({"depths": (), "num_heads": (), "pretrained_window_sizes": ()}, "depths is empty"),
        ({"num_classes": 0}, "num_classes"),
        ({"pretrained_window_sizes": (0, 4)}, "version 1 has none"),
        ({"mlp_ratio": -1.0}, "mlp_ratio"),
        ({"norm_eps": float("nan")}, "norm_eps"),
    ],
)  # fmt: skip
def test_validate_names_the_field_and_a_fix(
    tiny_architecture: Architecture, change: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        replace(tiny_architecture, **change).validate()
    assert caught.value.fix


def test_differences_state_both_values(tiny_architecture: Architecture) -> None:
    other = replace(tiny_architecture, window_size=8, depths=(2, 4))
    assert tiny_architecture.differences(other) == [
        "depths: 2,2 here, 2,4 there",
        "window_size: 4 here, 8 there",
    ]
    assert tiny_architecture.differences(tiny_architecture) == []
