"""Times a QAT step against the same float step: both compiled, captured, in bf16, taking turns.

    python scripts/benchmark_training.py --cfg swin_tiny_patch4_window7_224 --batch 128
    torchrun --nproc_per_node 2 scripts/benchmark_training.py --cfg \\
        swin_large_patch4_window7_224_22kto1k_finetune --batch 64 --distill --json benchmarks

A step is forward, loss on mixed targets, backward, clipping and AdamW. Weights and images are made
up: time hardly depends on them, and no loader takes part. Times are medians of rounds, by the
device's own clock; a step of several ranks takes as long as the slowest. Memory is what a job's
allocator takes from the GPU: weights, moments, teacher, graphs, and the most that a step needs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from swinq import api, console, distributed
from swinq.latency import device_name
from swinq.models.build import build_model
from swinq.models.layers import SwinBase, set_drop_path
from swinq.models.variants import find_variant
from swinq.quant.insert import set_int8_mode
from swinq.train import parallel
from swinq.train.distill import Distillation
from swinq.train.graphs import can_capture, capture_stages
from swinq.train.precision import AMP_TYPES, autocast
from swinq.train.ranges import KINDS, learn_ranges

CALIBRATION_IMAGES = 2
CLIP = 5.0
LARGEST_RATIOS = {"ms": 1.35, "bytes": 1.25}  # of a QAT step to the float step


class Job:
    """A model that is trained on the same batch again and again."""

    def __init__(
        self,
        student: SwinBase,
        args: argparse.Namespace,
        device: torch.device,
        distillation: Distillation | None = None,
    ) -> None:
        self.args, self.device, self.distillation = args, device, distillation
        student.train().set_gradient_checkpointing(args.checkpointing)
        if not args.eager:
            parallel.compile_blocks(student)
        if args.graphs:
            capture_stages(student, args.batch, args.amp)
        if distillation is not None:
            distillation.watch(student)
        self.model = parallel.wrap(student, args.parallel, device)
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=1e-5, weight_decay=0.05, fused=device.type == "cuda"
        )
        self.loss = SoftTargetCrossEntropy()
        self.ms: list[float] = []
        self.peak_bytes = 0

    def step(self, images: Tensor, targets: Tensor) -> None:
        """One step; nothing waits for the device."""
        with autocast(self.device, self.args.amp):
            lesson = None if self.distillation is None else self.distillation.teach(images)
            logits = self.model(images).float()
        loss = self.loss(logits, targets)
        if self.distillation is not None and lesson is not None:
            loss = loss + torch.stack(list(self.distillation.losses(logits, lesson).values())).sum()
        loss.backward()
        parallel.clip_gradients(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def round(self, images: Tensor, targets: Tensor) -> None:
        """Some steps, and their mean time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
        began = time.perf_counter()
        for _ in range(self.args.steps):
            self.step(images, targets)
        if self.device.type == "cuda":
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end)
        else:
            spent = 1e3 * (time.perf_counter() - began)
        slowest = distributed.all_reduce_max_(torch.tensor(spent / self.args.steps))
        self.ms.append(float(slowest))

    def kept_bytes(self) -> int:
        """Memory of this rank's weights, ranges, moments and teacher."""
        tensors: list[Tensor] = [*self.model.parameters(), *self.model.buffers()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        if self.distillation is not None:
            teacher = self.distillation.teacher
            tensors += [*teacher.parameters(), *teacher.buffers()]
        return _bytes(tensors)

    def measure_memory(self, images: Tensor, targets: Tensor, before: int) -> None:
        """Learn what a step takes; `before` is what the GPU's allocator held without this job."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # of compiling and warming up
            torch.cuda.reset_peak_memory_stats()
            self.step(images, targets)
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_reserved() - before

    def measured(self) -> dict[str, Any]:
        """What was found, as plain JSON."""
        ms = statistics.median(self.ms)
        images = self.args.batch * distributed.world_size()
        return {
            "ms_per_step": ms,
            "ms_per_step_all": self.ms,
            "images_per_second": 1e3 * images / ms,
            "peak_bytes": self.peak_bytes,
            "kept_bytes": self.kept_bytes(),
        }


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (getattr(t, "_local_tensor", t) for t in tensors)  # of a sharded tensor
    return sum(t.numel() * t.element_size() for t in local)


def jobs_of(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], Job]]:
    """Makers of the float job and the QAT job, and with --distill of one that has a teacher."""
    architecture = find_variant(args.cfg)
    if architecture is None:
        raise SystemExit(f"{args.cfg} is no official model; configs/ has their names")
    size = architecture.img_size

    def made_up() -> SwinBase:
        torch.manual_seed(0)
        return build_model(architecture, args.drop_path).to(device)

    def student() -> SwinBase:
        images = torch.randn(CALIBRATION_IMAGES, architecture.in_chans, size, size, device=device)
        model = api.calibrate(made_up().eval(), images, recipe=args.recipe, method="max")
        assert isinstance(model, SwinBase)
        set_drop_path(model, args.drop_path)
        set_int8_mode(model, args.int8_mode)
        if args.learn:
            learn_ranges(model, args.learn)
        return model

    def teacher() -> Distillation:
        return Distillation(
            made_up(),
            scale=1.0,
            temperature=3.0,
            features=args.features,
            compile_blocks=not args.eager,
        )

    jobs = {
        "float": lambda: Job(made_up(), args, device),
        "QAT": lambda: Job(student(), args, device),
    }
    if args.distill:
        jobs["QAT distilled"] = lambda: Job(student(), args, device, teacher())
    return jobs


def reserved_bytes(device: torch.device) -> int:
    """What the allocator holds on the GPU, without what it could give back."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def profiled(job: Job, images: Tensor, targets: Tensor) -> str:
    """The kernels of a step that take longest."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        job.step(images, targets)
        if job.device.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if job.device.type == "cuda" else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=110)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cfg", default="swin_tiny_patch4_window7_224", metavar="NAME")
    parser.add_argument("--batch", type=int, default=128, help="images on each rank")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--int8-mode", type=int, default=1)
    parser.add_argument("--learn", nargs="*", choices=KINDS, default=["output"])
    parser.add_argument("--amp", choices=AMP_TYPES, default="bf16")
    parser.add_argument("--drop-path", type=float, default=0.2)
    parser.add_argument("--distill", action="store_true", help="a third job, with a teacher")
    parser.add_argument("--features", type=float, default=0.0, help="weight of that loss")
    parser.add_argument("--parallel", choices=parallel.WRAPPINGS, default="ddp")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel by itself")
    parser.add_argument("--steps", type=int, default=5, help="of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--profile", action="store_true", help="print each job's longest kernels")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="raw results go here")
    return parser.parse_args()


def rows(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A line for each job, beside the float one."""
    lines = []
    for name, job in found.items():
        ratios = {
            "ms": job["ms_per_step"] / found["float"]["ms_per_step"],
            "bytes": job["peak_bytes"] / max(found["float"]["peak_bytes"], 1),
        }
        lines.append(
            [name, f"{job['ms_per_step']:.1f} ms", f"{ratios['ms']:.3f}"]
            + [f"{job['images_per_second']:.0f} images/s"]
            + [f"{job['peak_bytes'] / 2**30:.2f} GiB", f"{ratios['bytes']:.3f}"]
        )
    return lines


def main() -> int:
    """Run, print a table, save what was measured."""
    args = parsed()
    device = distributed.select_device(args.device)
    distributed.init()
    sharded = parallel.is_sharded(args.parallel)
    fits = can_capture(device, checkpointing=args.checkpointing, sharded=sharded)
    args.graphs = fits and not args.no_graphs
    arch = find_variant(args.cfg)
    assert arch is not None
    torch.manual_seed(distributed.rank())
    images = torch.randn(args.batch, arch.in_chans, arch.img_size, arch.img_size, device=device)
    targets = torch.rand(args.batch, arch.num_classes, device=device).mul(10).softmax(-1)
    jobs: dict[str, Job] = {}
    ready_s = {}
    for name, make in jobs_of(args, device).items():
        began = time.perf_counter()
        before = reserved_bytes(device)
        jobs[name] = job = make()
        job.round(images, targets)
        job.measure_memory(images, targets, before)
        job.ms = []  # compiling does not count
        ready_s[name] = time.perf_counter() - began
        console.say(f"{name}: ready after {ready_s[name]:.0f} s")
    for _ in range(args.rounds):
        for job in jobs.values():
            job.round(images, targets)
    found = {name: job.measured() for name, job in jobs.items()}
    console.table(rows(found), ["job", "step", "x float", "", "memory", "x float"])
    wanted = ", ".join(f"{name} {ratio}" for name, ratio in LARGEST_RATIOS.items())
    console.say(f"wanted of QAT to float at most: {wanted}")
    if args.profile:
        for name, job in jobs.items():
            console.say(f"{name}\n{profiled(job, images, targets)}")
    if args.json and distributed.is_main():
        write(args, device, {"jobs": found, "ready_s": ready_s})
    distributed.shutdown()
    return 0


def write(args: argparse.Namespace, device: torch.device, found: dict[str, Any]) -> None:
    """Save the raw results, named after the GPU, the ranks and the model."""
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {"device": device_name(device), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "ranks": distributed.world_size(),
        **{name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()},
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        **found,
    }
    args.json.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    ranks = f"-x{distributed.world_size()}" if distributed.world_size() > 1 else ""
    path = args.json / f"training-{slug}{ranks}-{args.cfg}-{args.batch}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.say(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
