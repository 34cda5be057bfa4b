"""Ranks and their collectives: torchrun's environment, or one process where all of it is a no-op.

Only integers are summed and only maxima are taken across ranks, because both are the same bits in
any order. Tensors travel as they are; nothing is pickled. torch is imported inside the functions,
so that console and main can ask for the rank before paying for it.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from swinq.errors import ConfigError, SwinqError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT_S = 600  # a rank that is silent for this long ends the job
# NCCL's watchdog, having found a rank silent, waits four times this, 60 s by default, for a dump of
# its records, which takes no second; only then it ends the process
DUMP_PATIENCE_MS = 1000
CULPRIT_FIRST_S = 2.0  # torchrun blames the first rank that ends: not one that only lost its peer


def rank() -> int:
    """This process's number in the job, from 0."""
    return _group().get_rank() if _initialized() else _environment("RANK", 0)


def world_size() -> int:
    """The number of processes in the job."""
    return _group().get_world_size() if _initialized() else _environment("WORLD_SIZE", 1)


def local_rank() -> int:
    """This process's number on its machine: the GPU it takes."""
    return _environment("LOCAL_RANK", 0)


def is_main() -> bool:
    """Whether this is rank 0, the one that speaks and writes."""
    return rank() == 0


def loader_processes(stated: int, limit: int = 16) -> int:
    """The processes that load images for this rank.

    Args:
        stated: DATA.NUM_WORKERS; -1 takes this rank's share of the cores but one, at most `limit`.
    """
    if stated >= 0:
        return stated
    if hasattr(os, "sched_getaffinity"):  # what the container or SLURM gives, not what is there
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(0, min(limit, cores // _environment("LOCAL_WORLD_SIZE", 1) - 1))


def select_device(name: str = "auto") -> torch.device:
    """The device of this rank; a CUDA device is also made the current one.

    Args:
        name: "auto" (this rank's GPU if there is one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: no such device, fewer GPUs than ranks on this machine, or one GPU for all.
    """
    import torch

    kind, _, index = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (
        index and not (kind == "cuda" and index.isdecimal())
    ):
        raise ConfigError(f"device '{name}' is not known", "use auto, cpu, cuda or cuda:N")
    ranks_here = _environment("LOCAL_WORLD_SIZE", 1)
    if index and ranks_here > 1:
        raise ConfigError(
            f"device '{name}' is one GPU, but {ranks_here} processes run on this machine",
            "use --device cuda, which gives each its own, or start one with --nproc_per_node 1",
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not found):
        return torch.device("cpu")
    if not found:
        why = (
            "this PyTorch is built without CUDA"
            if torch.version.cuda is None
            else "no GPU is visible"
        )
        raise ConfigError(f"device '{name}' cannot be used: {why}", "use --device cpu")
    ordinal = int(index) if index else local_rank()
    if ordinal >= found:
        raise ConfigError(
            f"rank {rank()} wants device cuda:{ordinal}, but this machine shows {found} GPU(s)",
            f"start {found} process(es) here (--nproc_per_node {found}), or use --device cpu",
        )
    torch.cuda.set_device(ordinal)
    return torch.device("cuda", ordinal)


def init(backend: str | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
    """Joins the ranks that torchrun started; does nothing in a single process or when done already.

    Args:
        backend: "gloo" or "nccl"; None takes NCCL when every rank of this machine has its own GPU.
        timeout_s: seconds after which a collective that waits for a rank gives up.

    Raises:
        ConfigError: the environment does not say where the ranks meet, or they do not meet.
    """
    if _initialized() or world_size() == 1:
        return
    import torch
    import torch.distributed as group

    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but {', '.join(absent)} is not set",
            "start the job with torchrun, which sets them, or unset WORLD_SIZE for one process",
        )
    if backend is None:
        ranks_here = _environment("LOCAL_WORLD_SIZE", world_size())
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        backend = "nccl" if ranks_here <= gpus and group.is_nccl_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local_rank())
        os.environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(DUMP_PATIENCE_MS))
    try:
        group.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"rank {rank()} of {world_size()} could not join at {where} ({backend}): "
            f"{_first(error)}",
            "check that every rank was started and the port is free (torchrun --master_port N)",
        ) from error


def shutdown() -> None:
    """Leaves the group when everything is done; a rank that failed just exits instead."""
    if _initialized():
        _group().destroy_process_group()


def barrier() -> None:
    """Waits until every rank is here; with gloo a rank that does not come is named."""
    if world_size() == 1:
        return
    group = _joined()
    if group.get_backend() == "gloo":
        _collect("barrier", lambda: group.monitored_barrier(wait_all_ranks=True))
    else:
        _collect("barrier", lambda: group.barrier(device_ids=[local_rank()]))


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sums an int64 tensor over the ranks, in place, and returns it.

    Raises:
        TypeError: another dtype; a float sum would depend on the number of ranks.
    """
    import torch

    if tensor.dtype != torch.int64:
        raise TypeError(f"all_reduce_sum_ wants int64 (exact in any order), got {tensor.dtype}")
    if world_size() > 1:
        group = _joined()
        _exchange("sum", tensor, lambda flat: group.all_reduce(flat, op=group.ReduceOp.SUM))
    return tensor


def all_reduce_max_(tensor: Tensor) -> Tensor:
    """Takes the elementwise maximum over the ranks, in place; NaN wins, as in torch."""
    if world_size() == 1:
        return tensor
    group = _joined()

    def reduce_max(flat: Tensor) -> None:
        import torch

        nan = flat.isnan()
        flat.masked_fill_(nan, -torch.inf if flat.is_floating_point() else 0)
        group.all_reduce(flat, op=group.ReduceOp.MAX)
        if flat.is_floating_point():  # backends order NaN as they like: carry it apart
            seen = nan.to(torch.int32)
            group.all_reduce(seen, op=group.ReduceOp.MAX)
            flat.masked_fill_(seen.bool(), torch.nan)

    _exchange("maximum", tensor, reduce_max)
    return tensor


def broadcast_(tensor: Tensor, source: int = 0) -> Tensor:
    """Copies rank `source`'s tensor (any dtype, the same shape everywhere) into every rank's."""
    if world_size() > 1:
        import torch

        group = _joined()
        _exchange(
            "broadcast", tensor, lambda flat: group.broadcast(flat.view(torch.uint8), src=source)
        )
    return tensor


def require_same(what: str, digest: Callable[[], str], fix: str) -> None:
    """Checks that every rank has what rank 0 has, by a digest of it; every rank calls this.

    Args:
        what: in plural, for the error.
        digest: gives it in hex, as long on every rank; not asked where there is one rank only.

    Raises:
        SwinqError: this rank's is another; says which rank on which machine.
    """
    if world_size() == 1:
        return
    import torch

    own = torch.tensor(list(bytes.fromhex(digest())), dtype=torch.uint8)
    if not torch.equal(broadcast_(own.clone()), own):
        raise SwinqError(
            f"rank {rank()} of {world_size()} on {socket.gethostname()} has other {what} "
            "than rank 0",
            fix,
        )


@contextmanager
def lost_peers_named(what: str) -> Iterator[None]:
    """Says which rank noticed when another is gone or silent in torch's own collectives, as DDP's.

    Raises:
        SwinqError: in the place of torch's error; others pass through.
    """
    try:
        yield
    except RuntimeError as error:
        # NCCL's errors have a class; gloo's are told by the source file that they name
        if world_size() > 1 and (isinstance(error, _joined().DistError) or "gloo" in str(error)):
            raise _lost_peer(what, error) from error
        raise


def _exchange(what: str, tensor: Tensor, collective: Callable[[Tensor], object]) -> None:
    """Runs a collective on a flat copy where the backend can reach it; writes the result back."""
    import torch

    if tensor.numel() == 0:
        return
    on_gpu = _joined().get_backend() == "nccl"
    place = torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu")
    with torch.no_grad():
        flat = tensor.detach().to(place, copy=True).reshape(-1)  # contiguous, also for a view
        _collect(what, lambda: collective(flat))
        tensor.copy_(flat.view(tensor.shape))


def _collect(what: str, collective: Callable[[], object]) -> None:
    """Runs a collective; when another rank is gone or silent, says which rank noticed."""
    try:
        collective()
    except RuntimeError as error:
        raise _lost_peer(what, error) from error


def _lost_peer(what: str, error: BaseException) -> SwinqError:
    time.sleep(CULPRIT_FIRST_S)
    return SwinqError(
        f"rank {rank()} of {world_size()} on {socket.gethostname()}: "
        f"{what} over the ranks failed: {_first(error)}",
        "another rank has stopped or hangs: the first error in the log is the cause",
    )


def _joined() -> Any:  # noqa: ANN401  (a module)
    """torch.distributed, once this process has joined."""
    if not _initialized():
        raise ConfigError(
            f"this is one of {world_size()} processes (WORLD_SIZE), but it has not joined them",
            "call swinq.distributed.init() first, or unset WORLD_SIZE to run alone",
        )
    return _group()


def _group() -> Any:  # noqa: ANN401  (a module)
    return sys.modules["torch.distributed"]


def _initialized() -> bool:
    group = sys.modules.get("torch.distributed")  # never imported by us alone: it costs seconds
    return bool(group and group.is_available() and group.is_initialized())


def _environment(name: str, default: int) -> int:
    """An integer of torchrun's environment."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ConfigError(
            f"the environment variable {name} is '{text}', not a number", f"unset {name}"
        )
    return int(text)


def _first(error: BaseException) -> str:
    """The first line of an error's text, short enough for one line of a message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
