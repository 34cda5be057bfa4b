"""Holds the CUDA engine to the reference on large windows, with self-made weights.

    python scripts/check_large_windows.py --json benchmarks/large-windows-nvidia-h100.json

No trained checkpoint of these sizes is at hand, so weights are random, with v2's temperature at its
largest, calibrated on random images. Random logits have no margin that agreement could be counted
by; compared are the logits, as the norm of a difference over the norm of the reference. Beside it
stands the noise floor: what rounding the residual stream to fp16 does to the fake-quantized model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmarking.tables import grid
from torch import Tensor, nn

from swinq import api, console
from swinq.errors import SwinqError
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin
from swinq.int8.model import Int8Swin
from swinq.latency import device_name
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.variants import find_variant
from swinq.quant.insert import set_int8_mode
from swinq.quant.stream import half_stream

MODELS = (
    "swin_base_patch4_window12_384_finetune",
    "swinv2_base_patch4_window12_192_22k",
    "swinv2_tiny_patch4_window16_256",
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft",
)
LARGEST_LOGIT_SCALE = 100.0
CALIBRATION_IMAGES = 4
MOST_FLOORS = 2.0  # the engine may differ from the reference by so many noise floors


def made_model(arch: Architecture, device: torch.device) -> nn.Module:
    """A float model whose norms, biases and temperatures are not what training starts from."""
    torch.manual_seed(0)
    model = build_model(arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(math.log(LARGEST_LOGIT_SCALE))
            elif "norm" in name:
                centre = 1.0 if name.endswith("weight") else 0.0
                parameter.normal_(centre, 0.1)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1)
    return model.eval().to(device)


@torch.inference_mode()
def checked(arch: Architecture, count: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each INT8 mode; without an engine it holds the reference and its noise floor."""
    size = arch.img_size
    generator = torch.Generator().manual_seed(1)
    shape = (CALIBRATION_IMAGES + count, arch.in_chans, size, size)
    images = torch.randn(shape, generator=generator)
    with torch.inference_mode(False), torch.no_grad():
        model = made_model(arch, device)
        quantized = api.calibrate(model, images[:CALIBRATION_IMAGES])
    seen = images[CALIBRATION_IMAGES:].to(device)
    rows = []
    for mode in (1, 2):
        fake = set_int8_mode(quantized, mode)(seen)
        with half_stream(quantized):
            rounded = quantized(seen)
        with tempfile.TemporaryDirectory() as folder:
            path = api.export(quantized, Path(folder, "int8.safetensors"), int8_mode=mode)
            reference = Int8Swin.load(path, device=device)(seen)
            row: dict[str, Any] = {
                "mode": mode,
                "images": count,
                "noise_floor": distance(rounded, fake),
                "reference_from_fake_quant": distance(reference, fake),
            }
            problem = devices.problem(device)
            if problem:
                row["error"] = problem
            else:
                engine = CudaSwin.load(path, device=device)(seen)
                row["engine_from_reference"] = distance(engine, reference)
                row["engine_from_fake_quant"] = distance(engine, fake)
        rows.append(row)
    return rows


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| over |b|, in double precision."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


def passes(row: dict[str, Any]) -> bool:
    """Whether the engine was there and stayed within the noise."""
    limit = MOST_FLOORS * row["noise_floor"]
    return row.get("engine_from_reference", math.inf) <= limit


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("--models", nargs="+", default=list(MODELS))
    made.add_argument("--images", type=int, default=8)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path)
    return made


def main() -> int:
    """Check each model, print a table, save the rows; 1 if one is beyond the noise."""
    args = parser().parse_args()
    rows: list[dict[str, Any]] = []
    try:
        for name in args.models:
            arch = find_variant(name)
            if arch is None:
                raise SwinqError(f"'{name}' is no official model", "see configs/ for the names")
            console.say(name)
            found = checked(arch, args.images, torch.device(args.device))
            rows += [{"model": name, **row, "passes": passes(row)} for row in found]
    except SwinqError as error:
        console.complain(str(error))
        return 2
    columns = ["mode", "noise_floor", "engine_from_reference", "engine_from_fake_quant", "passes"]
    cells = [[row["model"], *(_cell(row.get(column)) for column in columns)] for row in rows]
    print("\n".join(grid(["model", *columns], cells)))
    if args.json:
        command = " ".join(["python", "scripts/check_large_windows.py", *sys.argv[1:]])
        versions = {"torch": str(torch.__version__)}
        result = {"command": command, "device": device_name(args.device), "versions": versions}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["passes"] for row in rows) else 1


def _cell(value: Any) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
