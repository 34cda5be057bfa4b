"""Mixup and CutMix: soft targets that match the pixels, drawn by (seed, step, number) alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from swinq.data.mixing import Mixing
from swinq.errors import ConfigError


def batch(size: int = 4, side: int = 16) -> tuple[Tensor, Tensor]:
    """Image i is all i, label i: what a mixture is made of can be read from its pixels."""
    values = torch.arange(size, dtype=torch.float32)
    return values.view(-1, 1, 1, 1).expand(size, 3, side, side).clone(), torch.arange(size)


def test_mixup_weighs_targets_as_it_weighs_pixels(device: torch.device) -> None:
    mixing = Mixing(4, cutmix=0, label_smoothing=0)
    images, labels = batch()
    mixed, targets = mixing(images.to(device), labels.to(device), 3, 1)
    assert targets.shape == (4, 4) and targets.dtype == torch.float32
    assert targets.device.type == device.type
    expected = (targets.cpu() * torch.arange(4)).sum(1)
    assert torch.allclose(mixed.mean((1, 2, 3)).cpu(), expected, atol=1e-5)
    assert 0 < targets[0, 3] < 1


@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_cutmix_weighs_targets_by_area(minmax: tuple[float, float] | None) -> None:
    mixing = Mixing(4, mixup=0, cutmix=1.0, cutmix_minmax=minmax, label_smoothing=0)
    pasted = 0.0
    for step in range(20):
        mixed, targets = mixing(*batch(), step, 0)
        assert set(mixed[0].unique().tolist()) <= {0.0, 3.0}
        share = (mixed[0, 0] == 3).float().mean()
        assert torch.allclose(targets[0, 3], share, atol=1e-6)
        pasted = max(pasted, float(share))
    assert pasted > 0.2


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_a_mixture_is_a_function_of_seed_step_and_number(mode: str) -> None:
    def made(seed: int, step: int, number: int) -> tuple[Tensor, Tensor]:
        return Mixing(4, mode=mode, seed=seed)(*batch(), step, number)

    pixels, targets = made(0, 5, 2)
    np.random.seed(99)
    state = np.random.get_state()[1]
    again = made(0, 5, 2)
    assert torch.equal(pixels, again[0]) and torch.equal(targets, again[1])
    assert np.array_equal(state, np.random.get_state()[1])
    assert torch.allclose(targets.sum(1), torch.ones(4))
    others = [made(1, 5, 2), made(0, 6, 2), made(0, 5, 3)]
    assert not any(torch.equal(pixels, other[0]) for other in others)


@pytest.mark.parametrize("off", [{"mixup": 0, "cutmix": 0}, {"prob": 0}])
def test_without_mixing_targets_are_smoothed_and_images_untouched(off: dict[str, float]) -> None:
    images, labels = batch(3)
    mixed, targets = Mixing(5, label_smoothing=0.1, **off)(images.clone(), labels, 0, 0)  # type: ignore[arg-type]
    assert torch.equal(mixed, images)
    assert torch.allclose(targets[1], torch.tensor([0.02, 0.92, 0.02, 0.02, 0.02]))
    logits = torch.randn(3, 5)
    ours = torch.nn.functional.cross_entropy(logits, targets)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(ours, theirs)


def test_an_odd_batch_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="a batch of 3 images") as caught:
        Mixing(4)(*batch(3), 0, 0)
    assert "--batch-size" in str(caught.value)
    Mixing(4, mixup=0, cutmix=0).check_batch(3)


@pytest.mark.parametrize(
    "wrong", [{"mode": "all"}, {"cutmix_minmax": [0.5]}, {"cutmix_minmax": [0.8, 0.2]}]
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="AUG"):
        Mixing(4, **wrong)  # type: ignore[arg-type]
