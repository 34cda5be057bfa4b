"""One rank of a job that only counts steps; what it does is the argument.

steps: counts until asked to stop. hang: rank 0 waits in a collective that rank 1 never enters.
"""

import sys
import time

import torch
import torch.distributed as group

from swinq import distributed
from swinq.train.signals import StopRequest


def count(stop: StopRequest) -> int:
    """Steps of 20 ms; the exit code."""
    for step in range(1, 1000):
        time.sleep(0.02)
        group.all_reduce(torch.zeros(1))  # as gradients are
        print(f"step {step}", flush=True)
        if stop.agreed():
            print(f"stopped after {step}", flush=True)
            return stop.exit_code
    return 0


def hang() -> None:
    """Nothing that Python could interrupt: a collective without its peer."""
    if distributed.rank() == 1:
        print("sleeping", flush=True)
        time.sleep(60)
    print("waiting", flush=True)
    group.all_reduce(torch.zeros(1))


def main() -> int:
    """Joins the ranks and does what was asked for."""
    distributed.init("gloo")
    with StopRequest(grace_s=1.0 if sys.argv[1] == "hang" else None) as stop:
        if sys.argv[1] == "hang":
            hang()
        code = count(stop)
    distributed.shutdown()
    return code


if __name__ == "__main__":
    sys.exit(main())
