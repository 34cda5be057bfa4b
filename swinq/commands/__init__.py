"""What the actions of the command line do; `run` is called on every rank, once all have joined."""

from __future__ import annotations

import importlib

from swinq.config import Config

_MODULES = {
    "calib": "swinq.commands.calib",
    "eval": "swinq.commands.evaluate",
    "export": "swinq.commands.export",
    "throughput": "swinq.commands.throughput",
    "train": "swinq.commands.train",
}


def run(action: str, config: Config) -> int:
    """Run one action and return the exit code.

    Raises:
        SwinqError: whatever the user can mend.
    """
    return int(importlib.import_module(_MODULES[action]).run(config))
