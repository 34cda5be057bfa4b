"""What tells a training job from another one that might share its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swinq import distributed
from swinq.errors import CheckpointError, ConfigError
from swinq.train.settings import FREE, Settings


def describe_job(settings: Settings, identity: dict[str, Any], images: int) -> dict[str, Any]:
    """What a checkpoint must share with the job that takes it up, plain JSON.

    Args:
        identity: of what the loop does not know: model, teacher, images.
    """
    stated = settings.decisive()
    stated["micro_batches"] = stated.pop("accumulation") * distributed.world_size()
    return {**identity, **stated, "images": images}


def require_same_job(path: Path, metadata: Any, ours: dict[str, Any]) -> None:
    """Refuse a checkpoint of another job.

    Args:
        metadata: of the checkpoint at the path, whoever wrote it; its "job" is compared.

    Raises:
        ConfigError: names what differs, with both values.
        CheckpointError: the checkpoint does not say what job it is of.
    """
    theirs = metadata.get("job") if isinstance(metadata, dict) else None
    if not isinstance(theirs, dict):
        raise CheckpointError(
            f"{path} does not say what job it is of: its state has no 'job'",
            "no training has written it: move it out of that folder",
        )
    differing = [
        f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in {**theirs, **ours}
        if name not in FREE and theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ConfigError(
            f"{path} is of another job: {'; '.join(differing[:4])}",
            "repeat the command that began it, or begin another with --tag NAME",
        )
