"""The calibrated checkpoint: all of it comes back; what is missing or was changed is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from swinq import api
from swinq.errors import CheckpointError, ExportError
from swinq.export.calibrated import spec_of, write_calibrated
from swinq.export.integrity import digests
from swinq.models.checkpoint import LoadedCheckpoint
from swinq.quant.insert import named_quantizers, set_int8_mode
from swinq.quant.linear import QuantLinear
from swinq.quant.spec import LayerRule, QuantSpec
from tests.export.calibrated_model import calibrated_model, images, lively_model
from tests.export.faster_transformer import named_by_faster_transformer
from tests.int8.made_checkpoint import made_architecture

CALIBRATION = {"method": "max", "percentile": 0.0, "images": 4, "residual_max": {"a.stream": 3.5}}
MIXED = QuantSpec(
    migration=(0.5,),
    output_headroom=1.25,
    bias_correction=True,
    allow_dead=("*.k_quantizer",),
    layers=(LayerRule("layers.0.*.attn", "fp16"), LayerRule("*.proj", "int8-unrounded")),
)

Contents = tuple[dict[str, Tensor], dict[str, str]]


def corrected(model: nn.Module) -> nn.Module:
    """With a bias correction on every layer, as if calibration had found one."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.bias_correction.copy_(0.01 * torch.randn(module.out_features))
    return model


def written(path: Path, model: nn.Module) -> Path:
    classes = [f"class {i}" for i in range(10)]
    return write_calibrated(
        path, model, calibration=CALIBRATION, classes=classes, transform={"name": "made up"}
    )


def contents_of(path: Path) -> Contents:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> Path:
    """The file with a change whose digests are right, as another writer might make it."""
    tensors, metadata = contents_of(path)
    change(tensors, metadata)
    metadata["digests"] = json.dumps(digests(tensors, metadata))
    save_file(tensors, path, metadata)
    return path


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return corrected(calibrated_model(made_architecture(request.param), vectors=True))


@pytest.mark.parametrize("spec", [QuantSpec(), MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("version", [1, 2])
def test_model_comes_back_to_the_last_bit(version: int, spec: QuantSpec, tmp_path: Path) -> None:
    model = corrected(calibrated_model(made_architecture(version), spec=spec, vectors=True))
    again = api.load(written(tmp_path / "calib.safetensors", model))
    assert again.quant_spec == spec
    state, before = again.state_dict(), model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert again.classes == [f"class {i}" for i in range(10)]
    assert again.calibration.method == "max" and again.calibration.images == 4
    assert again.calibration.residual_max == {"a.stream": 3.5}
    batch = images(model.arch, 2)
    for mode in (1, 2):
        with torch.no_grad():
            wanted = set_int8_mode(model, mode)(batch)
            assert torch.equal(set_int8_mode(again, mode)(batch), wanted)


def test_same_model_gives_the_same_bytes(model: nn.Module, tmp_path: Path) -> None:
    first, second = (written(tmp_path / f"{i}.safetensors", model) for i in range(2))
    assert first.read_bytes() == second.read_bytes()


def test_float_model_of_a_calibrated_file_is_the_one_it_was_made_from(
    model: nn.Module, tmp_path: Path
) -> None:
    plain = api.load(written(tmp_path / "calib.safetensors", model), ranges=False)
    assert not named_quantizers(plain) and not hasattr(plain, "quant_spec")
    arch = model.arch
    batch = images(arch, 2)
    with torch.no_grad():
        assert torch.equal(plain(batch), lively_model(arch)(batch))


def test_unwritable_place_is_named(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write .*calib.safetensors"):
        written(tmp_path / "file" / "calib.safetensors", model)


def change_weight(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["head.weight"][0, 0] += 1.0


def change_range(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["layers.0.blocks.0.attn.v_quantizer._amax"] *= 2


def change_correction(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["layers.0.blocks.0.mlp.fc1.bias_correction"][3] = 0.0


def drop_range(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del tensors["layers.0.blocks.0.attn.v_quantizer._amax"]


def change_recipe(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["recipe"] = metadata["recipe"].replace("1.1", "1.2")


def damage_digests(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["digests"] = metadata["digests"][:-5]


def rename_format(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["format"] = "swinq-calibrbted"
    tensors["head.weight"][0, 0] += 1


def drop_digests(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    del metadata["digests"]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weight, "head.weight"),
        (change_range, "layers.0.blocks.0.attn.v_quantizer._amax"),
        (change_correction, "layers.0.blocks.0.mlp.fc1.bias_correction"),
        (drop_range, "layers.0.blocks.0.attn.v_quantizer._amax"),
        (change_recipe, "__metadata__"),
        (drop_digests, "sha256"),
        (damage_digests, "sha256"),
        (rename_format, "head.weight"),
    ],
)
def test_changed_file_is_refused(
    change: Callable[..., None], named: str, ranges: bool, model: nn.Module, tmp_path: Path
) -> None:
    path = written(tmp_path / "calib.safetensors", model)
    tensors, metadata = contents_of(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match="changed since it was written") as caught:
        api.load(path, ranges=ranges)
    assert named in caught.value.problem and str(path) in caught.value.problem
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize("quantizer", ["attn.v_quantizer", "mlp.fc2.output_quantizer"])
@pytest.mark.parametrize("how", ["absent", "never calibrated"])
def test_missing_range_is_named(how: str, quantizer: str, model: nn.Module, tmp_path: Path) -> None:
    name = f"layers.0.blocks.1.{quantizer}"

    def forget(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if how == "absent":
            del tensors[f"{name}._amax"]
        else:
            tensors[f"{name}._amax"].fill_(torch.nan)

    path = rewritten(written(tmp_path / "calib.safetensors", model), forget)
    with pytest.raises(CheckpointError) as caught:
        api.load(path)
    assert f"has no range for 1 quantizers of the recipe: {name}" in caught.value.problem
    assert "--calib" in caught.value.fix
    api.load(path, ranges=False)  # what that --calib begins with


def test_range_of_a_layer_in_fp16_may_be_missing(tmp_path: Path) -> None:
    name = "layers.0.blocks.1.mlp.fc1"
    spec = QuantSpec(layers=(LayerRule(name, "fp16"),))
    model = calibrated_model(made_architecture(1), spec=spec)

    def forget(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        del tensors[f"{name}.input_quantizer._amax"], tensors[f"{name}.weight_quantizer._amax"]

    path = rewritten(written(tmp_path / "calib.safetensors", model), forget)
    assert api.load(path)(images(model.arch, 1)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("attn.v_quantizer", (32,), "wants []"),
        ("mlp.fc1.input_quantizer", (7,), "wants [] or [32]"),
        ("mlp.fc1.weight_quantizer", (32,), "wants [] or [64]"),
        ("attn.proj.output_quantizer", (33,), "wants [] or [32]"),
    ],
)
def test_range_of_a_shape_without_a_meaning_is_refused(
    name: str, shape: tuple[int, ...], wanted: str, model: nn.Module, tmp_path: Path
) -> None:
    tensor = f"layers.0.blocks.0.{name}._amax"
    path = written(tmp_path / "calib.safetensors", model)
    rewritten(path, lambda tensors, _: tensors.update({tensor: torch.ones(shape)}))
    with pytest.raises(CheckpointError) as caught:
        api.load(path)
    assert f"{tensor} has shape {list(shape)}" in caught.value.problem
    assert wanted in caught.value.problem


@pytest.mark.parametrize("text", ["[]", "{}", "not JSON", '{"WEIGHT": 3}'])
def test_recipe_that_is_none_is_refused(text: str, model: nn.Module, tmp_path: Path) -> None:
    path = written(tmp_path / "calib.safetensors", model)
    rewritten(path, lambda _, metadata: metadata.update(recipe=text))
    with pytest.raises(CheckpointError, match="metadata hold no sound recipe"):
        api.load(path)


def test_file_of_another_library_says_nothing_of_its_recipe() -> None:
    assert spec_of(LoadedCheckpoint({}, None, "modelopt")) is None


@pytest.mark.parametrize("version", [1, 2])
def test_faster_transformers_file_runs_under_its_own_recipe(version: int, tmp_path: Path) -> None:
    spec = api.recipe_spec("fastertransformer")
    model = calibrated_model(made_architecture(version), spec=spec)
    path = tmp_path / "swin_calib.pth"
    torch.save({"model": named_by_faster_transformer(model)}, path)
    again = api.load(path, architecture=model.arch)
    assert again.quant_spec == spec
    assert again.calibration.method == "unknown"
    batch = images(model.arch, 2)
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))
    with pytest.raises(ExportError, match="this recipe cannot be exported"):
        api.export(again, tmp_path / "int8.safetensors", int8_mode=1)


def test_ranges_of_one_linear_alone_are_not_enough(tmp_path: Path) -> None:
    """ModelOpt quantizes Linears only; attention would have no range."""
    model = calibrated_model(made_architecture(1))
    state = {n: t for n, t in named_by_faster_transformer(model).items() if "quantizer" not in n}
    state["layers.0.blocks.0.attn.qkv.input_quantizer._amax"] = torch.tensor(2.0)
    torch.save(state, tmp_path / "modelopt.pth")
    with pytest.raises(CheckpointError, match=r"modelopt layout\) has no range for \d+") as caught:
        api.load(tmp_path / "modelopt.pth")
    assert "layers.0.blocks.0.attn.qkv.weight_quantizer" in caught.value.problem
    assert len(str(caught.value).splitlines()) <= 10
