"""Weights, files and images whose faults show only when they are read: named all the same."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swinq.demo.checkpoint import CHECKPOINT
from tests.commands.command_line import (
    changed_micro_swin,
    refused,
    swinq,
    tensors_of,
    write_digits,
    write_flat,
)
from tests.commands.conftest import Demo

DIGITS = ("--data-path", "digits", "--workers", "0", "--sensitivity-images", "0")
SMALL = ("--num-calib-batch", "1", "--calib-batchsz", "4", "--workers", "0")
FC1 = "layers.1.blocks.0.mlp.fc1"


def flipped(path: Path, copy: Path, *, at: int = -1000) -> Path:
    """A copy with one bit changed."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("action", ["--calib", "--eval"])
def test_weights_that_are_no_numbers_are_named(action: str, value: float, tmp_path: Path) -> None:
    weight = tensors_of(CHECKPOINT)[f"{FC1}.weight"].clone()
    weight[5, 7] = value
    file = changed_micro_swin(tmp_path / "diverged.safetensors", {f"{FC1}.weight": weight})
    message = refused(action, "--resume", file, *DIGITS[:4], "--output", tmp_path)
    assert f"{file}: {FC1}.weight holds 1 " in message and "NaN or infinite" in message


def test_activations_that_overflow_are_traced_to_their_layer(tmp_path: Path) -> None:
    weight = tensors_of(CHECKPOINT)[f"{FC1}.weight"].sign().float() * 3e38
    file = changed_micro_swin(tmp_path / "loud.safetensors", {f"{FC1}.weight": weight})
    argv = ("--resume", file, *DIGITS, "--output", tmp_path)
    message = refused("--calib", *argv, *SMALL[:4])
    first = FC1.replace("fc1", "fc2.input_quantizer")  # the next tensor that is watched
    assert re.search(f"{first} saw (inf|nan) in calibration image 0", message)
    assert not list(tmp_path.glob("*/*/*.safetensors"))
    message = refused("--eval", *argv, "--eval-images", "4")
    assert "NaN or Inf for 4 of 4 images" in message and "val/" in message


def test_network_that_computes_zeros_is_refused(tmp_path: Path) -> None:
    norms = {n: torch.zeros_like(t) for n, t in tensors_of(CHECKPOINT).items() if ".norm1." in n}
    file = changed_micro_swin(tmp_path / "dead.safetensors", norms)
    argv = ("--calib", "--resume", file, *DIGITS, *SMALL[:4], "--output", tmp_path)
    message = refused(*argv)
    assert "tensors are zero in every image" in message
    assert "layers.0.blocks.0.attn.qkv.input_quantizer" in message
    assert "QUANT.ALLOW_DEAD" in message
    allowed = swinq(*argv, "--opts", "QUANT.ALLOW_DEAD", "['*.attn.*']", "EVAL.IMAGES", "10")
    assert allowed.code == 0, allowed.err


def test_residual_beyond_fp16_is_refused_before_anything_is_exported(tmp_path: Path) -> None:
    name = "patch_embed.norm.weight"
    weight = tensors_of(CHECKPOINT)[name] * 2e4
    file = changed_micro_swin(tmp_path / "loud.safetensors", {name: weight})
    argv = ("--calib", "--resume", file, *DIGITS, *SMALL[:4], "--output", tmp_path)
    message = refused(*argv)
    assert "residual stream exceeds 32,768" in message and "patch_embed.stream reaches" in message
    assert not list(tmp_path.glob("*/*/*int8*"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_image_is_named(split: str, tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images")
    bad = sorted((images / split / "3").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:60])
    message = refused(
        *("--calib", "--resume", CHECKPOINT, "--data-path", images, "--workers", "0"),
        *("--num-calib-batch", "4", "--calib-batchsz", "5", "--sensitivity-images", "0"),
        *("--output", tmp_path),
    )
    assert f"{split}/3/{bad.name}" in message and "never skipped" in message


def test_images_without_a_validation_folder_are_refused_at_once(tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images", splits=("train",))
    argv = ("--calib", "--resume", CHECKPOINT, "--data-path", images, *SMALL, "--output", tmp_path)
    ran = swinq(*argv)
    assert ran.code == 2 and "calibrating" not in ran.err
    message = refused(*argv)
    assert "has no folder val" in message and f"{images}/val/<class>/<image>" in message


def test_more_calibration_images_than_there_are_is_refused(tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images")
    argv = ("--calib", "--resume", CHECKPOINT, "--data-path", images, "--output", tmp_path)
    message = refused(*argv, "--num-calib-batch", "7", "--calib-batchsz", "3")
    assert "wants 21 images" in message and "holds 20" in message
    assert "--num-calib-batch" in message


def test_too_few_images_without_labels_are_refused(tmp_path: Path) -> None:
    images = write_flat(tmp_path / "flat", count=3)
    argv = ("--calib", "--resume", CHECKPOINT, "--data-path", images, "--output", tmp_path)
    assert "wants 4 images" in refused(*argv, *SMALL)


def test_data_of_other_classes_are_refused(tmp_path: Path) -> None:
    images = write_digits(tmp_path / "images", classes=3)
    argv = ("--calib", "--resume", CHECKPOINT, "--data-path", images, "--output", tmp_path)
    message = refused(*argv, *SMALL)
    assert "holds 3 classes" in message and "the model has 10" in message


@pytest.mark.parametrize("kind", ["calib", "int8_mode1"])
@pytest.mark.parametrize("action", ["--eval", "--throughput"])
def test_file_with_one_bit_changed_is_refused(
    kind: str, action: str, demo: Demo, tmp_path: Path
) -> None:
    file = flipped(demo.checkpoint(kind), tmp_path / "changed.safetensors")
    data = DIGITS[:4] if action == "--eval" else ()
    message = refused(action, "--resume", file, *data, "--output", tmp_path)
    assert f"{file}: changed since it was written" in message and "sha256" in message


@pytest.mark.parametrize("kind", ["calib", "int8_mode1"])
@pytest.mark.parametrize("kept", [0, 5, 400, 20_000])
def test_file_that_was_cut_short_is_refused(
    kind: str, kept: int, demo: Demo, tmp_path: Path
) -> None:
    file = tmp_path / "cut.safetensors"
    file.write_bytes(demo.checkpoint(kind).read_bytes()[:kept])
    message = refused("--eval", "--resume", file, *DIGITS[:4], "--output", tmp_path)
    assert str(file) in message


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refused("--eval", "--resume", tmp_path / "no.pth", *DIGITS[:4], "--output", tmp_path)
    assert str(tmp_path / "no.pth") in message


def test_output_in_the_way_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    message = refused("--eval", "--output", tmp_path / "taken")
    assert "taken" in message and "--output" in message


@pytest.mark.parametrize("action", ["--calib", "--train"])
def test_checkpoints_that_could_not_be_written_in_the_end_are_refused_at_the_start(
    action: str, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    place = tmp_path / "taken" / "folder"
    ran = swinq(action, "--output", tmp_path, "--calib-output-path", place)
    assert ran.code == 2 and "calibration: " not in ran.out
    assert f"cannot write to {place}" in ran.err and "--calib-output-path" in ran.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_output_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    message = refused("--eval", "--output", tmp_path / "results")
    assert str(tmp_path / "results") in message and "--output" in message


def test_full_disk_leaves_the_old_files(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "micro_swin_digits_int8_mode1.safetensors"
    old.write_bytes(b"what was there before")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = refused(
        *("--export", "--resume", demo.checkpoint("calib"), "--output", tmp_path / "run"),
        *("--calib-output-path", tmp_path),
    )
    assert "No space left on device" in message and "free space" in message
    assert old.read_bytes() == b"what was there before"
    assert sorted(p.name for p in tmp_path.iterdir()) == [old.name, "run"]


def test_process_of_its_own_ends_with_the_error_alone(demo: Demo, tmp_path: Path) -> None:
    """As a user starts it: exit code, nothing but the message on standard error, no traceback."""
    file = flipped(demo.checkpoint("int8_mode1"), tmp_path / "changed.safetensors")
    main = Path(__file__).parents[2] / "swinq" / "main.py"
    ran = subprocess.run(
        [sys.executable, main, "--eval", "--resume", file, *DIGITS[:4], "--output", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: {file}: changed since it was written")
    assert len(ran.stderr.splitlines()) <= 10
