"""Integer products are exact: on every path, at the extremes, for any size."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from swinq.int8 import matmul
from swinq.int8.matmul import (
    SLICE_S8,
    SLICE_U8,
    IntegerMatrix,
    float_product,
    int_mm_is_usable,
    sliced_product,
)

SIZES = [
    (1, 1, 1),
    (17, 1, 33),
    (0, 32, 8),
    (5, 3, 7),
    (17, 33, 1),
    (49, 96, 288),
    (3, 1025, 9),
    (2, 6144, 5),
]


def codes(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape)


@pytest.fixture(params=["int_mm", "fp32 slices"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply; the first is skipped where this CPU cannot."""
    if request.param == "int_mm" and not int_mm_is_usable():
        pytest.skip("torch._int_mm is not exact, or a plain loop, on this CPU")
    if request.param != "int_mm":
        monkeypatch.setattr(matmul, "int_mm_is_usable", lambda: False)
    return str(request.param)


@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_product_is_that_of_the_integers(path: str, m: int, k: int, n: int) -> None:
    a, w = codes(m, k), codes(n, k, low=-127)
    matrix = IntegerMatrix(w.to(torch.int8))
    for rows in (a, a.flip(0)):
        found = matrix.product(rows.to(torch.int8))
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), rows @ w.t())


@pytest.mark.parametrize("a", [-128, 127])
@pytest.mark.parametrize("w", [-128, -127, 127])
def test_extreme_codes_do_not_saturate(path: str, a: int, w: int) -> None:
    k = 6144  # fc2 of Swin-L's last stage
    left = torch.full((40, k), a, dtype=torch.int8)
    right = torch.full((24, k), w, dtype=torch.int8)
    assert (IntegerMatrix(right).product(left) == a * w * k).all()


def test_rows_of_a_strided_view_are_multiplied(path: str) -> None:
    a, w = codes(64, 96), codes(33, 96)
    found = IntegerMatrix(w.to(torch.int8)).product(a.to(torch.int8)[::2])
    assert torch.equal(found.long(), a[::2] @ w.t())


def test_cuda_or_cpu_gives_the_same_integers(device: torch.device) -> None:
    a, w = codes(50, 1100), codes(30, 1100, low=-127)
    matrix = IntegerMatrix(w.to(device, torch.int8))
    assert torch.equal(matrix.product(a.to(device, torch.int8)).cpu().long(), a @ w.t())


@pytest.mark.parametrize("k", [32, 511, 512, 513, 576, 1200])
def test_batched_product_of_u8_codes_is_exact(device: torch.device, k: int) -> None:
    p, v = codes(2, 3, 4, k, low=0, high=255), codes(2, 3, k, 32)
    p[0, 0, 0], v[0, 0, :, 0] = 255, -128
    found = sliced_product(p.float().to(device), v.float().to(device), SLICE_U8)
    assert torch.equal(found.cpu().long(), p @ v)


@pytest.mark.parametrize("k", [32, 1024, 1025])
def test_product_as_fp32_rounds_the_exact_sum_once(k: int) -> None:
    q, t = codes(2, 4, k), codes(2, k, 5)
    q[0, 0], t[0, :, 0] = -128, -128
    found = float_product(q.float(), t.float(), SLICE_S8)
    assert found.dtype == torch.float32
    assert torch.equal(found, (q @ t).float())


@pytest.mark.parametrize(("length", "largest"), [(SLICE_S8, 128 * 128), (SLICE_U8, 255 * 128)])
def test_slices_keep_every_partial_sum_in_what_fp32_counts(length: int, largest: int) -> None:
    assert length * largest <= 2**24


def test_lower_precision_of_float_products_does_not_matter() -> None:
    a, w = codes(9, 1024), codes(1024, 9)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = sliced_product(a.float(), w.float(), SLICE_S8)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.long(), a @ w)


@pytest.fixture
def _fresh_test() -> Iterator[None]:
    """Let the self-test run again, before and after."""
    int_mm_is_usable.cache_clear()
    yield
    int_mm_is_usable.cache_clear()


@pytest.mark.usefixtures("_fresh_test")
def test_saturating_int_mm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        """u8 x s8 pairs added in 16 bits, as vpmaddubsw does; then the shift of 128 taken back."""
        shifted = (a.long() + 128)[:, :, None] * b.long()[None]  # (M, K, N)
        pairs = (shifted[:, 0::2] + shifted[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(1) - 128 * b.long().sum(0)).to(torch.int32)

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int_mm_is_usable()


@pytest.mark.usefixtures("_fresh_test")
def test_missing_int_mm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    assert not int_mm_is_usable()


@pytest.mark.usefixtures("_fresh_test")
def test_int_mm_that_is_a_plain_loop_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).to(torch.int32))
    seconds = iter([1.0, 0.1])  # of _int_mm, of fp32
    monkeypatch.setattr(matmul, "_seconds", lambda run: next(seconds))
    assert not int_mm_is_usable()


@pytest.mark.usefixtures("_fresh_test")
def test_exact_and_quick_int_mm_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).to(torch.int32))
    seconds = iter([0.1, 0.1])
    monkeypatch.setattr(matmul, "_seconds", lambda run: next(seconds))
    assert int_mm_is_usable()
