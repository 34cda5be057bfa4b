"""FP16 and FP32 tensors of a float model: those of an all-fp16 file, and the same model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from swinq.errors import ExportError
from swinq.export.format import expected_tensors, layer_names
from swinq.export.plain import collect_plain
from swinq.export.reader import Int8Checkpoint
from swinq.int8.model import Int8Swin
from swinq.models.build import build_model
from tests.export.calibrated_model import calibrated_model, images, lively_model
from tests.int8.made_checkpoint import made_architecture

ARCHITECTURES = {
    "v1": made_architecture(1),
    "v2": made_architecture(2),
    "v1 without qkv bias": made_architecture(1, qkv_bias=False),
    "v2 without qkv bias": made_architecture(2, qkv_bias=False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fp16_tensors_are_a_whole_checkpoint_that_computes_the_same_model(name: str) -> None:
    arch = ARCHITECTURES[name]
    model = lively_model(arch)
    found = collect_plain(model)
    assert found.precision == dict.fromkeys(layer_names(arch), "fp16")
    specs = expected_tensors(arch, found.precision, 1)
    assert found.tensors.keys() == specs.keys()
    for tensor, spec in ((found.tensors[name], spec) for name, spec in specs.items()):
        assert tensor.dtype == spec.dtype and tuple(tensor.shape) in spec.shapes
    checkpoint = Int8Checkpoint(
        found.tensors, arch, found.precision, 1, {}, None, {}, Path("float model")
    )
    batch = images(arch, 4)
    with torch.no_grad():
        wanted = model(batch)
    error = (Int8Swin(checkpoint)(batch) - wanted).abs().max()
    assert error < 0.01 * wanted.std()


def test_fp32_tensors_are_the_weights_themselves() -> None:
    model = lively_model(made_architecture(2))
    found = collect_plain(model, "fp32")
    assert set(found.precision.values()) == {"fp32"}
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}
    own = dict(model.named_parameters())
    for name in ("patch_embed.proj.weight", "layers.0.blocks.1.mlp.fc1.weight", "head.weight"):
        assert torch.equal(found.tensors[name], own[name])
    found.tensors["head.weight"].zero_()
    assert own["head.weight"].any()  # a copy


def test_what_is_no_float_swin_is_refused() -> None:
    arch = made_architecture()
    for model in (nn.Linear(2, 2), calibrated_model(arch)):
        with pytest.raises(ExportError, match="is no float Swin"):
            collect_plain(model)
    model = build_model(arch)
    with pytest.raises(ExportError, match="precision is 'int8'"):
        collect_plain(model, "int8")
    with torch.no_grad():
        model.get_submodule("layers.0.blocks.0.mlp.fc1").weight[0, 0] = 1e6  # type: ignore[index,union-attr]
    with pytest.raises(ExportError, match=r"as fp16.*fc1\.weight"):
        collect_plain(model)
    collect_plain(model, "fp32")
