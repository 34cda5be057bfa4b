"""Where the time of a forward goes: a table of our kernels on one GPU, each against its floor.

    python scripts/profile_kernels.py --json benchmarks/kernels-nvidia-h100.json \\
        --models swin_tiny_patch4_window7_224 --batches 1 32
    python scripts/profile_kernels.py --json benchmarks/kernels-nvidia-h100.json \\
        --tables docs/performance.md

Kernels of a CUDA graph's replays are timed by the profiler. Kernels that wait for their predecessor
overlap it, so a kernel's time is counted from the end of the one before. The floor is the longer of
its products at the tensor cores' datasheet rate and its bytes at that of L2 or memory. Models have
made-up weights.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarking import ours, work
from benchmarking.cases import FORMS, MODELS, OURS, STREAM, Model, find_models
from benchmarking.records import Record
from benchmarking.tables import Renderer, grid, rewrite_all

from swinq import console
from swinq.errors import ConfigError, SwinqError
from swinq.latency import device_name
from swinq.models.variants import find_variant

FORWARDS = 20
GRAPHED = tuple(form for form in OURS if not form.endswith(STREAM))


def kernel_times(replay: Any) -> list[tuple[str, float]]:
    """Name and median microseconds of each kernel of a forward, in order.

    Raises:
        SwinqError: the forwards did not all run the same kernels.
    """
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(FORWARDS):
            replay()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        return per_kernel(json.loads(trace.read_text())["traceEvents"], FORWARDS)


def per_kernel(events: Sequence[dict[str, Any]], forwards: int) -> list[tuple[str, float]]:
    """Name and median microseconds of each kernel, from a trace of some equal forwards."""
    kernels = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    count, rest = divmod(len(kernels), forwards)
    names = [_short(e["name"]) for e in kernels]
    if not count or rest or names != names[:count] * forwards:
        raise SwinqError(
            f"{len(kernels)} kernels in {forwards} forwards: they did not all run the same"
        )
    times: list[list[float]] = [[] for _ in range(count)]
    end = 0.0
    for index, event in enumerate(kernels):
        stop = event["ts"] + event["dur"]
        times[index % count].append(max(stop - max(end, event["ts"]), 0.0))
        end = max(end, stop)
    return [(name, statistics.median(t)) for name, t in zip(names[:count], times, strict=True)]


def _short(name: str) -> str:
    """`gemm_mma_kernel` of a demangled signature."""
    found = re.search(r"\w+_kernel\b", name)
    return found[0] if found else name


def profiled(model: Model, form: str, batch: int, device: torch.device) -> dict[str, Any]:
    """One row of the record: the kernels of a model, each with its work and floor."""
    arch = find_variant(model.name)
    assert arch is not None
    running = ours.engine(model, form, device)
    with torch.inference_mode():
        graph = running.graph(batch, torch.float16)
        graph.images.normal_()
        times = kernel_times(graph.replay)
    todo = work.pieces(arch, batch, ours.mode_of(form))
    groups = work.assign([name for name, _ in times], todo)
    rates = work.find_device(device_name(device))
    rows = []
    for (name, microseconds), group in zip(times, groups, strict=True):
        row: dict[str, Any] = {
            "kernel": name,
            "layers": " + ".join(piece.name for piece in group) or "flags",
            "stage": group[0].stage if group else -1,
            "us": microseconds,
            "macs": sum(piece.macs for piece in group),
            "bytes": work.moved(group),
        }
        if rates and group:
            floor = work.floor(group, rates)
            row |= {"floor_us": 1e6 * floor.seconds, "bound": floor.bound}
        rows.append(row)
    return {"model": model.name, "batch": batch, "form": form, "kernels": rows}


def kernel_table(row: dict[str, Any]) -> list[str]:
    """Equal layers of a stage in one line, the longest first."""
    total = sum(kernel["us"] for kernel in row["kernels"])
    merged: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for kernel in row["kernels"]:
        merged.setdefault((kernel["stage"], kernel["layers"], kernel["kernel"]), []).append(kernel)
    rows = []
    for (stage, layers, name), same in sorted(
        merged.items(), key=lambda item: -_sum(item[1], "us")
    ):
        us, floor = max(_sum(same, "us"), 1e-3), _sum(same, "floor_us")
        rows.append(
            [
                layers,
                "" if stage < 0 else str(stage + 1),
                f"`{name}`",
                str(len(same)),
                f"{us:.1f}",
                f"{100 * us / total:.1f}",
                f"{2e-6 * _sum(same, 'macs') / us:.0f}" if _sum(same, "macs") else "",
                f"{1e-3 * _sum(same, 'bytes') / us:.0f}",
                f"{floor:.1f}" if floor else "",
                f"{100 * floor / us:.0f}" if floor else "",
                same[0].get("bound", ""),
            ]
        )
    floor = _sum(row["kernels"], "floor_us")
    share = f"{100 * floor / total:.0f}" if floor else ""
    size = len(row["kernels"])
    rows.append(
        ["all", "", "", str(size), f"{total:.1f}", "100", "", "", f"{floor:.1f}", share, ""]
    )
    header = ["layers", "stage", "kernel", "launches", "us", "% of forward", "TOP/s", "GB/s"]
    return grid([*header, "floor us", "% of time", "bound by"], rows)


def _sum(kernels: Sequence[dict[str, Any]], what: str) -> float:
    return sum(kernel.get(what, 0) for kernel in kernels)


def renderers(record: Record) -> dict[str, Renderer]:
    """The one table, by model, batch and form."""

    def kernels(model: str, batch: str, form: str) -> list[str]:
        row = record.find(model, int(batch), form)
        return kernel_table(row) if row else ["Not measured."]

    return {"kernels": kernels}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--models", nargs="+", default=list(MODELS)[:1], metavar="MODEL")
    made.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    made.add_argument("--forms", nargs="+", choices=GRAPHED, default=list(GRAPHED))
    made.add_argument("--json", type=Path, help="raw results, added to what is there")
    made.add_argument("--tables", nargs="+", type=Path, metavar="PAGE", help="write them, no GPU")
    made.add_argument("--device", default="cuda")
    return made


def measure(args: argparse.Namespace, record: Record) -> None:
    """Profile what is asked for, keep and print it."""
    device = torch.device(args.device)
    if device.type != "cuda":
        raise ConfigError(f"kernels cannot be profiled on {device}", "use a machine with a GPU")
    versions = {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}
    command = shlex.join(["python", "scripts/profile_kernels.py", *sys.argv[1:]])
    record.begin(device_name(device), {"command": command, "versions": versions})
    for model in find_models(args.models):
        for form in args.forms:
            for batch in args.batches:
                console.say(f"\n{model.title}, {FORMS[form].title}, batch {batch}")
                try:
                    row = profiled(model, form, batch, device)
                except (SwinqError, ValueError) as error:  # the others are still worth having
                    console.complain(str(error))
                    continue
                record.add(row)
                print("\n".join(kernel_table(row)), flush=True)


def main() -> int:
    """Profile, or write the tables of what was profiled."""
    args = parser().parse_args()
    try:
        record = Record(args.json)
        if args.tables is None:
            measure(args, record)
            return 0
        rewrite_all(args.tables, renderers(record), args.json, record.rows())
    except SwinqError as error:
        console.complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
