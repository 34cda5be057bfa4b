"""The student on one or many ranks: compiled blocks, DDP or FSDP2, and its state by plain names.

Whatever the wrapping, a state has the names, shapes and values of the plain model's, so a job may
go on with another one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from swinq import distributed
from swinq.errors import CheckpointError, ConfigError
from swinq.models.layers import BasicLayer, WindowBlock
from swinq.quant.insert import used_quantizers

WRAPPINGS = ("ddp", "fsdp", "none")
# Rounding belongs into the kernels that read or write a tensor anyway. By default inductor writes
# out, in fp32, what several kernels use and what takes more than 4 reads or 30 operations.
INLINED = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}
SOUND = 1e18  # numbers up to this have finite squares in fp32; no model trains beyond
GRAPHS = 64  # torch.compile's limit for one forward; a Swin needs two a stage, its teacher as many


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> nn.Module:
    """Compile every block and patch merging, in place, each as one graph.

    Blocks of a stage share a graph, so compiling takes as long as for two blocks a stage, and
    activation checkpointing can still recompute a block by itself.
    """
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    # DDP would have every graph cut at its buckets: blocks end often enough for gradients to leave
    torch._dynamo.config.optimize_ddp = False
    # what is fp32 is so on purpose: position biases, and everything with --disable-amp
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    options = INLINED if backend == "inductor" else None
    for module in _units(model):
        module.compile(fullgraph=True, dynamic=False, backend=backend, options=options)
    return model


def _units(model: nn.Module) -> list[nn.Module]:
    """The blocks and patch mergings, in the order of the forward."""
    stages = [module for module in model.modules() if isinstance(module, BasicLayer)]
    merges = {id(stage.downsample) for stage in stages}
    return [m for m in model.modules() if isinstance(m, WindowBlock) or id(m) in merges]


def is_sharded(kind: str) -> bool:
    """Whether `wrap` will share out the weights over these ranks."""
    return kind == "fsdp" and distributed.world_size() > 1


def wrap(student: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """Spread training over the ranks; alone, or for "none", the student stays as it is.

    Args:
        kind: "ddp" (a replica on each rank) or "fsdp" (parameters, gradients and optimiser state
            sharded, block by block; the student itself is changed).
        device: of this rank, where the student is.

    Raises:
        ConfigError: another kind.
    """
    if kind not in WRAPPINGS:
        raise ConfigError(
            f"QAT.PARALLEL is {kind!r}; wanted one of {', '.join(WRAPPINGS)}",
            "ddp is the quickest while model and optimiser fit on one GPU",
        )
    if kind == "none" or distributed.world_size() == 1:
        return student
    if kind == "ddp":
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False}  # nothing in them changes; torch renamed it
        return DistributedDataParallel(
            student,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **options,
        )
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for unit in _units(student):
        fully_shard(unit, mesh=mesh)
    fully_shard(student, mesh=mesh)
    return student


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of a micro-batch: ranks exchange gradients only at the last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a norm; 0 leaves them alone.

    Returns:
        The norm over all parameters and ranks before that, 0-dim fp32, nothing waits for it.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of every rank's values, to be looked at: its last bits depend on the ranks."""
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(values)
    return values / distributed.world_size()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model, on the CPU; every rank calls this, every rank gets it."""
    return {name: whole(tensor) for name, tensor in _plain(model).state_dict().items()}


def save_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Everything that a step changes, on the CPU; every rank calls this, every rank gets it.

    Returns:
        "model.<name>" and "optimizer.<parameter>.<exp_avg, exp_avg_sq, step>", whole tensors.
    """
    tensors = {f"model.{name}": tensor for name, tensor in full_state(model).items()}
    trained = trained_tensors(model, optimizer)
    return tensors | {n: whole(tensor) for n, tensor in trained.items() if n not in tensors}


def trained_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimiser's state where they lie, by their names in `save_tensors`."""
    tensors = {}
    for name, parameter in _plain(model).named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


@torch.no_grad()
def first_spoiled(tensors: Mapping[str, Tensor]) -> str:
    """The first name of a tensor with NaN or a number beyond `SOUND`, the same on all ranks, or "".

    Every rank calls this, with the same names; the device reads each tensor once.
    """
    found = [(name, local(tensor)) for name, tensor in tensors.items()]
    held = [  # a shard may be empty, and AdamW may count its steps on the CPU
        (place, tensor)
        for place, (name, tensor) in enumerate(found)
        if tensor.numel() and not name.endswith(".step")
    ]
    largest = torch.stack(torch._foreach_norm([tensor for _, tensor in held], ord=torch.inf))
    spoiled = torch.zeros(len(found), dtype=torch.int64)
    spoiled[[place for place, _ in held]] = (~(largest <= SOUND)).to("cpu", torch.int64)
    places = distributed.all_reduce_max_(spoiled).nonzero()
    return found[int(places[0])][0] if len(places) else ""


@torch.no_grad()
def load_tensors(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take back what `save_tensors` gave, however either side is wrapped; every rank calls this.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    for name, tensor in _plain(model).state_dict().items():
        tensor.copy_(placed(_required(tensors, f"model.{name}", tensor.shape), tensor))
    names = {parameter: name for name, parameter in _plain(model).named_parameters()}
    state = optimizer.state_dict()
    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        for parameter, index in zip(group["params"], saved["params"], strict=True):
            prefix = f"optimizer.{names[parameter]}."
            state["state"][index] = {
                name.removeprefix(prefix): placed(tensor, parameter) if tensor.ndim else tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
    optimizer.load_state_dict(state)
    for quantizer in used_quantizers(_plain(model), any_mode=True).values():
        quantizer.refresh_scale()


def _required(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape:
        found = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
        raise CheckpointError(
            f"the training checkpoint's {name} {found}, wanted {list(shape)}",
            "it is of another model or recipe: begin another job with --tag NAME",
        )
    return tensor


def _plain(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, sharded or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, sharded or not, as a copy on the CPU."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.to("cpu", copy=True)


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and sharded as it is."""
    tensor = tensor.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor
