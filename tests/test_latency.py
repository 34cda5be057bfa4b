"""Latency: medians of interleaved runs, in milliseconds, of the size that was asked for."""

import json
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from swinq.errors import ConfigError, SwinqError
from swinq.latency import device_name, measure_latency, measure_together


def sleeper(milliseconds: float) -> Callable[[Tensor], Tensor]:
    def model(images: Tensor) -> Tensor:
        time.sleep(milliseconds / 1e3)
        return images

    return model


def test_milliseconds_and_images_per_second_fit_the_work() -> None:
    found = measure_latency(sleeper(5), 8, 16, "cpu", warmup=1, repeats=5)
    assert 5.0 <= found.p10 <= found.median_ms <= found.p90
    assert found.median_ms < 50
    assert found.images_per_second == pytest.approx(8e3 / found.median_ms)
    assert (found.batch_size, found.img_size, found.repeats) == (8, 16, 5)
    assert found.threads == torch.get_num_threads() and found.device_name
    assert json.loads(json.dumps(found.to_dict()))["median_ms"] == found.median_ms


def test_models_take_turns_and_warm_up_uncounted() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []

    def named(name: str) -> Callable[[Tensor], Tensor]:
        def model(images: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            calls.append((name, tuple(images.shape)))
            return images

        return model

    models = {"float": named("float"), "int8": named("int8")}
    found = measure_together(models, 2, 8, "cpu", warmup=2, repeats=3)
    assert [name for name, _ in calls] == ["float", "int8"] * 5
    assert {shape for _, shape in calls} == {(2, 3, 8, 8)}
    assert list(found) == ["float", "int8"] and found["int8"].repeats == 3


def test_the_slower_model_is_the_slower_model() -> None:
    found = measure_together({"a": sleeper(1), "b": sleeper(6)}, 1, 8, "cpu", 1, 5)
    assert found["a"].median_ms < found["b"].median_ms


def test_one_repeat_is_its_own_median() -> None:
    found = measure_latency(sleeper(0), 1, 8, "cpu", warmup=0, repeats=1)
    assert found.p10 == found.median_ms == found.p90


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"img_size": 0}, {"repeats": 0}, {"warmup": -1}],
)
def test_senseless_settings_are_refused(settings: dict[str, int]) -> None:
    sizes = {"batch_size": 1, "img_size": 8, "warmup": 0, "repeats": 1, **settings}
    with pytest.raises(ConfigError):
        measure_latency(sleeper(0), device="cpu", **sizes)  # type: ignore[arg-type]


def test_too_large_a_batch_says_what_to_try() -> None:
    def model(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(SwinqError, match="--batch-size 4"):
        measure_latency(model, 8, 8, "cpu")


def test_the_device_is_named(device: torch.device) -> None:
    assert device_name(device).strip()


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock() -> None:
    weight = torch.randn(4096, 4096, device="cuda")

    def model(images: Tensor) -> Tensor:
        return weight @ weight @ weight

    found = measure_latency(model, 1, 8, "cuda", warmup=3, repeats=10)
    # launching takes microseconds, the work itself two products of 137 GFLOP
    assert 0.5 < found.median_ms < 100
    assert found.device_name == torch.cuda.get_device_name()
