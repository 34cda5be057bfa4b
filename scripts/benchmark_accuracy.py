"""Measures what quantization costs: float, int8_mode 1 and 2, and the fastertransformer recipe.

    python scripts/benchmark_accuracy.py --data-path imagenette160.zip --transform squash \\
        --json benchmarks/accuracy-h200.json swin_tiny.pth swinv2_tiny.pth

For each checkpoint, on the same validation images: top-1 of the float model, of the fake-quantized
one in both modes and under both recipes, and of the exported integer model in both modes; changes
paired against float; and how often the integer model agrees with the fake-quantized one, beside
how often that one agrees with itself when its residual stream is rounded to fp16 (the noise floor:
fake-quantized networks are chaotic at the level of single codes). Results of several calls are
merged into one file, by checkpoint. With --ablation it measures instead what each part of the
recipe and each search method is worth, in mode 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from swinq import api, console
from swinq.data.datasets import open_dataset
from swinq.data.loader import Batch, BatchLoader
from swinq.data.sampling import calibration_indices
from swinq.data.transforms import TRANSFORMS, eval_transform
from swinq.errors import SwinqError
from swinq.evaluate import Predictions, compare
from swinq.int8.model import Int8Swin
from swinq.latency import device_name
from swinq.quant.insert import set_int8_mode
from swinq.quant.spec import QuantSpec
from swinq.quant.stream import half_stream

BATCH = 128
RECIPES = ("int8", "fastertransformer")
MODES = (1, 2)


_PLAIN = QuantSpec()  # per-channel weights and outputs, one input scale, no correction
_VECTORS = api.recipe_spec("int8").migration
ABLATION: dict[str, tuple[QuantSpec, str]] = {
    "plain": (_PLAIN, "percentile"),
    "plain, one output scale": (
        replace(_PLAIN, output_granularity="per_tensor", output_headroom=1.0),
        "percentile",
    ),
    "plain, headroom 1.0": (replace(_PLAIN, output_headroom=1.0), "percentile"),
    "plain, headroom 1.25": (replace(_PLAIN, output_headroom=1.25), "percentile"),
    "plain, max": (_PLAIN, "max"),
    "plain, mse": (_PLAIN, "mse"),
    "plain, entropy": (_PLAIN, "entropy"),
    "bias correction": (replace(_PLAIN, bias_correction=True), "percentile"),
    "input vectors": (replace(_PLAIN, migration=_VECTORS), "percentile"),
    "both": (replace(_PLAIN, migration=_VECTORS, bias_correction=True), "percentile"),
}


class Bench:
    """One checkpoint on one device, with its images decoded once."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.device = torch.device(args.device)
        self.model = api.load(path, device=self.device)
        arch = self.model.arch
        transform = eval_transform(args.transform, arch.img_size)
        train = open_dataset(args.data_path, "train", transform, num_classes=arch.num_classes)
        val = open_dataset(args.data_path, "val", transform, num_classes=arch.num_classes)
        count = min(args.images or len(val), len(val))
        self.val = self._decoded(val, calibration_indices(len(val), count, 0))
        sample = calibration_indices(len(train), args.calibration_images, 0)
        self.calibration = [
            image for batch in self._decoded(train, sample) for image in batch.images
        ]
        self.rows: list[dict[str, Any]] = []
        self.reference = self.predict(self.model)
        self._add("float", None)

    @staticmethod
    def _decoded(dataset: Any, indices: list[int]) -> list[Batch]:
        batches = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
        workers = min(16, os.cpu_count() or 1)
        return list(BatchLoader(dataset, batches, num_workers=workers))

    @torch.inference_mode()
    def predict(self, model: Any) -> Predictions:
        """Logits of all validation images."""
        logits = [model(batch.images.to(self.device)).float().cpu() for batch in self.val]
        return Predictions(
            torch.cat([b.indices for b in self.val]),
            torch.cat([b.labels for b in self.val]),
            torch.cat(logits),
        )

    def _add(self, name: str, said: Predictions | None, **more: Any) -> None:
        scores = (said or self.reference).scores()
        row: dict[str, Any] = {"model": name, **scores.to_dict(), **more}
        if said is not None:
            row["comparison"] = compare(self.reference, said).to_dict()
        self.rows.append(row)
        c = row.get("comparison")
        change = f"{c['difference_points']:+.2f}, KL {c['mean_kl']:.1e}" if c else ""
        console.say(f"  {name:32s} {scores.top1_percent:6.2f} {change} {more or ''}")

    def run(self) -> None:
        """Calibrate by each recipe and measure every form of the model."""
        for recipe in RECIPES:
            started = time.monotonic()
            quantized = api.calibrate(self.model, self.calibration, recipe=recipe)
            seconds = round(time.monotonic() - started, 2)
            for mode in MODES:
                set_int8_mode(quantized, mode)
                said = self.predict(quantized)
                self._add(f"{recipe}, mode {mode}", said, calibration_seconds=seconds)
                if recipe == "int8":
                    with half_stream(quantized):
                        floor = compare(said, self.predict(quantized)).agreement_percent
                    self._integer(quantized, mode, said, floor)

    def ablate(self) -> None:
        """Measure each variant of the recipe in mode 1."""
        for name, (spec, method) in ABLATION.items():
            quantized = api.calibrate(self.model, self.calibration, recipe=spec, method=method)
            self._add(name, self.predict(set_int8_mode(quantized, 1)))

    def _integer(self, quantized: Any, mode: int, said: Predictions, floor: float) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = api.export(quantized, Path(folder) / "int8.safetensors", int8_mode=mode)
            size = path.stat().st_size
            model = Int8Swin.load(path, int8_mode=mode, device=self.device)
        integer = self.predict(model)
        self._add(
            f"integer model, mode {mode}",
            integer,
            agreement_with_fake_quant=compare(said, integer).agreement_percent,
            fake_quant_self_agreement_fp16_stream=floor,
            file_bytes=size,
        )


def table(results: dict[str, Any]) -> Iterator[str]:
    """Markdown rows, a checkpoint each."""
    header = ["checkpoint", "float", "mode 1", "mode 2", "integer 1", "integer 2", "FT 1", "FT 2"]
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    columns = ["int8, mode 1", "int8, mode 2", "integer model, mode 1", "integer model, mode 2"]
    columns += ["fastertransformer, mode 1", "fastertransformer, mode 2"]
    for name, entry in results.items():
        rows = {row["model"]: row for row in entry["rows"]}
        cells = [f"{rows['float']['top1_percent']:.2f}"]
        for column in columns:
            row = rows[column]
            cells.append(
                f"{row['top1_percent']:.2f} ({row['comparison']['difference_points']:+.2f})"
            )
        yield f"| {name} | {' | '.join(cells)} |"


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--transform", choices=TRANSFORMS, default="official")
    parser.add_argument("--images", type=int, default=0, help="validation images, 0 = all")
    parser.add_argument("--calibration-images", type=int, default=80)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ablation", action="store_true", help="the parts of the recipe")
    parser.add_argument("--json", type=Path, help="results, merged with what is there")
    return parser.parse_args()


def main() -> int:
    """Measure each checkpoint, print a table, save the raw results."""
    args = parsed()
    machine = {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    results: dict[str, Any] = {}
    if args.json and args.json.exists():
        results = json.loads(args.json.read_text())["results"]
    for path in args.checkpoints:
        console.say(f"{path.name}")
        try:
            bench = Bench(path, args)
            bench.ablate() if args.ablation else bench.run()
        except SwinqError as error:
            console.complain(str(error))
            return 2
        command = " ".join(["python", "scripts/benchmark_accuracy.py", *sys.argv[1:]])
        results[path.stem] = {"command": command, **machine, "rows": bench.rows}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")
    if not args.ablation:
        print("\n".join(table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
