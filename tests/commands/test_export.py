"""--export: what --calib wrote, byte for byte; nothing without ranges."""

from pathlib import Path

import pytest

from swinq.demo.checkpoint import CHECKPOINT
from swinq.export.reader import read_checkpoint
from tests.commands.command_line import FEW, done, refused
from tests.commands.conftest import Demo


def test_exported_files_are_the_bytes_that_calibration_wrote(demo: Demo, tmp_path: Path) -> None:
    ran = done("--export", "--resume", demo.checkpoint("calib"), "--output", tmp_path)
    for mode in (1, 2):
        name = f"micro_swin_digits_int8_mode{mode}.safetensors"
        path = tmp_path / "micro_swin_digits" / "default" / name
        assert path.read_bytes() == demo.checkpoint(f"int8_mode{mode}").read_bytes()
        assert f"exported: {path}" in ran.out


def test_one_mode_is_exported_where_it_was_asked_to_go(demo: Demo, tmp_path: Path) -> None:
    files = tmp_path / "files"
    done(
        *("--export", "--resume", demo.checkpoint("calib"), "--output", tmp_path),
        *("--int8-mode", "2", "--calib-output-path", files),
    )
    (path,) = files.iterdir()
    assert read_checkpoint(path).int8_mode == 2


@pytest.mark.parametrize("kind", ["float", "int8_mode1"])
def test_file_without_ranges_is_refused(kind: str, demo: Demo, tmp_path: Path) -> None:
    file = CHECKPOINT if kind == "float" else demo.checkpoint(kind)
    message = refused("--export", "--resume", file, "--output", tmp_path)
    assert f"{file} is not a calibrated checkpoint" in message
    assert "--calib" in message


def test_recipe_without_kernels_is_refused(tmp_path: Path) -> None:
    done("--calib", *FEW, "--output", tmp_path, "--recipe", "fastertransformer")
    file = tmp_path / "micro_swin_digits" / "default" / "micro_swin_digits_calib.safetensors"
    message = refused("--export", "--resume", file, "--output", tmp_path)
    assert "this recipe cannot be exported" in message and "static" in message
    assert "int8.yaml" in message
