"""The built libswinq on a GPU: against the reference and torch, same bits, non-finite numbers."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swinq.errors import DataError, EngineError, SwinqError
from swinq.export.format import default_precision, layer_names
from swinq.export.plain import collect_plain
from swinq.int8 import choice
from swinq.int8.engine import CudaSwin
from swinq.int8.library import available
from swinq.int8.model import Int8Swin
from swinq.models.architecture import Architecture
from tests.export.calibrated_model import lively_model
from tests.int8.made_checkpoint import (
    made_architecture,
    made_checkpoint,
    overflowing_attention,
    write_made,
)
from tests.int8.test_model import (
    VARIANTS,
    images,
    mixed_precision,
    require_same_bits_in_any_company,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not available(), reason="libswinq is not built"),
]
ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("int8", "mode 2", "mixed", "fp16")


def on_gpu(arch: Architecture, precision: str) -> tuple[CudaSwin, Int8Swin]:
    """A made-up model on the engine and, on the CPU, on the reference."""
    mode = 2 if precision == "mode 2" else 1
    table = {
        "int8": default_precision(arch, 1),
        "mode 2": default_precision(arch, 2),
        "mixed": mixed_precision(arch, 1),
        "fp16": dict.fromkeys(layer_names(arch), "fp16"),
    }[precision]
    checkpoint = made_checkpoint(arch, mode=mode, precision=table)
    return CudaSwin(checkpoint), Int8Swin(checkpoint)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", VARIANTS)
def test_engine_agrees_with_the_reference(name: str, precision: str) -> None:
    arch = VARIANTS[name]
    model, reference = on_gpu(arch, precision)
    batch = images(arch, 4)
    wanted = reference(batch)
    found = model(batch)
    assert found.device.type == "cuda"
    # exp, GELU and float sums differ in the last bits: single codes move, logits a little
    assert (found.cpu() - wanted).abs().max() < 0.1 * wanted.std()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.02), ("fp32", 1e-3)])
def test_float_models_agree_with_torch(version: int, precision: str, bound: float) -> None:
    arch = made_architecture(version)
    model = lively_model(arch)
    batch = images(arch, 4)
    with torch.no_grad():
        wanted = model(batch)
    found = CudaSwin(collect_plain(model, precision))(batch).cpu()
    assert (found - wanted).abs().max() < bound * wanted.std()


def tiny_architecture(version: int) -> Architecture:
    """As many channels, blocks and tokens as Swin-T has."""
    size, window = (224, 7) if version == 1 else (256, 8)
    return made_architecture(
        version,
        img_size=size,
        patch_size=4,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        mlp_ratio=4.0,
        window_size=window,
        pretrained_window_sizes=(0, 0, 0, 0),
    )


@pytest.mark.parametrize("make", [made_architecture, tiny_architecture])
@pytest.mark.parametrize("version", [1, 2])
def test_fp16_errs_at_most_twice_as_much_as_torch(
    version: int, make: Callable[[int], Architecture]
) -> None:
    arch = make(version)
    model = lively_model(arch).half().cuda()  # weights that all three have
    batch = images(arch, 64).half().cuda()
    with torch.no_grad():
        plain = model(batch).double()
        exact = model.double()(batch.double())
    found = CudaSwin(collect_plain(model.float(), "fp16"))(batch).double()
    assert (found - exact).square().mean() <= 4 * (plain - exact).square().mean()


# 96 channels, whose MLP is one kernel on sm_90: v1's has a form for few rows, which one image is
# still, and v2 takes separate kernels for those.
FUSED = {
    "img_size": 128,
    "embed_dim": 96,
    "num_heads": (3, 6),
    "mlp_ratio": 4.0,
    "window_size": 8,
}


@pytest.mark.parametrize("changes", [{}, FUSED], ids=["narrow", "fused"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", [1, 2])
def test_an_image_has_the_same_bits_in_any_company_stream_and_graph(
    version: int, precision: str, changes: dict[str, object]
) -> None:
    arch = made_architecture(version, **changes)
    model, _ = on_gpu(arch, precision)
    batch = images(arch, 11).cuda()
    together = model(batch)
    require_same_bits_in_any_company(model, batch, together)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        aside = model(batch)
    other.synchronize()
    assert torch.equal(aside, together)
    graph = model.graph(11)
    for _ in range(3):
        assert torch.equal(graph(batch), together)
    streams = [torch.cuda.current_stream(), other] * 10
    ways = [batch, batch.flip(0)] * 10
    other.wait_stream(streams[0])
    found = []
    for stream, way in zip(streams, ways, strict=True):
        with torch.cuda.stream(stream):
            found.append(graph(way))
    torch.cuda.synchronize()
    assert all(torch.equal(x, together) for x in found[::2])
    assert all(torch.equal(x, together.flip(0)) for x in found[1::2])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", [1, 2])
def test_a_batch_of_more_than_two_to_the_31_numbers_is_right(version: int, precision: str) -> None:
    arch = tiny_architecture(version)
    model, _ = on_gpu(arch, precision)
    few = images(arch, 8).cuda().half()
    repeats = -(-(2**31) // ((arch.img_size // 4) ** 2 * arch.embed_dim * len(few))) + 1
    wanted = model(few)
    torch.cuda.empty_cache()
    pixels = few.numel() * few.element_size() * repeats
    if torch.cuda.mem_get_info()[0] < model.plan.workspace_size(repeats * len(few)) + 2 * pixels:
        pytest.skip("too little memory for such a batch")
    found = model(few.repeat(repeats, 1, 1, 1))
    assert torch.equal(found, wanted.repeat(repeats, 1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_gpu_gives_the_same_bits_while_the_first_is_current() -> None:
    arch = made_architecture()
    first, _ = on_gpu(arch, "int8")
    second = CudaSwin(first.checkpoint, "cuda:1")
    batch = images(arch, 4)
    wanted = first(batch).cpu()
    assert torch.cuda.current_device() == 0
    found = second(batch)
    assert found.device == torch.device("cuda", 1)
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(second.graph(4)(batch.to("cuda:1")).cpu(), wanted)


def test_streams_run_at_once_without_mixing() -> None:
    arch = made_architecture()
    model, _ = on_gpu(arch, "int8")
    batches = [images(arch, 8).cuda() for _ in range(4)]
    wanted = [model(batch) for batch in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found: list[Tensor] = []
    for _ in range(20):
        found = []
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(model(batch, check=False))
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_forward_neither_waits_nor_allocates() -> None:
    arch = made_architecture()
    model, _ = on_gpu(arch, "int8")
    batch = images(arch, 4).cuda()
    model(batch)
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            model(batch, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] == free


FIRST_FORWARD = """
import sys
import torch
from torch.profiler import ProfilerActivity, profile
from swinq.int8.engine import CudaSwin

model = CudaSwin.load(sys.argv[1])
size = model.plan.workspace_size(2)
images = torch.empty(2, 3, 32, 32, device="cuda").fill_(0.5)
logits = torch.empty(2, 10, device="cuda")
workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
if sys.argv[2] == "prepared":
    model.plan.prepare(2)
torch.cuda.synchronize()
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
    model.plan.forward(images, logits, workspace)
    torch.cuda.synchronize()
loading = ("Lazy Function Loading", "Runtime Triggered Module Loading")
print(sum(event.count for event in profiler.key_averages() if event.key in loading))
"""


def test_a_prepared_forward_loads_no_kernels(tmp_path: Path) -> None:
    path = write_made(tmp_path / "model.safetensors", made_architecture())
    loads = [
        int(subprocess.check_output([sys.executable, "-c", FIRST_FORWARD, path, how], cwd=ROOT))
        for how in ("prepared", "as it is")
    ]
    assert loads[0] == 0 < loads[1]


def test_memory_of_the_host_is_refused() -> None:
    plan = on_gpu(made_architecture(), "int8")[0].plan
    workspace = torch.empty(plan.prepare(2), dtype=torch.uint8, device="cuda")
    logits = torch.empty(2, 10, device="cuda")
    for on_host in (torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 32, 32).pin_memory()):
        with pytest.raises(EngineError, match="images is at .* in the memory of the host"):
            plan.forward(on_host, logits, workspace)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", [1, 2])
def test_image_that_is_no_number_is_reported_and_spoils_no_other(
    version: int, precision: str
) -> None:
    arch = made_architecture(version)
    model, _ = on_gpu(arch, precision)
    batch = images(arch, 4).cuda()
    clean = model(batch)
    for value in (float("nan"), float("inf"), -70000.0):
        bad = batch.clone()
        bad[2, 1, 5, 5] = value
        with pytest.raises(DataError, match="image 2 of the batch"):
            model(bad)
        logits = model(bad, check=False)
        assert logits[2].isnan().all()
        assert torch.equal(logits[[0, 1, 3]], clean[[0, 1, 3]])
    with pytest.raises(DataError, match="image 0 of the batch"):
        model(torch.full_like(batch[:1], float("nan")).half())


@pytest.mark.parametrize("name", ["patch_embed.norm.bias", "layers.0.blocks.0.mlp.fc2.bias"])
def test_overflow_of_the_stream_is_reported_though_codes_would_hide_it(name: str) -> None:
    arch = made_architecture()
    checkpoint = made_checkpoint(arch, mode=2)
    checkpoint.tensors[name][0] = 1e6
    with pytest.raises(SwinqError, match="overflowed on image 0"):
        CudaSwin(checkpoint)(images(arch, 1))


@pytest.mark.parametrize(("version", "row"), [(1, 5), (1, 37), (1, 70), (2, 70)])
def test_overflow_of_an_fp16_attention_is_reported_though_codes_would_hide_it(
    version: int, row: int
) -> None:
    checkpoint = overflowing_attention(version, row)
    with pytest.raises(SwinqError, match="overflowed on image 0"):
        CudaSwin(checkpoint)(images(checkpoint.architecture, 1))


def test_auto_takes_the_engine_on_a_gpu(tmp_path: Path) -> None:
    path = write_made(tmp_path / "model.safetensors", made_architecture())
    assert isinstance(choice.load(path, device="cuda"), CudaSwin)
