"""CudaSwin: what it takes and refuses, before a stand-in; and on a GPU the real kernels' logits."""

import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import swinq
from swinq.demo.checkpoint import CHECKPOINT
from swinq.errors import ConfigError, DataError, EngineError, EngineFailedError, SwinqError
from swinq.export.plain import collect_plain
from swinq.int8 import choice, engine
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin, Graph
from swinq.int8.model import Int8Swin
from swinq.int8.plan import _architecture
from tests.export.calibrated_model import lively_model
from tests.int8 import fake_engine
from tests.int8.made_checkpoint import (
    made_architecture,
    made_checkpoint,
    write_made,
)
from tests.int8.test_model import images


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
    assert fake.plan.launches(1) == 10 and fake.plan.weight_bytes > 0


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
        (torch.zeros(1, 3, 32, 32).to_sparse(), "are a torch.sparse_coo, wanted a dense tensor"),
        ([torch.zeros(3, 32, 32)], "are a list, wanted a dense tensor"),
    ],
)
def test_wrong_images_are_refused_in_the_words_of_the_reference(
    fake: CudaSwin, bad: Any, said: str
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
    fake.plan.prepare(1)
    monkeypatch.setattr(devices, "capturing", lambda device: True)
    with pytest.raises(EngineError, match="check=True waits") as caught:
        fake(images(fake.arch, 1))
    assert "check=False" in caught.value.fix
    fake(images(fake.arch, 1), check=False)
    assert not fake._workspaces  # the graph's memory is the graph's
    with pytest.raises(EngineError, match="not prepared"):  # nor does a capture load kernels
        fake(images(fake.arch, 2), check=False)


def test_a_stream_keeps_one_workspace_as_large_as_its_largest_batch(
    fake: CudaSwin, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in (2, 5, 3):
        fake(images(fake.arch, batch))
    assert [held.numel() for held in fake._workspaces.values()] == [5 * 64]
    monkeypatch.setattr(devices, "stream", lambda device: 7)
    fake(images(fake.arch, 1))
    assert {stream: held.numel() for stream, held in fake._workspaces.items()} == {0: 320, 7: 64}


def test_a_larger_workspace_is_made_when_the_old_one_is_gone(
    fake: CudaSwin, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(images(fake.arch, 1))
    old = weakref.ref(fake._workspaces[0])
    freed = []

    def empty(*size: object, **options: object) -> Tensor:
        if options["dtype"] == torch.uint8:
            freed.append(old() is None)
        return made(*size, **options)

    made = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    fake(images(fake.arch, 2))
    assert freed == [True]


@pytest.mark.parametrize("batch", [-1, 1 << 31, 1 << 32])
def test_a_batch_that_no_c_int_holds_is_refused(fake: CudaSwin, batch: int) -> None:
    with pytest.raises(EngineError, match=f"a batch of {batch} images"):
        fake.plan.workspace_size(batch)
    with pytest.raises(EngineError, match=f"a batch of {batch} images"):
        fake.plan.launches(batch)


def test_a_size_that_no_c_int_holds_is_refused() -> None:
    arch = made_architecture(img_size=2**32 + 32)
    with pytest.raises(EngineError, match="img_size is 4294967328, and the CUDA engine counts up"):
        _architecture(arch)


def test_graph_holds_its_images_and_keeps_no_workspace_here(fake: CudaSwin) -> None:
    graph = fake.graph(2, torch.float16)
    assert (graph.images.shape, graph.images.dtype) == ((2, 3, 32, 32), torch.float16)
    batch = images(fake.arch, 2).half()
    assert torch.equal(graph(batch), fake(batch))


@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(0, torch.float32), (-1, torch.float16), (1.5, torch.float16), (2, torch.bfloat16)],
)
def test_graph_of_what_no_kernel_reads_is_refused(
    fake: CudaSwin, batch: Any, dtype: torch.dtype
) -> None:
    with pytest.raises(DataError, match=f"of {batch} images of {dtype}") as caught:
        fake.graph(batch, dtype)
    assert "torch.float16" in caught.value.fix


@pytest.fixture
def captured(fake: CudaSwin, monkeypatch: pytest.MonkeyPatch) -> Graph:
    """A graph of two images whose replays do nothing, of a model that nothing else holds."""
    stream = SimpleNamespace(wait_event=lambda event: None)
    for name, stub in {
        "device": lambda device: nullcontext(),
        "Event": lambda: SimpleNamespace(record=lambda stream=None: None),
        "current_stream": lambda device=None: stream,
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


def test_threads_that_share_a_graph_do_not_mix(captured: Graph) -> None:
    read, written = captured.images, captured.logits

    def replay() -> None:
        time.sleep(0.01)  # in which another thread could bring its images
        written.copy_(read.flatten(1)[:, :10])

    captured._graph.replay = replay  # type: ignore[method-assign]
    batches = [torch.full((2, 3, 32, 32), float(i)) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(captured, batches))
    assert [float(logits.mean()) for logits in found] == list(range(8))


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
    [
        ("cuda", "no GPU is visible"),
        ("gpu0", "'gpu0' is not known"),
        ("vulkan", "vulkan: PyTorch cannot use it here"),
        (None, "None is not known"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    kind: str, device: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = (
        write_made(tmp_path / "int8.safetensors", made_architecture())
        if kind == "int8"
        else CHECKPOINT
    )
    with pytest.raises(ConfigError, match=words):
        swinq.load(path, device=device)
