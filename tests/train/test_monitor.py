"""The monitor: what a line says, curves that a resumed job continues, a disk that takes nothing."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from swinq.models.architecture import Architecture
from swinq.quant.insert import quantize_model, used_quantizers
from swinq.quant.spec import QuantSpec
from swinq.train import monitor as module
from swinq.train.monitor import Monitor
from tests.quant.tiny import tiny_swin


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the monitor reads: set its only element."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def job(folder: Path | None, print_every: int = 5) -> Monitor:
    return Monitor(
        folder,
        total_steps=40,
        steps_per_epoch=10,
        images_per_step=32,
        print_every=print_every,
        world=2,
    )


def run(shown: Monitor, first: int, last: int, loss: float = 2.0) -> None:
    for step in range(first, last):
        shown.step(step, loss, 1e-4, 0.5, {"labels": loss / 2, "logits": loss / 2})


def scalars(folder: Path, tag: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_line_has_loss_rate_norm_speed_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = job(None)
    for step in range(15):
        clock[0] += 0.5
        shown.step(step, float(step), 1.25e-5, 3.14159, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # the first step is a sign of life, then every fifth
    assert lines[0] == "epoch 1/4  step 1/40  loss 0.0000  rate 1.25e-05  gradient 3.14"
    assert lines[1].startswith("epoch 1/4  step 5/40  loss 2.5000  ")  # the mean of steps 2 to 5
    assert lines[3].startswith("epoch 2/4  step 15/40  loss 12.0000  rate 1.25e-05  gradient 3.14")
    assert "64 images/s on 2 ranks" in lines[3]
    assert lines[3].endswith("12 s left")  # 25 steps of half a second


def test_evaluations_cost_no_speed_and_count_in_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = job(None, print_every=10)
    shown.evaluated(0, 78.8)
    assert "before training: top-1 78.80 %" in capsys.readouterr().out
    for step in range(20):
        clock[0] += 1.0
        shown.step(step, 1.0, 1e-4, 1.0, {})
        if step == 9:
            clock[0] += 60.0
            shown.evaluated(10, 81.234)
    lines = capsys.readouterr().out.splitlines()
    assert "epoch 1, step 10: top-1 81.23 %" in lines[-2]
    assert "32 images/s" in lines[-1]
    assert lines[-1].endswith("2 min 20 s left")  # 20 steps of a second, 2 evaluations of a minute


def test_a_loss_that_is_not_finite_does_not_hide_the_others(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = job(None)
    for step, loss in enumerate((1.0, math.nan, 3.0, math.inf, 5.0)):
        shown.step(step, loss, 1e-4, 1.0, {})
    assert "loss 4.0000" in capsys.readouterr().out.splitlines()[-1]


def test_a_resumed_job_continues_its_curves(tmp_path: Path) -> None:
    killed = job(tmp_path)
    run(killed, 0, 15)  # no close: what a kill leaves, five steps behind its last checkpoint
    with job(tmp_path) as resumed:
        run(resumed, 10, 40, loss=1.0)
        resumed.evaluated(40, 80.0)
    found = scalars(tmp_path, "train/loss")
    assert found == {step: 2.0 if step <= 10 else 1.0 for step in range(1, 41)}
    assert scalars(tmp_path, "train/loss/logits")[40] == 0.5
    assert scalars(tmp_path, "train/rate")[1] == pytest.approx(1e-4)
    assert scalars(tmp_path, "train/gradient_norm")[1] == 0.5
    assert scalars(tmp_path, "validation/top1") == {40: 80.0}
    assert set(scalars(tmp_path, "train/images_per_second")) <= set(range(5, 41, 5))
    killed.close()


def test_a_resumed_job_that_begins_with_an_evaluation_keeps_its_curves(tmp_path: Path) -> None:
    with job(tmp_path) as killed:
        run(killed, 0, 10)
    with job(tmp_path) as resumed:
        resumed.evaluated(10, 80.0)
        run(resumed, 10, 20, loss=1.0)
    found = scalars(tmp_path, "train/loss")
    assert found == {step: 2.0 if step <= 10 else 1.0 for step in range(1, 21)}
    assert scalars(tmp_path, "validation/top1") == {10: 80.0}


def test_ranges_are_summed_up_by_kind(tmp_path: Path) -> None:
    model = made_model()
    quantizers = used_quantizers(model)
    for name, quantizer in quantizers.items():
        shape = quantizer.amax.shape
        wide = 8.0 if name.endswith("output_quantizer") else 2.0
        quantizer.load_calib_amax(torch.full(shape, wide))
    weights = [m.weight for m in model.modules() if hasattr(m, "weight_quantizer")]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
            weight.view(-1)[: weight.numel() // 4] = 3.0  # a quarter lies beyond 2
    with job(tmp_path) as shown:
        run(shown, 0, 10)
        shown.ranges(model)
    assert scalars(tmp_path, "ranges/output/median") == {10: 8.0}
    assert scalars(tmp_path, "ranges/attention/maximum") == {10: 2.0}
    assert scalars(tmp_path, "ranges/weight/clipped")[10] == pytest.approx(0.25)


def test_a_dead_channel_does_not_stop_the_curves(tmp_path: Path) -> None:
    model = made_model()
    for quantizer in used_quantizers(model).values():
        quantizer.load_calib_amax(torch.zeros(quantizer.amax.shape))
    with job(tmp_path) as shown:
        run(shown, 0, 1)
        shown.ranges(model)
    assert scalars(tmp_path, "ranges/weight/clipped") == {1: 1.0}  # all values lie beyond 0


def test_a_disk_that_takes_nothing_is_said_once_and_stops_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with job(tmp_path / "file") as shown:
        run(shown, 0, 10)
    out = capsys.readouterr().out
    assert out.count("no curves are written from step 1 on") == 1
    assert "step 10/40" in out

    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with job(tmp_path) as shown:
        run(shown, 0, 2)
        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        run(shown, 2, 10)
        shown.evaluated(10, 50.0)
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_other_ranks_are_silent_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with job(tmp_path) as shown:
        run(shown, 0, 10)
        shown.ranges(nn.Linear(1, 1))
        shown.evaluated(10, 50.0)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def made_model() -> nn.Module:
    """A quantized Swin of one block in each of two stages, without ranges."""
    architecture = Architecture(
        version=1,
        img_size=16,
        patch_size=2,
        in_chans=3,
        num_classes=3,
        embed_dim=32,
        depths=(1, 1),
        num_heads=(1, 2),
        window_size=4,
        mlp_ratio=2.0,
        qkv_bias=True,
        pretrained_window_sizes=(0, 0),
        norm_eps=1e-5,
    )
    return quantize_model(tiny_swin(architecture), QuantSpec())
