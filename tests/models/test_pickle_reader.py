"""The tensor-only reader: right tensors, nothing executed, damage named."""

import argparse
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from swinq.errors import CheckpointError
from swinq.models.pickle_reader import Inert, StoredTensor, TorchFile


def _tensors(path: Path, *keys: str) -> dict[str, Tensor]:
    with TorchFile(path) as file:
        tree = file.tree
        for key in keys:
            tree = tree[key]
        return {name: file.load(stored) for name, stored in tree.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    """A .pth with a given program as its pickle and one storage of 4 floats."""

    def write_program(program: bytes) -> Path:
        path = tmp_path / "made.pth"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("made/data.pkl", program)
            file.writestr("made/data/0", struct.pack("4f", 1, 2, 3, 4))
        return path

    return write_program


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8,
     torch.uint8, torch.uint16, torch.bool],
)  # fmt: skip
def test_every_dtype_comes_back_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    want = {"w.a": torch.randint(0, 2, (3, 5)).to(dtype), "w.scalar": torch.ones((), dtype=dtype)}
    torch.save(want, tmp_path / "a.pth")
    got = _tensors(tmp_path / "a.pth")
    assert all(got[n].dtype == dtype and torch.equal(got[n], want[n]) for n in want)


def test_views_parameters_and_empty_tensors_come_back_equal(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    want = OrderedDict(
        transposed=base.t(),
        sliced=base[1:3, ::2],
        parameter=nn.Parameter(base * 2),
        empty=torch.empty(0, 3),
    )
    torch.save(want, tmp_path / "a.pth")
    got = _tensors(tmp_path / "a.pth")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(tensor.is_contiguous() for tensor in got.values())


def test_tensors_of_dtypes_that_no_swin_has_are_inert(tmp_path: Path) -> None:
    saved = {
        "w": torch.randn(3),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.ones(3, dtype=torch.complex64),
    }
    torch.save(saved, tmp_path / "a.pth")
    with TorchFile(tmp_path / "a.pth") as file:
        assert isinstance(file.tree["float8"], Inert) and isinstance(file.tree["complex"], Inert)
        assert torch.equal(file.load(file.tree["w"]), saved["w"])


def test_a_module_s_state_dict_with_metadata_comes_back_equal(tmp_path: Path) -> None:
    want = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).state_dict()
    torch.save(want, tmp_path / "a.pth")
    got = _tensors(tmp_path / "a.pth")
    assert list(got) == list(want) and all(torch.equal(got[n], want[n]) for n in want)


def test_training_checkpoints_with_foreign_objects_open_with_equal_tensors(tmp_path: Path) -> None:
    config = CfgNode({"MODEL": {"TYPE": "swin", "SWIN": {"WINDOW_SIZE": 7}}})
    config.freeze()
    weights = {"w": torch.randn(4, 4)}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 4)}}}
    saved = {
        "model": weights,
        "optimizer": optimizer,
        "config": config,
        "max_accuracy": np.float64(81.2),
        "array": np.arange(3),
        "args": argparse.Namespace(lr=0.1),
        "path": Path("somewhere"),
        "epoch": 299,
    }
    torch.save(saved, tmp_path / "a.pth")
    with TorchFile(tmp_path / "a.pth") as file:
        assert torch.equal(file.load(file.tree["model"]["w"]), weights["w"])
        moment = file.tree["optimizer"]["state"][0]["exp_avg"]
        assert torch.equal(file.load(moment), optimizer["state"][0]["exp_avg"])
        assert file.tree["config"]["MODEL"]["SWIN"]["WINDOW_SIZE"] == 7
        assert file.tree["args"]["lr"] == 0.1
        assert file.tree["epoch"] == 299
        assert isinstance(file.tree["max_accuracy"], Inert)


def _short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _exploits(marker: Path) -> dict[str, bytes]:
    """Programs that make Python's own unpickler create the marker."""
    touch = f"touch {marker}"
    line = f"S'{touch}'\n".encode()
    code = _short(f"open({str(marker)!r}, 'w').close()")
    module = b"c__builtin__\n__import__\n(S'os'\ntR"
    return {
        "global": b"cos\nsystem\n(" + line + b"tR.",
        "python 2 name": b"c__builtin__\neval\n(" + code + b"tR.",
        "stack global": b"\x80\x04" + _short("posix") + _short("system") + b"\x93" + _short(touch)
        + b"\x85R.",
        "dotted stack global": b"\x80\x04" + _short("torch.serialization") + _short("os.system")
        + b"\x93" + _short(touch) + b"\x85R.",
        "exec": b"\x80\x04" + _short("builtins") + _short("exec") + b"\x93" + code + b"\x85R.",
        "instance": b"(" + line + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + line + b"o.",
        "nested reduce": b"cbuiltins\ngetattr\n(" + module + b"S'system'\ntR(" + line + b"tR.",
    }  # fmt: skip


@pytest.mark.parametrize("name", _exploits(Path("x")))
def test_an_exploit_is_inert(tmp_path: Path, write: Callable[[bytes], Path], name: str) -> None:
    marker = tmp_path / "executed"
    program = _exploits(marker)[name]
    pickle.loads(program)
    assert marker.exists()  # it does work on Python's own unpickler
    marker.unlink()
    with TorchFile(write(program)) as file:
        assert isinstance(file.tree, Inert)
    assert not marker.exists()


def test_tensors_beside_an_exploit_are_recovered(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    weights = torch.randn(3)
    torch.save({"bomb": Bomb(), "w": weights}, tmp_path / "a.pth")
    with TorchFile(tmp_path / "a.pth") as file:
        assert isinstance(file.tree["bomb"], Inert)
        assert file.tree["bomb"].origin in ("posix.system", "nt.system")
        assert torch.equal(file.load(file.tree["w"]), weights)
    assert not (tmp_path / "executed").exists()


_STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
)
_NINE_ONES = b"(" + 9 * b"K\x01" + b"t"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("


def _tensor(
    offset: bytes = b"K\x00", shape: bytes = b"(K\x04t", stride: bytes = b"(K\x01t"
) -> bytes:
    return _REBUILD + _STORAGE + offset + shape + stride + b"\x89}tR"


def test_a_tensor_made_by_hand_is_read(write: Callable[[bytes], Path]) -> None:
    with TorchFile(write(_tensor() + b".")) as file:
        assert file.load(file.tree).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (_tensor(shape=b"(K\x05t") + b".", "more than the 4 elements"),
        (_tensor(offset=b"K\x01") + b".", "more than the 4 elements"),
        (_tensor(shape=b"(J\xff\xff\xff\x7ft", stride=b"(K\x00t") + b".", "more than the 4"),
        (_tensor(stride=b"(J\xff\xff\xff\xfft") + b".", "stride"),
        (_tensor(shape=b"(K\x01K\x04t") + b".", "shape"),
        (_tensor(shape=_NINE_ONES, stride=_NINE_ONES) + b".", "shape"),
        (_tensor() + b"}X\x05\x00\x00\x00shape(K\x64tsb.", "changes a tensor"),
        (_REBUILD + b"K\x01K\x00(t(t\x89}tR.", "without a storage"),
        (_STORAGE.replace(b"\x000X", b"\x007X") + b".", "storage '7'"),
        (_STORAGE.replace(b"ctorch\nFloatStorage\n", b"K\x04") + b".", "unknown type"),
        (b"K\x01Q.", "no storage"),
        (b"P0\n.", "PERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"]r\xff\xff\xff\x7f.", "memo larger"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "changes a function"),
        (b"ccollections\nOrderedDict\n}b.", "cannot be read"),
        (b"cos\nsystem\n}b.", "cannot be read"),
        (b"}cos\nsystem\n)RK\x01s.", "cannot be read"),
        (b"}K\x01", "cannot be read"),
        (b"", "cannot be read"),
    ],
)  # fmt: skip
def test_a_hostile_program_is_refused(
    write: Callable[[bytes], Path], program: bytes, named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        TorchFile(write(program))


def test_hostile_programs_leave_later_loads_alone(
    tmp_path: Path, write: Callable[[bytes], Path]
) -> None:
    with pytest.raises(CheckpointError):
        TorchFile(write(b"ctorch._utils\n_rebuild_tensor_v2\nN}S'_function'\nNs\x86b."))
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    assert torch.equal(_tensors(tmp_path / "a.pth")["w"], torch.ones(2))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    path = tmp_path / "sound.pth"
    torch.save({"model": {"a.w": torch.randn(64, 64), "a.b": torch.randn(64)}}, path)
    return path


def test_a_flipped_bit_in_a_weight_is_found_by_its_crc(sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    weight = _tensors(sound, "model")["a.w"]
    start = data.index(weight.numpy().tobytes())
    data[start + 1234] ^= 0x10
    sound.write_bytes(data)
    with TorchFile(sound) as file, pytest.raises(CheckpointError, match="data/0.*CRC"):
        file.load(file.tree["model"]["a.w"])


def test_a_flipped_bit_in_the_pickle_is_found_by_its_crc(sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    data[data.index(b"a.w")] ^= 0x01
    sound.write_bytes(data)
    with pytest.raises(CheckpointError, match="data.pkl.*CRC"):
        TorchFile(sound)


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95, 0.999])
def test_a_truncated_file_is_named(sound: Path, keep: float) -> None:
    data = sound.read_bytes()
    sound.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="sound.pth is not a sound .pth") as caught:
        TorchFile(sound)
    assert "download the file again" in caught.value.fix


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"}." + b"\0" * 1000)
    with pytest.raises(CheckpointError, match="compressed"):
        TorchFile(tmp_path / "a.pth")


def test_records_that_claim_more_than_the_file_are_refused(sound: Path) -> None:
    data = bytearray(sound.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)  # both sizes
    sound.write_bytes(data)
    with pytest.raises(CheckpointError, match="larger than the file"):
        TorchFile(sound)


def test_zips_of_other_kinds_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.pth", "w") as file:
        file.writestr("train/cat.jpg", b"x")
    with pytest.raises(CheckpointError, match="train/cat.jpg"):
        TorchFile(tmp_path / "images.pth")
    with zipfile.ZipFile(tmp_path / "script.pth", "w") as file:
        file.writestr("script/data.pkl", b"}.")
        file.writestr("script/constants.pkl", b"}.")
    with pytest.raises(CheckpointError, match="TorchScript"):
        TorchFile(tmp_path / "script.pth")


def test_big_endian_files_are_refused(write: Callable[[bytes], Path]) -> None:
    path = write(b"}.")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("made/byteorder", b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        TorchFile(path)


def test_random_damage_gives_tensors_or_one_kind_of_error(sound: Path, tmp_path: Path) -> None:
    data, path, dice = sound.read_bytes(), tmp_path / "damaged.pth", random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            with TorchFile(path) as file:
                for stored in file.tree["model"].values():
                    assert isinstance(stored, StoredTensor)
                    file.load(stored)
        except CheckpointError:
            refused += 1
    assert refused > 300  # most bytes lie under a CRC
