"""TensorBoard finds histograms, ranges and scores under the names that are documented."""

from pathlib import Path

import pytest

from swinq.errors import DataError
from swinq.report.tensorboard import write_tensorboard
from tests.report.sample import made_up_report


def test_histograms_ranges_and_scores_can_be_read_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = made_up_report((1, 1))
    write_tensorboard(report, tmp_path, step=3)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    row = next(row for row in report.quantizers if row.histogram)
    assert row.histogram is not None
    (histogram,) = events.Histograms(f"calib/{row.name}/hist")
    assert histogram.step == 3
    assert histogram.histogram_value.num == sum(row.histogram.counts) + row.histogram.below
    assert sum(histogram.histogram_value.bucket) == histogram.histogram_value.num
    (amax,) = events.Scalars(f"calib/{row.name}/amax")
    assert amax.value == pytest.approx(row.amax.maximum)
    (top1,) = events.Scalars("score/INT8 mode 1/top1")
    assert top1.value == pytest.approx(report.models[2].top1)
    assert events.Scalars(f"sqnr/{report.layer_errors[0].layer}/minimum")
    assert events.Scalars("latency/Float/batch 32")


def test_events_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    report = made_up_report((1,))
    write_tensorboard(report, folder)
    (earlier,) = folder.iterdir()
    write_tensorboard(report, folder)
    (later,) = folder.iterdir()
    assert later.name != earlier.name
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/logs"):
        write_tensorboard(made_up_report((1,)), tmp_path / "file" / "logs")
