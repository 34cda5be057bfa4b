"""The reader returns what was written, and refuses everything else with value, wish and remedy."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from swinq.errors import CheckpointError, ConfigError
from swinq.export.format import encode
from swinq.export.integrity import digests
from swinq.export.reader import is_int8_checkpoint, read_checkpoint
from tests.int8.made_checkpoint import TRANSFORM, made_architecture, made_checkpoint, write_made

ARCH = made_architecture()
QKV = "layers.0.blocks.0.attn.qkv"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_made(tmp_path_factory.mktemp("made") / "good.safetensors", ARCH)


def parts_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())


def changed(
    good: Path, folder: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]
) -> Path:
    """A copy of the good file with something changed, and digests that agree with the change."""
    tensors, metadata = parts_of(good)
    change(tensors, metadata)
    if "digests" in metadata:
        metadata["digests"] = encode(digests(tensors, metadata))
    path = folder / "changed.safetensors"
    save_file(tensors, path, metadata)
    return path


def refused(path: Path, **arguments: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **arguments)
    text = str(caught.value)
    assert str(path) in text
    assert caught.value.fix
    assert len(text.splitlines()) <= 10
    return caught.value


def test_what_was_written_is_read(good: Path) -> None:
    made = made_checkpoint(ARCH)
    found = read_checkpoint(good, int8_mode=1, architecture=ARCH)
    assert found.architecture == ARCH
    assert found.precision == made.precision
    assert found.int8_mode == 1
    assert found.calibration == made.calibration
    assert found.classes == [f"class {i}" for i in range(10)]
    assert found.transform == TRANSFORM
    assert found.tensors.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def test_both_modes_versions_and_vector_scales_are_read(tmp_path: Path) -> None:
    for version in (1, 2):
        for mode in (1, 2):
            arch = made_architecture(version)
            made = made_checkpoint(arch, mode=mode)
            made.tensors[f"{QKV}.input_scale"] = torch.full((32,), 0.03)
            path = tmp_path / f"{version}{mode}"
            write_made(path, arch, mode=mode, tensors=made.tensors, classes=None)
            assert read_checkpoint(path).tensors[f"{QKV}.input_scale"].shape == (32,)


def test_tensors_outlive_the_file(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(good.read_bytes())
    found = read_checkpoint(path)
    before = found.tensors["head.weight"].clone()
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(found.tensors["head.weight"], before)


# what is changed, what the problem must say, what the fix must say
def drop(*names: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: [tensors.pop(name) for name in names] and None


def put(name: str, make: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    return lambda tensors, metadata: tensors.update({name: make(tensors[name])})


def meta(key: str, value: str) -> Callable[..., None]:
    return lambda tensors, metadata: metadata.update({key: value})


def poke(name: str, value: float) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


def architecture(**fields: Any) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        metadata["architecture"] = encode(json.loads(metadata["architecture"]) | fields)

    return change


def precision(**layers: str) -> Callable[..., None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        table = json.loads(metadata["precision"])
        table.update({name.replace("__", "."): word for name, word in layers.items()})
        metadata["precision"] = encode(table)

    return change


def without_metadata(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata.clear()


def calibrated(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata.clear()
    tensors[f"{QKV}.input_quantizer._amax"] = torch.tensor(1.0)


REFUSALS = {
    "missing tensor": (drop(f"{QKV}.weight"), f"missing tensors: {QKV}.weight", "export"),
    "missing scale": (drop(f"{QKV}.input_scale"), f"{QKV}.input_scale", "export"),
    "extra tensor": (
        lambda tensors, metadata: tensors.update({"cls_token": torch.zeros(1)}),
        "does not have: cls_token",
        "export",
    ),
    "wrong shape": (
        put(f"{QKV}.weight", lambda w: w[:-1]),
        "has shape [95, 32], wanted int8 [96, 32]",
        "export",
    ),
    "scale of neither shape": (
        put(f"{QKV}.input_scale", lambda s: s.repeat(3)),
        "has shape [3], wanted float32 [] or [32]",
        "export",
    ),
    "wrong dtype": (
        put(f"{QKV}.weight", lambda w: w.float()),
        "is float32, wanted int8",
        "export",
    ),
    "unknown dtype": (
        put("head.bias", lambda b: b.double()),
        "head.bias is F64, wanted float32",
        "export",
    ),
    "weight code -128": (poke(f"{QKV}.weight", -128), "-128, wanted -127 to 127", "export"),
    "NaN scale": (poke(f"{QKV}.weight_scale", float("nan")), "1 of 96 values are NaN", "export"),
    "infinite norm": (poke("norm.weight", float("inf")), "norm.weight: 1 of 64", "export"),
    "negative scale": (poke(f"{QKV}.weight_scale", -0.5), "holds -0.5", "export"),
    "scale too small to invert": (poke(f"{QKV}.input_scale", 1e-39), "below 1.17549e-38", "export"),
    "scale whose products overflow": (
        poke(f"{QKV}.weight_scale", 1e30),
        "holds 1e+30, wanted at most 16384",
        "export",
    ),
    "number whose square overflows": (
        poke("norm.weight", -1e30),
        "norm.weight holds -1e+30, wanted at most 1.1259e+15",
        "export",
    ),
    "more hidden channels than there are numbers": (
        architecture(mlp_ratio=1e308),
        "mlp_ratio 1e+308, wanted more than 0 and at most 1024",
        "export",
    ),
    "eps that fp32 has not": (architecture(norm_eps=1e-60), "norm_eps is 1e-60", "export"),
    "names of some classes": (
        meta("classes", '["a", "b", "c"]'),
        "3 class names for a head of",
        "export",
    ),
    "float model": (without_metadata, "format is 'not given', wanted 'swinq-int8'", "--calib"),
    "calibrated model": (calibrated, "calibrated checkpoint with fake quantizers", "--export"),
    "other format": (meta("format", "pt"), "format is 'pt', wanted 'swinq-int8'", "--calib"),
    "newer version": (meta("format_version", "7"), "is 7, this swinq reads up to 1", "update"),
    "version that is no number": (meta("format_version", "one"), "'one', wanted 1", "copy"),
    "version 0": (meta("format_version", "0"), "'0', wanted 1", "copy"),
    "mode 3": (meta("int8_mode", "3"), "int8_mode is '3', wanted one of (1, 2)", "export"),
    "mode that the tensors contradict": (
        meta("int8_mode", "2"),
        "mlp.fc2: 'int8', wanted int8-unrounded or fp16 in int8 mode 2",
        "export",
    ),
    "missing metadata": (
        lambda t, m: m.pop("precision") and None,
        "precision is missing",
        "export",
    ),
    "unknown metadata": (meta("author", "me"), "'author' is unknown", "export"),
    "metadata that is no JSON": (meta("transform", "{"), "transform is not JSON", "copy"),
    "metadata of another kind": (meta("calibration", "[]"), "calibration is a list", "export"),
    "class names of another kind": (meta("classes", "[1]"), "classes is neither", "export"),
    "nested metadata bomb": (meta("calibration", "[" * 200_000), "calibration is not JSON", "copy"),
    "unknown field": (architecture(ape=True), "unknown keys ['ape']", "export"),
    "field of the wrong type": (architecture(depths="22"), "depths is '22'", "export"),
    "window that does not divide": (architecture(window_size=5), "window_size 5", "export"),
    "another window": (architecture(window_size=2), "wanted float32 [9, 1]", "export"),
    "more blocks than tensors": (
        architecture(depths=[10**9, 2]),
        "depths are [1000000000, 2]",
        "export",
    ),
    "unknown precision": (
        precision(layers__0__blocks__0__mlp__fc2="int4"),
        "mlp.fc2: 'int4', wanted int8 or int8-unrounded or fp16",
        "export",
    ),
    "precision of no layer": (precision(head="fp16"), "head: not a layer", "export"),
    "precision that the tensors contradict": (
        precision(layers__0__blocks__0__mlp__fc2="fp16"),
        "fc2.input_scale",
        "export",
    ),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refuses(kind: str, good: Path, tmp_path: Path) -> None:
    change, said, fix = REFUSALS[kind]
    error = refused(changed(good, tmp_path, change))
    assert said in error.problem
    assert fix in error.fix or fix in error.problem


def test_missing_tensors_are_listed_up_to_six(good: Path, tmp_path: Path) -> None:
    names = [name for name in parts_of(good)[0] if name.endswith("weight_scale")]
    problem = refused(changed(good, tmp_path, drop(*names))).problem
    assert sum(name in problem for name in names) == 6
    assert f"and {len(names) - 6} more" in problem


@pytest.mark.parametrize(("written", "asked"), [(1, 2), (2, 1)])
def test_other_mode_than_asked_for_is_refused(tmp_path: Path, written: int, asked: int) -> None:
    path = write_made(tmp_path / "model", ARCH, mode=written)
    error = refused(path, int8_mode=asked)
    assert f"int8 mode {written}, int8 mode {asked} was asked for" in error.problem
    assert f"--int8-mode {asked}" in error.fix


@pytest.mark.parametrize("asked", [0, 3, "1"])
def test_a_mode_that_does_not_exist_is_refused(good: Path, asked: Any) -> None:
    with pytest.raises(ConfigError, match=f"int8_mode is {asked!r}, wanted 1 or 2"):
        read_checkpoint(good, int8_mode=asked)


def test_other_architecture_than_asked_for_is_refused(good: Path) -> None:
    wanted = made_architecture(window_size=8, num_classes=1000)
    error = refused(good, architecture=wanted)
    assert "window_size: 4 here, 8 there" in error.problem
    assert "num_classes: 10 here, 1000 there" in error.problem
    assert "--cfg" in error.fix


def test_very_different_architecture_is_told_in_few_lines(good: Path) -> None:
    wanted = made_architecture(
        2,
        img_size=64,
        patch_size=4,
        in_chans=1,
        num_classes=5,
        embed_dim=64,
        num_heads=(2, 4),
        mlp_ratio=4.0,
        qkv_bias=False,
    )
    assert "more" in refused(good, architecture=wanted).problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file (0 bytes)"),
        (b"short", "not a safetensors file (5 bytes)"),
        (b"PK\x03\x04" + bytes(100), "a torch checkpoint"),
        (b"\x80\x02}q\x00." + bytes(100), "a torch checkpoint"),
        (bytes(1000), "not a safetensors file (1,000 bytes)"),
        (struct.pack("<Q", 10**12) + b"{" + bytes(100), "cut short"),
        (struct.pack("<Q", 20) + b"{not json at all....", "damaged or cut short"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert said in refused(path).problem


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "nowhere.safetensors").problem
    assert "Is a directory" in refused(tmp_path).problem


def test_file_cut_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    path = tmp_path / "cut"
    for size in random.Random(0).sample(range(len(data)), 40):
        path.write_bytes(data[:size])
        refused(path)
    path.write_bytes(data + b"\0")
    refused(path)


def test_every_flipped_bit_is_noticed(good: Path, tmp_path: Path) -> None:
    data = bytearray(good.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    generator = random.Random(0)
    places = [generator.randrange(header) for _ in range(150)]
    places += [generator.randrange(header, len(data)) for _ in range(100)]
    path = tmp_path / "flipped"
    for place in places:
        bit = 1 << generator.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        refused(path)
        data[place] ^= bit
    path.write_bytes(data)
    read_checkpoint(path)


def test_a_flip_in_each_tensor_is_named(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts_of(good)
    path = tmp_path / "flipped"
    for name in [f"{QKV}.weight", f"{QKV}.input_scale", "norm.bias", "head.weight"]:
        own = {key: tensor.clone() for key, tensor in tensors.items()}
        raw = own[name].reshape(1, -1).view(torch.uint8)
        raw[0, 0] ^= 1
        own[name] = raw.view(own[name].dtype).reshape(tensors[name].shape)
        path.write_bytes(save(own, metadata))
        assert f"changed since it was written: {name}\n" in refused(path).problem


def test_changed_description_is_noticed(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts_of(good)
    metadata["transform"] = metadata["transform"].replace("36", "37")
    path = tmp_path / "edited"
    path.write_bytes(save(tensors, metadata))
    assert "changed since it was written: __metadata__" in refused(path).problem
    assert read_checkpoint(path, verify=False).transform["resize"] == 37


def test_digest_of_nothing_is_noticed(good: Path, tmp_path: Path) -> None:
    tensors, metadata = parts_of(good)
    table = json.loads(metadata["digests"]) | {"ghost": "0" * 64}
    path = tmp_path / "edited"
    path.write_bytes(save(tensors, metadata | {"digests": encode(table)}))
    assert "ghost" in refused(path).problem


def test_a_file_tells_whether_it_is_an_int8_checkpoint(good: Path, tmp_path: Path) -> None:
    assert is_int8_checkpoint(good)
    assert not is_int8_checkpoint(tmp_path / "nowhere")
    assert not is_int8_checkpoint(changed(good, tmp_path, without_metadata))
    (tmp_path / "file").write_bytes(b"PK" + bytes(100))
    assert not is_int8_checkpoint(tmp_path / "file")
