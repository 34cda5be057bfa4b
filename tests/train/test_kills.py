"""Jobs that are killed end with the bits of jobs that are not; a failed rank ends all of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from swinq.train import qat
from swinq.train.qat import StoppedError
from swinq.train.state import CheckpointFolder
from tests.threads import threads_of_torch
from tests.train.jobs import run_job, tiny_calibrated
from tests.train.kill_job import COMMAND, KINDS

KILL_JOB = Path(__file__).with_name("kill_job.py")
FAILING_JOB = Path(__file__).with_name("failing_job.py")
STEPS = 8  # of a tiny job


class Killed(BaseException):
    """Ends a job where it is, as SIGKILL does: nothing of the job's handles it."""


def trained(folder: Path) -> dict[str, Tensor]:
    """What a tiny job ends with, or goes on to end with."""
    model = tiny_calibrated()
    run_job(folder, model, save_steps=3, ema=0.5, learned=("output", "input", "weight"))
    return model.state_dict()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    with threads_of_torch(1):
        return trained(tmp_path_factory.mktemp("alone"))


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same bits: unused ranges are NaN, which equals nothing."""
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if found[n].numpy().tobytes() != wanted[n].numpy().tobytes()] == []


def every(steps: range, quick: int) -> list[Any]:
    """All steps, of which one is hit in every run of the tests."""
    return [pytest.param(n, marks=() if n == quick else pytest.mark.slow) for n in steps]


@pytest.mark.parametrize("step", every(range(STEPS), quick=4))
def test_job_killed_in_any_step_ends_with_the_same_bits(
    step: int,
    left_alone: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    single_thread: None,
) -> None:
    def killed(seed: int, at: int, number: int) -> None:
        if at == step:
            raise Killed

    with monkeypatch.context() as faulty, pytest.raises(Killed):
        faulty.setattr(qat, "seed_step", killed)
        trained(tmp_path)
    check_same(trained(tmp_path), left_alone)


@pytest.mark.parametrize("step", every(range(STEPS), quick=1))
def test_job_asked_to_stop_saves_the_step_under_way_and_goes_on_from_it(
    step: int,
    left_alone: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    single_thread: None,
) -> None:
    real = qat.seed_step

    def asked(seed: int, at: int, number: int) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        real(seed, at, number)

    with monkeypatch.context() as faulty, pytest.raises(StoppedError) as stopped:
        faulty.setattr(qat, "seed_step", asked)
        trained(tmp_path)
    assert stopped.value.code == 143
    saved = CheckpointFolder(tmp_path / "training").newest()
    assert saved is not None and saved.step == step + 1
    check_same(trained(tmp_path), left_alone)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("ranks", "kills"), [(1, 30), (2, 24)])
def test_jobs_hit_at_random_moments_lose_nothing(ranks: int, kills: int, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, KILL_JOB, tmp_path, f"--ranks={ranks}", f"--kills={kills}", "--seed=4"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    summary = json.loads(ran.stdout.splitlines()[-1])
    assert summary["hits"] >= kills
    assert all(summary[kind] for kind in KINDS)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
MAIN = Path(__file__).parents[2] / "swinq" / "main.py"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_torchrun_passes_a_signal_on_and_everything_is_saved(number: int, tmp_path: Path) -> None:
    """It signals whole process groups: data workers are in them, and must stay."""
    handled = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    flags = (*COMMAND, "OUTPUT", str(tmp_path), "DATA.NUM_WORKERS", "1", "QAT.EPOCHS", "300")
    job = subprocess.Popen(
        [sys.executable, *TORCHRUN, *handled, MAIN, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert job.stdout is not None
    said = ""
    for line in job.stdout:
        said += line
        if "epoch 2/" in line:
            job.send_signal(number)
            break
    said += job.communicate(timeout=60)[0]
    assert job.returncode != 0
    stopped = re.search(r"stopped after step (\d+) of", said)
    assert stopped, said[-5000:]
    newest = sorted(tmp_path.glob("*/*/training/*"))[-1]
    assert newest.name == f"step-{int(stopped[1]):08d}.safetensors"
    assert "error:" not in said and "data worker" not in said


TIMEOUT_S = 10  # of a collective
# What befalls rank 1, the error that must be told, the rank that torchrun names, seconds to the end
FAILURES = [
    ("raise", "RuntimeError: planted fault", 1, 30),
    ("kill", "Signal 9 (SIGKILL) received", 1, 30),
    # torchrun accuses no rank that leaves with 0, nor one that only waits
    ("leave", "[rank 0] error: rank 0 of 2 on ", 0, 30),
    ("hang", f"Timed out waiting {TIMEOUT_S}000ms", 0, TIMEOUT_S + 30),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "error", "named", "limit_s"), FAILURES, ids=[kind for kind, *_ in FAILURES]
)
def test_failure_of_one_rank_ends_the_job_and_is_named(
    kind: str, error: str, named: int, limit_s: int, tmp_path: Path
) -> None:
    flags = (*COMMAND, "DIST.TIMEOUT", str(TIMEOUT_S), "OUTPUT", str(tmp_path))
    ran = subprocess.run(
        [sys.executable, *TORCHRUN, FAILING_JOB, kind, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    ended = time.time()
    fault = re.search(r"fault at ([\d.]+)", ran.stdout)
    assert fault, ran.stderr[-3000:]
    assert ended - float(fault[1]) < limit_s
    assert ran.returncode != 0
    assert error in ran.stderr
    _, _, root_cause = ran.stderr.partition("Root Cause (first observed failure):")
    assert f"rank      : {named} " in root_cause, ran.stderr[-3000:]
    others = [line for line in ran.stderr.splitlines() if line.startswith("[rank0]: Traceback")]
    assert not others  # a rank that lost its peer says so in a line
