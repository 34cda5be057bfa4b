"""The errors a user can meet: each says what is wrong and what to do next, in at most ten lines."""

from __future__ import annotations


class SwinqError(Exception):
    """A failure that its reader can mend.

    Args:
        problem: names the offending value and what was wanted instead.
        fix: a concrete next step; empty where there is none to offer.
    """

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(problem, fix)  # both in args: copies and pickles keep them
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return self.problem + (f"\n  fix: {self.fix}" if self.fix else "")


class ConfigError(SwinqError):
    """A flag, a configuration key or a combination of them that cannot be meant."""


class DataError(SwinqError):
    """Images or labels that are missing, damaged or of the wrong shape."""


class CheckpointError(SwinqError):
    """A checkpoint that cannot be read, or that belongs to another model."""


class CalibrationError(SwinqError):
    """Ranges that cannot be found: NaN, dead or uncalibrated quantizers."""


class ExportError(SwinqError):
    """A model that cannot be written as, or read from, an INT8 checkpoint."""


class EngineError(SwinqError):
    """libswinq that is missing or cannot be loaded, a GPU it has no kernels for, a failed call."""


class EngineFailedError(EngineError):
    """A call of libswinq that its GPU could not do: no memory, or a fault of the CUDA runtime."""
