"""Recipes: both committed ones load, contradictions are named, unexportable ones say why."""

from typing import Any

import pytest

from swinq.errors import ConfigError
from swinq.quant.spec import LayerRule, QuantSpec
from tests.quant.recipes import recipe


def test_the_int8_recipe_is_exportable_and_close_to_the_defaults() -> None:
    spec = recipe("int8")
    assert spec.exportable_problem() is None
    assert spec.weight_granularity == spec.output_granularity == "per_channel"
    assert spec.output_layers == ("proj", "fc2", "reduction") and spec.probabilities == "row_max"


def test_the_fastertransformer_recipe_is_per_tensor_and_not_exportable() -> None:
    spec = recipe("fastertransformer")
    assert spec.weight_granularity == spec.output_granularity == "per_tensor"
    assert spec.output_position == "before_bias" and spec.probabilities == "static"
    assert "fake quantization only" in (spec.exportable_problem() or "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"probabilities": "static"}, "PROBABILITIES static"),
        ({"output_position": "before_bias"}, "POSITION before_bias"),
        ({"output_layers": ("qkv", "proj", "fc1")}, "fc1, qkv"),
    ],
)
def test_what_no_kernel_computes_is_said(changes: dict[str, Any], named: str) -> None:
    assert named in (QuantSpec(**changes).exportable_problem() or "")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weight_granularity": "per_block"}, "per_block"),
        ({"output_granularity": "row"}, "row"),
        ({"output_position": "inside"}, "inside"),
        ({"output_method": "mse"}, "mse"),
        ({"probabilities": "log2"}, "log2"),
        ({"output_layers": ("fc3",)}, "fc3"),
        ({"layers": (LayerRule("*", "int4"),)}, "int4"),
        ({"output_method": "percentile"}, "percentile needs a histogram"),
        ({"output_headroom": 0.5}, "0.5"),
        ({"migration": (0.5, 1.5)}, "1.5"),
    ],
)
def test_a_value_outside_its_choices_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        QuantSpec(**changes).validate()
    assert error.value.fix


def test_exponent_zero_means_no_vector_and_is_not_tried_twice() -> None:
    assert recipe("int8", INPUT={"MIGRATION": [0.0, 0.5]}).migration == (0.5,)


def test_rules_are_read_in_order() -> None:
    rules = [{"PATTERN": "*", "PRECISION": "fp16"}, {"PATTERN": "*.fc1", "PRECISION": "int8"}]
    spec = recipe("int8", LAYERS=rules, ALLOW_DEAD=["*.k_quantizer"])
    assert spec.layers == (LayerRule("*", "fp16"), LayerRule("*.fc1", "int8"))
    assert spec.allow_dead == ("*.k_quantizer",)


@pytest.mark.parametrize("name", ["int8", "fastertransformer"])
def test_a_spec_survives_the_way_through_a_configuration(name: str) -> None:
    spec = recipe(name, LAYERS=[{"PATTERN": "*.fc2", "PRECISION": "int8-unrounded"}])
    assert QuantSpec.from_config(spec.to_config()) == spec
