"""Measures what calibration costs: collecting histograms, and searching them for ranges.

    python scripts/benchmark_calibration.py --json benchmarks
    python scripts/benchmark_calibration.py --json benchmarks --modelopt-quantizers 0   # all

Collecting is timed against the plain float forward, image by image in turns, and against the float
forward of a batch. Searches are timed over the histograms of all of the model's quantizers. Where
nvidia-modelopt can be imported, its HistogramCalibrator collects some of the same tensors and
searches them by entropy, each timed; its total is theirs extrapolated to all quantizers. Weights
are random unless --checkpoint gives some: how long it takes hardly depends on them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from swinq import api, console
from swinq.calib.calibrate import Calibration, calibrate
from swinq.calib.methods import find_amax
from swinq.latency import device_name
from swinq.models.build import build_model
from swinq.models.variants import find_variant
from swinq.quant.insert import float_layers, named_quantizers, quantize_model

SEARCHES = ("percentile", "mse", "entropy")
LARGEST_RATIO = 1.6  # collecting against a plain forward
LONGEST_ENTROPY_S = 2.0


def float_model(args: argparse.Namespace) -> nn.Module:
    """The checkpoint's model, or one of the named architecture with random weights."""
    if args.checkpoint:
        model: nn.Module = api.load(args.checkpoint)
    else:
        architecture = find_variant(args.model)
        if architecture is None:
            raise SystemExit(f"{args.model} is no known model")
        model = build_model(architecture)
    return model.eval().to(args.device)


class Bench:
    """One float model, its quantized copy and some images on one device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.manual_seed(0)
        self.model = float_model(args)
        torch.manual_seed(0)
        self.fake = quantize_model(float_model(args), api.recipe_spec(args.recipe))
        size = self.model.arch.img_size  # type: ignore[union-attr]
        self.images = torch.randn(args.images, 3, size, size, device=self.device)  # type: ignore[arg-type]

    def seconds(self, work: Callable[[], Any]) -> float:
        """How long ``work`` takes, the device's queue included."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def collecting(self) -> tuple[dict[str, Any], Calibration]:
        """Times of one image: plain, in a batch, and collected, taken in turns."""
        collected: list[float] = []
        plain: list[float] = []
        batched: list[float] = []
        batch = self.images[: self.args.batch]
        for _ in range(2):  # warm up
            self.model(batch)
            self.model(self.images[:1])
        last_end = time.perf_counter()

        def after_image() -> None:
            nonlocal last_end
            self._wait()
            collected.append(time.perf_counter() - last_end)
            image = self.images[len(plain)][None]
            plain.append(self.seconds(lambda: self.model(image)))
            if len(plain) % 4 == 0:
                batched.append(self.seconds(lambda: self.model(batch)) / len(batch))
            last_end = time.perf_counter()

        result = calibrate(self.fake, self.images, method="max", on_image=after_image)
        rest = time.perf_counter() - last_end  # reductions, vectors and weights
        # the first image also pays for making the observers
        times = {"plain": plain[1:], "batched": batched, "collected": collected[1:]}
        medians = {name: statistics.median(values) for name, values in times.items()}
        return {
            "images": len(self.images),
            "batch": len(batch),
            "ms_per_image": {name: 1e3 * value for name, value in medians.items()},
            "ms_per_image_all": {n: [1e3 * v for v in values] for n, values in times.items()},
            "ratio_to_plain": medians["collected"] / medians["plain"],
            "ratio_to_batched": medians["collected"] / medians["batched"],
            "vectors_weights_bias_s": rest,
        }, result

    def searching(self, result: Calibration) -> dict[str, Any]:
        """Times of each search over all histograms at once."""
        counts = torch.stack(list(result.histograms.values())).to(self.device)
        last = counts.shape[1] - 1 - (counts > 0).flip(1).int().argmax(1)
        peaks = ((last + 1).int() << 15).view(torch.float32)  # the edge above the last filled bin
        times: dict[str, list[float]] = {method: [] for method in SEARCHES}
        for _ in range(self.args.repeats):
            for method in SEARCHES:
                search = self.seconds(lambda m=method: find_amax(m, counts, peaks))  # type: ignore[misc]
                times[method].append(search)
        return {
            "quantizers": len(counts),
            "seconds": {method: statistics.median(values) for method, values in times.items()},
            "seconds_all": times,
        }

    @torch.no_grad()
    def modelopt(self, quantizers: list[str], count: int) -> dict[str, Any] | None:
        """Entropy by ModelOpt's HistogramCalibrator on evenly spaced quantizers' tensors."""
        try:
            calib = importlib.import_module("modelopt.torch.quantization.calib")
        except ImportError:
            return None
        chosen = quantizers[:: max(1, len(quantizers) // count)][:count] if count else quantizers
        peers = {name: calib.HistogramCalibrator(8, None, False) for name in chosen}
        collecting = dict.fromkeys(chosen, 0.0)

        def watch(name: str) -> Callable[[Tensor], None]:
            def observe(x: Tensor) -> None:
                collecting[name] += self.seconds(lambda: peers[name].collect(x))

            return observe

        for name in chosen:
            named_quantizers(self.fake)[name].observer = watch(name)
        with float_layers(self.fake):
            for image in self.images[: self.args.batch]:
                self.fake(image[None])
        times = {}
        with console.progress(chosen, "ModelOpt's entropy") as steps:
            for name in steps:
                named_quantizers(self.fake)[name].observer = None
                times[name] = self.seconds(lambda n=name: peers[n].compute_amax("entropy"))  # type: ignore[misc]
        return {
            "version": metadata.version("nvidia-modelopt"),
            "quantizers_run": len(chosen),
            "quantizers": len(quantizers),
            "entropy_seconds_run": sum(times.values()),
            "entropy_seconds_all_extrapolated": sum(times.values()) / len(chosen) * len(quantizers),
            "entropy_seconds_by_quantizer": times,
        }


def rows(results: dict[str, Any]) -> list[list[str]]:
    """What a reader wants to know, one line each."""
    collecting, searching = results["collecting"], results["searching"]
    ms, seconds = collecting["ms_per_image"], searching["seconds"]
    number = searching["quantizers"]
    lines = [
        ["float forward, image by image", f"{ms['plain']:.1f} ms an image", ""],
        [f"float forward, batch {collecting['batch']}", f"{ms['batched']:.1f} ms an image", ""],
        [
            "collecting histograms",
            f"{ms['collected']:.1f} ms an image",
            f"{collecting['ratio_to_plain']:.2f} x plain (wanted <= {LARGEST_RATIO}), "
            f"{collecting['ratio_to_batched']:.2f} x batched",
        ],
        ["vectors, weights, bias", f"{collecting['vectors_weights_bias_s']:.2f} s", "once"],
    ]
    for method in SEARCHES:
        wanted = f" (wanted <= {LONGEST_ENTROPY_S:.0f} s)" if method == "entropy" else ""
        lines.append(
            [f"{method} search", f"{seconds[method]:.2f} s", f"{number} quantizers{wanted}"]
        )
    peer = results.get("modelopt")
    if peer:
        total, ran = peer["entropy_seconds_all_extrapolated"], peer["quantizers_run"]
        said = "all run" if ran == number else f"extrapolated from {ran}"
        lines.append(
            [
                f"entropy by ModelOpt {peer['version']}",
                f"{total:.1f} s",
                f"{number} quantizers, {said}: {total / seconds['entropy']:.0f} x ours",
            ]
        )
    return lines


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--checkpoint", help="weights to use instead of random ones")
    parser.add_argument("--recipe", default="int8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=25)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5, help="of each search")
    parser.add_argument(
        "--modelopt-quantizers", type=int, default=12, metavar="N", help="0 runs all of them"
    )
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="raw results go here")
    return parser.parse_args()


def main() -> int:
    """Run, print a table, save what was measured."""
    args = parsed()
    load = os.getloadavg()  # of the last 1, 5 and 15 minutes: who else was at work
    bench = Bench(args)
    collecting, result = bench.collecting()
    results: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "device": device_name(args.device),
            "cpu": device_name("cpu"),
            "threads": torch.get_num_threads(),
            "load_average_before": load,
            "platform": platform.platform(),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": args.checkpoint or args.model,
        "collecting": collecting,
        "searching": bench.searching(result),
    }
    peer = bench.modelopt(list(result.histograms), args.modelopt_quantizers)
    if peer:
        results["modelopt"] = peer
    else:
        console.say("nvidia-modelopt cannot be imported here: it is left out")
    console.table(rows(results), ["what", "time", ""])
    if args.json:
        args.json.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(args.device).lower()).strip("-")
        path = args.json / f"calibration-{slug}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
