"""--export: the INT8 checkpoints of a calibrated one."""

from __future__ import annotations

from swinq import api, console, distributed
from swinq.commands.session import Session, load_model, weights_of
from swinq.config import Config
from swinq.errors import ExportError


def run(config: Config) -> int:
    """Write the INT8 checkpoint of each mode asked for, on rank 0."""
    session = Session.open(config, "export")
    session.begin()
    model = load_model(session)
    if not hasattr(model, "quant_spec"):
        raise ExportError(
            f"{weights_of(config)} is not a calibrated checkpoint",
            "calibrate it first: torchrun swinq/main.py --calib --resume FILE --data-path IMAGES",
        )
    if distributed.is_main():
        for mode in session.modes:
            path = api.export(
                model,
                session.int8_path(mode),
                int8_mode=mode,
                transform=session.transform(model),
            )
            console.say(f"exported: {path} ({path.stat().st_size / 2**20:.1f} MiB)", "good")
    return 0
