"""--eval: exact accuracy of a float, calibrated or INT8 checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swinq import console, distributed
from swinq.commands.session import Session, load_model, weights_of
from swinq.config import Config
from swinq.errors import CheckpointError
from swinq.export.integrity import write_atomically
from swinq.int8.model import Int8Swin
from swinq.quant.insert import set_int8_mode


def run(config: Config) -> int:
    """Evaluate what --resume names on the validation images; print and save the scores."""
    session = Session.open(config, "eval")
    model = load_model(session)
    dataset = session.dataset("val", model)
    console.say(f"images: {dataset.description}, {session.transform(model)}")
    rows: list[dict[str, Any]] = []
    for name, form in forms(model, session).items():
        scores = session.predictions(form(), dataset, name).scores()
        rows.append({"model": name, **scores.to_dict()})
    if distributed.is_main():
        console.table(
            [
                [r["model"], r["images"], f"{r['top1_percent']:.3f}", f"{r['top5_percent']:.3f}"]
                for r in rows
            ],
            ["model", "images", "top-1 %", "top-5 %"],
        )
        weights = weights_of(config)
        path = write_atomically(
            session.folder / f"eval_{Path(weights or session.name).stem}.json",
            lambda written: _write(written, rows, str(weights)),
        )
        console.say(f"saved: {path}")
    return 0


def forms(model: Any, session: Session) -> dict[str, Any]:
    """The models to evaluate by name: one, or each mode of a calibrated checkpoint.

    Raises:
        CheckpointError: an INT8 checkpoint of another mode than asked for.
    """
    asked = session.config.INT8.MODE
    if isinstance(model, Int8Swin):
        if asked and asked != model.int8_mode:
            raise CheckpointError(
                f"--int8-mode {asked} is given, but {weights_of(session.config)} was exported in "
                f"mode {model.int8_mode}",
                f"use --int8-mode {model.int8_mode}, or export the other mode",
            )
        return {f"INT8 mode {model.int8_mode}": lambda: model}
    if hasattr(model, "quant_spec"):
        return {
            f"fake-quant mode {mode}": lambda mode=mode: set_int8_mode(model, mode)
            for mode in session.modes
        }
    if asked:
        raise CheckpointError(
            f"--int8-mode {asked} is given, but {weights_of(session.config)} is a float checkpoint "
            "without ranges",
            "calibrate it first with --calib, or leave --int8-mode out to evaluate it in float",
        )
    return {"float": lambda: model}


def _write(path: Path, rows: list[dict[str, Any]], checkpoint: str) -> None:
    path.write_text(json.dumps({"checkpoint": checkpoint, "results": rows}, indent=1) + "\n")
