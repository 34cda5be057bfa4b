"""The best model of a training job: kept when a validation beats all before, read at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from swinq import api, console, distributed
from swinq.commands.session import Session
from swinq.errors import ExportError, SwinqError
from swinq.models.layers import SwinBase
from swinq.train.qat import Progress


def best_path(session: Session) -> Path:
    """Where the best so far is kept."""
    return session.training_folder / "best.safetensors"


def keep_best(session: Session, model: nn.Module, step: int, top1: float) -> bool:
    """Write the model as the best so far, on rank 0, with its step and top-1 in percent.

    Returns:
        whether it could be written, on all ranks; if not, a warning says so.
    """
    kept = True
    if distributed.is_main():
        try:
            session.write_calibrated(best_path(session), model, judged=(step, top1))
        except ExportError as error:
            kept = False
            console.say(
                f"warning: the model of step {step}, with top-1 {top1:.2f} %, could not be kept: "
                f"{error}",
                "warning",
            )
    return bool(distributed.broadcast_(torch.tensor(int(kept))))


def load_best(
    session: Session, last: SwinBase, before: dict[str, Tensor], progress: Progress
) -> dict[str, Tensor]:
    """The state of the best model or, if its file is lost, of the last step's.

    Args:
        last: the model of the last step. before: the state of the one before training, which may
            be the best. progress: says which is; it is changed where another is taken, and where
            the file is of a judgement after which the job was killed before it could save: repeated
            on a GPU, that one may have come out lower, and what was kept is still the best.
    """
    path, problem = best_path(session), ""
    found: Any = None
    if distributed.is_main():
        try:
            found = api.load(path, device=session.device)
        except SwinqError as error:
            problem = error.problem
    if int(distributed.all_reduce_max_(torch.tensor(len(problem)))) == 0:
        session.require_shared(path)
        if found is None:
            found = api.load(path, device=session.device)
        if found.judged and found.judged != (progress.best_step, progress.best_top1):
            progress.best_step, progress.best_top1 = found.judged
            console.say(
                f"note: the best model is of step {progress.best_step} with top-1 "
                f"{progress.best_top1:.2f} %, judged before the job was killed and repeated these "
                "steps"
            )
        state: dict[str, Tensor] = found.state_dict()
        return state
    if progress.best_step == 0:
        return before
    best_top1 = progress.best_top1
    progress.best_step, progress.best_top1 = progress.judged[-1]
    console.say(
        f"warning: {problem}; the model of the last step is exported, with top-1 "
        f"{progress.best_top1:.2f} % instead of {best_top1:.2f} %",
        "warning",
    )
    return {name: tensor.clone() for name, tensor in last.state_dict().items()}
