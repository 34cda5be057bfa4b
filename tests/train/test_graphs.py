"""Captured stages compute, draw and add up what the kernels do one by one."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swinq import config
from swinq.commands.train import settings_of
from swinq.errors import SwinqError
from swinq.models.architecture import Architecture
from swinq.models.layers import SwinBase, set_drop_path
from swinq.quant.insert import quantize_model, used_quantizers
from swinq.train.graphs import CapturedStages, can_capture, capture_stages, hold_gradients
from swinq.train.parallel import compile_blocks
from swinq.train.ranges import KINDS, learn_ranges
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin
from tests.train.jobs import Judge, run_job, tiny_calibrated
from tests.train.tape import play_graphs_on_the_cpu

BATCH = 4
# torch.compile looks at .grad of the block's input, and uses what torch has deprecated
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, or a CPU on which graphs are tapes."""
    if request.param == "cpu":
        play_graphs_on_the_cpu(monkeypatch)
    return str(request.param)


def student_of(architecture: Architecture, device: str) -> SwinBase:
    torch.manual_seed(0)
    model = quantize_model(tiny_swin(architecture), recipe("int8"))
    set_ranges_to_maxima(model, torch.randn(BATCH, 3, 32, 32))
    learn_ranges(model, KINDS)
    return model.train().to(device)  # type: ignore[return-value]


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits and gradients of a forward and backward; the model's are cleared first."""
    model.zero_grad(set_to_none=True)
    logits = model(images)
    logits.square().mean().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach().clone(), **found}


def require_same_gradients(plain: nn.Module, captured: nn.Module, device: str) -> None:
    assert captured.state_dict().keys() == plain.state_dict().keys()
    for _ in range(3):  # new images, and new weights in the same places
        images = torch.randn(BATCH, 3, 32, 32, device=device)
        wanted, found = gradients(plain, images), gradients(captured, images)
        assert wanted.keys() == found.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], msg=name)
        with torch.no_grad():
            for model in (plain, captured):
                for parameter in model.parameters():
                    parameter.mul_(1.01)


@pytest.mark.parametrize("version", [1, 2])
def test_captured_stages_give_the_gradients_of_every_batch(
    version: int,
    device: str,
    tiny_architecture: Architecture,
    tiny_architecture_v2: Architecture,
) -> None:
    plain = student_of(tiny_architecture if version == 1 else tiny_architecture_v2, device)
    captured = copy.deepcopy(plain)
    capture_stages(captured, BATCH, "fp32")
    require_same_gradients(plain, captured, device)
    with pytest.raises(ValueError, match=r"captured for \[4, 256, 32\] tokens, got \[1, "):
        captured(torch.randn(1, 3, 32, 32, device=device))
    for model in (plain, captured):
        model.eval()
    images = torch.randn(2, 3, 32, 32, device=device)  # of any number
    assert torch.equal(captured(images), plain(images))


@pytest.mark.gpu
@pytest.mark.parametrize("version", [1, 2])
def test_compiled_blocks_can_be_captured(
    version: int, tiny_architecture: Architecture, tiny_architecture_v2: Architecture
) -> None:
    plain = student_of(tiny_architecture if version == 1 else tiny_architecture_v2, "cuda")
    captured = copy.deepcopy(plain)
    torch._dynamo.reset()
    compile_blocks(plain)
    compile_blocks(captured)
    capture_stages(captured, BATCH, "fp32")
    require_same_gradients(plain, captured, "cuda")


def test_gradients_that_are_held_add_up(device: str, tiny_architecture: Architecture) -> None:
    """Without zeros to begin with, the second backward would write over the first one's."""
    student = student_of(tiny_architecture, device)
    capture_stages(student, BATCH, "fp32")
    batches = torch.randn(2, BATCH, 3, 32, 32, device=device)
    first, second = (gradients(student, images) for images in batches)
    student.zero_grad(set_to_none=True)
    hold_gradients(student)
    for images in batches:
        student(images).square().mean().backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, first[name] + second[name], msg=name)


@pytest.mark.filterwarnings("ignore:.*broadcast_buffers:FutureWarning")
def test_data_parallel_training_gets_the_gradients_of_captured_stages(
    device: str, tiny_architecture: Architecture
) -> None:
    plain = student_of(tiny_architecture, device)
    captured = copy.deepcopy(plain)
    capture_stages(captured, BATCH, "fp32")
    backend = "nccl" if device == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    try:
        wanted, found = (DistributedDataParallel(m, **options) for m in (plain, captured))
        require_same_gradients(wanted, found, device)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_drop_path_is_drawn_anew_and_follows_the_seed(
    compiled: bool, device: str, tiny_architecture: Architecture
) -> None:
    student = student_of(tiny_architecture, device)
    set_drop_path(student, 0.5)
    if compiled and device == "cuda":
        compile_blocks(student)
    capture_stages(student, BATCH, "fp32")
    images = torch.randn(BATCH, 3, 32, 32, device=device)

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [student(images).detach().clone() for _ in range(2)]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_captured_job_learns_like_one_that_is_not(
    tmp_path: Path, accumulation: int, device: str
) -> None:
    """By its losses: of gradients near 0, AdamW makes steps of either sign."""
    losses = []
    for graphs in (False, True):
        progress = run_job(
            tmp_path / str(graphs),
            tiny_calibrated().to(device),
            device=device,
            cuda_graphs=graphs,
            accumulation=accumulation,
            batch=4 // accumulation,
        )
        losses.append([loss for _, loss, _ in progress.curve])
    plain, captured = losses
    assert len(plain) == 8 and abs(plain[-1] - plain[0]) > 0.01
    assert captured == pytest.approx(plain, rel=1e-4)


def test_a_captured_job_resumes_with_what_was_saved(tmp_path: Path, device: str) -> None:
    """Also ranges that the graphs read: the model that it is given has others, one for channels."""

    class KilledError(Exception):
        pass

    class Killed(Judge):
        def judge(self, model: nn.Module) -> float:
            if len(self.seen) == 1:
                raise KilledError
            return super().judge(model)

    job: dict[str, Any] = {"device": device, "cuda_graphs": True}
    whole = run_job(tmp_path / "whole", tiny_calibrated().to(device), **job)
    with pytest.raises(KilledError):
        run_job(tmp_path / "killed", tiny_calibrated().to(device), Killed(), **job)
    other = tiny_calibrated(seed=2).to(device)
    turned = used_quantizers(other)["layers.0.blocks.0.attn.qkv.input_quantizer"]
    shape = (32,) if turned.per_tensor else ()
    turned.load_calib_amax(turned.amax.max().expand(shape))
    resumed = run_job(tmp_path / "killed", other, **job)
    assert [step for step, _, _ in resumed.curve] == list(range(1, 9))
    losses = [[loss for _, loss, _ in progress.curve] for progress in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_the_graphs_read_may_not_move(tiny_architecture: Architecture) -> None:
    student = student_of(tiny_architecture, "cpu")
    captured = CapturedStages(student)
    for tensor in student.state_dict().values():
        tensor.mul_(2.0)
    quantizers = used_quantizers(student)
    for quantizer in quantizers.values():
        quantizer.refresh_scale()
    captured.require_unmoved()
    name, quantizer = next(iter(quantizers.items()))
    quantizer.load_calib_amax(quantizer.amax)
    with pytest.raises(SwinqError, match=rf"(?s){name}\._amax has moved.*CUDA_GRAPHS False"):
        captured.require_unmoved()


@pytest.mark.parametrize(
    "changes",
    [
        {"QAT.CUDA_GRAPHS": False},
        {"QAT.COMPILE": "no"},
        {"TRAIN.USE_CHECKPOINT": True},
    ],
)
def test_stages_are_captured_where_that_can_work(changes: dict[str, object]) -> None:
    told = config.default_config()
    cuda = torch.device("cuda")
    assert settings_of(told, cuda).cuda_graphs
    assert not settings_of(told, torch.device("cpu")).cuda_graphs
    assert not can_capture(cuda, checkpointing=False, sharded=True)
    for key, value in changes.items():
        config.put(told, key, value, "test")
    assert not settings_of(told, cuda).cuda_graphs


def test_a_resumed_job_may_capture_or_not() -> None:
    told = settings_of(config.default_config(), torch.device("cuda"))
    assert told.decisive() == replace(told, cuda_graphs=False).decisive()
