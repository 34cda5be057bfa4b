"""CudaSwin: what it takes and refuses, before a stand-in; and on a GPU the real kernels' logits."""

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import swinq
from swinq.demo.checkpoint import CHECKPOINT
from swinq.errors import ConfigError, DataError, EngineError, EngineFailedError, SwinqError
from swinq.export.format import default_precision, layer_names
from swinq.export.plain import collect_plain
from swinq.int8 import choice, engine
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin, Graph
from swinq.int8.library import available
from swinq.int8.model import Int8Swin
from swinq.models.architecture import Architecture
from tests.export.calibrated_model import lively_model
from tests.int8 import fake_engine
from tests.int8.made_checkpoint import (
    made_architecture,
    made_checkpoint,
    overflowing_attention,
    write_made,
)
from tests.int8.test_model import VARIANTS, images, mixed_precision


@pytest.fixture(scope="module")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_engine.built(tmp_path_factory.mktemp("library"))


@pytest.fixture
def fake(library_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaSwin]:
    """A model whose logits are the sum of an image's pixels plus the class's number."""
    fake_engine.use(library_path, monkeypatch)
    yield CudaSwin(made_checkpoint(made_architecture()))


def sums(batch: Tensor) -> Tensor:
    """The logits of `fake`."""
    return batch.double().flatten(1).sum(1, keepdim=True) + torch.arange(10)


def test_images_and_logits_reach_the_library_and_come_back(fake: CudaSwin) -> None:
    batch = images(fake.arch, 3)
    logits = fake(batch)
    assert (logits.shape, logits.dtype) == ((3, 10), torch.float32)
    assert torch.allclose(logits.double(), sums(batch), atol=1e-3)
    assert fake(batch[:0]).shape == (0, 10)
    assert fake.engine == "libswinq fake" and fake.notes == []
    assert (fake.int8_mode, fake.classes) == (1, None)
    assert fake.plan.launches == 10 and fake.plan.weight_bytes > 0


def test_every_floating_type_and_layout_is_read(fake: CudaSwin) -> None:
    batch = images(fake.arch, 4).half()
    wanted = fake(batch)
    for same in (batch.float(), batch.double(), batch.flip(0)[[3, 2, 1, 0]]):
        assert torch.equal(fake(same), wanted)
    assert torch.equal(fake(batch.contiguous(memory_format=torch.channels_last)), wanted)
    shifted = torch.zeros(batch.numel() + 1, dtype=batch.dtype)[1:].view(batch.shape).copy_(batch)
    assert shifted.data_ptr() % 16  # an address that the kernels cannot read
    assert torch.equal(fake(shifted), wanted)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.zeros(3, 32, 32), r"wants images \(batch, 3, 32, 32\), got a tensor \(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 64), r"got a tensor \(1, 3, 32, 64\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch\.uint8, wanted floating point"),
    ],
)
def test_wrong_images_are_refused_in_the_words_of_the_reference(
    fake: CudaSwin, bad: Tensor, said: str
) -> None:
    for model in (fake, Int8Swin(made_checkpoint(fake.arch))):
        with pytest.raises(DataError, match=said):
            model(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -70000.0])
def test_image_that_is_no_number_is_named_or_has_nan_logits(fake: CudaSwin, value: float) -> None:
    batch = images(fake.arch, 4)
    batch[2, 1, 5, 5] = value
    with pytest.raises(DataError, match="image 2 of the batch holds NaN"):
        fake(batch)
    unchecked = fake(batch, check=False)
    assert unchecked.isfinite().all(1).tolist() == [True, True, False, True]


def test_overflow_within_the_model_is_named(fake: CudaSwin) -> None:
    batch = torch.zeros(3, 3, 32, 32)
    batch[1] = 1000.0  # to the stand-in an overflow
    with pytest.raises(SwinqError, match=r"made-up\.safetensors: .* on image 1 of") as caught:
        fake(batch)
    assert "calibrate on more" in caught.value.fix


def test_check_is_refused_while_a_graph_is_captured(
    fake: CudaSwin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "capturing", lambda device: True)
    with pytest.raises(EngineError, match="check=True waits") as caught:
        fake(images(fake.arch, 1))
    assert "check=False" in caught.value.fix
    fake(images(fake.arch, 1), check=False)
    assert not fake._workspaces  # the graph's memory is the graph's


def test_a_stream_keeps_one_workspace_as_large_as_its_largest_batch(
    fake: CudaSwin, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (2, 5, 3):
        fake(images(fake.arch, batch))
    assert [held.numel() for held in fake._workspaces.values()] == [5 * 64]
    monkeypatch.setattr(devices, "stream", lambda device: 7)
    fake(images(fake.arch, 1))
    assert {stream: held.numel() for stream, held in fake._workspaces.items()} == {0: 320, 7: 64}


def test_graph_holds_its_images_and_keeps_no_workspace_here(fake: CudaSwin) -> None:
    graph = fake.graph(2, torch.float16)
    assert (graph.images.shape, graph.images.dtype) == ((2, 3, 32, 32), torch.float16)
    batch = images(fake.arch, 2).half()
    assert torch.equal(graph(batch), fake(batch))


@pytest.mark.parametrize(
    ("batch", "dtype"), [(0, torch.float32), (-1, torch.float16), (2, torch.bfloat16)]
)
def test_graph_of_what_no_kernel_reads_is_refused(
    fake: CudaSwin, batch: int, dtype: torch.dtype
) -> None:
    with pytest.raises(DataError, match=f"of {batch} images of {dtype}") as caught:
        fake.graph(batch, dtype)
    assert "torch.float16" in caught.value.fix


@pytest.fixture
def captured(fake: CudaSwin, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """A graph of two images whose replays do nothing, of a model that nothing else holds."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stub in {
        "device": lambda device: nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(engine, "Graph", Graph)
    return CudaSwin(made_checkpoint(fake.arch)).graph(2)


def test_graph_keeps_the_weights_that_it_reads(captured: Graph, fake: CudaSwin) -> None:
    gc.collect()
    assert fake_engine.live_plans() == 2  # fake's, and what captured reads
    assert captured.logits.shape == (2, 10)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(1, 3, 32, 32),
        torch.zeros(3, 32, 32),
        torch.zeros(3, 3, 32, 32),
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
    ids=["stretched", "stretched too", "more", "bytes"],
)
def test_graph_refuses_images_that_it_was_not_captured_for(captured: Graph, wrong: Tensor) -> None:
    with pytest.raises(DataError, match=r"graph wants \(2, 3, 32, 32\) floating point, got"):
        captured(wrong)
    right = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    captured(right)
    assert torch.equal(captured.images, right.float())


def test_plan_is_destroyed_with_the_model(fake: CudaSwin) -> None:
    before = fake_engine.live_plans()
    other = CudaSwin(made_checkpoint(fake.arch))
    assert fake_engine.live_plans() == before + 1
    del other
    gc.collect()
    assert fake_engine.live_plans() == before


def test_what_the_library_refuses_is_said(fake: CudaSwin) -> None:
    checkpoint = made_checkpoint(fake.arch)
    head = checkpoint.tensors.pop("head.weight")
    with pytest.raises(EngineError, match="head.weight is missing") as caught:
        CudaSwin(checkpoint)
    assert caught.value.fix == "export again"
    checkpoint.tensors["head.weight"] = head.double()
    with pytest.raises(EngineError, match="head.weight is torch.float64 with 2 dimensions"):
        CudaSwin(checkpoint)
    with pytest.raises(EngineError, match="a batch of 1001 images"):
        fake(torch.zeros(1001, 3, 32, 32))
    deep = made_architecture(
        1,
        img_size=512,
        depths=(1,) * 9,
        num_heads=(1,) * 9,
        embed_dim=8,
        pretrained_window_sizes=(0,) * 9,
    )
    with pytest.raises(EngineError, match="9 stages, the CUDA engine runs up to 8"):
        CudaSwin(made_checkpoint(deep))


def test_load_reads_checks_and_describes(fake: CudaSwin, tmp_path: Path) -> None:
    path = write_made(tmp_path / "model.safetensors", made_architecture(2), mode=2)
    model = CudaSwin.load(path, int8_mode=2, device="cpu")
    assert (model.int8_mode, model.arch) == (2, made_architecture(2))
    assert model.classes == [f"class {i}" for i in range(10)]
    assert model.checkpoint.transform["crop"] == 32


def test_float_model_has_no_mode(fake: CudaSwin) -> None:
    model = CudaSwin(collect_plain(lively_model(fake.arch), "fp32"))
    assert model.int8_mode is None and model.classes is None
    batch = torch.full((1, 3, 32, 32), 1000.0)
    with pytest.raises(SwinqError, match="the model: the residual stream"):
        model(batch)


def test_choice_takes_what_is_asked_for(fake: CudaSwin, tmp_path: Path) -> None:
    path = write_made(tmp_path / "model.safetensors", fake.arch)
    assert isinstance(choice.load(path), Int8Swin)  # a CPU: auto means the reference
    assert isinstance(choice.load(path, engine="cuda"), CudaSwin)
    assert isinstance(choice.load(path, engine="reference"), Int8Swin)
    with pytest.raises(ConfigError, match="engine is 'gpu', wanted one of auto, cuda, reference"):
        choice.load(path, engine="gpu")


def test_choice_falls_back_with_a_reason_unless_cuda_is_demanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(device: object) -> torch.device:
        raise EngineError("cuda:0 has compute\n capability 6.1")

    monkeypatch.setattr(devices, "require", refuse)
    monkeypatch.setattr(devices, "require_present", lambda device: None)
    checkpoint = made_checkpoint(made_architecture())
    with pytest.raises(EngineError, match="capability 6.1"):
        choice.prepare(checkpoint, "cuda", "cuda")
    taken: list[object] = []

    class Elsewhere(Int8Swin):
        """The reference, wherever it is told to run."""

        def __init__(self, checkpoint: object, device: object) -> None:
            taken.append(device)
            super().__init__(checkpoint, "cpu")  # type: ignore[arg-type]

    monkeypatch.setattr(choice, "Int8Swin", Elsewhere)
    model = choice.prepare(checkpoint, "cuda")
    assert taken == ["cuda"]
    assert model.notes == [
        "the reference runs this model on cuda, not libswinq: cuda:0 has compute capability 6.1"
    ]


def test_choice_does_not_hide_that_the_gpu_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(checkpoint: object, device: object) -> CudaSwin:
        raise EngineFailedError("libswinq: allocating 9 bytes of weights: out of memory")

    monkeypatch.setattr(choice, "CudaSwin", full)
    monkeypatch.setattr(devices, "require_present", lambda device: None)
    with pytest.raises(EngineFailedError, match="out of memory"):
        choice.prepare(made_checkpoint(made_architecture()), "cuda")


@pytest.mark.parametrize("kind", ["int8", "float"])
@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda", "no GPU is visible"), ("gpu0", "'gpu0' is not known")],
)
def test_a_device_that_is_not_there_is_named(
    kind: str, device: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = (
        write_made(tmp_path / "int8.safetensors", made_architecture())
        if kind == "int8"
        else CHECKPOINT
    )
    with pytest.raises(ConfigError, match=words):
        swinq.load(path, device=device)


# ---- the real library ----

needs_library = pytest.mark.skipif(not available(), reason="libswinq is not built")
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


@pytest.mark.gpu
@needs_library
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


@pytest.mark.gpu
@needs_library
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


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("version", [1, 2])
def test_an_image_has_the_same_bits_in_any_company_stream_and_graph(
    version: int, precision: str
) -> None:
    arch = made_architecture(version)
    model, _ = on_gpu(arch, precision)
    batch = images(arch, 11).cuda()
    together = model(batch)
    for size in (1, 2, 5):
        for start in (0, 3, 6):
            part = slice(start, start + size)
            assert torch.equal(model(batch[part]), together[part])
    order = torch.randperm(11)
    assert torch.equal(model(batch[order]), together[order])
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        aside = model(batch)
    other.synchronize()
    assert torch.equal(aside, together)
    graph = model.graph(11)
    for _ in range(3):
        assert torch.equal(graph(batch), together)
    assert torch.equal(graph(batch.flip(0)), together.flip(0))


@pytest.mark.gpu
@needs_library
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


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@needs_library
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


@pytest.mark.gpu
@needs_library
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


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("name", ["patch_embed.norm.bias", "layers.0.blocks.0.mlp.fc2.bias"])
def test_overflow_of_the_stream_is_reported_though_codes_would_hide_it(name: str) -> None:
    arch = made_architecture()
    checkpoint = made_checkpoint(arch, mode=2)
    checkpoint.tensors[name][0] = 1e6
    with pytest.raises(SwinqError, match="overflowed on image 0"):
        CudaSwin(checkpoint)(images(arch, 1))


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize(("version", "row"), [(1, 5), (1, 37), (1, 70), (2, 70)])
def test_overflow_of_an_fp16_attention_is_reported_though_codes_would_hide_it(
    version: int, row: int
) -> None:
    checkpoint = overflowing_attention(version, row)
    with pytest.raises(SwinqError, match="overflowed on image 0"):
        CudaSwin(checkpoint)(images(checkpoint.architecture, 1))


@pytest.mark.gpu
@needs_library
def test_auto_takes_the_engine_on_a_gpu(tmp_path: Path) -> None:
    path = write_made(tmp_path / "model.safetensors", made_architecture())
    assert isinstance(choice.load(path, device="cuda"), CudaSwin)
