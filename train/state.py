"""A folder of training checkpoints: each whole, verified and digested, the last good ones kept.

A checkpoint is one safetensors file, step-<step>.safetensors: every tensor of the job, and in its
metadata plain JSON and the digests. It is written beside its final name, read back, and renamed;
only then do older ones go. So a job killed at any moment finds the last checkpoint it finished.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinq import __version__, console, distributed
from swinq.errors import CheckpointError, ConfigError, ExportError
from swinq.export.format import decode, encode
from swinq.export.integrity import digests
from swinq.files import write_atomically

FORMAT, FORMAT_VERSION = "swinq-training", "1"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_LEFTOVERS = (".step-*.partial", ".tmp*")  # a killed writer's: ours, and those of safetensors
PATIENCE_S = 30.0  # for a job that is ending, or a disk that has not yet heard of its end
_HEADER_BYTES = 256  # a name, a digest and a shape


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was saved."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU
    metadata: dict[str, Any]
    path: Path

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        found = self.tensors.items()
        return {n.removeprefix(prefix): tensor for n, tensor in found if n.startswith(prefix)}


class CheckpointFolder:
    """The checkpoints of one training job.

    Args:
        folder: made when the first one is saved; other files in it stay.
        keep: the number of checkpoints that stay; while one is written there is one more.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = keep

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no other job trains in the folder; it is rank 0 that looks and holds it.

        Jobs on other machines see it where the shared disk passes locks on.

        Raises:
            ConfigError (rank 0): another job trains there, and goes on for PATIENCE_S.
            ExportError (rank 0): the folder cannot be made.
        """
        if not distributed.is_main():
            yield
            return
        path = self.folder / ".lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "w")  # noqa: SIM115  closed below
        except OSError as error:
            raise ExportError(
                f"{path} cannot be written: {error.strerror}", "choose another folder with --output"
            ) from error
        with file:
            deadline = time.monotonic() + PATIENCE_S
            while not _locked(file):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another job trains in {self.folder}",
                        "wait until it has ended, or begin this one with another --tag NAME; if "
                        f"there is none, delete {path}",
                    )
                time.sleep(0.2)
            yield

    def save(self, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Path:
        """Write a checkpoint, and remove those it makes needless; all ranks call, rank 0 writes.

        Args:
            step: optimiser steps done.
            tensors: contiguous ones on the CPU that share no memory; rank 0's are written.
            metadata: plain JSON.

        Returns:
            The file, which is there and verified when any rank returns.

        Raises:
            ExportError (rank 0, while the others wait for it in a barrier): it cannot be written,
                or does not read back; names the bytes needed where the disk is full. Earlier
                checkpoints are untouched.
            TypeError, ValueError: the metadata is not plain JSON, or holds NaN.
        """
        path = self.folder / f"step-{step:08d}.safetensors"
        if distributed.is_main():
            _write(path, step, tensors, metadata)
            self._prune(step)
        distributed.barrier()
        return path

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, the same on all ranks; None if there is no file.

        All ranks call; rank 0 reads and the others receive, so the folder may be on its machine
        alone. Damaged ones are told and passed over.

        Raises:
            CheckpointError (rank 0): there are checkpoints, and every one is damaged.
        """
        return _broadcast(self._newest_here() if distributed.is_main() else None)

    def peek(self) -> tuple[Path, dict[str, Any]] | None:
        """The metadata of the newest file that has any, unverified; this rank alone looks."""
        for _, path in sorted(self._files().items(), reverse=True):
            with suppress(SafetensorError, OSError, ValueError, KeyError):
                with safe_open(path, framework="pt") as file:
                    return path, decode((file.metadata() or {})["state"])
        return None

    def _newest_here(self) -> Saved | None:
        for pattern in _LEFTOVERS:
            for leftover in self.folder.glob(pattern):
                leftover.unlink(missing_ok=True)
        files = self._files()
        problems: list[str] = []
        for _, path in sorted(files.items(), reverse=True):
            try:
                saved = _read(path)
            except CheckpointError as error:
                problems.append(error.problem)
                continue
            for problem in problems:
                console.say(f"warning: {problem}; {path.name} is used", "warning")
            return saved
        if problems:
            raise CheckpointError(
                "no training checkpoint can be used:\n  " + "\n  ".join(problems[:4]),
                f"copy a good one into {self.folder}, or move that folder away to train from "
                "the start",
            )
        return None

    def _prune(self, step: int) -> None:
        """Keep this step's file and those before it; later ones were damaged and passed over."""
        files = self._files()
        kept = sorted(found for found in files if found <= step)[-self.keep :]
        for found, path in files.items():
            if found not in kept:
                with suppress(OSError):  # the next save tries again
                    path.unlink()

    def _files(self) -> dict[int, Path]:
        """Checkpoints by step."""
        found = {path: _NAME.fullmatch(path.name) for path in self.folder.glob("step-*")}
        return {int(match[1]): path for path, match in found.items() if match}


def _locked(file: TextIO) -> bool:
    """Whether this process now holds the file; it does until it closes it or ends."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _write(
    path: Path, step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "swinq_version": __version__,
        "step": str(step),
        "state": encode(dict(metadata)),
    }
    described["digests"] = encode(digests(tensors, described))
    data = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    texts = sum(map(len, described.values()))

    def write(partial: Path) -> None:
        rights = partial.stat().st_mode
        try:
            save_file(dict(tensors), partial, described)
        except SafetensorError as error:
            raise _os_error(error) from error
        partial.chmod(rights)  # the library has put a file of its own there, closed to others

    def verify(partial: Path) -> None:
        try:
            with safe_open(partial, framework="pt") as file:
                read = dict(file.metadata())
                found = digests({name: file.get_tensor(name) for name in tensors}, read)
        except SafetensorError as error:
            raise _os_error(error) from error
        if read != described or encode(found) != described["digests"]:
            raise ExportError(
                f"{path}: what was written does not read back",
                "earlier checkpoints are untouched; check the disk, then run the command again",
            )

    size = data + texts + _HEADER_BYTES * len(tensors)
    write_atomically(path, write, size=size, verify=verify)


def _read(path: Path) -> Saved:
    """A checkpoint, every bit as it was written.

    Raises:
        CheckpointError: it is not.
    """
    try:
        with safe_open(path, framework="pt") as file:
            described = dict(file.metadata() or {})
            # cloned: the mapped file goes when newer ones are saved
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        kind = (described["format"], described["format_version"])
        if kind != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {' '.join(kind)}, wanted {FORMAT} {FORMAT_VERSION}")
        if digests(tensors, described) != decode(described["digests"]):
            raise ValueError("changed since it was written")
        return Saved(int(described["step"]), tensors, decode(described["state"]), path)
    except KeyError as error:
        raise CheckpointError(f"{path}: its metadata has no {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0][:160]}") from error


def _broadcast(saved: Saved | None) -> Saved | None:
    """Rank 0's checkpoint on every rank."""
    if distributed.world_size() == 1:
        return saved
    text = b""
    if saved is not None:
        forms = {n: (str(t.dtype).split(".")[1], list(t.shape)) for n, t in saved.tensors.items()}
        text = encode([saved.step, str(saved.path), saved.metadata, forms]).encode()
    length = int(distributed.broadcast_(torch.tensor(len(text))))
    if length == 0:
        return None
    header = torch.tensor(list(text), dtype=torch.uint8) if text else torch.empty(length).byte()
    header = distributed.broadcast_(header)
    step, path, metadata, forms = decode(bytes(header.tolist()).decode())
    tensors = {}
    for name, (dtype, shape) in forms.items():
        here = saved.tensors[name] if saved else torch.empty(shape, dtype=getattr(torch, dtype))
        tensors[name] = distributed.broadcast_(here)
    return Saved(step, tensors, metadata, Path(path))


def _os_error(error: SafetensorError) -> OSError:
    """The system's error inside the library's, which says `(os error 28)`."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))
