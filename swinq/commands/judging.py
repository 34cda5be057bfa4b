"""Judges the forms of a model on the same images, each against the float model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from swinq import console
from swinq.commands.session import Session
from swinq.data.dataset import ImageDataset
from swinq.evaluate import Comparison, Predictions, Scores, compare
from swinq.int8 import choice


@dataclass(frozen=True)
class Judged:
    """One form of the model and how it did."""

    name: str
    kind: str  # float, fake-quant, int8
    mode: int | None
    scores: Scores
    comparison: Comparison | None  # against float
    engine: str = ""  # what ran it, of INT8


class Judging:
    """The judgements of one run, in their order; every rank makes the same calls.

    Attributes:
        judged: the float model first; empty where the images have no labels.
        notes: what a reader has to know of them.
    """

    def __init__(self, session: Session, images: ImageDataset, float_model: nn.Module) -> None:
        """Judge the float model."""
        self.session, self.images = session, images
        self.judged: list[Judged] = []
        self.notes: list[str] = []
        self._reference: Predictions | None = None
        if not images.labelled:
            self._note(f"accuracy was not measured: {images.description} has no labels")
            return
        self._reference = session.predictions(float_model, images, "float")
        self.judged.append(Judged("float", "float", None, self._reference.scores(), None))

    def add(self, name: str, kind: str, mode: int, form: Any) -> None:
        """Judge one more form."""
        if self._reference is None:
            return
        said = self.session.predictions(form, self.images, name)
        against = compare(self._reference, said)
        engine = getattr(form, "engine", "")
        self.judged.append(Judged(name, kind, mode, said.scores(), against, engine))

    def add_exported(self, files: Mapping[str, Path]) -> None:
        """Judge the INT8 checkpoints among the files, by the session's engine."""
        for mode in self.session.modes:
            path = files.get(f"INT8 mode {mode}")
            if path is None or self._reference is None:
                continue
            int8 = choice.load(
                path, int8_mode=mode, device=self.session.device, engine=self.session.config.ENGINE
            )
            for note in int8.notes:
                self._note(note)
            self.add(f"INT8 mode {mode}", "int8", mode, int8)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            console.say(f"note: {text}", "warning")
