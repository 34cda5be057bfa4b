"""What AdamW is given: Swin's parameter groups, the rates of the schedule, clipped gradients."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from swinq.train import optimizer
from swinq.train.optimizer import build_optimizer
from swinq.train.ranges import learn_ranges
from tests.train.jobs import SETTINGS, run_job, tiny_calibrated

# In the official training, these alone are decayed
DECAYED = ("qkv", "attn.proj", "fc1", "fc2", "reduction", "patch_embed.proj", "head")


class Recording(torch.optim.AdamW):
    """Remembers the rate of every group and the norm of the weights' gradients at each step."""

    rates: list[dict[str, float]]
    norms: list[float]

    def step(self, closure: Any = None) -> Any:
        self.rates.append({group["name"]: group["lr"] for group in self.param_groups})
        gradients = [
            parameter.grad.flatten()
            for group in self.param_groups
            for parameter in group["params"]
            if group["name"] != "ranges" and parameter.grad is not None
        ]
        self.norms.append(float(torch.cat(gradients).norm()))
        return super().step(closure)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(Recording, "rates", [], raising=False)
    monkeypatch.setattr(Recording, "norms", [], raising=False)
    monkeypatch.setattr(optimizer, "AdamW", Recording)
    return Recording


@pytest.mark.parametrize("version", [1, 2])
def test_groups_are_those_of_the_official_training(version: int) -> None:
    model = tiny_calibrated(version)
    learn_ranges(model, ("output",))
    found = build_optimizer(model, replace(SETTINGS, weight_decay=0.07)).param_groups
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    names = {g["name"]: {named[id(parameter)] for parameter in g["params"]} for g in found}
    ranges = {name for name in named.values() if name.endswith("log_amax")}
    decayed = {
        name for name in named.values() if name.endswith(tuple(f"{x}.weight" for x in DECAYED))
    }
    assert ranges and len(decayed) > len(DECAYED)
    plain = set(named.values()) - ranges - decayed
    assert names == {"decayed": decayed, "plain": plain, "ranges": ranges}
    assert {g["name"]: (g["weight_decay"], g["lr"]) for g in found} == {
        "decayed": (0.07, SETTINGS.rate),
        "plain": (0.0, SETTINGS.rate),
        "ranges": (0.0, SETTINGS.range_rate),
    }


def test_every_group_steps_at_the_rate_of_the_schedule(
    tmp_path: Path, recorded: type[Recording]
) -> None:
    """A linear rise over a quarter of the 8 steps, then a cosine towards 1 %."""
    progress = run_job(tmp_path, tiny_calibrated())

    def wanted(peak: float) -> list[float]:
        rise = [step / 2 for step in range(2)]
        cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
        return [1e-5 + (peak - 1e-5) * share for share in (*rise, *cosine)]

    weights = pytest.approx(wanted(SETTINGS.rate), rel=1e-6)
    assert [rates["decayed"] for rates in recorded.rates] == weights
    assert [rates["plain"] for rates in recorded.rates] == weights
    assert [rate for _, _, rate in progress.curve] == weights
    ranges = pytest.approx(wanted(SETTINGS.range_rate), rel=1e-6)
    assert [rates["ranges"] for rates in recorded.rates] == ranges


def test_gradients_are_clipped_to_their_norm(tmp_path: Path, recorded: type[Recording]) -> None:
    run_job(tmp_path / "clipped", tiny_calibrated(), clip=0.01)
    assert recorded.norms == pytest.approx([0.01] * 8, rel=1e-3)
    recorded.norms.clear()
    run_job(tmp_path / "free", tiny_calibrated(), clip=0.0)
    assert min(recorded.norms) > 0.1
