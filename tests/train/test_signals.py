"""Signals ask for a stop that all ranks make together, and end a process that cannot stop."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from swinq.data.loader import BatchLoader
from swinq.errors import ConfigError
from swinq.train import signals
from swinq.train.signals import SIGNALS, StopRequest
from tests.threads import threads_of_torch
from tests.train.ranks import start

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}
JOB = Path(__file__).with_name("signal_job.py").read_text()


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # the watching thread has it by then


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "signals" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("number", "code"), CODES.items(), ids=lambda value: str(int(value)))
def test_signal_stops_at_the_end_of_the_step_with_its_code(number: int, code: int) -> None:
    with StopRequest() as stop:
        assert not stop.agreed()
        assert stop.exit_code == 0
        send(number)
        assert stop.agreed()
        assert stop.agreed()
        assert stop.exit_code == code


def test_first_of_several_signals_gives_the_code() -> None:
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        assert stop.agreed()
        assert stop.exit_code == 138


def test_second_interrupt_is_immediate() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(signal.SIGINT)
        assert stop.agreed()
        send(signal.SIGINT)


def test_grace_ends_with_the_step_not_with_the_saving() -> None:
    with StopRequest(grace_s=0.2) as stop:
        send(signal.SIGTERM)
        assert stop.agreed()
        time.sleep(0.5)  # a checkpoint that takes its time


def test_grace_waits_for_a_save_that_a_signal_meets() -> None:
    with StopRequest(grace_s=0.2) as stop:
        assert not stop.agreed()
        with stop.saving():
            send(signal.SIGTERM)
            time.sleep(0.5)
        assert stop.agreed()


def test_a_step_after_a_save_has_the_whole_grace() -> None:
    """The test's own process would end, had it only what a second grace within the save leaves."""
    with StopRequest(grace_s=0.5) as stop:
        with stop.saving():
            send(signal.SIGTERM)
            time.sleep(0.9)
        time.sleep(0.3)
        assert stop.agreed()


def test_patience_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2m")
    with pytest.raises(ConfigError, match="TIMEOUT is '2m', wanted seconds"):
        StopRequest()


def test_grace_grows_with_the_patience_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed peer makes torchrun send SIGTERM, and then it kills after 30 s all the same."""
    assert [StopRequest().grace_s(number) for number in SIGNALS] == [20, 20, 20]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "150")
    for knows, grace_s in ((True, 100), (False, 20)):  # torchrun before PyTorch 2.12 does not
        config = SimpleNamespace(**({"shutdown_timeout": None} if knows else {}))
        monkeypatch.setattr(signals, "LaunchConfig", config)
        assert [StopRequest().grace_s(number) for number in SIGNALS] == [20, grace_s, 20]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "15")
    assert StopRequest().grace_s(signal.SIGTERM) == 10


def test_other_signals_are_none_of_its_business() -> None:
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    with StopRequest(grace_s=0.1) as stop:
        send(signal.SIGUSR2)
        time.sleep(0.2)
        assert not stop.agreed()
    signal.signal(signal.SIGUSR2, before)
    assert seen == [signal.SIGUSR2]


class Slow:
    """Images that take a while, in workers."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.1)
        return torch.zeros(1), os.getpid()

    def path(self, index: int) -> str:
        return str(index)

    def preload(self, indices: object) -> None:
        pass


@pytest.fixture
def thread_in_each_worker() -> Iterator[None]:
    """One that torch starts, before the worker can say anything about signals."""
    with threads_of_torch(2):
        yield


@pytest.mark.usefixtures("thread_in_each_worker")
@pytest.mark.parametrize("number", CODES, ids=lambda value: str(int(value)))
@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_workers_outlive_a_signal_to_the_whole_group(number: int, start_method: str) -> None:
    with StopRequest() as stop:
        loaded = iter(
            BatchLoader(Slow(), [[n] for n in range(12)], num_workers=2, start_method=start_method)
        )
        workers = {int(next(loaded).labels) for _ in range(4)}
        assert len(workers) == 2 and os.getpid() not in workers
        for worker in workers:  # from a stranger, as a scheduler is
            subprocess.run(["kill", f"-{number}", str(worker)], check=True)
        assert sum(len(batch) for batch in loaded) == 8
        assert not stop.agreed()  # a worker's signals are not its parent's


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"ended without {text!r}: {process.communicate()[1][-2000:]}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
def test_signal_to_one_rank_stops_both_after_the_same_step(number: int) -> None:
    ranks = start(JOB, "steps", ranks=2)
    wait_for(ranks[0], "step 3")
    ranks[1].send_signal(number)
    said = [rank.communicate(timeout=60) for rank in ranks]
    stopped = [out.splitlines()[-1] for out, _ in said]
    assert stopped[0] == stopped[1], said
    assert stopped[0].startswith("stopped after ")
    assert [rank.returncode for rank in ranks] == [CODES[signal.Signals(number)]] * 2


def test_rank_that_waits_for_a_peer_for_ever_ends_within_the_grace() -> None:
    ranks = start(JOB, "hang", ranks=2)
    wait_for(ranks[0], "waiting")
    wait_for(ranks[1], "sleeping")
    ranks[0].send_signal(signal.SIGTERM)
    began = time.monotonic()
    errors = ranks[0].communicate(timeout=30)[1]
    assert time.monotonic() - began < 10
    assert ranks[0].returncode == 143
    assert "[rank 0] SIGTERM 1 s ago, and no step has ended since" in errors
    ranks[1].kill()
    ranks[1].communicate()
