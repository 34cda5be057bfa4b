"""Putting quantizers into a Swin: which layers, what names, modes, precision, activity."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from swinq.errors import CalibrationError, ConfigError
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.quant.attention import QuantAttention
from swinq.quant.insert import (
    float_layers,
    named_quantizers,
    quantize_model,
    quantized_layers,
    resolve_precisions,
    set_active,
    set_int8_mode,
    used_quantizers,
)
from swinq.quant.linear import QuantLinear
from swinq.quant.spec import LayerRule, QuantSpec
from swinq.quant.stream import half_stream, stream_modules
from tests.quant.ranges import set_ranges_to_maxima
from tests.quant.recipes import recipe
from tests.quant.tiny import tiny_swin

Build = Callable[..., tuple[nn.Module, nn.Module]]
IMAGES = (2, 3, 32, 32)


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def architecture(
    request: pytest.FixtureRequest,
    tiny_architecture: Architecture,
    tiny_architecture_v2: Architecture,
) -> Architecture:
    return tiny_architecture if request.param == 1 else tiny_architecture_v2


@pytest.fixture
def build(architecture: Architecture) -> Build:
    def make(spec: QuantSpec | None = None) -> tuple[nn.Module, nn.Module]:
        model = tiny_swin(architecture)
        return model, quantize_model(copy.deepcopy(model), spec or QuantSpec())

    return make


def test_every_gemm_of_the_blocks_and_merges_is_found_under_the_models_names(build: Build) -> None:
    _, fake = build()
    block = ["attn.qkv", "attn", "attn.proj", "mlp.fc1", "mlp.fc2"]
    expected = [f"layers.{s}.blocks.{b}.{n}" for s in (0, 1) for b in (0, 1) for n in block]
    expected.insert(10, "layers.0.downsample.reduction")  # the order of the forward
    assert list(quantized_layers(fake)) == expected
    kinds = {name.rpartition(".")[2] for name, m in fake.named_modules() if type(m) is nn.Linear}
    assert "head" in kinds and not kinds & {"qkv", "proj", "fc1", "fc2", "reduction"}


def test_float_outputs_are_unchanged_while_nothing_is_active(build: Build) -> None:
    model, fake = build()
    set_active(fake, False)
    x = torch.randn(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(fake(x), model(x), rtol=1e-5, atol=1e-5)


def test_an_uncalibrated_model_is_an_error_that_names_its_first_quantizer(build: Build) -> None:
    with pytest.raises(CalibrationError, match=r"^layers\.0\.blocks\.0\.attn\.qkv\.input_quanti"):
        build()[1](torch.randn(IMAGES))


def test_parameters_are_taken_over_not_copied(architecture: Architecture) -> None:
    model = build_model(architecture)
    before = {id(p) for p in model.parameters()}
    fake = quantize_model(model, QuantSpec())
    assert fake is model
    assert {id(p) for p in fake.parameters()} == before


def test_quantizers_know_their_names_and_files_find_amax_under_them(build: Build) -> None:
    _, fake = build()
    for name, quantizer in named_quantizers(fake).items():
        assert quantizer.name == name
        assert f"{name}._amax" in fake.state_dict()
    attn = "layers.1.blocks.0.attn"
    wanted = {f"{attn}.qkv.{q}" for q in ("input_quantizer", "weight_quantizer")}
    wanted |= {f"{attn}.{q}_quantizer" for q in "qkv"}
    assert wanted <= set(named_quantizers(fake))


def test_quantizing_twice_is_refused(build: Build) -> None:
    with pytest.raises(ConfigError, match="no float layer"):
        quantize_model(build()[1], QuantSpec())
    with pytest.raises(ConfigError, match="Sequential"):
        quantize_model(nn.Sequential(nn.Linear(2, 2)), QuantSpec())


def test_quantized_logits_stay_close_in_both_modes_and_both_recipes(build: Build) -> None:
    x = torch.randn(IMAGES)
    for spec, tolerance in ((QuantSpec(), 0.05), (recipe("fastertransformer"), 0.2)):
        model, fake = build(spec)
        set_ranges_to_maxima(fake, x)
        for mode in (1, 2):
            set_int8_mode(fake, mode)
            with torch.no_grad():
                wanted = model(x)
                error = float((fake(x) - wanted).norm() / wanted.norm())
            assert 0 < error < tolerance


# precision rules

NAMES = ["layers.0.blocks.0.attn.qkv", "layers.0.blocks.0.attn", "layers.0.blocks.0.mlp.fc2"]


def test_without_rules_everything_is_int8() -> None:
    assert resolve_precisions(NAMES, []) == dict.fromkeys(NAMES, "int8")


def test_later_rules_win() -> None:
    rules = [LayerRule("*", "fp16"), LayerRule("*.fc2", "int8-unrounded"), LayerRule("*n", "int8")]
    assert list(resolve_precisions(NAMES, rules).values()) == ["fp16", "int8", "int8-unrounded"]


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"'layers\.0\.blocks\.0\.mlp\.fc3'") as error:
        resolve_precisions(NAMES, [LayerRule("layers.0.blocks.0.mlp.fc3", "fp16")])
    assert "layers.0.blocks.0.mlp.fc2" in error.value.fix
    with pytest.raises(ConfigError, match="no layer"):
        resolve_precisions([], [LayerRule("*", "fp16")])


def test_a_dead_pattern_that_matches_nothing_is_an_error_too(
    tiny_architecture: Architecture,
) -> None:
    with pytest.raises(ConfigError, match=r"'layers\.9\.\*' matches no quantizer"):
        quantize_model(tiny_swin(tiny_architecture), QuantSpec(allow_dead=("layers.9.*",)))


@pytest.mark.parametrize("name", NAMES[:2])
def test_unrounded_is_refused_where_the_consumer_quantizes_anyway(name: str) -> None:
    with pytest.raises(ConfigError, match=f"int8-unrounded for {name} "):
        resolve_precisions(NAMES, [LayerRule(name, "int8-unrounded")])


def test_layers_take_the_precision_of_their_rule(build: Build) -> None:
    rules = (
        LayerRule("layers.0.*", "fp16"),
        LayerRule("*.blocks.1.attn", "int8"),
        LayerRule("layers.1.*.proj", "int8-unrounded"),
    )
    model, fake = build(QuantSpec(layers=rules))
    layers = quantized_layers(fake)
    assert layers["layers.0.blocks.0.attn"].precision == "fp16"
    assert layers["layers.0.blocks.1.attn"].precision == "int8"
    assert layers["layers.0.downsample.reduction"].precision == "fp16"
    proj = layers["layers.1.blocks.0.attn.proj"]
    assert proj.precision == "int8" and not proj.output_quantizer.enabled
    x = torch.randn(IMAGES)
    set_ranges_to_maxima(fake, x)
    with torch.no_grad():
        assert float((fake(x) - model(x)).norm() / model(x).norm()) < 0.05


def test_a_model_all_in_fp16_is_nearer_to_float_than_int8(build: Build) -> None:
    x = torch.randn(IMAGES)
    errors = []
    for rules in ((LayerRule("*", "fp16"),), ()):
        model, fake = build(QuantSpec(layers=rules))
        set_ranges_to_maxima(fake, x)
        with torch.no_grad():
            errors.append(float((fake(x) - model(x)).norm()))
    assert errors[0] < 0.1 * errors[1]


# modes and the quantizers in use


def test_mode_2_leaves_fc2_and_reduction_unrounded_and_mode_1_brings_them_back(
    build: Build,
) -> None:
    _, fake = build()

    def rounded() -> set[str]:
        return {
            name.rpartition(".")[2]
            for name, layer in quantized_layers(fake).items()
            if isinstance(layer, QuantLinear) and layer.output_quantizer.enabled
        }

    assert rounded() == {"proj", "fc2", "reduction"}
    assert set_int8_mode(fake, 2) is fake
    assert rounded() == {"proj"}
    set_int8_mode(fake, 1)
    assert rounded() == {"proj", "fc2", "reduction"}


@pytest.mark.parametrize("mode", [0, 3, "1", None])
def test_another_mode_is_refused(build: Build, mode: int) -> None:
    with pytest.raises(ConfigError, match="int8_mode"):
        set_int8_mode(build()[1], mode)


def test_used_quantizers_are_those_of_int8_layers_that_the_mode_enables(build: Build) -> None:
    _, fake = build(QuantSpec(layers=(LayerRule("layers.1.*", "fp16"),)))
    used = set(used_quantizers(fake))
    assert not any(name.startswith("layers.1.") for name in used)
    assert "layers.0.blocks.0.attn.k_quantizer" in used
    assert "layers.0.blocks.0.attn.qkv.output_quantizer" not in used
    set_int8_mode(fake, 2)
    gone = used - set(used_quantizers(fake))
    assert gone == {
        "layers.0.blocks.0.mlp.fc2.output_quantizer",
        "layers.0.blocks.1.mlp.fc2.output_quantizer",
        "layers.0.downsample.reduction.output_quantizer",
    }


def test_a_model_runs_when_only_its_used_quantizers_have_ranges(build: Build) -> None:
    _, fake = build(QuantSpec(layers=(LayerRule("*.blocks.1.*", "fp16"),)))
    x = torch.randn(IMAGES)
    set_ranges_to_maxima(fake, x)
    set_int8_mode(fake, 2)
    used = used_quantizers(fake)
    for name, quantizer in named_quantizers(fake).items():
        if name not in used:
            quantizer.amax.fill_(float("nan"))
    with torch.no_grad():
        assert fake(x).isfinite().all()


# activity


def test_only_the_named_layers_are_active(build: Build) -> None:
    model, fake = build()
    x = torch.randn(IMAGES)
    set_ranges_to_maxima(fake, x)
    name = "layers.1.blocks.1.mlp.fc1"
    set_active(fake, [name])
    assert [n for n, layer in quantized_layers(fake).items() if layer.active] == [name]
    with torch.no_grad():
        one, wanted = fake(x), model(x)
        all_layers = set_active(fake, True)(x)
    assert 0 < float((one - wanted).norm()) < float((all_layers - wanted).norm())


def test_float_layers_puts_every_layer_back_also_after_an_error(build: Build) -> None:
    _, fake = build()
    names = ["layers.0.blocks.0.attn", "layers.1.blocks.0.mlp.fc1"]
    set_active(fake, names)
    with pytest.raises(ZeroDivisionError), float_layers(fake) as inside:
        assert not any(layer.active for layer in quantized_layers(inside).values())
        raise ZeroDivisionError
    assert [n for n, layer in quantized_layers(fake).items() if layer.active] == names


# the residual stream in half precision


def test_half_stream_rounds_every_write_and_restores_the_model(build: Build) -> None:
    model, fake = build()
    x = torch.randn(IMAGES)
    seen: list[Tensor] = []
    assert len(stream_modules(fake)) == 1 + 4 + 1  # patch embedding, blocks, merge
    with torch.no_grad(), float_layers(fake):
        before = fake(x)
        with half_stream(fake):
            handles = [
                module.register_forward_hook(lambda module, args, out: seen.append(out))
                for module in stream_modules(fake).values()
            ]
            rounded = fake(x)
        for handle in handles:
            handle.remove()
        after = fake(x)
    assert len(seen) == 1 + 2 * 4 + 1  # a block writes twice
    assert all(torch.equal(s, s.half().float()) for s in seen)
    assert 0 < float((rounded - before).abs().max()) < 0.05
    assert torch.equal(before, after)


def test_half_stream_lets_go_of_the_model_after_an_error(build: Build) -> None:
    _, fake = build()
    with pytest.raises(ZeroDivisionError), half_stream(fake):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in stream_modules(fake).values())


# torch.compile


def test_the_quantized_model_compiles_into_one_graph(build: Build) -> None:
    _, fake = build()
    x = torch.randn(IMAGES)
    set_ranges_to_maxima(fake, x)
    block = fake.get_submodule("layers.0.blocks.1")
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    tokens = torch.randn(2, 256, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), block(tokens))


def test_the_attention_of_a_quantized_model_is_ours(build: Build) -> None:
    _, fake = build()
    attentions = [m for n, m in fake.named_modules() if n.endswith(".attn")]
    assert len(attentions) == 4 and all(isinstance(m, QuantAttention) for m in attentions)
