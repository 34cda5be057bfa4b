"""The teacher of a training job: the checkpoint that is named, or the float model itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from swinq import api, console
from swinq.commands.session import Session, weights_of
from swinq.data.dataset import ImageDataset
from swinq.data.images import shown
from swinq.errors import ConfigError
from swinq.int8.choice import IntegerModel
from swinq.train.distill import Distillation
from swinq.train.settings import Settings


def distillation(
    session: Session, settings: Settings, float_model: Any, images: ImageDataset
) -> Distillation | None:
    """The teacher that the configuration names, and its losses; None where nothing is distilled.

    Args:
        images: whose labels the student learns.

    Raises:
        ConfigError: a teacher of other sizes or classes, or one without float weights.
    """
    distill = session.config.QAT.DISTILL
    if not distill.ENABLED:
        return None
    teacher = copy.deepcopy(float_model)
    if distill.TEACHER:
        teacher = api.load(distill.TEACHER, ranges=False, device=session.device)
        if isinstance(teacher, IntegerModel):
            raise ConfigError(
                f"--teacher {distill.TEACHER} is an exported INT8 checkpoint, wanted a float one",
                "give the checkpoint it was made from, or leave --teacher out",
            )
        _require_same_sizes(distill.TEACHER, teacher, float_model, features=bool(settings.features))
        known = {"the model": float_model.classes or [], images.description: images.classes}
        _require_same_classes(distill.TEACHER, teacher.classes or [], known)
    _say_if_its_own(session, float_model)
    return Distillation(
        teacher,
        scale=settings.distill,
        temperature=settings.temperature,
        features=settings.features,
        compile_blocks=settings.compile_blocks,
    )


def _require_same_sizes(path: str, teacher: Any, model: Any, *, features: bool) -> None:
    alike = ("embed_dim", "patch_size", "depths") if features else ()
    for name in ("num_classes", "img_size", *alike):
        ours, theirs = getattr(model.arch, name), getattr(teacher.arch, name)
        if ours != theirs:
            raise ConfigError(
                f"--teacher {path} has {name} {theirs}, the model {ours}",
                "give a teacher for the same images and classes"
                + (", of the same shape, or set QAT.DISTILL.FEATURES to 0" if alike else ""),
            )


def _require_same_classes(
    path: str, theirs: Sequence[str], known: Mapping[str, Sequence[str]]
) -> None:
    """Refuse a teacher that numbers classes otherwise, as far as names tell.

    Args:
        theirs: names in the order of the teacher's logits; empty if its file has none.
        known: where names of the student's classes are from, and they. The first with a name in
            common with the teacher's decides: a file may have words where folders have numbers.
    """
    named = {place: names for place, names in known.items() if names}
    for place, ours in named.items():
        if set(ours) & set(theirs):
            for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
                if our != their:
                    raise ConfigError(
                        f"--teacher {path}: class {number} is {shown(their)}, and {shown(our)} in "
                        f"{place}",
                        "give a teacher with the same classes in the same order",
                    )
            return
    if theirs and named:
        place, ours = next(iter(named.items()))
        console.say(
            f"note: --teacher {path} names its classes otherwise ({shown(theirs[0])}, ...) than "
            f"{place} ({shown(ours[0])}, ...): whether they are the same cannot be checked",
            "warning",
        )


def _say_if_its_own(session: Session, model: Any) -> None:
    """Note where a finetuned model would only be held where it is."""
    path, named = weights_of(session.config), session.config.QAT.DISTILL.TEACHER
    assert path is not None  # the model was loaded from it
    step = model.judged[0] if model.judged else 0
    if step and (not named or path.resolve() == Path(named).resolve()):
        console.say(
            f"note: {path} was finetuned for {step} steps and is now its own teacher; what it has "
            "lost comes back from the float original: --teacher FILE",
            "warning",
        )
