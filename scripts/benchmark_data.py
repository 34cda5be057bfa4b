"""Measures how many images a second training can be fed, from folders and from a zip.

    OMP_NUM_THREADS=1 python scripts/benchmark_data.py --json benchmarks

Made-up JPEGs of ImageNet's usual size (500x375 pixels, about 110 kB) go to a temporary folder and
into a zip; TrainingLoader then reads, augments and batches them with the official Swin settings.
The rounds of all settings are interleaved and their medians given. What a core does, by CPU seconds
of all processes, says how many cores a GPU needs to be given --wanted images a second.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from swinq import console
from swinq.data.augment import Augmented, train_transform
from swinq.data.datasets import open_dataset
from swinq.data.order import StepOrder
from swinq.data.training import TrainingLoader
from swinq.latency import device_name

WIDTH, HEIGHT, QUALITY = 500, 375, 94
CLASSES = 4


def jpeg(seed: int) -> bytes:
    """A photograph's stand-in: soft blobs and some noise, compressed to about 110 kB."""
    random = np.random.RandomState(seed)
    coarse = random.randint(256, size=(12, 16, 3)).astype(np.uint8)
    blobs = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    noise = random.randint(-16, 17, size=(HEIGHT, WIDTH, 3))
    file = io.BytesIO()
    pixels = (np.asarray(blobs) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_images(folder: Path, count: int) -> dict[str, Path]:
    """The same images as train/<class>/<image> and in a zip; returns both data paths."""
    root, archive = folder / "images", folder / "images.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as zipped:
        for index in range(count):
            name = f"train/class_{index % CLASSES}/{index:05d}.jpg"
            data = jpeg(index)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
            zipped.writestr(name, data)
    return {"folder": root, "zip": archive}


def cpu_seconds() -> float:
    """User and system time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def speeds(path: Path, workers: int, args: argparse.Namespace) -> tuple[float, float]:
    """Images per second, without the start of the workers, and images per CPU second."""
    dataset = Augmented(open_dataset(path, "train", train_transform(args.img_size)), seed=0)
    order = StepOrder(len(dataset), args.batch_size, 1, seed=0)
    loader = TrainingLoader(
        dataset,
        order,
        first_step=0,
        last_step=order.steps_per_epoch,
        numbers=range(1),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    before = cpu_seconds()
    batches = iter(loader)
    # Workers start together, each with a batch: after the first round they are out of step
    first = sum(len(next(batches)) for _ in range(max(1, workers)))
    start = time.perf_counter()
    images = sum(len(batch) for batch in batches)
    wall = time.perf_counter() - start
    return images / wall, (first + images) / (cpu_seconds() - before)


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second of every storage and number of workers."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), args.images)
        for _ in range(args.rounds):
            for storage, path in paths.items():
                for workers in args.workers:
                    found.setdefault((storage, workers), []).append(speeds(path, workers, args))
    rows = []
    for (storage, workers), values in found.items():
        per_second, per_core = map(statistics.median, zip(*values, strict=True))
        rows.append(
            {
                "storage": storage,
                "workers": workers,
                "images_per_second": per_second,
                "images_per_cpu_second": per_core,
                "all": values,
                "cores_for": {str(wanted): math.ceil(wanted / per_core) for wanted in args.wanted},
            }
        )
    return rows


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1024, help="made and read in every round")
    parser.add_argument("--img-size", type=int, default=224, help="side of the model's input")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--wanted",
        type=int,
        nargs="+",
        default=[500, 2500],
        metavar="N",
        help="images a second that a GPU uses up; by default about those of Swin-L and Swin-T",
    )
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="raw results go here")
    return parser.parse_args()


def main() -> int:
    """Run, print a table, save what was measured."""
    args = parsed()
    load = os.getloadavg()  # of the last 1, 5 and 15 minutes: who else was at work
    rows = measured(args)
    header = ["from", "workers", "images/s", "per core"]
    header += [f"cores for {wanted}/s" for wanted in args.wanted]
    console.table(
        [
            [
                row["storage"],
                row["workers"],
                f"{row['images_per_second']:.0f}",
                f"{row['images_per_cpu_second']:.0f}",
                *row["cores_for"].values(),
            ]
            for row in rows
        ],
        header,
    )
    if args.json:
        cpu = device_name("cpu")
        results = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": {
                "cpu": cpu,
                "cores": os.cpu_count(),
                "load_average_before": load,
                "platform": platform.platform(),
            },
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("torch", "timm", "pillow")},
            },
            "img_size": args.img_size,
            "batch_size": args.batch_size,
            "image": {"width": WIDTH, "height": HEIGHT, "bytes_of_the_first": len(jpeg(0))},
            "results": rows,
        }
        args.json.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
        path = args.json / f"data-{slug}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
