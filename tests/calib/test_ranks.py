"""Calibration finds the same bits on 1, 2 and 4 ranks, whatever the number of their threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

JOB = Path(__file__).with_name("rank_job.py")


def run(folder: Path, repo_root: Path, ranks: int, threads: int) -> list[dict[str, Tensor]]:
    """What each rank found."""
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), str(JOB), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(ranks)]


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, repo_root: Path
) -> dict[str, dict[str, Tensor]]:
    return run(tmp_path_factory.mktemp("ranks") / "1", repo_root, ranks=1, threads=2)[0]


@pytest.mark.parametrize(
    "ranks", [pytest.param(2, id="2"), pytest.param(4, id="4", marks=pytest.mark.slow)]
)
def test_every_rank_finds_the_bits_that_one_process_finds(
    alone: dict[str, dict[str, Tensor]], tmp_path: Path, repo_root: Path, ranks: int
) -> None:
    assert alone["v1"]["vectors"].numel() and alone["v2"]["vectors"].numel()
    for found in run(tmp_path / "many", repo_root, ranks, threads=1):
        assert found.keys() == alone.keys()
        for job, tensors in alone.items():
            assert tensors.keys() == found[job].keys()
            different = [n for n, x in tensors.items() if not torch.equal(x, found[job][n])]
            assert not different, f"{job}: {different}"
