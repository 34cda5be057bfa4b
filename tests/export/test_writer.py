"""A calibrated model becomes a file that says what the model says; an unfit one is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swinq.errors import ExportError
from swinq.export.format import expected_tensors
from swinq.export.reader import read_checkpoint
from swinq.export.writer import write_checkpoint
from swinq.models.build import build_model
from swinq.quant.insert import named_quantizers, quantize_model, quantized_layers, set_int8_mode
from swinq.quant.linear import QuantLinear
from swinq.quant.spec import LayerRule, QuantSpec
from tests.export.calibrated_model import calibrated_model
from tests.int8.made_checkpoint import made_architecture, made_checkpoint, write_made

ARCH = made_architecture()
DESCRIPTION: dict[str, Any] = {
    "calibration": {"method": "max", "percentile": None, "images": 4, "sample_sha256": "ab"},
    "classes": [f"class {i}" for i in range(10)],
    "transform": {"name": "official", "resize": 36},
    "residual_max": {"patch_embed.stream": 3.5, "layers.0.blocks.1.stream": 12.0},
}


def write(path: Path, model: nn.Module, mode: int = 1, **changes: Any) -> Path:
    return write_checkpoint(path, model, int8_mode=mode, **(DESCRIPTION | changes))


def refused(path: Path, model: nn.Module, mode: int = 1, **changes: Any) -> ExportError:
    """The refusal; what lay there before must still lie there."""
    path.write_bytes(b"before")
    with pytest.raises(ExportError) as caught:
        write(path, model, mode, **changes)
    assert path.read_bytes() == b"before"
    assert os.listdir(path.parent) == [path.name]
    assert caught.value.fix
    assert len(str(caught.value).splitlines()) <= 10
    return caught.value


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("vectors", [False, True])
def test_file_holds_what_the_model_computes_with(
    tmp_path: Path, version: int, mode: int, vectors: bool
) -> None:
    model = calibrated_model(made_architecture(version), vectors=vectors)
    found = read_checkpoint(write(tmp_path / "model", model, mode), int8_mode=mode)
    set_int8_mode(model, mode)
    for name, layer in quantized_layers(model).items():
        if not isinstance(layer, QuantLinear):
            scale = found.tensors[f"{name}.softmax_scale"]
            assert torch.equal(scale, layer.softmax_scale())
            table = found.tensors[f"{name}.relative_position_bias_table"]
            assert torch.equal(table, layer.compact_relative_position_bias())
            for part in "qk":
                own = getattr(layer, f"{part}_quantizer").scale()[0]
                assert torch.equal(found.tensors[f"{name}.{part}_scale"], own.expand(len(scale)))
            continue
        codes, weight_scale = layer.integer_weight()
        assert torch.equal(found.tensors[f"{name}.weight"], codes)
        assert torch.equal(found.tensors[f"{name}.weight_scale"], weight_scale)
        own = layer.input_quantizer.scale()[0]
        assert torch.equal(found.tensors[f"{name}.input_scale"], own)
        assert torch.equal(found.tensors[f"{name}.bias"], layer.export_bias())
        rounded = f"{name}.output_scale" in found.tensors
        assert rounded == layer.output_quantizer.enabled
        if rounded:
            own = layer.output_quantizer.scale()[0]
            assert torch.equal(found.tensors[f"{name}.output_scale"], own)
    half = model.get_parameter("head.weight").half()
    assert torch.equal(found.tensors["head.weight"], half)
    assert found.calibration["residual_max"] == DESCRIPTION["residual_max"]
    assert found.calibration["images"] == 4
    assert found.classes == DESCRIPTION["classes"]
    assert found.transform == DESCRIPTION["transform"]


@pytest.mark.parametrize("set_to", [1, 2])
def test_mode_of_the_file_does_not_depend_on_the_mode_the_model_is_set_to(
    tmp_path: Path, set_to: int
) -> None:
    model = set_int8_mode(calibrated_model(ARCH), set_to)
    enabled = {name: q.enabled for name, q in named_quantizers(model).items()}
    fc2 = "layers.0.blocks.0.mlp.fc2"
    for mode, word in ((1, "int8"), (2, "int8-unrounded")):
        found = read_checkpoint(write(tmp_path / str(mode), model, mode))
        assert found.precision[fc2] == word
    assert {name: q.enabled for name, q in named_quantizers(model).items()} == enabled


def test_precision_of_each_layer_is_written(tmp_path: Path) -> None:
    rules = (
        LayerRule("layers.0.blocks.0.*", "fp16"),
        LayerRule("layers.0.blocks.0.attn", "fp16"),
        LayerRule("*.blocks.1.attn.proj", "int8-unrounded"),
    )
    model = calibrated_model(ARCH, spec=QuantSpec(layers=rules))
    found = read_checkpoint(write(tmp_path / "model", model))
    assert {word for name, word in found.precision.items() if ".0.blocks.0." in name} == {"fp16"}
    assert found.precision["layers.1.blocks.1.attn.proj"] == "int8-unrounded"
    assert found.precision["layers.1.blocks.1.mlp.fc2"] == "int8"
    assert found.tensors.keys() == expected_tensors(ARCH, found.precision, 1).keys()


def test_output_kinds_that_the_recipe_leaves_out_are_unrounded(tmp_path: Path) -> None:
    model = calibrated_model(ARCH, spec=QuantSpec(output_layers=("fc2",)))
    precision = read_checkpoint(write(tmp_path / "model", model)).precision
    assert precision["layers.0.blocks.0.attn.proj"] == "int8-unrounded"
    assert precision["layers.0.blocks.0.mlp.fc2"] == "int8"


def test_scales_of_a_tensor_are_written_for_each_channel(tmp_path: Path) -> None:
    spec = QuantSpec(weight_granularity="per_tensor", output_granularity="per_tensor")
    found = read_checkpoint(write(tmp_path / "model", calibrated_model(ARCH, spec=spec)))
    for suffix in ("weight_scale", "output_scale"):
        scale = found.tensors[f"layers.0.blocks.0.attn.proj.{suffix}"]
        assert scale.shape == (32,)
        assert len(scale.unique()) == 1


def test_v2_qkv_bias_is_one_vector_without_keys(tmp_path: Path) -> None:
    arch = made_architecture(2)
    model = calibrated_model(arch)
    bias = read_checkpoint(write(tmp_path / "model", model)).tensors[
        "layers.0.blocks.0.attn.qkv.bias"
    ]
    q, k, v = bias.chunk(3)
    assert torch.equal(q, model.get_parameter("layers.0.blocks.0.attn.qkv.q_bias"))
    assert torch.equal(v, model.get_parameter("layers.0.blocks.0.attn.qkv.v_bias"))
    assert not k.any()


def test_missing_biases_are_written_as_zeros(tmp_path: Path) -> None:
    for version in (1, 2):
        model = calibrated_model(made_architecture(version, qkv_bias=False))
        found = read_checkpoint(write(tmp_path / str(version), model))
        assert not found.tensors["layers.0.blocks.0.attn.qkv.bias"].any()
        assert not found.tensors["layers.0.downsample.reduction.bias"].any()


def test_uncalibrated_model_is_refused_with_the_first_eight(tmp_path: Path) -> None:
    model = quantize_model(build_model(ARCH), QuantSpec())
    problem = refused(tmp_path / "model", model).problem
    total = sum(
        layer.output_quantizer.enabled + 2 if isinstance(layer, QuantLinear) else 3
        for layer in quantized_layers(model).values()
    )
    assert f"{total} of {total} quantizers are not calibrated" in problem
    assert problem.count("_quantizer") == 8
    assert f"and {total - 8} more" in problem


def test_one_uncalibrated_quantizer_is_named(tmp_path: Path) -> None:
    model = calibrated_model(ARCH)
    model.get_submodule("layers.1.blocks.0.attn.k_quantizer")._amax.fill_(float("nan"))
    error = refused(tmp_path / "model", model)
    assert "layers.1.blocks.0.attn.k_quantizer" in error.problem
    assert "--calib" in error.fix


def test_output_range_is_needed_only_where_it_is_used(tmp_path: Path) -> None:
    model = calibrated_model(ARCH)
    model.get_submodule("layers.0.blocks.0.mlp.fc2.output_quantizer")._amax.fill_(float("nan"))
    assert "fc2.output_quantizer" in refused(tmp_path / "model", model, mode=1).problem
    write(tmp_path / "model", model, mode=2)


def test_dead_tensor_is_refused_unless_the_recipe_allows_it(tmp_path: Path) -> None:
    name = "layers.0.blocks.1.attn.v_quantizer"
    for allowed in ((), (name,), ("*.v_quantizer",)):
        model = calibrated_model(ARCH, spec=QuantSpec(allow_dead=allowed))
        model.get_submodule(name)._amax.fill_(0.0)
        if allowed:
            write(tmp_path / "model", model)
            continue
        error = refused(tmp_path / "model", model)
        assert name in error.problem
        assert "ALLOW_DEAD" in error.fix


def test_dead_channel_is_no_dead_tensor(tmp_path: Path) -> None:
    model = calibrated_model(ARCH)
    fc1 = model.get_submodule("layers.0.blocks.0.mlp.fc1")
    with torch.no_grad():
        fc1.weight[3] = 0
        fc1.calibrate_weight()
    found = read_checkpoint(write(tmp_path / "model", model))
    assert found.tensors["layers.0.blocks.0.mlp.fc1.weight_scale"][3] == 0
    assert not found.tensors["layers.0.blocks.0.mlp.fc1.weight"][3].any()


@pytest.mark.parametrize("value", [32769.0, -40000.0, float("inf"), float("nan")])
def test_residual_beyond_half_of_fp16_is_refused(tmp_path: Path, value: float) -> None:
    model = calibrated_model(ARCH)
    residual = {"patch_embed.stream": 2.0, "layers.1.blocks.0.stream": value}
    problem = refused(tmp_path / "model", model, residual_max=residual).problem
    assert f"layers.1.blocks.0.stream reaches {value:g}" in problem
    assert "patch_embed" not in problem
    write(tmp_path / "model", model, residual_max={"layers.1.blocks.0.stream": 32768.0})


def test_recipe_that_no_kernel_computes_is_refused(tmp_path: Path) -> None:
    spec = QuantSpec(probabilities="static")
    model = quantize_model(build_model(ARCH), spec)
    assert "static" in refused(tmp_path / "model", model).problem


def test_model_without_quantizers_is_refused(tmp_path: Path) -> None:
    assert "holds no quantizers" in refused(tmp_path / "model", build_model(ARCH)).problem


def test_model_that_is_quantized_in_parts_is_refused(tmp_path: Path) -> None:
    model = calibrated_model(ARCH)
    linear = nn.Linear(32, 64)
    model.get_submodule("layers.0.blocks.0.mlp").fc1 = linear
    problem = refused(tmp_path / "model", model).problem
    assert "layers without quantizers: layers.0.blocks.0.mlp.fc1" in problem
    del model.quant_spec
    assert "which recipe" in refused(tmp_path / "model", model).problem


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("norm.weight", float("nan"), "norm.weight"),
        ("patch_embed.proj.weight", 70000.0, "fp16"),
        ("layers.0.blocks.0.mlp.fc1.bias", float("inf"), "fc1.bias"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, name: str, value: float, said: str
) -> None:
    model = calibrated_model(ARCH)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    assert said in refused(tmp_path / "model", model).problem


def test_mode_3_and_wrong_class_count_are_refused(tmp_path: Path) -> None:
    model = calibrated_model(ARCH)
    assert "3, wanted 1 or 2" in refused(tmp_path / "model", model, mode=3).problem
    error = refused(tmp_path / "model", model, classes=["cat", "dog"])
    assert "2 class names for a head of 10" in error.problem


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(2), {1, 2}])
def test_description_that_is_not_json_is_refused(tmp_path: Path, value: object) -> None:
    model = calibrated_model(ARCH)
    assert "calibration" in refused(tmp_path / "model", model, calibration={"x": value}).problem


def test_file_that_the_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"before")
    tensors = made_checkpoint(ARCH).tensors
    del tensors["norm.weight"]
    with pytest.raises(ExportError, match=r"does not read back: .*model: missing tensors: norm"):
        write_made(path, ARCH, tensors=tensors)
    assert path.read_bytes() == b"before"


def test_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    model = calibrated_model(ARCH)
    one, two = write(tmp_path / "one", model), write(tmp_path / "two", model)
    assert one.read_bytes() == two.read_bytes()
