"""A run describes itself and its inputs."""

import hashlib
import shlex
from datetime import datetime
from pathlib import Path

import pytest
import torch

from swinq.errors import DataError
from swinq.report.environment import describe_file, describe_run, launcher


def test_a_run_says_how_to_repeat_it() -> None:
    words = ["swinq/main.py", "--calib", "--data-path", "my images/set 1"]
    run = describe_run(words, "cpu", "Some Processor")
    assert shlex.split(run.command) == words
    assert datetime.fromisoformat(run.date).tzinfo is not None
    assert run.environment.device == run.environment.cpu == "Some Processor"
    assert run.environment.torch == torch.__version__
    assert run.environment.ranks == 1 and "timm" in run.environment.packages


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "python swinq/main.py"),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, "torchrun swinq/main.py"),
        (
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nproc_per_node 8 swinq/main.py",
        ),
        (
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nnodes 2 --nproc_per_node 8 swinq/main.py",
        ),
    ],
)
def test_a_run_is_repeated_the_way_it_was_started(
    environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert " ".join(launcher()) == words


def test_a_file_has_its_digest_and_size(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(b"x" * 3_000_000)
    file = describe_file("checkpoint", path)
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (file.role, file.size_bytes) == ("checkpoint", 3_000_000)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="checkpoint .*gone.pth cannot be read: No such file"):
        describe_file("checkpoint", tmp_path / "gone.pth")
