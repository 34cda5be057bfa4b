"""Verdicts say what the figures say, also when it is bad news or no news."""

import pytest

from swinq.evaluate import Comparison, Scores
from swinq.report.accuracy import latency_row, model_row
from swinq.report.schema import ModelRow, QuantizerRow, Range, ValidationPoint, Verdict
from swinq.report.verdict import (
    accuracy_verdict,
    headline,
    judge,
    range_verdicts,
    resolution_verdicts,
    speed_verdicts,
)
from tests.report.sample import made_up_report, trained_report


def int8(images: int, lost: int, won: int) -> ModelRow:
    right = images // 2
    comparison = Comparison(images, right, lost, won, images - right - lost - won, images, 0.01)
    return model_row("INT8", "int8", Scores(images, right + won, images), comparison)


@pytest.mark.parametrize(
    ("images", "lost", "won", "level", "words"),
    [
        (50_000, 200, 210, "good", "gains 0.02 points of top-1 on 50,000 images (200 lost, 210"),
        (50_000, 260, 200, "note", "loses 0.12 points"),
        (50_000, 900, 400, "bad", "more than chance (McNemar p < 0.001)"),
        (50_000, 400, 900, "good", "gains 1.00 points"),
        (500, 12, 5, "warning", "no more than chance (McNemar p = 0.143)"),
        (500, 3, 3, "note", "loses 0.00 points"),
    ],
)
def test_accuracy_verdicts(images: int, lost: int, won: int, level: str, words: str) -> None:
    verdict = accuracy_verdict(int8(images, lost, won))
    assert verdict.level == level
    assert words in verdict.text


def test_too_few_images_are_called_too_few() -> None:
    (verdict,) = resolution_verdicts([int8(500, 3, 3), int8(500, 3, 2)])
    assert "500 images cannot show differences under 1.0" in verdict.text
    assert "0.1 would take about 54,000" in verdict.text


def test_enough_images_are_called_enough() -> None:
    (verdict,) = resolution_verdicts([int8(50_000, 210, 200)])
    assert verdict.text == "50,000 images can show differences down to 0.08 points."


def test_images_without_a_flip_still_show_only_so_much() -> None:
    (verdict,) = resolution_verdicts([int8(300, 0, 0)])
    assert "300 images cannot show differences under 0.65 points" in verdict.text


def speed(*rows: tuple[str, int, float]) -> Verdict:
    (verdict,) = speed_verdicts(
        [latency_row(kind, kind, batch, ms) for kind, batch, ms in rows]  # type: ignore[arg-type]
    )
    return verdict


def test_slower_int8_is_said_plainly() -> None:
    verdict = speed(("float", 1, 10.0), ("int8", 1, 25.0))
    assert verdict.level == "warning"
    assert verdict.text == (
        "int8 is slower than float here: 2.50 times the time (batch 1: 25.0 against 10.0 ms)."
    )


def test_mixed_speed_is_not_sold_as_gain() -> None:
    verdict = speed(("float", 1, 1.0), ("float", 32, 9.0), ("int8", 1, 2.0), ("int8", 32, 3.0))
    assert verdict.level == "warning"
    assert "slower" in verdict.text and "3.00 times as fast" in verdict.text
    level = speed(("float", 1, 1.0), ("float", 32, 9.0), ("int8", 1, 1.0), ("int8", 32, 3.0)).level
    assert level == "note"


def test_equal_speed_is_no_gain() -> None:
    assert "no faster" in speed(("float", 1, 10.0), ("int8", 1, 9.9)).text


def test_gain_is_against_the_fastest_float_of_the_same_batch() -> None:
    verdict = speed(("float", 8, 30.0), ("float", 8, 12.0), ("float", 1, 90.0), ("int8", 8, 4.0))
    assert verdict.text == "int8 is 3.00 times as fast as float (batch 8: 4.00 against 12.0 ms)."


def test_speeds_of_different_devices_are_not_compared() -> None:
    rows = [
        latency_row("float", "float", 1, 1.0, device="GPU"),
        latency_row("int8", "int8", 1, 50.0, device="CPU"),
    ]
    assert speed_verdicts(rows) == []


def test_dead_channels_and_clipping_are_warned_of() -> None:
    rows = [
        QuantizerRow("a", Range(4, 0.0, 1.0, 2.0), "max", dead_channels=2),
        QuantizerRow("b", Range(1, 1.0, 1.0, 1.0), "mse", clipped_share=0.034),
        QuantizerRow("c", Range(1, 1.0, 1.0, 1.0), "mse", clipped_share=0.0001),
    ]
    dead, clipped = range_verdicts(rows)
    assert dead.text == "2 channels never saw a value other than 0: a."
    assert "1 quantizer with more than 1 %" in clipped.text and "3.4 %: b" in clipped.text


def test_a_dead_output_channel_is_told_with_the_total_that_hides_it() -> None:
    report = made_up_report()
    for row in report.layer_errors:
        row.dead_channels = 0
    report.layer_errors[4].dead_channels, report.layer_errors[4].total = 3, 38.04
    texts = [verdict.text for verdict in judge(report) if verdict.level == "warning"]
    assert texts == [
        "Noise drowns 3 output channels in 1 layer, most in layers.0.blocks.0.mlp.fc2: 3 of 96, "
        "though its total is 38.0 dB."
    ]


def test_a_layer_whose_usual_channel_is_noise_is_named() -> None:
    report = made_up_report()
    for row in report.layer_errors:
        row.dead_channels = 0
    report.layer_errors[2].median = 7.25
    texts = [verdict.text for verdict in judge(report) if verdict.level == "warning"]
    name = report.layer_errors[2].layer
    assert texts == [f"1 layer with a median channel under 10 dB, the worst {name} with 7.2 dB."]


@pytest.mark.parametrize("best", [0, 40])
def test_what_training_changed_is_not_blamed_on_rounding(best: int) -> None:
    report = trained_report()
    assert report.training is not None
    report.training.best_step = best  # 0: what was calibrated is exported
    for row in report.layer_errors:
        row.dead_channels = 0
    report.layer_errors[2].dead_channels, report.layer_errors[2].median = 3, 7.25
    drowned, worst, *_ = (row for row in judge(report) if row.subject == "layers")
    assert drowned.text.startswith("What rounding and training changed" if best else "Noise drowns")
    assert ("training changed" in worst.text) == bool(best)
    assert drowned.level == worst.level == ("note" if best else "warning")


def test_a_comparison_of_no_images_is_no_good_news() -> None:
    row = int8(500, 3, 3)
    assert row.comparison is not None
    row.comparison.images = 0
    assert accuracy_verdict(row).level == "warning"
    row.comparison = None
    with pytest.raises(ValueError, match="compared with nothing"):
        accuracy_verdict(row)


def test_the_headline_is_of_the_first_int8_model() -> None:
    report = made_up_report()
    assert headline(report) == "INT8 mode 1 loses 0.03 points (95 % interval −0.32 … +0.27)"
    report.models = [row for row in report.models if row.kind != "int8"]
    assert headline(report).startswith("Fake-quant mode 1 loses 0.08 points")
    report.models = report.models[:1]
    assert headline(report).endswith("nothing was compared with the float model")


@pytest.mark.parametrize(
    ("top1", "best", "level", "words"),
    [
        ((83.40, 83.50, 83.67), 120, "note", "still rising: more epochs may give more"),
        ((83.60, 83.66, 83.67), 120, "note", "which flatters it a little."),
        ((83.67, 83.10, 82.90), 40, "warning", "fell by 0.77 points after it: a lower rate"),
    ],
)
def test_the_choice_of_the_best_step_is_said_to_flatter(
    top1: tuple[float, ...], best: int, level: str, words: str
) -> None:
    report = trained_report()
    assert report.training is not None
    points = zip((40, 80, 120), top1, strict=True)
    report.training.validations = [ValidationPoint(step, value) for step, value in points]
    report.training.best_step = best
    *_, choice = (verdict for verdict in judge(report) if verdict.subject == "training")
    assert choice.level == level and words in choice.text
    assert "The best of 3 validations" in choice.text


def test_what_training_gave_is_held_against_calibration() -> None:
    report = trained_report()
    before, after = report.models[1:3]
    gave = next(verdict for verdict in judge(report) if verdict.subject == "training")
    assert gave.level == "good"
    assert gave.text.startswith("Training gave +0.23 points of top-1 over calibration, from 83.44")
    after.top1 = before.top1 - 1
    gave = next(verdict for verdict in judge(report) if verdict.subject == "training")
    assert gave.level == "warning" and "gained nothing over calibration alone" in gave.text


def test_the_headline_of_training_without_export_is_the_trained_model() -> None:
    report = trained_report()
    report.models = report.models[:3]
    assert headline(report).startswith("QAT fake-quant mode 1 gains 0.15 points")
