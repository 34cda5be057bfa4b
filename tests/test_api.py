"""The Python API: five functions from a float checkpoint to INT8 logits, and what they refuse."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import swinq
from swinq import api
from swinq.data.datasets import open_dataset
from swinq.data.transforms import EvalTransform, eval_transform
from swinq.demo.checkpoint import CHECKPOINT
from swinq.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DataError,
    ExportError,
    SwinqError,
)
from swinq.evaluate import compare
from swinq.export.calibrated import write_calibrated
from swinq.export.reader import read_checkpoint
from swinq.int8.model import Int8Swin
from swinq.models.architecture import Architecture
from swinq.models.variants import find_variant
from swinq.quant.insert import (
    named_quantizers,
    quantize_model,
    quantized_layers,
    set_int8_mode,
    used_quantizers,
)
from swinq.quant.spec import LayerRule, QuantSpec
from tests.export.calibrated_model import images as noise
from tests.export.calibrated_model import lively_model

IMAGES = 12


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The demo's float model."""
    loaded: nn.Module = swinq.load(CHECKPOINT)
    return loaded


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Some digits of the training set, (12, 3, 32, 32)."""
    train = open_dataset("digits", "train", eval_transform("squash", 32))
    return torch.stack([train[100 * i][0] for i in range(IMAGES)])


@pytest.fixture(scope="module")
def quantized(model: nn.Module, digits: Tensor) -> nn.Module:
    """The demo's model, calibrated on those digits; not to be changed."""
    calibrated: nn.Module = swinq.calibrate(model, digits)
    return calibrated


@pytest.fixture(scope="module")
def exported(quantized: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Its INT8 checkpoint in both modes."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        mode: swinq.export_model(quantized, folder / f"mode{mode}.safetensors", int8_mode=mode)
        for mode in (1, 2)
    }


def test_five_names_are_all_one_needs(exported: dict[int, Path], digits: Tensor) -> None:
    assert {"load", "calibrate", "evaluate_model", "export_model", "run"} <= set(dir(swinq))
    for mode, path in exported.items():
        int8 = swinq.load(path)
        assert isinstance(int8, Int8Swin) and int8.int8_mode == mode
        logits = swinq.run(int8, digits)
        assert (logits.shape, logits.dtype) == ((IMAGES, 10), torch.float32)
        assert torch.equal(swinq.run(path, digits), logits)  # a path will do
        scores = swinq.evaluate_model(int8, "digits").scores()
        assert scores.images == 355 and scores.top1_percent >= 97
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        swinq.quantise  # noqa: B018


@torch.inference_mode()
def test_models_load_calibrate_and_run_in_inference_mode(
    model: nn.Module, digits: Tensor, tmp_path: Path
) -> None:
    found = swinq.calibrate(model, digits)
    path = write_calibrated(
        tmp_path / "calibrated.safetensors", found, calibration={}, classes=None, transform={}
    )
    logits = swinq.run(path, digits)
    assert torch.equal(swinq.run(swinq.load(path), digits), logits)
    assert torch.equal(swinq.run(found, digits), logits)


def test_calibration_images_that_are_none_are_named(model: nn.Module, digits: Tensor) -> None:
    with pytest.raises(CalibrationError, match=r"image 0 is \[4, 3, 32, 32\], wanted a tensor"):
        swinq.calibrate(model, [digits[:4]])
    with pytest.raises(CalibrationError, match="image 1 is tuple, wanted a tensor"):
        swinq.calibrate(model, [digits[0], (digits[1], 3)])


def test_importing_the_package_loads_no_torch() -> None:
    program = "import swinq, sys; print('torch' in sys.modules, 'load' in dir(swinq))"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == ["False", "True"]


def assert_same_state(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():  # NaN: ranges that no mode uses
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_calibrating_leaves_the_float_model_as_it_was(
    model: nn.Module, quantized: nn.Module
) -> None:
    assert not hasattr(model, "quant_spec") and not named_quantizers(model)
    before = swinq.load(CHECKPOINT).state_dict()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert all(q.calibrated for q in used_quantizers(quantized).values())
    assert quantized.calibration.images == IMAGES
    assert quantized.classes == [str(i) for i in range(10)]


def test_order_and_form_of_the_images_change_no_range(
    model: nn.Module, quantized: nn.Module, digits: Tensor
) -> None:
    counted: list[int] = []
    backwards = swinq.calibrate(
        model, (x for x in digits.flip(0)), on_image=lambda: counted.append(1)
    )
    assert len(counted) == IMAGES
    wanted = quantized.state_dict()
    found = backwards.state_dict()
    assert_same_state(found, wanted)


def test_recipe_may_be_a_name_a_file_or_a_spec(
    model: nn.Module, digits: Tensor, tmp_path: Path
) -> None:
    spec = QuantSpec(layers=(LayerRule("*.attn", "fp16"),))
    path = tmp_path / "mine.yaml"
    path.write_text("QUANT: {LAYERS: [{PATTERN: '*.attn', PRECISION: fp16}]}\n")
    for recipe in (spec, path, str(path)):
        found = swinq.calibrate(model, digits[:2], recipe=recipe, method="max")
        assert quantized_layers(found)["layers.1.blocks.0.attn"].precision == "fp16"
    assert swinq.calibrate(model, digits[:2]).quant_spec == api.recipe_spec("int8")
    assert api.recipe_spec("fastertransformer").probabilities == "static"
    with pytest.raises(ConfigError, match="fastertransfomer"):
        api.recipe_spec("fastertransfomer")


def test_calibration_refuses_what_it_cannot_use(
    model: nn.Module, quantized: nn.Module, exported: dict[int, Path], digits: Tensor
) -> None:
    with pytest.raises(CalibrationError, match="0 calibration images"):
        swinq.calibrate(model, [])
    with pytest.raises(ConfigError, match="is quantized already"):
        swinq.calibrate(quantized, digits)
    with pytest.raises(ConfigError, match="Int8Swin is quantized already"):
        swinq.calibrate(swinq.load(exported[1]), digits)
    with pytest.raises(CalibrationError, match="'median' is not known"):
        swinq.calibrate(model, digits[:1], method="median")
    with pytest.raises(CalibrationError, match=r"percentile 0 is outside \(0, 100\]"):
        swinq.calibrate(model, digits[:1], percentile=0)
    bad = digits[:2].clone()
    bad[1, 0, 3, 3] = torch.nan
    with pytest.raises(CalibrationError, match="saw nan in calibration image 1"):
        swinq.calibrate(model, bad)


def test_uncalibrated_model_neither_runs_nor_is_exported(
    model: nn.Module, digits: Tensor, tmp_path: Path
) -> None:
    bare = quantize_model(copy.deepcopy(model), QuantSpec())
    with pytest.raises(CalibrationError) as caught:
        swinq.run(bare, digits)
    assert "layers.0.blocks.0.attn.qkv.input_quantizer is enabled but has no range" in str(
        caught.value
    )
    with pytest.raises(ExportError, match="quantizers are not calibrated: layers.0.blocks.0.attn"):
        swinq.export_model(bare, tmp_path / "x.safetensors", int8_mode=1)
    assert not list(tmp_path.iterdir())


def test_export_leaves_the_model_as_it_was(quantized: nn.Module, tmp_path: Path) -> None:
    mine = copy.deepcopy(quantized)
    set_int8_mode(mine, 2)
    swinq.export_model(mine, tmp_path / "mode1.safetensors", int8_mode=1)
    fc2 = quantized_layers(mine)["layers.0.blocks.0.mlp.fc2"]
    assert not fc2.output_quantizer.enabled
    assert_same_state(mine.state_dict(), quantized.state_dict())


def test_export_refuses_other_modes_and_float_models(
    model: nn.Module, quantized: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="int8_mode is 3, wanted 1 or 2"):
        swinq.export_model(quantized, tmp_path / "x.safetensors", int8_mode=3)
    with pytest.raises(ExportError, match="holds no quantizers"):
        swinq.export_model(model, tmp_path / "x.safetensors", int8_mode=1)


def test_transform_travels_from_the_float_file_to_the_int8_one(
    model: nn.Module, quantized: nn.Module, exported: dict[int, Path], tmp_path: Path
) -> None:
    squash = eval_transform("squash", 32)
    assert api.transform_of(model) == api.transform_of(quantized) == squash
    assert api.transform_of(swinq.load(exported[1])) == squash
    mine = EvalTransform(40, 32, name="mine")
    path = swinq.export_model(quantized, tmp_path / "x.safetensors", int8_mode=1, transform=mine)
    assert api.transform_of(swinq.load(path)) == mine
    assert read_checkpoint(path).transform == mine.to_dict()


def test_ranges_of_other_windows_are_refused(quantized: nn.Module, tmp_path: Path) -> None:
    path = write_calibrated(
        tmp_path / "calib.safetensors", quantized, calibration={}, classes=None, transform={}
    )
    arch = Architecture.from_dict({**quantized.arch.to_dict(), "img_size": 64, "window_size": 8})
    with pytest.raises(CheckpointError, match="calibrated at other windows"):
        swinq.load(path, architecture=arch, resize=True)
    larger = swinq.load(path, architecture=arch, resize=True, ranges=False)
    assert larger.arch == arch and not hasattr(larger, "quant_spec")


def test_transform_of_another_size_is_not_taken(model: nn.Module) -> None:
    arch = Architecture.from_dict({**model.arch.to_dict(), "img_size": 64, "window_size": 8})
    larger = swinq.load(CHECKPOINT, architecture=arch, resize=True)
    assert larger.arch == arch
    assert api.transform_of(larger) is None
    assert swinq.run(larger, torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_evaluation_takes_a_path_a_data_set_or_another_transform(
    model: nn.Module, quantized: nn.Module
) -> None:
    squash = eval_transform("squash", 32)
    by_path = swinq.evaluate_model(model, "digits")
    by_data = swinq.evaluate_model(model, open_dataset("digits", "val", squash), batch_size=50)
    assert by_path.scores() == by_data.scores()
    cropped = swinq.evaluate_model(
        model, "digits", transform=eval_transform("official", 32), batch_size=71
    )
    assert not torch.equal(cropped.logits, by_path.logits)
    both = compare(by_path, swinq.evaluate_model(quantized, "digits"))
    assert both.images == 355 and both.agreement_percent >= 98


@pytest.mark.parametrize("kind", ["float", "fake-quant", "int8"])
@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 32, 32), (1, 1, 32, 32)])
def test_images_of_another_shape_are_refused_with_both(
    kind: str,
    shape: tuple[int, ...],
    model: nn.Module,
    quantized: nn.Module,
    exported: dict[int, Path],
) -> None:
    form = {"float": model, "fake-quant": quantized, "int8": exported[1]}[kind]
    with pytest.raises(DataError) as caught:
        swinq.run(form, torch.zeros(shape))
    assert str(shape) in caught.value.problem and "3, 32, 32" in caught.value.problem
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_file_of_another_model_is_refused(kind: str, exported: dict[int, Path]) -> None:
    path = CHECKPOINT if kind == "float" else exported[1]
    with pytest.raises(CheckpointError) as caught:
        swinq.load(path, architecture=find_variant("swin_tiny_patch4_window7_224"))
    assert "img_size" in str(caught.value) and "embed_dim" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 10


def test_what_is_no_model_or_no_file_is_refused(tmp_path: Path, digits: Tensor) -> None:
    with pytest.raises(CheckpointError, match="dict is no model"):
        swinq.run({}, digits)
    with pytest.raises(SwinqError, match=r"absent\.pth"):
        swinq.run(tmp_path / "absent.pth", digits)


@pytest.mark.parametrize("version", [1, 2])
def test_both_versions_go_the_whole_way(
    version: int,
    tiny_architecture: Architecture,
    tiny_architecture_v2: Architecture,
    tmp_path: Path,
) -> None:
    arch = tiny_architecture if version == 1 else tiny_architecture_v2
    float_model = lively_model(arch)
    torch.save({"model": float_model.state_dict()}, tmp_path / "float.pth")
    loaded = swinq.load(tmp_path / "float.pth", architecture=arch)
    quantized = swinq.calibrate(loaded, noise(arch, 8))
    batch = noise(arch, 32, seed=5)
    exact = swinq.run(loaded, batch)
    for mode in (1, 2):
        path = swinq.export_model(quantized, tmp_path / f"{mode}.safetensors", int8_mode=mode)
        found = swinq.run(swinq.load(path, architecture=arch), batch)
        error = (found - exact).pow(2).mean().sqrt() / exact.std()
        assert error < 0.15, f"version {version}, mode {mode}: {error:.3f} of the logits' spread"
