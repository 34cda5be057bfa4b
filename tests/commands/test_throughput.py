"""--throughput: a line for each form of a checkpoint, or for random weights of a configuration."""

from pathlib import Path

import pytest

from tests.commands.command_line import Ran, done, refused
from tests.commands.conftest import Demo


def check(ran: Ran, *models: str) -> None:
    for model in models:
        batch, median, low, _, high, rate = ran.row(model)
        assert batch == "2"
        assert 0 < float(low) <= float(median) <= float(high)
        assert float(rate) == pytest.approx(2e3 / float(median), rel=0.05)


@pytest.mark.parametrize(
    ("kind", "models"),
    [("calib", ["fake-quant mode 1", "fake-quant mode 2"]), ("int8_mode1", ["INT8 mode 1"])],
)
def test_forms_of_a_checkpoint_are_measured(
    kind: str, models: list[str], demo: Demo, tmp_path: Path
) -> None:
    argv = ("--throughput", "--resume", demo.checkpoint(kind), "--batch-size", "2")
    check(done(*argv, "--output", tmp_path), *models)


def test_configuration_alone_is_measured_with_random_weights(demo: Demo, tmp_path: Path) -> None:
    ran = done(
        *("--throughput", "--cfg", demo.folder / "config.yaml", "--batch-size", "2"),
        *("--output", tmp_path, "--opts", "DEMO", "false"),
    )
    check(ran, "float, random weights")


def test_mode_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    message = refused(
        *("--throughput", "--cfg", "swin_tiny_patch4_window7_224", "--int8-mode", "1"),
        *("--output", tmp_path),
    )
    assert "--int8-mode 1 is given" in message and "--resume" in message


def test_other_mode_than_the_files_is_refused(demo: Demo, tmp_path: Path) -> None:
    message = refused(
        *("--throughput", "--resume", demo.checkpoint("int8_mode2"), "--int8-mode", "1"),
        *("--output", tmp_path),
    )
    assert "--int8-mode 1 is given" in message and "mode 2" in message
