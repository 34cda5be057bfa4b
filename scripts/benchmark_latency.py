"""Times the float model and the integer model in both modes, taking turns in one run.

    python scripts/benchmark_latency.py --json benchmarks/latency-cpu.json \\
        swin_tiny_patch4_window7_224 swinv2_tiny_patch4_window8_256

Models are official names with random weights, calibrated on random images: time does not depend on
what the numbers are, as no kernel skips zeros. On a CPU the integer model is the product; on a GPU
it is the specification in plain PyTorch, not the fast kernels. Medians of the repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from swinq import api, console
from swinq.errors import SwinqError
from swinq.latency import measure_together
from swinq.models.build import build_model
from swinq.models.variants import find_variant

CALIBRATION_IMAGES = 2


def measured(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per batch size and form of one model."""
    arch = find_variant(name)
    if arch is None:
        raise SwinqError(f"'{name}' is no official model", "see configs/ for the names")
    torch.manual_seed(0)
    model = build_model(arch).eval()
    images = torch.randn(CALIBRATION_IMAGES, arch.in_chans, arch.img_size, arch.img_size)
    quantized = api.calibrate(model, images, method="max")
    forms: dict[str, Any] = {"float": model.to(args.device)}
    with tempfile.TemporaryDirectory() as folder:
        for mode in (1, 2):
            path = api.export(quantized, Path(folder, "int8.safetensors"), int8_mode=mode)
            forms[f"INT8 mode {mode}"] = api.load(path, device=args.device)
    rows = []
    for batch in args.batches:
        timed = measure_together(forms, batch, arch.img_size, args.device, 2, args.repeats)
        for form, latency in timed.items():
            ratio = latency.median_ms / timed["float"].median_ms
            rows.append({"model": name, "form": form, "ratio_to_float": ratio, **asdict(latency)})
    return rows


def main() -> int:
    """Measure each model, print a table, save the raw results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        try:
            rows += measured(name, args)
        except SwinqError as error:
            console.complain(str(error))
            return 2
    console.table(
        [
            [r["model"], r["form"], r["batch_size"], f"{r['median_ms']:.1f}"]
            + [f"{r['ratio_to_float']:.2f}"]
            for r in rows
        ],
        ["model", "form", "batch", "median ms", "times float"],
    )
    if args.json:
        command = " ".join(["python", "scripts/benchmark_latency.py", *sys.argv[1:]])
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        raw = {"command": command, "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(raw, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
