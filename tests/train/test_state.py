"""Training checkpoints: whole or not there, the newest good one found, never from scratch."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinq.errors import CheckpointError, ConfigError, ExportError
from swinq.train import state
from swinq.train.state import CheckpointFolder
from tests.train.ranks import start

METADATA = {"epoch": 3, "curve": [[1, 0.25]], "scaler": {}}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "training")


def tensors(step: int) -> dict[str, Tensor]:
    """Every form that a job's state has: vectors, scalars, states of generators, nothing."""
    return {
        "model.weight": torch.full((4, 300), float(step)),
        "model.logit": torch.tensor(float(step)),
        "model.empty": torch.empty(0, 3),
        "optimizer.weight.step": torch.tensor(step),
        "random.0.torch": torch.arange(256, dtype=torch.uint8),
        "half": torch.full((3,), step % 100, dtype=torch.float16),
    }


HOLDS = """
import sys, time
from swinq.train.state import CheckpointFolder
with CheckpointFolder(sys.argv[1]).alone():
    print("holds", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_jobs_until_it_ends_or_is_killed(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "PATIENCE_S", 0.5)
    command = [sys.executable, "-c", HOLDS, str(folder.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "holds\n"
        with pytest.raises(ConfigError, match="another job trains in") as caught, folder.alone():
            pass
        assert "--tag NAME" in caught.value.fix
        other.kill()
    with folder.alone():
        folder.save(1, tensors(1), METADATA)


def files(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.folder.iterdir())


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_what_was_saved_comes_back_bit_for_bit(folder: CheckpointFolder) -> None:
    path = folder.save(7, tensors(7), METADATA)
    assert path.name == "step-00000007.safetensors"
    saved = folder.newest()
    assert saved is not None
    assert (saved.step, saved.path, saved.metadata) == (7, path, METADATA)
    check_same(saved.tensors, tensors(7))


def test_file_has_the_rights_of_any_new_file(folder: CheckpointFolder) -> None:
    path = folder.save(7, tensors(7), {})
    plain = folder.folder / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode


def test_job_without_checkpoints_starts_from_scratch(folder: CheckpointFolder) -> None:
    assert folder.newest() is None
    folder.folder.mkdir()
    assert folder.newest() is None


def test_newest_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (5, 10, 100, 99_999_999, 100_000_000):
        folder.save(step, tensors(step), {})
    assert files(folder) == [
        "step-00000100.safetensors",
        "step-100000000.safetensors",
        "step-99999999.safetensors",
    ]
    saved = folder.newest()
    assert saved is not None and saved.step == 100_000_000


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.6, 0.9, 0.9999])
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_newest_is_told_and_the_one_before_is_used(
    folder: CheckpointFolder, capsys: pytest.CaptureFixture[str], share: float, damage: str
) -> None:
    folder.save(1, tensors(1), {})
    path = folder.save(2, tensors(2), {})
    place = int(share * path.stat().st_size)
    flip(path, place) if damage == "flip" else os.truncate(path, place)
    saved = folder.newest()
    assert saved is not None
    assert saved.step == 1
    check_same(saved.tensors, tensors(1))
    assert f"warning: {path}: " in capsys.readouterr().out


def test_damaged_one_is_not_counted_among_those_kept(folder: CheckpointFolder) -> None:
    for step in (10, 20):
        folder.save(step, tensors(step), {})
    flip(folder.folder / "step-00000020.safetensors", -1)
    folder.save(15, tensors(15), {})  # a job that went on from step 10
    assert files(folder) == ["step-00000010.safetensors", "step-00000015.safetensors"]


@pytest.mark.parametrize("place", range(0, 1024, 64))
def test_one_changed_bit_anywhere_in_the_header_is_noticed(
    folder: CheckpointFolder, place: int
) -> None:
    filled = {name: tensor for name, tensor in tensors(1).items() if tensor.numel()}
    flip(folder.save(1, filled, METADATA), place)
    with pytest.raises(CheckpointError):
        folder.newest()


def test_checkpoints_that_are_all_damaged_never_start_from_scratch(
    folder: CheckpointFolder,
) -> None:
    for step in (1, 2):
        os.truncate(folder.save(step, tensors(step), {}), 100)
    with pytest.raises(CheckpointError, match="no training checkpoint can be used") as caught:
        folder.newest()
    assert "step-00000001" in caught.value.problem and "step-00000002" in caught.value.problem
    assert str(folder.folder) in caught.value.fix


def test_file_of_a_later_format_is_not_guessed_at(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(state, "FORMAT_VERSION", "2")
        folder.save(1, tensors(1), {})
    with pytest.raises(CheckpointError, match="format swinq-training 2, wanted swinq-training 1"):
        folder.newest()


def test_what_killed_writers_left_is_cleared(folder: CheckpointFolder) -> None:
    folder.save(1, tensors(1), {})
    for name in (".step-00000002.safetensors.host.1.0123456789abcdef.partial", ".tmpAbC123"):
        (folder.folder / name).write_bytes(b"half")
    assert folder.newest() is not None
    assert files(folder) == ["step-00000001.safetensors"]


@pytest.fixture
def small_files() -> Iterator[int]:
    """No file may be larger than this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield 50_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_that_fails_midway_leaves_the_earlier_ones(
    folder: CheckpointFolder, small_files: int
) -> None:
    folder.save(1, tensors(1), {})
    large = {"large": torch.zeros(small_files)}
    with pytest.raises(ExportError, match="File too large") as caught:
        folder.save(2, large, {})
    assert f"({200_000 + 1:,}"[:4] in caught.value.problem  # 200,... bytes needed
    assert files(folder) == ["step-00000001.safetensors"]


def test_full_disk_is_said_with_the_bytes_needed(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.save(1, tensors(1), {})

    def full(*args: object) -> None:
        raise state.SafetensorError("Error while serializing: No space left (os error 28)")

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(ExportError, match=r"No space left on device \([\d,]+ bytes needed\)"):
        folder.save(2, tensors(2), {})
    assert files(folder) == ["step-00000001.safetensors"]


def test_file_that_reads_back_differently_is_not_kept(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty_disk(state_dict: dict[str, Tensor], path: Path, described: dict[str, str]) -> None:
        real(state_dict, path, described)
        flip(path, -1)

    folder.save(1, tensors(1), {})
    real = state.save_file
    monkeypatch.setattr(state, "save_file", faulty_disk)
    with pytest.raises(ExportError, match="does not read back"):
        folder.save(2, tensors(2), {})
    assert files(folder) == ["step-00000001.safetensors"]


def test_old_one_that_cannot_be_removed_stops_no_job(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    folder.save(1, tensors(1), {})
    folder.save(2, tensors(2), {})
    monkeypatch.setattr(Path, "unlink", refused)
    folder.save(3, tensors(3), {})
    monkeypatch.undo()
    folder.save(4, tensors(4), {})
    assert files(folder) == ["step-00000003.safetensors", "step-00000004.safetensors"]


def test_metadata_that_is_no_json_is_refused_before_anything_is_written(
    folder: CheckpointFolder,
) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.save(1, tensors(1), {"loss": float("nan")})
    assert not folder.folder.exists()


# The folder is on rank 0's machine alone, and each rank has random numbers of its own.
ONE_OF_TWO = """
import random, sys, torch
from swinq import distributed
from swinq.train.randomness import gather, restore_rank
from swinq.train.state import CheckpointFolder
distributed.init("gloo")
rank = distributed.rank()
folder = CheckpointFolder(sys.argv[1] + f"/machine{rank}")
assert folder.newest() is None
random.seed(rank)
tensors = {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(rank), **gather()}
drawn = random.random()
folder.save(7, tensors, {"epoch": 3})
saved = folder.newest()
assert (saved.step, saved.metadata, int(saved.tensors["step"])) == (7, {"epoch": 3}, 0)
assert torch.equal(saved.tensors["weight"], tensors["weight"])
assert saved.tensors.keys() == tensors.keys()
restore_rank(saved.tensors)
assert random.random() == drawn
print("drawn", drawn)
distributed.shutdown()
"""


def test_all_ranks_resume_from_what_rank_0_reads(tmp_path: Path) -> None:
    ranks = start(ONE_OF_TWO, str(tmp_path), ranks=2)
    said = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[0][0] != said[1][0]
    assert [path.name for path in tmp_path.iterdir()] == ["machine0"]
