"""--throughput: images per second, of a checkpoint or of a configuration's random weights."""

from __future__ import annotations

from typing import Any

from swinq import console, distributed, preflight
from swinq.commands.forms import forms, half_form, timed
from swinq.commands.session import Session, load_model, weights_of
from swinq.config import Config
from swinq.errors import CheckpointError
from swinq.latency import measure_together
from swinq.models.build import build_model


def run(config: Config) -> int:
    """Measure the model at the batch size asked for, and print a line per form of it.

    Raises:
        CheckpointError: a mode is asked for, and there is no checkpoint whose ranges it could use.
    """
    session = Session.open(config, "throughput")
    session.begin()
    model: Any
    if weights_of(config) is None:
        if config.INT8.MODE:
            raise CheckpointError(
                f"--int8-mode {config.INT8.MODE} is given, but without a checkpoint the "
                "weights are random floats without ranges",
                "name a calibrated or INT8 checkpoint with --resume, or leave --int8-mode out",
            )
        model = build_model(preflight.architecture(config)).to(session.device).eval()
        named: dict[str, Any] = {"float, random weights": lambda: model}
        named |= half_form(model, session)
    else:
        model = load_model(session)
        named = forms(model, session)
        if "float" in named:
            named |= half_form(model, session)
    if not distributed.is_main():
        return 0
    rows = []
    for name, form in named.items():
        calls = timed(name, form(), config.DATA.BATCH_SIZE)
        found = measure_together(calls, config.DATA.BATCH_SIZE, model.arch.img_size, session.device)
        for call, took in found.items():
            spread = f"{took.p10:.2f} to {took.p90:.2f}"
            rows.append(
                [call, took.batch_size, f"{took.median_ms:.2f}", spread]
                + [f"{took.images_per_second:.1f}"]
            )
    console.say(f"device: {took.device_name}, {took.threads} threads")
    console.table(rows, ["model", "batch", "median ms", "10 % to 90 %", "images/s"])
    return 0
