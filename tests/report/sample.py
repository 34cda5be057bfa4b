"""A made-up but plausible report of a Swin with any depth, for tests of its written forms."""

from __future__ import annotations

import math
import random

import torch

from swinq.evaluate import Comparison, Scores
from swinq.report.accuracy import latency_row, model_row
from swinq.report.quantizers import quantizer_row
from swinq.report.schema import (
    Configuration,
    DataSummary,
    Environment,
    InputFile,
    LayerErrorRow,
    QuantizerRow,
    Report,
    Run,
    Sensitivity,
    SensitivityRow,
    TrainingPoint,
    TrainingSummary,
    ValidationPoint,
)
from swinq.report.sensitivity import Suggestion, recipe_without

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
RECIPE = "QUANT:\n  METHOD: percentile\n  PERCENTILE: 99.99\n"


def made_up_report(depths: tuple[int, ...] = (2, 2, 6, 2), dim: int = 96) -> Report:
    """A whole report with every section; the same for the same depths."""
    dice = random.Random(0)
    layers = layer_names(depths)
    errors = [layer_error(name, i / len(layers), dim, dice) for i, name in enumerate(layers)]
    rows = [
        SensitivityRow(name, kl := 4e-4 * dice.lognormvariate(0, 1.1), 0.021 - 0.6 * kl)
        for name in layers
    ]
    bad = max(range(len(rows)), key=lambda i: rows[i].only_this_quantized)
    rows[bad] = SensitivityRow(rows[bad].layer, 0.0123, 0.0082)
    suggestion = Suggestion(
        [rows[bad].layer],
        0.021,
        0.0082,
        worth_it=True,
        reason=f"1 of {len(rows)} layers left in fp16 give 61 % of the KL back",
        recipe=recipe_without(RECIPE, [rows[bad].layer]),
    )
    return Report(
        model="swin_tiny_patch4_window7_224",
        run=Run(
            command="torchrun swinq/main.py --calib --cfg swin_tiny_patch4_window7_224.yaml "
            "--resume swin_tiny.pth --data-path imagenette160 --int8-mode 1",
            date="2026-11-23T15:04:05+01:00",
            swinq_version="0.1.0",
            environment=Environment(
                device="NVIDIA H100 80GB HBM3",
                device_type="cuda",
                cpu="AMD EPYC 9554 64-Core Processor",
                threads=16,
                ranks=1,
                platform="Linux-6.1.0-x86_64-with-glibc2.36",
                python="3.11.9",
                torch="2.14.1",
                packages={"torchvision": "0.29.1", "timm": "1.0.20", "numpy": "2.4.6"},
            ),
        ),
        configuration=Configuration(RECIPE, {"QUANT.METHOD": "--calibrator", "TAG": "--opts"}),
        models=[
            model_row("Float", "float", Scores(3925, 3278, 3861), size_bytes=110_234_112),
            model_row(
                "Fake-quant mode 1",
                "fake-quant",
                Scores(3925, 3275, 3860),
                Comparison(3925, 3259, 19, 16, 631, 3868, 0.0021),
                int8_mode=1,
            ),
            model_row(
                "INT8 mode 1",
                "int8",
                Scores(3925, 3277, 3861),
                Comparison(3925, 3260, 18, 17, 630, 3866, 0.0022),
                int8_mode=1,
                size_bytes=28_540_032,
                engine="libswinq 0.1.0",
            ),
            model_row(
                "INT8 mode 2",
                "int8",
                Scores(3925, 3281, 3860),
                Comparison(3925, 3262, 16, 19, 628, 3870, 0.0019),
                int8_mode=2,
                size_bytes=28_520_032,
            ),
        ],
        files=[
            InputFile("checkpoint", "checkpoints/swin_tiny.pth", "ab" * 32, 55_120_384),
            InputFile(
                "exported mode 1", "output/swin_tiny_int8.safetensors", "cd" * 32, 28_540_032
            ),
        ],
        data=[
            DataSummary("calibration", "imagenette160/train", 512, 10, "resize 256", "ef" * 32),
            DataSummary(
                "evaluation",
                "imagenette160/val",
                3925,
                10,
                "resize 256 bicubic, crop 224",
                class_names=["tench", "English springer", "cassette player", "chain saw"],
            ),
        ],
        quantizers=quantizers(depths, dim),
        layer_errors=errors,
        layer_error_images=32,
        sensitivity=Sensitivity(256, 0.021, rows, suggestion),
        latency=[
            latency_row("Float", "float", 1, 4.1),
            latency_row(
                "INT8 mode 1", "int8", 1, 1.3, int8_mode=1, engine="libswinq 0.1.0, CUDA graph"
            ),
            latency_row("Float", "float", 32, 14.2),
            latency_row("INT8 mode 1", "int8", 32, 4.9, int8_mode=1),
        ],
        notes=["Mode 2 was evaluated with the same ranges as mode 1."],
    )


def trained_report(depths: tuple[int, ...] = (1, 1)) -> Report:
    """A report of a training run: in mode 1 alone, with a row before and one after training."""
    report = made_up_report(depths)
    comparison = Comparison(3925, 3266, 12, 18, 629, 3872, 0.0016)
    trained = model_row(
        "QAT fake-quant mode 1", "fake-quant", Scores(3925, 3284, 3862), comparison, int8_mode=1
    )
    report.models = [*report.models[:2], trained, report.models[2]]
    steps = range(1, 121)
    report.training = TrainingSummary(
        source="imagenette160/train",
        images=9469,
        epochs=3,
        steps=120,
        images_per_step=236,
        seconds=412.0,
        images_per_second=1480.0,
        precision="bf16",
        rate=4.6e-6,
        range_rate=1e-3,
        learned_ranges=["output", "weight"],
        teacher="the float model",
        best_step=120,
        curve=[TrainingPoint(s, 1 + math.exp(-s / 40), 4.6e-6 * (1 - s / 125)) for s in steps],
        validations=[ValidationPoint(s, t) for s, t in ((40, 83.45), (80, 83.5), (120, 83.67))],
    )
    return report


def layer_names(depths: tuple[int, ...]) -> list[str]:
    """Names of all quantized layers, attentions included, in the order of the forward pass."""
    names = []
    for stage, depth in enumerate(depths):
        for block in range(depth):
            names += [f"layers.{stage}.blocks.{block}.{part}" for part in ("attn", *LINEARS)]
        if stage + 1 < len(depths):
            names.append(f"layers.{stage}.downsample.reduction")
    return names


def quantizers(depths: tuple[int, ...], dim: int) -> list[QuantizerRow]:
    """A row for each quantizer: histograms of inputs and q, k, v, vectors for outputs, weights."""
    chance = torch.Generator().manual_seed(0)
    rows = []
    for layer in layer_names(depths):
        stage = int(layer.split(".")[1])
        if layer.endswith(".attn"):
            rows += [histogram_row(f"{layer}.{part}_quantizer", chance) for part in "qkv"]
            continue
        rows.append(histogram_row(f"{layer}.input_quantizer", chance))
        for part, level in (("weight", 0.2), ("output", 4.0)):
            if part == "weight" or layer.endswith(("proj", "fc2", "reduction")):
                amax = level * torch.randn(dim * 2**stage, generator=chance).mul(0.7).exp()
                rows.append(quantizer_row(f"{layer}.{part}_quantizer", amax, "max"))
    return rows


def histogram_row(name: str, chance: torch.Generator) -> QuantizerRow:
    """A Gaussian of some width, with a few outliers, under the 99.99th percentile."""
    width = math.exp(torch.randn((), generator=chance).item())
    x = torch.randn(20_000, generator=chance).mul(width).abs()
    x[:20] *= 6
    edges = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-20, 8.01, 0.125)])
    counts = torch.histogram(x, edges).hist.long()
    return quantizer_row(name, x.quantile(0.9995), "percentile 99.95", counts=counts, edges=edges)


def layer_error(name: str, depth: float, dim: int, dice: random.Random) -> LayerErrorRow:
    """SQNR that falls along the depth."""
    median = 42 - 12 * depth + dice.gauss(0, 1.5)
    low = median - 6 - abs(dice.gauss(0, 4))
    return LayerErrorRow(
        name, median + 3, low - 2, low, median, dim, int(low < 18), median + 6, low + 4
    )
