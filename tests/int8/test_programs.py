"""The C++ programs on loops over host memory: what they check and what they refuse, without a GPU.

scripts/build_kernels.sh builds them, with one timed run in place of many.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinq.export.collect import collect
from swinq.export.format import layers
from swinq.export.plain import collect_plain
from swinq.models.architecture import Architecture
from swinq.quant.insert import set_int8_mode
from tests.export.calibrated_model import calibrated_model, lively_model
from tests.int8.made_checkpoint import made_architecture, made_checkpoint, write_made

PROGRAMS = Path(__file__).resolve().parents[2] / "build" / "kernels" / "host"
IMAGE, WINDOW = 32, 8
# As model_type 0 has it, but for what no program asks for.
TINY = {
    "img_size": IMAGE,
    "patch_size": 4,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": WINDOW,
    "mlp_ratio": 1.0,
    "pretrained_window_sizes": (0, 0, 0, 0),
}


def run(name: str, *arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
    program = PROGRAMS / name
    if not program.is_file():
        pytest.skip(f"no {program}: bash scripts/build_kernels.sh builds it where nvcc is")
    return subprocess.run(
        [str(program), *map(str, arguments)],
        env={**os.environ, **{key: str(value) for key, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=300,
    )


def example(
    name: str, version: int, kind: int, *options: object, batch: int = 1, **environment: object
) -> subprocess.CompletedProcess[str]:
    """swin_example or swin_int8_example: data_type or int8_mode `kind`, the smallest images."""
    return run(name, version, kind, 0, WINDOW, IMAGE, batch, *options, **environment)


def refused(ran: subprocess.CompletedProcess[str], problem: str, fix: str) -> None:
    assert ran.returncode == 1
    assert problem in ran.stderr and f"\n  fix: {fix}" in ran.stderr, ran.stderr


def tiny(version: int) -> Architecture:
    return made_architecture(version, **TINY)


def int8_file(
    folder: Path,
    version: int = 1,
    mode: int = 1,
    *,
    vectors: bool = False,
    change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
) -> Path:
    """What calibration on such noise as the programs make exports.

    Args:
        vectors: give some layers an input scale for each channel.
    """
    noise = 4 * torch.rand(64, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0)) - 2
    model = calibrated_model(tiny(version), vectors=vectors, on=noise)
    set_int8_mode(model, mode)
    made = collect(model, int8_mode=mode)
    change(made.tensors)
    path = folder / "int8.safetensors"
    return write_made(path, tiny(version), mode=mode, tensors=made.tensors)


def fp16_file(folder: Path) -> Path:
    made = collect_plain(lively_model(tiny(1)))
    path = folder / "fp16.safetensors"
    return write_made(path, tiny(1), precision=made.precision, tensors=made.tensors)


@pytest.mark.parametrize(
    ("name", "version", "kind", "other"),
    [
        ("swin_int8_example", 1, 1, "FP32 logits, 0.10 allowed"),
        ("swin_int8_example", 2, 2, "FP32 logits, 0.10 allowed"),
        ("swin_example", 1, 0, "FP16 logits, 0.01 allowed"),
        ("swin_example", 2, 1, "FP32 logits, 0.01 allowed"),
    ],
)
def test_made_up_weights_are_compared_with_another_precision(
    name: str, version: int, kind: int, other: str
) -> None:
    ran = example(name, version, kind)
    assert ran.returncode == 0, ran.stderr
    assert "checked: finite" in ran.stdout and other in ran.stdout
    assert "SWINQ-CPP-time" in ran.stdout


@pytest.mark.parametrize(
    ("version", "mode", "vectors"), [(1, 1, True), (1, 2, False), (2, 1, False), (2, 2, True)]
)
def test_a_checkpoint_is_compared_with_its_dequantized_self(
    tmp_path: Path, version: int, mode: int, vectors: bool
) -> None:
    path = int8_file(tmp_path, version, mode, vectors=vectors)
    ran = example("swin_int8_example", version, mode, "--checkpoint", path, batch=2)
    assert ran.returncode == 0, ran.stderr
    assert "away from the FP32 logits, 0.30 allowed" in ran.stdout
    assert "SWINQ-CPP-time" in ran.stdout


def test_an_fp16_checkpoint_is_compared_with_fp32(tmp_path: Path) -> None:
    ran = example("swin_example", 1, 1, "--checkpoint", fp16_file(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "away from the FP32 logits, 0.01 allowed" in ran.stdout


def test_a_checkpoint_whose_codes_saturate_is_not_timed(tmp_path: Path) -> None:
    def saturate(tensors: dict[str, Tensor]) -> None:
        for name, scale in tensors.items():
            if name.endswith("fc1.input_scale"):
                scale.mul_(0.02)

    path = int8_file(tmp_path, change=saturate)
    ran = example("swin_int8_example", 1, 1, "--checkpoint", path)
    refused(ran, "of their deviation apart, wanted at most 0.3", "run it on made-up weights")
    assert "same bits again" in ran.stdout and "SWINQ-CPP-time" not in ran.stdout


@pytest.mark.parametrize(
    ("name", "kind", "is_int8", "problem", "fix"),
    [
        ("swin_example", 0, False, "FP16, wanted FP32", "give data_type 1"),
        ("swin_example", 0, True, "INT8, wanted FP32", "run swin_int8_example on it"),
        ("swin_example", 1, True, "INT8, wanted FP16", "run swin_int8_example on it"),
        ("swin_int8_example", 1, False, "FP16, wanted INT8 mode 1", "run swin_example on it, with"),
    ],
)
def test_a_file_of_other_numbers_is_refused(
    tmp_path: Path, name: str, kind: int, is_int8: bool, problem: str, fix: str
) -> None:
    path = int8_file(tmp_path) if is_int8 else fp16_file(tmp_path)
    refused(example(name, 1, kind, "--checkpoint", path), problem, fix)


@pytest.mark.parametrize("suffix", [".attn", ".mlp.fc1"])
def test_one_int8_layer_makes_an_int8_file(tmp_path: Path, suffix: str) -> None:
    """Though no GEMM of it might be: an attention has none, an MLP is one kernel."""
    table = {
        layer.name: "int8" if layer.name == f"layers.0.blocks.0{suffix}" else "fp16"
        for layer in layers(tiny(1))
    }
    tensors = made_checkpoint(tiny(1), precision=table).tensors
    path = write_made(tmp_path / "m.safetensors", tiny(1), precision=table, tensors=tensors)
    refused(
        example("swin_example", 1, 1, "--checkpoint", path),
        "1 of its layers are INT8",
        "run swin_int8_example",
    )


def test_memory_counts_images_and_logits_too() -> None:
    batch, bits = 4096, 20
    # fp16 images and 1000 logits of each, and the one more that the check runs
    beside = (batch + 1) * (3 * IMAGE * IMAGE * 2 + 1000 * 4)
    free = beside + (1 << bits)  # which no workspace of so many fits in
    ran = example("swin_int8_example", 1, 1, batch=batch, SWINQ_HOST_FREE=free)
    refused(ran, f"MiB of GPU memory, {free >> bits} MiB are free", "use a smaller batch")
    wanted = int(ran.stderr.partition(" wants ")[2].split()[0])
    one = example("swin_int8_example", 1, 1, batch=1, SWINQ_HOST_FREE=0)
    assert "a batch of 1, with one image to check it by, wants" in one.stderr
    assert wanted > beside >> bits
    enough = example("swin_int8_example", 1, 1, batch=1, SWINQ_HOST_FREE=16 << bits)
    assert enough.returncode == 0, enough.stderr


GEMM = (1, IMAGE, WINDOW, 1, 16, 1)  # batch, img, window, heads, size_per_head, dtype


def test_the_largest_gemm_must_fit_before_any_is_tuned(tmp_path: Path) -> None:
    ran = run("swin_gemm", *GEMM, 1, SWINQ_CACHE_DIR=tmp_path, SWINQ_HOST_FREE=10_000)
    refused(ran, "the largest GEMM of a batch of 1 wants 0 MiB", "use a smaller batch")
    assert ran.stdout == ""  # not even the head of the table


def test_a_model_that_no_kernel_has_is_refused_before_its_weights_are_made(tmp_path: Path) -> None:
    """They would take many gigabytes."""
    ran = run("swin_gemm", 1, 224, 7, 1024, 32, 1, 1, SWINQ_CACHE_DIR=tmp_path)
    refused(ran, "embed_dim 32768", "use a narrower model")


@pytest.mark.parametrize("is_int8", [0, 1])
def test_every_gemm_gets_a_tile(tmp_path: Path, is_int8: int) -> None:
    ran = run("swin_gemm", *GEMM, is_int8, SWINQ_CACHE_DIR=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "tiles written to" in ran.stdout and list(tmp_path.glob("tiles-host-*"))


def test_a_failed_allocation_says_what_to_do() -> None:
    # weights fit, the workspace of the batch does not
    ran = example("swin_int8_example", 1, 1, batch=2048, SWINQ_HOST_LARGEST=64 << 20)
    refused(ran, "cudaMalloc of ", "free device memory, or use a smaller batch")
