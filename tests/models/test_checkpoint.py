"""Loading as a whole: architectures found or contradicted, damaged files, real checkpoints."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from yacs.config import CfgNode

from swinq.errors import CheckpointError
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.checkpoint import load_checkpoint, load_into, resize_bias_table
from swinq.models.layers import SwinBase
from swinq.models.variants import VARIANTS


def _config(arch: Architecture) -> CfgNode:
    """The part of microsoft's training configuration that says what the model is."""
    kind = "swin" if arch.version == 1 else "swinv2"
    section = {
        "WINDOW_SIZE": arch.window_size,
        "APE": False,
        "PATCH_NORM": True,
        "PRETRAINED_WINDOW_SIZES": list(arch.pretrained_window_sizes),
    }
    model = {"TYPE": kind, kind.upper(): section}
    return CfgNode({"DATA": {"IMG_SIZE": arch.img_size}, "MODEL": model})


def _save_training(path: Path, model: SwinBase, **extra: object) -> Path:
    torch.save({"model": model.state_dict(), "config": _config(model.arch), **extra}, path)
    return path


def test_training_checkpoints_tell_the_v2_window(tmp_path: Path, tiny_model_v2: SwinBase) -> None:
    path = _save_training(tmp_path / "ckpt_epoch_299.pth", tiny_model_v2, max_accuracy=81.5)
    loaded = load_checkpoint(path)
    assert loaded.architecture == tiny_model_v2.arch
    assert "window 4 from the stored training configuration" in loaded.notes
    assert "max_accuracy stored in the file: 81.50" in loaded.notes


@pytest.mark.parametrize("pretrained", [(0, 0), (3, 3), (6, 4)])
def test_coordinates_in_the_file_tell_window_and_pretrained_window(
    tmp_path: Path, tiny_architecture_v2: Architecture, pretrained: tuple[int, int]
) -> None:
    arch = replace(tiny_architecture_v2, pretrained_window_sizes=pretrained)
    model = build_model(arch)
    buffers = {n: b for n, b in model.named_buffers() if "attn" in n}
    torch.save(model.state_dict() | buffers, tmp_path / "a.pth")
    found = load_checkpoint(tmp_path / "a.pth").architecture
    assert found is not None
    spans = [s.pretrained_window or s.window for s in arch.stages()]
    assert [s.pretrained_window or s.window for s in found.stages()] == spans
    assert found.window_size == 4 and found.img_size == 32
    wrong = replace(arch, pretrained_window_sizes=(5, 5))
    with pytest.raises(CheckpointError, match="pretrained_window_sizes"):
        load_checkpoint(tmp_path / "a.pth", architecture=wrong)


def test_masks_tell_the_image_size(tmp_path: Path, tiny_architecture: Architecture) -> None:
    model = build_model(replace(tiny_architecture, img_size=64))
    masks = {n: b for n, b in model.named_buffers() if "attn_mask" in n}
    torch.save(model.state_dict() | masks, tmp_path / "with.pth")
    torch.save(model.state_dict(), tmp_path / "without.pth")
    sizes = [load_checkpoint(tmp_path / f"{n}.pth").architecture for n in ("with", "without")]
    assert [arch.img_size for arch in sizes if arch is not None] == [64, 16]


def test_a_v2_window_that_nothing_tells_is_asked_for(
    tmp_path: Path, tiny_model_v2: SwinBase
) -> None:
    torch.save(tiny_model_v2.state_dict(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="window size is not stored") as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert "--cfg" in caught.value.fix
    loaded = load_checkpoint(tmp_path / "a.pth", architecture=tiny_model_v2.arch)
    assert loaded.architecture == tiny_model_v2.arch


def test_a_given_window_is_checked_against_the_stored_configuration(
    tmp_path: Path, tiny_model_v2: SwinBase
) -> None:
    path = _save_training(tmp_path / "a.pth", tiny_model_v2)
    with pytest.raises(CheckpointError, match="window_size: 4 in the file, 2 wanted"):
        load_checkpoint(path, architecture=replace(tiny_model_v2.arch, window_size=2))


def test_windows_that_differ_between_stages_are_refused(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    state = tiny_model.state_dict()
    for block in (0, 1):
        name = f"layers.1.blocks.{block}.attn.relative_position_bias_table"
        state[name] = torch.zeros(15**2, 2)  # as in timm's swin_s3 models
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"windows \(4, 8\)"):
        load_checkpoint(tmp_path / "a.pth")


def test_another_model_than_asked_for_is_listed_in_few_lines(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "a.pth")
    wanted = VARIANTS["swinv2_base_patch4_window12to16_192to256_22kto1k_ft"]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "a.pth", architecture=wanted)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 8
    assert "  version: 1 in the file, 2 wanted" in lines
    assert "--cfg configs/swin/" in lines[-1] and "MODEL.NUM_CLASSES 10" in lines[-1]


def test_another_image_size_with_the_same_windows_is_accepted(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "a.pth")
    larger = replace(tiny_model.arch, img_size=64)
    assert load_checkpoint(tmp_path / "a.pth", architecture=larger).architecture == larger


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda s: s.pop("head.weight"), "no classifier"),
        (lambda s: s.pop("patch_embed.norm.weight"), "missing: patch_embed.norm.weight"),
        (lambda s: s.pop("layers.1.blocks.1.mlp.fc2.bias"), "missing: layers.1.blocks.1.mlp.fc2"),
        (lambda s: s.update({"extra.weight": torch.ones(2)}), "not in the model: extra.weight"),
        (
            lambda s: s.update({"norm.weight": torch.ones(63)}),
            r"norm.weight: \(63,\) in the file, \(64,\) in the model",
        ),
        (lambda s: s["norm.weight"].fill_(float("nan")), "norm.weight holds 64 values that are"),
        (
            lambda s: s.update({"norm.weight": torch.ones(64, dtype=torch.int8)}),
            "norm.weight is torch.int8",
        ),
        (
            lambda s: s.update(
                {"layers.0.blocks.0.attn.relative_position_bias_table": torch.ones(21, 1)}
            ),
            "not of a square window",
        ),
        (
            lambda s: s.update({"patch_embed.proj.weight": torch.ones(32, 3, 2, 4)}),
            "not square",
        ),
        (
            lambda s: s.update({"layers.7.blocks.999.norm1.weight": torch.ones(1)}),
            r"blocks in the stages \[0, 1, 7\]",
        ),
    ],
)  # fmt: skip
def test_incomplete_or_wrong_tensors_are_named(
    tmp_path: Path,
    tiny_model: SwinBase,
    damage: Callable[[dict[str, Tensor]], object],
    named: str,
) -> None:
    state = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    damage(state)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in caught.value.problem and caught.value.fix


@pytest.mark.parametrize(
    ("content", "named", "fix"),
    [
        (b"", "is empty", "download the file again"),
        (b"<!DOCTYPE html><html>login</html>", "a web page", "fetch the file itself"),
        (b"\n <html>", "a web page", "fetch the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip", "gunzip"),
        (b"\x80\x02}.", "bare pickle", "torch.save"),
        (b"\x00\x01\x02\x03garbage", "no known checkpoint format", "download the file again"),
        (b"PK\x03\x04rest", "not a sound .pth", "download the file again"),
        (b"\x40" + b"\0" * 7 + b"{'a': 1}", "damaged safetensors", "download the file again"),
    ],
)
def test_files_that_are_no_checkpoints_are_named(
    tmp_path: Path, content: bytes, named: str, fix: str
) -> None:
    path = tmp_path / "swin.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(path)
    assert str(path) in caught.value.problem and fix in caught.value.fix


def test_the_format_of_old_torch_is_refused_by_name(tmp_path: Path, tiny_model: SwinBase) -> None:
    path = tmp_path / "old.pth"
    torch.save(tiny_model.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="before 1.6") as caught:
        load_checkpoint(path)
    assert "weights_only=True" in caught.value.fix


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere.pth cannot be read"):
        load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="folder without model.safetensors"):
        load_checkpoint(tmp_path)


def test_sharded_folders_and_broken_config_json_are_named(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several shards"):
        load_checkpoint(tmp_path)
    torch.save(tiny_model.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_checkpoint(tmp_path).layout == "official"
    for text in ("{", "[1]", "[" * 10_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match="config.json is no model configuration"):
            load_checkpoint(tmp_path)


def test_the_model_name_that_timms_training_stores_tells_the_window(tmp_path: Path) -> None:
    arch = VARIANTS["swinv2_tiny_patch4_window8_256"]
    state = {name: tensor.half() for name, tensor in build_model(arch).state_dict().items()}
    torch.save({"arch": "swinv2_tiny_window8_256", "state_dict": state}, tmp_path / "last.pth")
    loaded = load_checkpoint(tmp_path / "last.pth")
    assert loaded.architecture == arch
    assert "window 8 from the stored name" in loaded.notes


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_safetensors_file_is_named(
    tmp_path: Path, tiny_model: SwinBase, keep: float
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tiny_model.state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(CheckpointError, match="damaged safetensors"):
        load_checkpoint(path)


def test_a_pickled_model_object_is_refused_by_its_class(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    torch.save(tiny_model, tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="object of class swinq.models.swin.SwinTransformer"):
        load_checkpoint(tmp_path / "whole.pth")


def test_a_file_without_tensors_names_its_top_level(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"\['epoch', 'lr'\]"):
        load_checkpoint(tmp_path / "a.pth")


def test_an_exported_int8_model_is_refused_with_the_way_to_run_it(tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"format": "swinq-int8", "format_version": "1"})
    with pytest.raises(CheckpointError, match="exported INT8 model") as caught:
        load_checkpoint(path)
    assert "--eval" in caught.value.fix


def test_a_stored_architecture_that_is_damaged_is_named(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    values = tiny_model.arch.to_dict() | {"window_size": "four"}
    path = tmp_path / "a.safetensors"
    save_file(tiny_model.state_dict(), path, {"architecture": json.dumps(values)})
    with pytest.raises(CheckpointError, match="window_size is 'four'"):
        load_checkpoint(path)


def test_load_into_copies_every_parameter(tmp_path: Path, tiny_model: SwinBase) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "a.pth")
    model = build_model(tiny_model.arch)
    load_into(model, load_checkpoint(tmp_path / "a.pth", architecture=tiny_model.arch))
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_load_into_another_model_changes_nothing_and_says_why(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "a.pth")
    model = build_model(replace(tiny_model.arch, num_classes=7, depths=(2, 3)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(model, load_checkpoint(tmp_path / "a.pth"))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 8 and "head.weight: (10, 64) in the file, (7, 64) in the model" in lines[1]
    assert any("missing: layers.1.blocks.2" in line for line in lines)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_other_windows_need_resize(tmp_path: Path, tiny_model: SwinBase) -> None:
    torch.save(tiny_model.state_dict(), tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    model = build_model(replace(tiny_model.arch, window_size=8))
    with pytest.raises(CheckpointError, match="relative_position_bias_table"):
        load_into(model, loaded)
    load_into(model, loaded, resize=True)
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[name], resize_bias_table(loaded.state[name], 15**2))


def test_other_v2_windows_are_never_taken_silently(tmp_path: Path, tiny_model_v2: SwinBase) -> None:
    loaded = load_checkpoint(_save_training(tmp_path / "a.pth", tiny_model_v2))
    model = build_model(replace(tiny_model_v2.arch, window_size=8))
    with pytest.raises(CheckpointError, match="window_size: 4 in the file, 8 wanted"):
        load_into(model, loaded)
    load_into(model, loaded, resize=True)
    assert torch.equal(model.head.weight, loaded.state["head.weight"])


def test_resizing_keeps_axes_centre_and_constants() -> None:
    y = torch.randn(7)[:, None].expand(7, 7)
    table = torch.stack([y.flatten(), torch.full((49,), 3.0)], dim=1)  # (49, 2)
    resized = resize_bias_table(table, 13 * 13).view(13, 13, 2)
    torch.testing.assert_close(resized[..., 1], torch.full((13, 13), 3.0))
    torch.testing.assert_close(resized[..., 0], resized[:, :1, 0].expand(13, 13))
    torch.testing.assert_close(resized[6, 6, 0], y[3, 3])
    assert resized[:, 0, 0].std() > 0.1
    assert resize_bias_table(table, 49) is table


@pytest.mark.parametrize(
    ("stem", "variant"),
    [
        ("swin_tiny_patch4_window7_224_imagenette", "swin_tiny_patch4_window7_224"),
        ("swin_tiny_patch4_window7_224_imagenette_outliers", "swin_tiny_patch4_window7_224"),
        ("swinv2_tiny_patch4_window8_256_imagenette", "swinv2_tiny_patch4_window8_256"),
    ],
)
def test_real_checkpoints_load_with_classes_and_windows(
    shared_checkpoints: dict[str, Path], stem: str, variant: str
) -> None:
    path = shared_checkpoints[stem]
    loaded = load_checkpoint(path)
    assert loaded.architecture == replace(VARIANTS[variant], num_classes=10)
    assert loaded.layout == "official"
    assert loaded.classes is not None and loaded.classes[0] == "n01440764"
    reference = torch.load(path, weights_only=True)["model"]
    assert set(loaded.state) == set(reference)
    assert all(t.dtype == torch.float32 for t in loaded.state.values())
    assert all(torch.equal(loaded.state[name], reference[name].float()) for name in reference)
    model = build_model(loaded.architecture).eval()
    load_into(model, loaded)
    size = loaded.architecture.img_size
    with torch.inference_mode():
        assert model(torch.randn(1, 3, size, size)).isfinite().all()


def test_a_given_window_against_the_name_of_the_file_is_noted(
    shared_checkpoints: dict[str, Path],
) -> None:
    path = shared_checkpoints["swinv2_tiny_patch4_window8_256_imagenette"]
    given = replace(VARIANTS["swinv2_tiny_patch4_window16_256"], num_classes=10)
    notes = load_checkpoint(path, architecture=given).notes
    assert any("the weights cannot tell" in note for note in notes)
