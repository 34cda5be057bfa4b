"""Which images a step sees: every one once an epoch, the same however the work is divided."""

import pytest

from swinq.data.order import StepOrder
from swinq.errors import ConfigError


def step_keys(order: StepOrder, step: int) -> list[int]:
    return [key for number in range(order.micro_batches) for key in order.keys(step, number)]


def epoch_keys(order: StepOrder, epoch: int) -> list[int]:
    first = epoch * order.steps_per_epoch
    return [
        key
        for step in range(first, first + order.steps_per_epoch)
        for key in step_keys(order, step)
    ]


def test_an_epoch_shows_every_image_once() -> None:
    order = StepOrder(24, 2, 3, seed=1)
    assert order.steps_per_epoch == 4
    for epoch in (0, 1, 5):
        keys = epoch_keys(order, epoch)
        assert sorted(keys) == list(range(epoch * 24, epoch * 24 + 24))


def test_what_is_left_of_an_epoch_is_dropped_and_the_next_begins_anew() -> None:
    order = StepOrder(25, 2, 5, seed=1)
    assert order.steps_per_epoch == 2
    assert len(set(epoch_keys(order, 0))) == 20
    assert {key // 25 for key in step_keys(order, 2)} == {1}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(key % 50 for key in epoch_keys(StepOrder(50, 5, 1, seed), epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


def test_any_division_into_micro_batches_sees_the_same_step() -> None:
    """Two ranks, or twice the accumulation, or twice the batch: the same images, in order."""
    whole, halves = StepOrder(100, 8, 2, seed=3), StepOrder(100, 4, 4, seed=3)
    for step in range(whole.steps_per_epoch + 2):
        assert step_keys(whole, step) == step_keys(halves, step)


def test_a_step_is_the_same_when_it_is_the_first_that_is_asked_for() -> None:
    once = StepOrder(30, 3, 2, seed=9)
    wanted = [step_keys(once, step) for step in range(20)]
    for step in (17, 3, 11):
        assert step_keys(StepOrder(30, 3, 2, seed=9), step) == wanted[step]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert StepOrder(10, 5, 2, seed=0).keys(1, 1) == [15, 13, 12, 16, 17]


def test_too_few_images_for_a_step_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        StepOrder(100, 64, 2, seed=0)
    message = str(caught.value)
    assert all(number in message for number in ("64", " 2 ", "128", "100"))
    assert "--accumulation-steps" in message


@pytest.mark.parametrize("sizes", [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1, 1, 2**32)])
def test_sizes_and_seeds_out_of_range_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError):
        StepOrder(100, *sizes)


@pytest.mark.parametrize(("step", "number"), [(-1, 0), (0, 2), (0, -1)])
def test_a_micro_batch_that_is_none_is_an_error(step: int, number: int) -> None:
    with pytest.raises(IndexError):
        StepOrder(100, 2, 2, seed=0).keys(step, number)
