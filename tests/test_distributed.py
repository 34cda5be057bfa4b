"""Ranks: no-ops in one process, exact collectives in two, named errors when a rank is missing."""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from swinq import distributed
from swinq.errors import ConfigError, SwinqError
from tests.train.ranks import free_port

TWO_RANKS = """
import sys, torch
from swinq import distributed
distributed.init(timeout_s=30)
distributed.init(timeout_s=30)  # a second time changes nothing
rank = distributed.rank()
assert distributed.world_size() == 2 and distributed.is_main() == (rank == 0)

total = torch.arange(6).view(2, 3).t()  # not contiguous
assert distributed.all_reduce_sum_(total) is total
assert torch.equal(total, 2 * torch.arange(6).view(2, 3).t())
big = torch.tensor(2**62 - 1) if rank else torch.tensor(2**62)
assert distributed.all_reduce_sum_(big).item() == 2**63 - 1  # exact where a float is not

nan, inf = torch.nan, torch.inf
top = torch.tensor([[-1.0, nan, 3.0, -inf], [-2.0, 5.0, nan, -inf]][rank])
distributed.all_reduce_max_(top)
assert torch.equal(top.isnan(), torch.tensor([False, True, True, False])), top
assert top[0] == -1 and top[3] == -inf
assert distributed.all_reduce_max_(torch.tensor([rank - 5])).item() == -4
half = torch.full((2, 3), float(rank), dtype=torch.float16)
assert torch.equal(distributed.all_reduce_max_(half), torch.ones(2, 3).half())

for dtype in (torch.bool, torch.float16, torch.int64, torch.uint8, torch.float64):
    here = torch.full((2, 2), 1 - rank, dtype=dtype)
    assert torch.equal(distributed.broadcast_(here), torch.ones(2, 2, dtype=dtype)), dtype
assert distributed.broadcast_(torch.tensor(rank), source=1).item() == 1
assert distributed.all_reduce_sum_(torch.empty(0, dtype=torch.int64)).numel() == 0
distributed.require_same("images", lambda: "0af1", "copy them")
try:
    distributed.require_same("images", lambda: ["0af1", "0af2"][rank], "copy them")
    assert rank == 0
except distributed.SwinqError as error:
    assert rank == 1 and "rank 1 of 2 on" in str(error) and "has other images" in str(error)
distributed.barrier()
distributed.shutdown()
print("rank", rank, "done", flush=True)
"""

LOST_RANK = """
import os, torch
from swinq import distributed
from swinq.errors import SwinqError
distributed.init(timeout_s=30)
if distributed.rank() == 1:
    os._exit(7)
try:
    distributed.all_reduce_sum_(torch.tensor(1))
except SwinqError as error:
    print(error, flush=True)
try:
    with distributed.lost_peers_named("training"):
        torch.distributed.all_reduce(torch.zeros(1))
except SwinqError as error:
    print(error, flush=True)
try:
    with distributed.lost_peers_named("training"):
        raise RuntimeError("a mistake of its own")
except RuntimeError as error:
    print(error, flush=True)
    os._exit(3)
"""


def started(program: str, rank: int, port: int, repo_root: Path) -> subprocess.Popen[str]:
    """A rank of two, in the environment that torchrun would give it."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=repo_root,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_agree_exactly(repo_root: Path) -> None:
    port = free_port()
    ranks = [started(TWO_RANKS, rank, port, repo_root) for rank in (0, 1)]
    for rank, process in enumerate(ranks):
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert f"rank {rank} done" in output


def test_a_lost_rank_is_an_error_that_says_so_at_once(repo_root: Path) -> None:
    port = free_port()
    ranks = [started(LOST_RANK, rank, port, repo_root) for rank in (0, 1)]
    ranks[1].communicate(timeout=120)
    since = time.monotonic()
    output, _ = ranks[0].communicate(timeout=120)
    assert time.monotonic() - since < 20  # the timeout is 30 s: nobody waited for it
    assert ranks[0].returncode == 3, output
    assert output.count("rank 0 of 2 on") == 2
    assert "sum over the ranks failed" in output and "training over the ranks failed" in output
    assert output.splitlines()[-1] == "a mistake of its own"
    assert "the first error in the log is the cause" in output


def test_one_process_needs_no_group() -> None:
    distributed.init()
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    count, top = torch.tensor([3]), torch.tensor([torch.nan, 2.0])
    assert distributed.all_reduce_sum_(count) is count and count.item() == 3
    assert distributed.all_reduce_max_(top) is top and top[0].isnan()
    assert distributed.broadcast_(count) is count
    distributed.barrier()
    distributed.shutdown()
    assert not torch.distributed.is_initialized()


def test_only_integers_are_summed() -> None:
    for dtype in (torch.float32, torch.int32):
        with pytest.raises(TypeError, match="wants int64"):
            distributed.all_reduce_sum_(torch.zeros(2, dtype=dtype))


def test_a_process_that_has_not_joined_may_not_go_on_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for collective in (
        lambda: distributed.all_reduce_sum_(torch.tensor([1])),
        lambda: distributed.all_reduce_max_(torch.tensor([1.0])),
        lambda: distributed.broadcast_(torch.tensor([1.0])),
        distributed.barrier,
    ):
        with pytest.raises(ConfigError, match="one of 2 processes"):
            collective()


def test_a_half_set_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT is not set"):
        distributed.init()
    monkeypatch.setenv("RANK", "zero")
    with pytest.raises(ConfigError, match="RANK is 'zero'"):
        distributed.rank()


def test_ranks_that_do_not_meet_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**variables, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="rank 1 of 2 could not join at 127.0.0.1"):
        distributed.init("gloo", timeout_s=1)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu_the_device_is_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.select_device(name) == torch.device("cpu")


def test_a_missing_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match=f"'{name}' cannot be used") as caught:
            distributed.select_device(name)
        assert "--device cpu" in caught.value.fix
    for name in ("gpu", "cuda:x", "cpu:0"):
        with pytest.raises(ConfigError, match=f"'{name}' is not known"):
            distributed.select_device(name)


def test_each_rank_takes_its_own_gpu_and_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.select_device("auto") == torch.device("cuda", 1)
    assert distributed.select_device("cuda:0") == torch.device("cuda", 0)
    assert taken == [1, 0]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"wants device cuda:2, but this machine shows 2 GPU"):
        distributed.select_device("cuda")


def test_one_named_gpu_for_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"'cuda:0' is one GPU, but 2 processes"):
        distributed.select_device("cuda:0")
    assert distributed.select_device("cpu") == torch.device("cpu")


def test_loaders_leave_a_core_and_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.loader_processes(3) == 3
    cores = set(range(16))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    assert distributed.loader_processes(-1) == 15
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.loader_processes(-1) == 3
    cores = {0}
    assert distributed.loader_processes(-1) == 0


def test_errors_tell_the_problem_and_the_fix_and_survive_copying() -> None:
    error = ConfigError("mode is 3", "use 1 or 2")
    assert str(error) == "mode is 3\n  fix: use 1 or 2"
    again = copy.copy(error)  # what a loader process does to hand an error over
    assert (type(again), again.problem, again.fix) == (ConfigError, "mode is 3", "use 1 or 2")
    assert str(SwinqError("alone")) == "alone"
