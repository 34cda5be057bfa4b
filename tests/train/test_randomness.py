"""Random numbers follow from seed, step and number; states come back where they were."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from swinq.train.randomness import capture, gather, restore, restore_rank, seed_step


@pytest.fixture(autouse=True)
def own_generators() -> Iterator[None]:
    """Other tests may count on the global generators: they find them as they were."""
    before = capture()
    yield
    restore(before)


def draw() -> list[float]:
    """From every generator, uniform and normal: normal ones come in pairs."""
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def test_same_place_draws_the_same_numbers_and_any_other_draws_others() -> None:
    drawn = {}
    for place in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**62, 10**7, 4095)]:
        seed_step(*place)
        drawn[place] = draw()
        draw()
        seed_step(*place)
        assert draw() == drawn[place]
    numbers = [number for found in drawn.values() for number in found]
    assert len(set(numbers)) == len(numbers)


def test_states_come_back_in_the_middle_of_a_pair_of_normal_numbers() -> None:
    seed_step(1, 2, 3)
    draw()
    states = capture()
    wanted = [draw() for _ in range(400)]  # past the end of a twister's block
    restore(states)
    assert [draw() for _ in range(400)] == wanted


def test_states_have_one_size_so_that_ranks_can_exchange_them() -> None:
    def forms() -> dict[str, tuple[torch.dtype, torch.Size]]:
        return {name: (state.dtype, state.shape) for name, state in capture().items()}

    seed_step(1, 2, 3)
    before = forms()
    draw()
    assert forms() == before


def test_a_rank_finds_its_own_states_and_one_without_any_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seed_step(1, 2, 3)
    tensors: dict[str, Tensor] = {**gather(), "model.weight": torch.zeros(3)}
    assert {name.rsplit(".", 1)[0] for name in tensors} == {"random.0", "model"}
    wanted = draw()
    restore_rank(tensors)
    assert draw() == wanted
    monkeypatch.setenv("RANK", "1")
    before = capture()
    restore_rank(tensors)
    assert all(torch.equal(state, before[name]) for name, state in capture().items())


@pytest.mark.gpu
def test_gpu_follows_the_step_too_and_its_state_comes_back() -> None:
    def draw_there() -> Tensor:
        return torch.rand(1000, device="cuda")

    seed_step(1, 2, 3)
    first = draw_there()
    states = capture()
    second = draw_there()
    seed_step(1, 2, 3)
    assert torch.equal(draw_there(), first)
    restore(states)
    assert torch.equal(draw_there(), second)
