"""swinq's command line with a fault planted in the third step of rank 1.

torchrun --nproc_per_node 2 tests/train/failing_job.py raise|kill|leave|hang FLAGS...
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from swinq import cli, distributed
from swinq.train import qat

FAULTY_STEP = 2


def fail(kind: str) -> None:
    """What rank 1 does."""
    print(f"fault at {time.time()}", flush=True)
    if kind == "raise":
        raise RuntimeError("planted fault")
    if kind == "leave":
        os._exit(0)
    if kind == "hang":
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    """Runs the command on this rank."""
    kind, *argv = sys.argv[1:]
    real = qat.seed_step

    def seed_step(*place: Any) -> None:
        if place[1] == FAULTY_STEP and distributed.rank() == 1:
            fail(kind)
        real(*place)

    qat.seed_step = seed_step
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main())
