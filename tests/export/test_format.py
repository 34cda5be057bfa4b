"""The list of names, dtypes and shapes agrees with the model, the modes and the precisions."""

from pathlib import Path

import pytest
import torch

from swinq.export.format import (
    FORMAT,
    FORMAT_VERSION,
    JSON_KEYS,
    METADATA_DIGEST,
    PLAIN_KEYS,
    TensorSpec,
    decode,
    default_precision,
    encode,
    expected_tensors,
    layer_names,
    layers,
    precision_problems,
)
from swinq.models.build import build_model
from tests.int8.made_checkpoint import made_architecture


@pytest.mark.parametrize("version", [1, 2])
def test_layer_names_are_modules_of_the_float_model_in_its_order(version: int) -> None:
    arch = made_architecture(version)
    modules = [name for name, _ in build_model(arch).named_modules()]
    kept = ("attn", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "downsample.reduction")
    assert layer_names(arch) == [name for name in modules if name.endswith(kept)]


@pytest.mark.parametrize("version", [1, 2])
def test_shapes_are_those_of_the_float_model(version: int) -> None:
    arch = made_architecture(version)
    state = build_model(arch).state_dict()
    specs = expected_tensors(arch, default_precision(arch, 1), 1)
    shared = specs.keys() & state.keys()
    assert {name for name in specs if name.endswith(".weight")} <= shared
    for name in shared:
        assert specs[name].shapes == (tuple(state[name].shape),), name


@pytest.mark.parametrize("version", [1, 2])
def test_every_float_parameter_reaches_the_file(version: int) -> None:
    arch = made_architecture(version)
    specs = expected_tensors(arch, default_precision(arch, 1), 1)
    folded = ("cpb_mlp", "logit_scale", "q_bias", "v_bias")  # into table, softmax_scale, qkv.bias
    for name in build_model(arch).state_dict():
        assert name in specs or any(part in name for part in folded), name


def test_window_is_the_effective_one_where_the_map_is_smaller() -> None:
    arch = made_architecture(img_size=24, window_size=12)  # stage 1: 6x6 tokens, so one 6x6 window
    specs = expected_tensors(arch, default_precision(arch, 1), 1)
    table = "layers.{}.blocks.0.attn.relative_position_bias_table"
    assert specs[table.format(0)].shapes == ((23 * 23, 1),)
    assert specs[table.format(1)].shapes == ((11 * 11, 2),)


def test_mode_1_rounds_what_feeds_the_residual_and_mode_2_only_proj() -> None:
    arch = made_architecture()
    rounded = {
        mode: {
            name.split(".")[-2]
            for name in expected_tensors(arch, default_precision(arch, mode), mode)
            if name.endswith("output_scale")
        }
        for mode in (1, 2)
    }
    assert rounded == {1: {"proj", "fc2", "reduction"}, 2: {"proj"}}


def test_fp16_layers_have_half_weights_and_no_scales() -> None:
    arch = made_architecture()
    table = default_precision(arch, 1) | {
        "layers.0.blocks.0.mlp.fc1": "fp16",
        "layers.0.blocks.0.attn": "fp16",
    }
    specs = expected_tensors(arch, table, 1)
    assert specs["layers.0.blocks.0.mlp.fc1.weight"] == TensorSpec(torch.float16, ((64, 32),))
    assert "layers.0.blocks.0.mlp.fc1.input_scale" not in specs
    assert "layers.0.blocks.0.attn.q_scale" not in specs
    assert "layers.0.blocks.0.attn.softmax_scale" in specs


def test_input_scale_is_a_scalar_or_a_vector_over_the_inputs() -> None:
    arch = made_architecture()
    specs = expected_tensors(arch, default_precision(arch, 1), 1)
    assert specs["layers.0.blocks.0.mlp.fc2.input_scale"].shapes == ((), (64,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers.0.blocks.0.attn.qkv": "int8-unrounded"}, "attn.qkv: 'int8-unrounded', wanted"),
        ({"layers.0.blocks.0.mlp.fc2": "int4"}, "mlp.fc2: 'int4', wanted int8 or"),
        ({"layers.9.blocks.0.mlp.fc2": "int8"}, "layers.9.blocks.0.mlp.fc2: not a layer"),
    ],
)
def test_precision_that_does_not_fit_is_named(changes: dict[str, str], said: str) -> None:
    arch = made_architecture()
    problems = precision_problems(arch, default_precision(arch, 1) | changes, 1)
    assert len(problems) == 1
    assert said in problems[0]
    with pytest.raises(ValueError, match="layers"):
        expected_tensors(arch, default_precision(arch, 1) | changes, 1)


def test_rounded_fc2_is_no_mode_2() -> None:
    arch = made_architecture()
    problems = precision_problems(arch, default_precision(arch, 1), 2)
    assert len(problems) == sum(layer.kind in ("fc2", "reduction") for layer in layers(arch))


def test_missing_precision_is_named() -> None:
    arch = made_architecture()
    table = default_precision(arch, 1)
    del table["layers.1.blocks.1.attn"]
    assert precision_problems(arch, table, 1) == ["layers.1.blocks.1.attn: no precision given"]


def test_json_is_canonical_and_holds_no_nan() -> None:
    assert encode({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    assert decode(encode({"b": 1})) == {"b": 1}
    with pytest.raises(ValueError, match="JSON"):
        encode({"percentile": float("nan")})
    with pytest.raises(ValueError, match="NaN"):
        decode('{"percentile": NaN}')
    with pytest.raises(ValueError, match="deep"):
        decode("[" * 100_000)


def test_page_about_the_format_names_every_key_and_every_kind_of_tensor(repo_root: Path) -> None:
    page = (repo_root / "docs" / "checkpoint-format.md").read_text()
    for key in (*JSON_KEYS, *PLAIN_KEYS, METADATA_DIGEST, FORMAT):
        assert f"`{key}`" in page, key
    assert f"Format version: **{FORMAT_VERSION}**" in page
    for field in made_architecture().to_dict():
        assert f"`{field}`" in page, field
    arch = made_architecture(2)
    for name in expected_tensors(arch, default_precision(arch, 1), 1):
        leaf = name.rpartition(".")[2]
        assert f".{leaf}`" in page or f"`{leaf}`" in page, name
