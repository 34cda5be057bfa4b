"""A planted bad layer is found, excluded by a recipe that can be run, and only if it pays."""

from collections.abc import Callable

import pytest
import torch
import yaml
from torch import Tensor

from swinq.errors import ConfigError
from swinq.report.sensitivity import (
    mean_kl,
    measure_sensitivity,
    recipe_without,
    suggest_exclusions,
)

LAYERS = [f"layers.0.blocks.{i}.mlp.fc1" for i in range(20)]


class NoisyModel:
    """Logits to which each quantized layer adds its own fixed noise."""

    def __init__(self, strength: Callable[[int], float], images: int = 64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(images, 10, generator=generator) * 3
        noise = torch.randn(len(LAYERS), images, 10, generator=generator)
        self.noise = {name: noise[i] * strength(i) for i, name in enumerate(LAYERS)}
        self.quantized: set[str] = set(LAYERS)
        self.runs = 0

    def predict(self) -> Tensor:
        self.runs += 1
        return self.logits + sum(self.noise[name] for name in sorted(self.quantized))

    def set_quantized(self, names: set[str]) -> None:
        self.quantized = set(names)


def bad_layer_7(i: int) -> float:
    return 1.0 if i == 7 else 0.05


def test_mean_kl_is_the_definition() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    p, q = a.double().softmax(1), b.double().softmax(1)
    want = sum((p[i] * (p[i] / q[i]).log()).sum().item() for i in range(5)) / 5
    assert mean_kl(a, b) == pytest.approx(want, rel=1e-12)
    assert mean_kl(a, a + 3) == pytest.approx(0.0, abs=1e-12)  # softmax ignores a constant


def test_the_planted_layer_is_worst_both_ways() -> None:
    model = NoisyModel(bad_layer_7)
    result = measure_sensitivity(LAYERS, model.predict, model.set_quantized)
    assert max(result.rows, key=lambda row: row.only_this_quantized).layer == LAYERS[7]
    assert min(result.rows, key=lambda row: row.only_this_float).layer == LAYERS[7]
    assert result.rows[7].only_this_float < 0.2 * result.all_quantized
    assert (result.images, len(result.rows), model.runs) == (64, 20, 42)
    assert model.quantized == set(LAYERS)


def test_the_suggestion_names_the_planted_layer_alone_and_measures_it() -> None:
    model = NoisyModel(bad_layer_7)
    result = measure_sensitivity(LAYERS, model.predict, model.set_quantized)
    found = suggest_exclusions(result, model.predict, model.set_quantized, "QUANT: {METHOD: mse}")
    assert found.worth_it and found.layers == [LAYERS[7]]
    assert found.kl_after == pytest.approx(result.rows[7].only_this_float)
    assert yaml.safe_load(found.recipe) == {
        "QUANT": {"METHOD": "mse", "LAYERS": [{"PATTERN": LAYERS[7], "PRECISION": "fp16"}]}
    }
    assert model.quantized == set(LAYERS)


def test_a_layer_that_only_helps_alone_is_put_back() -> None:
    model = NoisyModel(lambda i: 0.02)
    one, *_ = model.noise.values()
    for i, part in ((3, 1.0), (5, 0.8), (9, -0.8)):  # without 3 and 5, nothing balances 9
        model.noise[LAYERS[i]] = one / one.std() * part
    result = measure_sensitivity(LAYERS, model.predict, model.set_quantized)
    assert result.rows[5].only_this_float < result.all_quantized
    found = suggest_exclusions(result, model.predict, model.set_quantized, "", share=1.0)
    assert found.layers[0] == LAYERS[3] and LAYERS[5] not in found.layers


def test_no_layer_is_given_up_when_all_are_alike() -> None:
    model = NoisyModel(lambda i: 0.2)
    result = measure_sensitivity(LAYERS, model.predict, model.set_quantized)
    found = suggest_exclusions(result, model.predict, model.set_quantized, "")
    assert not found.worth_it and found.recipe == ""
    assert len(found.layers) <= 2  # a tenth of the layers


def test_no_layer_is_given_up_for_a_negligible_loss() -> None:
    model = NoisyModel(lambda i: 0.02 if i == 7 else 0.0)
    result = measure_sensitivity(LAYERS, model.predict, model.set_quantized)
    runs = model.runs
    found = suggest_exclusions(result, model.predict, model.set_quantized, "")
    assert not found.worth_it and not found.layers and model.runs == runs
    assert "too little" in found.reason


def test_layers_are_quantized_again_after_a_failure() -> None:
    model = NoisyModel(bad_layer_7)

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        measure_sensitivity(LAYERS, fail, model.set_quantized)
    assert model.quantized == set(LAYERS)


def test_progress_sees_every_layer() -> None:
    model = NoisyModel(bad_layer_7)
    shown: list[str] = []

    def progress(layers: object) -> object:
        for layer in layers:  # type: ignore[attr-defined]
            shown.append(layer)
            yield layer

    measure_sensitivity(LAYERS, model.predict, model.set_quantized, progress=progress)
    assert shown == LAYERS


def test_a_recipes_own_rules_come_first() -> None:
    base = "QUANT:\n  LAYERS:\n  - {PATTERN: 'layers.3.*', PRECISION: fp16}\n"
    rules = yaml.safe_load(recipe_without(base, ["layers.0.a"]))["QUANT"]["LAYERS"]
    assert [rule["PATTERN"] for rule in rules] == ["layers.3.*", "layers.0.a"]


@pytest.mark.parametrize("base", ["", "QUANT:", "QUANT:\n  LAYERS:\n", "DATA: {IMG_SIZE: 32}"])
def test_a_recipe_without_rules_gets_its_first(base: str) -> None:
    content = yaml.safe_load(recipe_without(base, ["a"]))
    assert content["QUANT"]["LAYERS"] == [{"PATTERN": "a", "PRECISION": "fp16"}]


@pytest.mark.parametrize(
    "base", ["BASE: [int8.yaml]", "- a list", "QUANT: [", "QUANT: 3", "QUANT: {LAYERS: 3}", "text"]
)
def test_a_recipe_that_cannot_be_added_to_is_refused(base: str) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        recipe_without(base, ["a"])
