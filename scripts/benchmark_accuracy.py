"""Measures what quantization costs: float, int8_mode 1 and 2, and the fastertransformer recipe.

    python scripts/benchmark_accuracy.py --data-path imagenette160.zip --transform squash \\
        --json benchmarks/accuracy-h200.json swin_tiny.pth swinv2_tiny.pth

For each checkpoint, on the same validation images: top-1 of the float model, of the fake-quantized
one in both modes and under both recipes, and of the exported integer model in both modes, by the
reference and, on a GPU that has it, by the CUDA engine; changes paired against float; and how often
the integer models agree with the fake-quantized one, beside how often that one agrees with itself
when its residual stream is rounded to fp16 (the noise floor: fake-quantized networks are chaotic at
the level of single codes). With --ablation it measures instead what each part of the recipe and
each search method is worth, in mode 1.

Results of several calls, at the same time too, are merged into one file, by checkpoint. --cache
keeps the decoded images, so that photographs are needed once; --decode does nothing else.
"""

from __future__ import annotations

import argparse
import fcntl
import json
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
from benchmarking.decoded import decoded
from benchmarking.tables import grid, rewrite_all
from torch import Tensor

from swinq import api, console
from swinq.data.transforms import TRANSFORMS
from swinq.errors import ConfigError, SwinqError
from swinq.evaluate import Predictions, compare
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin
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
        self.args = args
        self.device = torch.device(args.device)
        self.model = api.load(path, device=self.device)
        size = self.model.arch.img_size
        source = (args.transform, size)
        self.val = decoded(args.data_path, "val", *source, args.images, args.cache)
        sample = decoded(args.data_path, "train", *source, args.calibration_images, args.cache)
        self.calibration: list[Tensor] = [
            image for batch in sample.batches(1, torch.device("cpu")) for image in batch
        ]
        self.rows: list[dict[str, Any]] = []
        self.reference = self.predict(self.model)
        self._add("float", None)

    @torch.inference_mode()
    def predict(self, model: Any, count: int | None = None) -> Predictions:
        """Logits of the validation images, or of the first so many."""
        rows = slice(0, count)
        chosen = replace(self.val, images=self.val.images[rows])
        logits = [model(images).float().cpu() for images in chosen.batches(BATCH, self.device)]
        return Predictions(self.val.indices[rows], self.val.labels[rows], torch.cat(logits))

    def _add(self, name: str, said: Predictions | None, **more: Any) -> None:
        scores = (said or self.reference).scores()
        row: dict[str, Any] = {"model": name, **scores.to_dict(), **more}
        if said is not None and len(said) == len(self.reference):
            row["comparison"] = compare(self.reference, said).to_dict()
        self.rows.append(row)
        c = row.get("comparison")
        change = f"{c['difference_points']:+.2f}, KL {c['mean_kl']:.1e}" if c else ""
        console.say(f"  {name:32s} {scores.top1_percent:6.2f} {change} {_short(more)}")

    def run(self) -> None:
        """Calibrate by each recipe and measure every form of the model."""
        for recipe in self.args.recipes:
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
        """The exported model by the reference and by the engine, if it can be had."""
        with tempfile.TemporaryDirectory() as folder:
            path = api.export(quantized, Path(folder) / "int8.safetensors", int8_mode=mode)
            size = path.stat().st_size
            reference = Int8Swin.load(path, int8_mode=mode, device=self.device)
            problem = devices.problem(self.device)
            engine = None if problem else CudaSwin.load(path, int8_mode=mode, device=self.device)
        about = {"fake_quant_self_agreement_fp16_stream": floor, "file_bytes": size}
        count = self.args.reference_images or len(self.val.images)
        integer = self.predict(reference, count)
        against = compare(first(said, count), integer)
        self._add(
            f"integer model, mode {mode}",
            integer,
            agreement_with_fake_quant=against.agreement_percent,
            against_fake_quant=against.to_dict(),
            **about,
        )
        if engine is None:
            console.say(f"  no CUDA engine: {problem}")
            return
        cuda = self.predict(engine)
        against = compare(said, cuda)
        self._add(
            f"CUDA engine, mode {mode}",
            cuda,
            agreement_with_fake_quant=against.agreement_percent,
            against_fake_quant=against.to_dict(),
            against_reference=compare(integer, first(cuda, count)).to_dict(),
            **about,
        )


def first(said: Predictions, count: int) -> Predictions:
    """The predictions of the first images."""
    return Predictions(said.indices[:count], said.labels[:count], said.logits[:count])


def _short(about: dict[str, Any]) -> str:
    plain = {name: value for name, value in about.items() if not isinstance(value, dict)}
    return str(plain) if plain else ""


def table(results: dict[str, Any]) -> Iterator[str]:
    """Markdown rows, a checkpoint each."""
    columns = ["int8, mode 1", "int8, mode 2", "integer model, mode 1", "integer model, mode 2"]
    columns += ["CUDA engine, mode 1", "CUDA engine, mode 2"]
    columns += ["fastertransformer, mode 1", "fastertransformer, mode 2"]
    table_rows = []
    for name, entry in results.items():
        rows = {row["model"]: row for row in entry["rows"]}
        if "float" not in rows:
            continue
        cells = [f"{rows['float']['top1_percent']:.2f}"]
        for column in columns:
            row = rows.get(column, {})
            change = row.get("comparison", {}).get("difference_points")
            cells.append("" if change is None else f"{row['top1_percent']:.2f} ({change:+.2f})")
        table_rows.append([name, *cells])
    yield from grid(["checkpoint", "float", *columns], table_rows)


def engine_table(results: dict[str, Any]) -> list[str]:
    """The CUDA engine beside the fake-quantized model and the reference, a mode of a model each."""
    table_rows = []
    for name, entry in results.items():
        rows = {row["model"]: row for row in entry["rows"]}
        for mode in MODES:
            engine, fake = rows.get(f"CUDA engine, mode {mode}"), rows.get(f"int8, mode {mode}")
            if engine is None or fake is None:
                continue
            against, exact = engine["against_fake_quant"], engine["against_reference"]
            low, high = against["interval_points"]
            table_rows.append(
                [
                    name,
                    str(mode),
                    f"{fake['top1_percent']:.2f}",
                    f"{engine['top1_percent']:.2f}",
                    f"{against['difference_points']:+.2f}",
                    f"{low:+.2f} to {high:+.2f}",
                    f"{against['agreement_percent']:.2f}",
                    f"{engine['fake_quant_self_agreement_fp16_stream']:.2f}",
                    f"{exact['agreement_percent']:.2f} of {exact['images']:,}",
                ]
            )
    header = ["checkpoint", "mode", "fake-quant", "engine", "change", "95 % interval"]
    header += ["agrees with fake-quant", "fake-quant with itself", "with the reference"]
    return grid(header, table_rows)


def merge(path: Path | None, name: str, entry: dict[str, Any]) -> None:
    """Put a checkpoint's results beside the others of the file, whoever writes there just now."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        results = json.loads(text)["results"] if text else {}
        results[name] = entry
        file.truncate(0)
        file.write(json.dumps({"results": results}, indent=1) + "\n")


def saved(path: Path | None) -> dict[str, Any]:
    """Results of a file by checkpoint."""
    return json.loads(path.read_text())["results"] if path and path.exists() else {}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    made.add_argument("checkpoints", nargs="*", type=Path)
    made.add_argument("--data-path", help="photographs; not needed where --cache holds them")
    made.add_argument("--transform", choices=TRANSFORMS, default="official")
    made.add_argument("--images", type=int, default=0, help="validation images, 0 = all")
    made.add_argument("--calibration-images", type=int, default=80)
    made.add_argument("--cache", type=Path, metavar="FOLDER", help="decoded images go there")
    made.add_argument(
        "--decode", nargs="+", type=int, metavar="SIZE", help="fill the cache, no more"
    )
    made.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    made.add_argument(
        "--reference-images", type=int, default=0, help="by the slow reference, 0 = all"
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--ablation", action="store_true", help="the parts of the recipe")
    made.add_argument("--json", type=Path, help="results, merged with what is there")
    made.add_argument("--tables", nargs="+", type=Path, metavar="PAGE", help="write them, no more")
    return made


def decode(args: argparse.Namespace) -> None:
    """Fill the cache."""
    if args.cache is None:
        raise ConfigError("--decode has nowhere to put images", "name a folder: --cache FOLDER")
    for size in args.decode:
        for split, count in (("val", args.images), ("train", args.calibration_images)):
            held = decoded(args.data_path, split, args.transform, size, count, args.cache)
            console.say(f"{split} at {size}: {len(held.images)} images")


def measure(args: argparse.Namespace) -> None:
    """Measure each checkpoint, save the raw results, print a table."""
    machine = {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    command = " ".join(["python", "scripts/benchmark_accuracy.py", *sys.argv[1:]])
    measured: dict[str, Any] = {}
    for path in args.checkpoints:
        console.say(f"{path.name}")
        bench = Bench(path, args)
        bench.ablate() if args.ablation else bench.run()
        measured[path.stem] = {"command": command, **machine, "rows": bench.rows}
        merge(args.json, path.stem, measured[path.stem])
    if not args.ablation:
        print("\n".join(table(saved(args.json) or measured)))


def main() -> int:
    """Do what the command line says."""
    args = parser().parse_args()
    try:
        if args.tables:
            results = saved(args.json)
            renderers = {"engine": lambda: engine_table(results)}
            rewrite_all(args.tables, renderers, args.json, results)
        elif args.decode:
            decode(args)
        else:
            measure(args)
    except SwinqError as error:
        console.complain(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
