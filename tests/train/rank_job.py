"""Trains a tiny Swin on this rank and saves the state and the losses that every rank ends with.

[torchrun --nproc_per_node N] tests/train/rank_job.py FOLDER ddp|fsdp
"""

import sys
from pathlib import Path

import torch

from swinq import distributed
from tests.train.jobs import run_job, tiny_calibrated


def main() -> None:
    """A step is two micro-batches: of one rank, or one of each."""
    torch.set_num_threads(1)
    distributed.init("gloo")
    model = tiny_calibrated()
    folder = Path(sys.argv[1])
    accumulation = 2 // distributed.world_size()
    progress = run_job(folder, model, accumulation=accumulation, parallel=sys.argv[2], eps=1e-2)
    losses = torch.tensor([loss for _, loss, _ in progress.curve])
    saved = {"model": model.state_dict(), "losses": losses}
    torch.save(saved, folder / f"{distributed.rank()}.pt")
    distributed.shutdown()


if __name__ == "__main__":
    main()
