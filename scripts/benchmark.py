"""Times every Swin in every form on one GPU: PyTorch's own, torchao's INT8, and ours.

    python scripts/benchmark.py --json benchmarks/latency-nvidia-h100.json --minutes 9
    python scripts/benchmark.py --json benchmarks/latency-nvidia-h100.json --tables README.md

Peers are timm's models on PyTorch: eager, a CUDA graph, jit.trace, torch.compile
(mode="reduce-overhead"), torchao's INT8 with torch.compile. Ours run by a CUDA graph and without.
All classify, all take fp16 images that lie on the GPU, all have random weights. Times are medians
of CUDA-event times, with a warm and with a flushed L2 cache.

Models compile side by side in processes of their own. When all that were started together are
ready, they are timed one after the other, with nothing else on the GPU or the host. What the file
holds already is not measured again, so a call that was cut short is simply repeated; failures are
kept with their error and tried again. To measure some rows anew, in place of those in the file:

    python scripts/benchmark.py --json benchmarks/latency-nvidia-h100.json --again \
        --models swin_large_patch4_window7_224 --peers compile --ours --batches 32
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarking import task as tasks_of_one
from benchmarking.cases import MODELS, OURS, PEERS, find_models, tasks
from benchmarking.peers import versions
from benchmarking.records import Record
from benchmarking.schedule import command_of, run_all
from benchmarking.tables import latency, renderers, rewrite_all

import swinq
from swinq import console
from swinq.errors import SwinqError
from swinq.int8.device import require_present
from swinq.latency import device_name

SCRIPT = Path(__file__).resolve()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--models", nargs="+", default=list(MODELS), metavar="MODEL")
    made.add_argument(
        "--batches", nargs="+", type=positive, default=[], help="instead of the usual"
    )
    made.add_argument("--peers", nargs="*", choices=PEERS, help="none after it: no peer")
    made.add_argument("--ours", nargs="*", choices=OURS, help="none after it: not ours")
    made.add_argument("--json", type=Path, help="raw results, added to what is there")
    made.add_argument("--again", action="store_true", help="measure what the file holds, too")
    made.add_argument("--tables", nargs="+", type=Path, metavar="PAGE", help="write them, no GPU")
    made.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 3))
    made.add_argument("--minutes", type=float, help="stop after so long; repeat to go on")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--list", action="store_true", help="say what would be measured")
    made.add_argument("--task", help=argparse.SUPPRESS)  # a process that this program starts
    made.add_argument("--turn", default="", help=argparse.SUPPRESS)
    return made


def positive(text: str) -> int:
    """A number of images, 1 or more.

    Raises:
        ValueError: it is none.
    """
    if int(text) < 1:
        raise ValueError
    return int(text)


def measure(args: argparse.Namespace, record: Record) -> int:
    """Measure what is asked for and not yet in the record."""
    started = time.monotonic()
    have = set() if args.again else record.measured()
    todo = tasks(find_models(args.models), args.peers, args.ours, args.batches, have=have)
    if args.list:
        for task in todo:
            batches = ", ".join(map(str, task.batches))
            console.say(f"{task.model}: {', '.join(task.forms)} at batch {batches}")
        return 0
    require_present(args.device)
    call = {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "versions": {"swinq": swinq.__version__, **versions()},
    }
    record.begin(device_name(args.device), call)
    deadline = None if args.minutes is None else started + 60 * args.minutes

    def add(row: dict[str, Any]) -> None:
        record.add(row)
        said = f"{row['warm_ms']:8.3f} ms" if "error" not in row else row["error"].split("\n")[0]
        at = f"{time.monotonic() - started:5.0f} s"
        console.say(f"{at}  {row['model']:45s} {row['batch']:3d}  {row['form']:20s} {said[:120]}")

    late = run_all(todo, command_of(SCRIPT, args.device), args.jobs, deadline, add)
    for batch in sorted({row["batch"] for row in record.rows()}):
        print("\n" + "\n".join(latency(record, batch, "warm")))
    if late:
        console.say(f"\n{len(late)} of {len(todo)} tasks ran out of time: repeat the command")
    return 0


def main() -> int:
    """Measure, or write the tables of what was measured."""
    args = parser().parse_args()
    if args.task:
        return tasks_of_one.main(args.task, args.device, args.turn)
    try:
        record = Record(args.json)
        if args.tables is None:
            return measure(args, record)
        rewrite_all(args.tables, renderers(record), args.json, record.rows())
    except SwinqError as error:
        console.complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
