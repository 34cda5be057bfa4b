"""The forms of a model that --eval and --throughput look at, and what of each is timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from swinq import api
from swinq.commands.session import Session, weights_of
from swinq.errors import CheckpointError
from swinq.int8 import device as devices
from swinq.int8.choice import AUTO, CUDA, REFERENCE, IntegerModel
from swinq.int8.engine import CudaSwin
from swinq.quant.insert import set_int8_mode

HALF = "FP16, CUDA engine"


def forms(model: Any, session: Session) -> dict[str, Callable[[], Any]]:
    """The models to evaluate by name: one, or each mode of a calibrated checkpoint.

    A form is made when it is called, and stays valid until the next one is made.

    Raises:
        CheckpointError: an INT8 checkpoint of another mode than asked for.
    """
    asked = session.config.INT8.MODE
    if isinstance(model, IntegerModel):
        if asked and asked != model.int8_mode:
            raise CheckpointError(
                f"--int8-mode {asked} is given, but {weights_of(session.config)} was exported in "
                f"mode {model.int8_mode}",
                f"use --int8-mode {model.int8_mode}, or export the other mode",
            )
        return {f"INT8 mode {model.int8_mode}": lambda: model}
    if hasattr(model, "quant_spec"):
        return {
            f"fake-quant mode {mode}": lambda mode=mode: set_int8_mode(model, mode)  # type: ignore[misc]
            for mode in session.modes
        }
    if asked:
        raise CheckpointError(
            f"--int8-mode {asked} is given, but {weights_of(session.config)} is a float checkpoint "
            "without ranges",
            "calibrate it first with --calib, or leave --int8-mode out to evaluate it in float",
        )
    if session.config.ENGINE == CUDA:
        return {"float": lambda: model, **half_form(model, session)}
    return {"float": lambda: model}


def half_form(model: nn.Module, session: Session) -> dict[str, Callable[[], Any]]:
    """A float model in FP16 on libswinq, by name; nothing where libswinq is not to be had."""
    engine = session.config.ENGINE
    if engine == REFERENCE or (engine == AUTO and devices.problem(session.device)):
        return {}
    return {HALF: lambda: api.cuda_model(model, device=session.device)}


def timed(name: str, model: Any, batch: int) -> dict[str, Callable[[Any], Any]]:
    """What to time of a model, by name: its call, and of the CUDA engine a CUDA graph too.

    The engine is not made to wait for its logits, which the check for NaN would do.
    """
    if not isinstance(model, CudaSwin):
        return {name: model}
    return {name: partial(model, check=False), f"{name}, CUDA graph": model.graph(batch)}
