"""Blocks that share graphs, state by plain names, and ranks that agree with one process."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swinq.errors import CheckpointError, ConfigError
from swinq.models.architecture import Architecture
from swinq.models.layers import set_drop_path
from swinq.quant.insert import quantize_model
from swinq.train import parallel
from swinq.train.ranges import KINDS, learn_ranges
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin
from tests.train.ranks import free_port

CPU = torch.device("cpu")
IMAGES = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32).sin()

RANK = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from swinq import distributed
from swinq.train import parallel
from tests.conftest import _tiny
from tests.train.test_parallel import CPU, IMAGES, optimizer_of, step, student_of

folder = Path(sys.argv[1])
torch.set_num_threads(1)
distributed.init(timeout_s=60)
rank = distributed.rank()
for kind in ("ddp", "fsdp"):
    student = student_of(_tiny(1))
    model = parallel.wrap(student, kind, CPU)
    optimizer = optimizer_of(student)
    norm = step(model, student, optimizer, IMAGES.chunk(2)[rank], parts=2)
    tensors = parallel.save_tensors(student, optimizer)
    tensors["norm"] = norm
    save_file(tensors, folder / f"{kind}-{rank}.safetensors")
    parallel.load_tensors(student, optimizer, load_file(folder / "alone.safetensors"))
    again = parallel.save_tensors(model, optimizer)
    save_file(again, folder / f"{kind}-loaded-{rank}.safetensors")
distributed.shutdown()
"""


def student_of(architecture: Architecture, kinds: tuple[str, ...] = KINDS) -> nn.Module:
    torch.manual_seed(0)
    model = quantize_model(tiny_swin(architecture), recipe("int8"))
    set_ranges_to_maxima(model, IMAGES)
    learn_ranges(model, kinds)
    return model.train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def step(
    model: nn.Module,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    parts: int = 1,
) -> Tensor:
    """One step over all images, accumulated over parts; returns the gradient's norm."""
    for number, part in enumerate(images.chunk(parts)):
        with parallel.gradient_sync(model, number + 1 == parts):
            (model(part).square().mean() / parts).backward()
    norm = parallel.clip_gradients(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


# torch.compile looks at .grad of the block's input and ignores the warning, where it may
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("version", [1, 2])
def test_blocks_of_a_stage_share_a_graph_whatever_their_names_ranges_and_drop_paths(
    version: int, tiny_architecture: Architecture, tiny_architecture_v2: Architecture
) -> None:
    arch = replace(tiny_architecture if version == 1 else tiny_architecture_v2, depths=(4, 4))
    student = student_of(arch)
    plain = copy.deepcopy(student)
    set_drop_path(student, 0.3)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    parallel.compile_blocks(student, count)
    student(IMAGES).sum().backward()
    assert len(graphs) == 2 * 2 + 1  # shifted and unshifted blocks of two stages, one merge
    set_drop_path(student, 0.0)
    torch.testing.assert_close(student(IMAGES), plain(IMAGES), rtol=1e-3, atol=1e-3)
    assert len(graphs) == 5
    assert student.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*broadcast_buffers:FutureWarning")
def test_data_parallel_training_leaves_the_graphs_whole(tiny_architecture: Architecture) -> None:
    """Buckets far smaller than a block would have it cut into many graphs, or be refused."""
    student = student_of(tiny_architecture)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        torch._dynamo.reset()
        parallel.compile_blocks(student, count)
        model = DistributedDataParallel(student, broadcast_buffers=False, bucket_cap_mb=0.005)
        model(IMAGES).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 2 + 1 + 2  # shifted and unshifted blocks of two stages, one merge


def test_a_saved_state_goes_on_with_the_same_bits(tiny_architecture: Architecture) -> None:
    first = student_of(tiny_architecture)
    optimizer = optimizer_of(first)
    for _ in range(2):
        step(first, first, optimizer, IMAGES)
    tensors = parallel.save_tensors(first, optimizer)
    assert {n.split(".")[0] for n in tensors} == {"model", "optimizer"}
    assert "optimizer.head.weight.exp_avg_sq" in tensors
    second = student_of(tiny_architecture)
    resumed = optimizer_of(second)
    parallel.load_tensors(second, resumed, tensors)
    for model, its in ((first, optimizer), (second, resumed)):
        step(model, model, its, IMAGES)
    ends = [parallel.save_tensors(first, optimizer), parallel.save_tensors(second, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_saved_tensors_are_copies_and_an_untried_optimizer_has_none(
    tiny_architecture: Architecture,
) -> None:
    model = student_of(tiny_architecture)
    optimizer = optimizer_of(model)
    saved = parallel.save_tensors(model, optimizer)
    assert not any(name.startswith("optimizer") for name in saved)
    before = saved["model.head.weight"].clone()
    step(model, model, optimizer, IMAGES)
    assert torch.equal(saved["model.head.weight"], before)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_state_of_another_model_is_refused_by_name(
    damage: str, tiny_architecture: Architecture
) -> None:
    model = student_of(tiny_architecture)
    tensors = parallel.save_tensors(model, optimizer_of(model))
    if damage == "missing":
        del tensors["model.head.weight"]
    else:
        tensors["model.head.weight"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"model\.head\.weight .*wanted \[10, 64\]"):
        parallel.load_tensors(model, optimizer_of(model), tensors)


def test_one_process_wraps_nothing_and_an_unknown_wrapping_is_refused() -> None:
    model = nn.Linear(2, 2)
    for kind in parallel.WRAPPINGS:
        assert parallel.wrap(model, kind, CPU) is model
    with pytest.raises(ConfigError, match="'zero'.*ddp, fsdp, none"):
        parallel.wrap(model, "zero", CPU)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 100.0])
def test_clipping_gives_the_norm_and_scales_only_what_is_above(max_norm: float) -> None:
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(7))]
    parameters.append(nn.Parameter(torch.zeros(2)))  # without a gradient
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    before = [p.grad.clone() for p in parameters[:2]]
    norm = parallel.clip_gradients(parameters, max_norm)
    wanted = float(torch.cat([g.flatten().double() for g in before]).norm())
    assert norm.shape == () and float(norm) == pytest.approx(wanted, rel=1e-6)
    factor = max_norm / wanted if 0 < max_norm < wanted else 1.0
    for parameter, gradient in zip(parameters[:2], before, strict=True):
        torch.testing.assert_close(parameter.grad, factor * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_of_ddp_and_of_fsdp_do_what_one_process_does(
    tmp_path: Path, repo_root: Path, tiny_architecture: Architecture
) -> None:
    from safetensors.torch import save_file

    alone = student_of(tiny_architecture)
    optimizer = optimizer_of(alone)
    norm = step(alone, alone, optimizer, IMAGES, parts=4)
    wanted = parallel.save_tensors(alone, optimizer)
    save_file(wanted, tmp_path / "alone.safetensors")
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(repo_root),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            cwd=repo_root,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:  # one that waits for another's death
            rank.kill()
            rank.communicate()
    for kind in ("ddp", "fsdp"):
        found = load_file(tmp_path / f"{kind}-0.safetensors")
        other = load_file(tmp_path / f"{kind}-1.safetensors")
        assert all(torch.equal(tensor, other[name]) for name, tensor in found.items())
        assert float(found.pop("norm")) == pytest.approx(float(norm), rel=1e-4)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].shape == tensor.shape
            if name.endswith("exp_avg"):  # the gradient
                furthest = (found[name] - tensor).abs().max()
                assert furthest <= 1e-3 * tensor.abs().max() + 1e-8, name
        loaded = load_file(tmp_path / f"{kind}-loaded-0.safetensors")
        assert loaded.keys() == wanted.keys()
        assert all(torch.equal(tensor, loaded[name]) for name, tensor in wanted.items())
