"""The integer model: same bits in any company, every precision, and no silent overflow."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinq.errors import CheckpointError, DataError, SwinqError
from swinq.export.format import UNROUNDED, default_precision, layer_names, layers
from swinq.int8 import windows
from swinq.int8.model import Int8Swin
from swinq.models.architecture import Architecture
from tests.int8.made_checkpoint import (
    made_architecture,
    made_checkpoint,
    overflowing_attention,
    write_made,
)
from tests.threads import threads_of_torch

VARIANTS = {
    "v1": made_architecture(1),
    "v2": made_architecture(2),
    "window 3, three stages": made_architecture(
        1,
        img_size=48,
        window_size=3,
        patch_size=4,
        depths=(3, 1, 1),
        num_heads=(1, 2, 4),
        pretrained_window_sizes=(0, 0, 0),
    ),
    "v2, window 12 larger than the last map": made_architecture(2, img_size=48, window_size=12),
    "one channel": made_architecture(1, in_chans=1, img_size=16, num_classes=3),
}


def images(arch: Architecture, count: int) -> torch.Tensor:
    return torch.randn(count, arch.in_chans, arch.img_size, arch.img_size)


def require_same_bits_in_any_company(
    model: Callable[[Tensor], Tensor], batch: Tensor, together: Tensor
) -> None:
    """Logits of parts of a batch of 11, and in another order, are those of all together."""
    for size in (1, 2, 5):
        for start in (0, 3, 6):
            part = slice(start, start + size)
            assert torch.equal(model(batch[part]), together[part])
    order = torch.randperm(11)
    assert torch.equal(model(batch[order]), together[order])


def mixed_precision(arch: Architecture, mode: int) -> dict[str, str]:
    """fp16 and unrounded layers of every kind, somewhere."""
    table = default_precision(arch, mode)
    for index, layer in enumerate(layers(arch)):
        if index % 3 == 0:
            table[layer.name] = "fp16"
        elif index % 3 == 1 and layer.kind in ("proj", "fc2", "reduction"):
            table[layer.name] = UNROUNDED
    return table


@pytest.mark.parametrize("mode", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_finite_and_depend_on_the_image(name: str, mode: int) -> None:
    arch = VARIANTS[name]
    logits = Int8Swin(made_checkpoint(arch, mode=mode))(images(arch, 3))
    assert logits.shape == (3, arch.num_classes)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("precision", ["int8", "mixed", "fp16"])
@pytest.mark.parametrize("name", ["v1", "v2", "window 3, three stages"])
def test_an_image_has_the_same_bits_in_any_company(name: str, precision: str) -> None:
    arch = VARIANTS[name]
    table = {
        "int8": default_precision(arch, 1),
        "mixed": mixed_precision(arch, 1),
        "fp16": dict.fromkeys(layer_names(arch), "fp16"),
    }[precision]
    model = Int8Swin(made_checkpoint(arch, precision=table))
    batch = images(arch, 11)
    require_same_bits_in_any_company(model, batch, model(batch))


@pytest.mark.parametrize("version", [1, 2])
def test_integer_layers_do_not_care_how_work_is_cut(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = made_architecture(version)
    checkpoint, batch = made_checkpoint(arch), images(arch, 2)
    whole = Int8Swin(checkpoint)(batch)
    for elements in (1, 5000, 1 << 30):
        monkeypatch.setitem(windows.PIECE_ELEMENTS, "cpu", elements)
        assert torch.equal(Int8Swin(checkpoint)(batch), whole)


def test_number_of_threads_changes_nothing_in_integer_layers() -> None:
    arch = made_architecture()
    model, batch = Int8Swin(made_checkpoint(arch)), images(arch, 4)
    traces = []
    for threads in (1, 2):
        with threads_of_torch(threads):
            traces.append(model.trace(batch))
    for name, codes in traces[0].items():
        if name != "logits":
            assert torch.equal(codes, traces[1][name]), name


def test_portable_products_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = made_architecture()
    checkpoint, batch = made_checkpoint(arch), images(arch, 2)
    quick = Int8Swin(checkpoint)(batch)
    monkeypatch.setattr("swinq.int8.matmul.int_mm_is_usable", lambda: False)
    assert torch.equal(Int8Swin(checkpoint)(batch), quick)


def test_autocast_and_default_dtype_around_the_model_change_nothing() -> None:
    arch = made_architecture(2)
    checkpoint, batch = made_checkpoint(arch), images(arch, 2)
    plain = Int8Swin(checkpoint)(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Int8Swin(checkpoint)(batch), plain)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Int8Swin(checkpoint)(batch), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_half_and_double_images_are_taken() -> None:
    arch = made_architecture()
    model, batch = Int8Swin(made_checkpoint(arch)), images(arch, 2).half()
    assert torch.equal(model(batch), model(batch.float()))
    assert torch.equal(model(batch), model(batch.double()))


def test_empty_batch_has_no_logits() -> None:
    arch = made_architecture()
    assert Int8Swin(made_checkpoint(arch))(images(arch, 0)).shape == (0, 10)


def test_images_are_not_changed() -> None:
    arch = made_architecture()
    batch = images(arch, 2).half().float()
    before = batch.clone()
    Int8Swin(made_checkpoint(arch))(batch)
    assert torch.equal(batch, before)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mode", [1, 2])
def test_trace_shows_every_int8_tensor(version: int, mode: int) -> None:
    arch = made_architecture(version)
    checkpoint = made_checkpoint(arch, mode=mode)
    trace = Int8Swin(checkpoint).trace(images(arch, 2))
    expected = set()
    for layer in layers(arch):
        if layer.kind == "attention":
            expected |= {f"{layer.name}.{part}" for part in ("q", "k", "v", "probabilities")}
            continue
        expected.add(f"{layer.name}.input")
        if f"{layer.name}.output_scale" in checkpoint.tensors:
            expected.add(f"{layer.name}.output")
    assert trace.keys() == expected
    block = "layers.0.blocks.1"
    shapes = {name: tuple(codes.shape) for name, codes in trace.items()}
    assert shapes[f"{block}.attn.qkv.input"] == (2 * 16, 16, 32)
    assert shapes[f"{block}.attn.q"] == (2 * 16, 1, 16, 32)
    assert shapes[f"{block}.attn.probabilities"] == (2 * 16, 1, 16, 16)
    assert shapes[f"{block}.mlp.fc2.input"] == (2, 256, 64)
    assert shapes["layers.0.downsample.reduction.input"] == (2, 64, 128)
    for name, codes in trace.items():
        assert codes.dtype == (torch.uint8 if name.endswith("probabilities") else torch.int8)
        assert len(codes.unique()) > 20, f"{name} hardly varies: scales are far off"


def test_traced_logits_are_those_of_a_plain_call() -> None:
    for version in (1, 2):
        arch = made_architecture(version)
        model = Int8Swin(made_checkpoint(arch, precision=mixed_precision(arch, 1)))
        batch = images(arch, 3)
        trace = model.trace(batch, streams=True)
        assert torch.equal(trace["logits"], model(batch))
        assert trace["patch_embed.stream"].dtype == torch.float16
        assert trace["layers.0.blocks.1.attn.stream"].shape == (3, 256, 32)
        assert trace["layers.0.downsample.stream"].shape == (3, 64, 64)
        fp16 = {name for name, word in model.checkpoint.precision.items() if word == "fp16"}
        owners = {name.rpartition(".")[0] for name in trace if not name.endswith("stream")}
        assert not owners & fp16


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 32, 32), "wants images (batch, 3, 32, 32), got a tensor (3, 32, 32)"),
        ((1, 1, 32, 32), "got a tensor (1, 1, 32, 32)"),
        ((1, 3, 32, 64), "got a tensor (1, 3, 32, 64)"),
        ((1, 3, 224, 224), "got a tensor (1, 3, 224, 224)"),
    ],
)
def test_wrong_shape_is_named(shape: tuple[int, ...], said: str) -> None:
    model = Int8Swin(made_checkpoint(made_architecture()))
    with pytest.raises(DataError) as caught:
        model(torch.zeros(shape))
    assert said in caught.value.problem
    assert "32 x 32" in caught.value.fix


def test_integer_images_are_refused() -> None:
    model = Int8Swin(made_checkpoint(made_architecture()))
    with pytest.raises(DataError, match=r"torch\.uint8, wanted floating point"):
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -70000.0])
def test_image_that_is_no_number_is_named(value: float) -> None:
    arch = made_architecture()
    batch = images(arch, 4)
    batch[2, 1, 5, 5] = value
    with pytest.raises(DataError, match="image 2 of the batch"):
        Int8Swin(made_checkpoint(arch))(batch)


@pytest.mark.parametrize("name", ["patch_embed.norm.bias", "layers.0.blocks.0.mlp.fc2.bias"])
def test_overflow_of_the_stream_is_an_error_though_codes_would_hide_it(name: str) -> None:
    arch = made_architecture()
    table = default_precision(arch, 2)
    checkpoint = made_checkpoint(arch, mode=2, precision=table)
    checkpoint.tensors[name][0] = 1e6
    with pytest.raises(SwinqError, match=r"residual stream of layers\.0 overflowed") as caught:
        Int8Swin(checkpoint)(images(arch, 1))
    assert caught.value.fix


@pytest.mark.parametrize(("version", "row"), [(1, 5), (1, 37), (1, 70), (2, 70)])
def test_overflow_of_an_fp16_attention_is_an_error_though_codes_would_hide_it(
    version: int, row: int
) -> None:
    checkpoint = overflowing_attention(version, row)
    with pytest.raises(SwinqError, match=r"q, k or v of layers\.0\.blocks\.1\.attn overflowed"):
        Int8Swin(checkpoint)(images(checkpoint.architecture, 1))


def test_overflow_of_the_logits_is_an_error() -> None:
    arch = made_architecture()
    checkpoint = made_checkpoint(arch)
    checkpoint.tensors["head.bias"][0] = 3.4e38
    checkpoint.tensors["norm.bias"][:] = 6e4
    checkpoint.tensors["head.weight"][0] = 6e4
    with pytest.raises(SwinqError, match="the logits overflowed"):
        checkpoint.tensors["norm.bias"][:] = 3e38  # finite, but no fp16 number
        Int8Swin(checkpoint)(images(arch, 1))


def test_load_reads_checks_and_describes(tmp_path: Path) -> None:
    arch = made_architecture(2)
    path = write_made(tmp_path / "model.safetensors", arch, mode=2)
    model = Int8Swin.load(path, int8_mode=2, architecture=arch)
    assert (model.int8_mode, model.arch) == (2, arch)
    assert model.classes == [f"class {i}" for i in range(10)]
    assert model.checkpoint.transform["crop"] == 32
    direct = Int8Swin(made_checkpoint(arch, mode=2))
    batch = images(arch, 2)
    assert torch.equal(model(batch), direct(batch))
    with pytest.raises(CheckpointError, match="int8 mode 1 was asked for"):
        Int8Swin.load(path, int8_mode=1)


def test_running_a_file_loads_no_quantizer(tmp_path: Path, repo_root: Path) -> None:
    path = write_made(tmp_path / "model.safetensors", made_architecture())
    program = (
        "import sys, torch; from swinq.int8.model import Int8Swin\n"
        f"Int8Swin.load({str(path)!r})(torch.zeros(1, 3, 32, 32))\n"
        "print(*[name for name in sys.modules if name.startswith(('swinq.quant', 'swinq.calib',"
        " 'swinq.models.swin', 'timm', 'torchvision'))])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=repo_root, capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []


def test_device_gives_the_logits_of_the_cpu_but_for_a_few_codes(device: torch.device) -> None:
    for version in (1, 2):
        arch = made_architecture(version)
        checkpoint, batch = made_checkpoint(arch), images(arch, 4)
        on_cpu = Int8Swin(checkpoint)(batch)
        there = Int8Swin(checkpoint, device)(batch.to(device))
        assert there.device.type == device.type
        # exp, erf and float sums differ in the last bit: single codes move, logits hardly
        assert (there.cpu() - on_cpu).abs().max() < 0.05 * on_cpu.std()
