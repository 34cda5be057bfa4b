"""--eval: exact accuracy of a float, calibrated or INT8 checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from swinq import console, distributed
from swinq.commands.forms import forms
from swinq.commands.session import Session, load_model, weights_of
from swinq.config import Config
from swinq.files import write_atomically


def run(config: Config) -> int:
    """Evaluate what --resume names on the validation images; print and save the scores."""
    session = Session.open(config, "eval")
    session.begin()
    model = load_model(session)
    dataset = session.dataset("val", model)
    console.say(f"images: {dataset.description}, {session.transform(model)}")
    rows: list[dict[str, Any]] = []
    for name, form in forms(model, session).items():
        made = form()
        scores = session.predictions(made, dataset, name).scores()
        engine = getattr(made, "engine", "torch")
        rows.append({"model": name, "engine": engine, **scores.to_dict()})
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


def _write(path: Path, rows: list[dict[str, Any]], checkpoint: str) -> None:
    path.write_text(json.dumps({"checkpoint": checkpoint, "results": rows}, indent=1) + "\n")
