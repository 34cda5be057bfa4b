"""What a run knows of itself without asking anyone: versions, machine, files and their digests."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch

from swinq import __version__, distributed
from swinq.errors import DataError
from swinq.report.schema import Environment, InputFile, Run

PACKAGES = ("torchvision", "timm", "numpy", "safetensors", "pillow")
_CHUNK = 1 << 20  # bytes read at once


def launcher() -> list[str]:
    """The words before the flags in the command that started this: plain Python or torchrun.

    Where to meet (--rdzv_endpoint, --node_rank) is left out: it differs from node to node.
    """
    if not {"TORCHELASTIC_RUN_ID", "WORLD_SIZE"} & os.environ.keys():
        return ["python", "swinq/main.py"]
    words, world = ["torchrun"], distributed.world_size()
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    if world > here:
        words += ["--nnodes", str(-(-world // here))]
    if here > 1:
        words += ["--nproc_per_node", str(here)]
    return [*words, "swinq/main.py"]


def describe_run(arguments: Sequence[str], device: torch.device | str, cpu: str) -> Run:
    """This run, now.

    Args:
        arguments: the command line as a list of words; they are quoted for a shell.
        device: where the models run.
        cpu: the processor's name.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    packages = {name: version for name in PACKAGES if (version := _version(name))}
    if cuda and torch.version.cuda:
        packages["cuda"] = torch.version.cuda
    environment = Environment(
        device=torch.cuda.get_device_name(device) if cuda else cpu,
        device_type=device.type,
        cpu=cpu,
        threads=torch.get_num_threads(),
        ranks=distributed.world_size(),
        platform=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        packages=packages,
    )
    return Run(
        command=shlex.join(arguments),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        swinq_version=__version__,
        environment=environment,
    )


def describe_file(role: str, path: Path | str) -> InputFile:
    """Digest and size of a file.

    Raises:
        DataError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise DataError(f"{role} {path} cannot be read: {error.strerror}") from error
    return InputFile(role, str(path), digest.hexdigest(), size)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
