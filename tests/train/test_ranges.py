"""Which ranges learn: kinds, modes and recipes, and what is left when they are fixed."""

import pytest
import torch
from torch import nn

from swinq.errors import CalibrationError, ConfigError
from swinq.models.architecture import Architecture
from swinq.quant.insert import named_quantizers, quantize_model, set_int8_mode, used_quantizers
from swinq.train.ranges import KINDS, fix_ranges, learn_ranges
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin
from tests.train.jobs import tiny_calibrated


def model_of(architecture: Architecture, name: str = "int8") -> nn.Module:
    model = quantize_model(tiny_swin(architecture), recipe(name))
    set_ranges_to_maxima(model, torch.randn(2, 3, 32, 32))
    return model


def learning(model: nn.Module) -> set[str]:
    """The last parts of the names of the quantizers that learn."""
    names = [n for n, _ in model.named_parameters() if n.endswith(".log_amax")]
    return {name.split(".")[-2] for name in names}


@pytest.mark.parametrize(
    ("kind", "quantizers"),
    [
        ("input", {"input_quantizer"}),
        ("weight", {"weight_quantizer"}),
        ("output", {"output_quantizer"}),
        ("attention", {"q_quantizer", "k_quantizer", "v_quantizer"}),
    ],
)
def test_a_kind_names_its_quantizers(
    kind: str, quantizers: set[str], tiny_architecture: Architecture
) -> None:
    model = model_of(tiny_architecture)
    parameters = learn_ranges(model, [kind])
    assert learning(model) == quantizers
    ours = {id(p) for n, p in model.named_parameters() if n.endswith(".log_amax")}
    assert {id(p) for p in parameters} == ours and len(parameters) == len(ours)


def test_all_kinds_under_the_fastertransformer_recipe(tiny_architecture_v2: Architecture) -> None:
    model = model_of(tiny_architecture_v2, "fastertransformer")
    learn_ranges(model, KINDS)
    assert learning(model) == {n.rpartition(".")[2] for n in named_quantizers(model)}


def test_only_outputs_that_the_mode_rounds_learn(tiny_architecture: Architecture) -> None:
    model = model_of(tiny_architecture)
    learned = {mode: len(learn_ranges(set_int8_mode(model, mode), ["output"])) for mode in (1, 2)}
    assert learned == {1: 2 * 4 + 1, 2: 4}  # proj, fc2 of four blocks and one merge; proj alone


def test_fixing_leaves_no_parameter_and_keeps_what_was_learned(
    tiny_architecture: Architecture,
) -> None:
    model = model_of(tiny_architecture)
    before = set(model.state_dict())
    with torch.no_grad():
        for parameter in learn_ranges(model, ["output", "input"]):
            parameter.add_(0.25)
    learned = {n: q.amax for n, q in named_quantizers(model).items()}
    fix_ranges(model)
    assert set(model.state_dict()) == before and not learning(model)
    for name, quantizer in named_quantizers(model).items():
        assert torch.equal(quantizer.amax, learned[name])


@pytest.mark.parametrize(
    ("kinds", "named"),
    [(["outputs"], "'outputs'.*input, weight, output"), (["probabilities"], "no quantizer")],
)
def test_unknown_kinds_and_kinds_without_a_quantizer_are_refused(
    kinds: list[str], named: str, tiny_architecture: Architecture
) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        learn_ranges(model_of(tiny_architecture), kinds)
    assert "QAT.LEARN_RANGES" in caught.value.fix


def test_an_uncalibrated_model_is_refused(tiny_architecture: Architecture) -> None:
    model = quantize_model(tiny_swin(tiny_architecture), recipe("int8"))
    with pytest.raises(CalibrationError, match="no range"):
        learn_ranges(model, ["output"])


def test_folded_input_ranges_learn_only_together_with_the_weights() -> None:
    model = tiny_calibrated()
    vectors = [n for n, q in used_quantizers(model).items() if "input" in n and not q.per_tensor]
    assert vectors, "this calibration found no scale per input channel"
    with pytest.raises(ConfigError, match=r"layers fold a scale per input channel"):
        learn_ranges(model, ("input",))
    assert learn_ranges(model, ("input", "weight"))
