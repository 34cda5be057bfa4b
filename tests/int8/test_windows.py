"""Index tables for windows, shifts and masks, against the float model and plain loops."""

import pytest
import torch

from swinq.int8.windows import PIECE_ELEMENTS, Cut, Windows, cut, relative_index, shift_mask
from swinq.models import layers

CPU = torch.device("cpu")
MAPS = [(8, 4, 0), (8, 4, 2), (14, 7, 3), (12, 3, 1), (7, 7, 0), (24, 24, 0), (16, 8, 4)]


def table(window: int, heads: int = 2) -> torch.Tensor:
    return torch.randn((2 * window - 1) ** 2, heads)


@pytest.mark.parametrize(("resolution", "window", "shift"), MAPS)
def test_gather_rolls_and_partitions(resolution: int, window: int, shift: int) -> None:
    x = torch.randn(3, resolution**2, 5).half()
    rolled = x.view(3, resolution, resolution, 5).roll((-shift, -shift), (1, 2))
    windows = Windows(resolution, window, shift, table(window))
    assert torch.equal(windows.gather(x), layers.window_partition(rolled, window))


@pytest.mark.parametrize(("resolution", "window", "shift"), MAPS)
def test_scatter_undoes_gather(resolution: int, window: int, shift: int) -> None:
    x = torch.randn(3, resolution**2, 5)
    windows = Windows(resolution, window, shift, table(window))
    assert torch.equal(windows.scatter(windows.gather(x)), x)


@pytest.mark.parametrize(("resolution", "window", "shift"), [m for m in MAPS if m[2]])
def test_mask_is_the_float_models(resolution: int, window: int, shift: int) -> None:
    mask = shift_mask(resolution, window, shift)
    assert torch.equal(mask, layers.shifted_window_mask(resolution, window, shift))
    assert set(mask.unique().tolist()) == {-100.0, 0.0}


def test_mask_separates_what_only_the_roll_joined() -> None:
    resolution, window, shift = 8, 4, 2
    mask = shift_mask(resolution, window, shift)
    ids = torch.arange(resolution**2).view(1, resolution, resolution, 1)
    own = layers.window_partition(ids.roll((-shift, -shift), (1, 2)), window).squeeze(-1)
    for tokens, window_mask in zip(own, mask, strict=True):
        y, x = tokens // resolution, tokens % resolution
        near = ((y[:, None] - y).abs() < window) & ((x[:, None] - x).abs() < window)
        assert torch.equal(window_mask == 0, near)


@pytest.mark.parametrize("window", [1, 2, 7, 24])
def test_relative_index_is_the_float_models(window: int) -> None:
    assert torch.equal(relative_index(window), layers.relative_position_index(window))


@pytest.mark.parametrize(("resolution", "window", "shift"), MAPS)
def test_bias_of_any_run_of_windows(resolution: int, window: int, shift: int) -> None:
    compact = table(window)
    windows = Windows(resolution, window, shift, compact)
    bias = compact[layers.relative_position_index(window)].permute(2, 0, 1)
    count = windows.count
    for start, stop in ((0, 1), (0, count), (count - 1, count), (0, 3 * count)):
        found = windows.bias(start, stop)
        if not shift:
            assert torch.equal(found, bias[None])
            continue
        mask = layers.shifted_window_mask(resolution, window, shift)
        expected = bias + mask[torch.arange(start, stop) % count][:, None]
        assert torch.equal(found, expected)


def test_unit_of_work_does_not_depend_on_the_batch_and_divides_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 1 << 17)
    assert cut(64, 1 << 14, CPU) == Cut(unit=8, step=8)
    assert cut(49, 1 << 15, CPU) == Cut(unit=1, step=1)
    assert cut(4, 1 << 10, CPU) == Cut(unit=4, step=128)
    assert cut(1, 1 << 30, CPU) == Cut(unit=1, step=1)
    for parts in (1, 9, 16, 49, 64, 3136):
        for elements in (1, 1000, 10**5, 10**7):
            found = cut(parts, elements, CPU)
            assert parts % found.unit == 0
            assert found.step == found.unit or (found.unit == parts and found.step % parts == 0)
