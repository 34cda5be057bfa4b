"""With every layer in fp16 the integer model is the float model: all its geometry is right.

Patches, windows, shifts, masks, bias tables, merging, norms, cosine attention and head are the same
code for fp16 and int8 layers, so logits that agree up to fp16 rounding prove them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from swinq.export.format import expected_tensors, layer_names
from swinq.export.reader import Int8Checkpoint
from swinq.int8 import reference, windows
from swinq.int8.model import Int8Swin
from swinq.int8.windows import relative_index
from swinq.models.architecture import Architecture
from tests.export.calibrated_model import images, lively_model
from tests.int8.made_checkpoint import made_architecture

# An fp16 value is off by 2^-11 relatively at most. The stream is rounded twice a block and each of
# the six operands of a block once, which for 5 blocks adds up, as independent errors do, to
# sqrt(40) * 2^-11 = 3e-3 of the logits. The largest seen is 9e-4.
BOUND = 3e-3

SIZES: dict[str, dict[str, object]] = {
    "shifted 4x4": {},
    "shifted 7x7, then one 7x7 window": {"img_size": 28, "window_size": 7},
    "shifted 6x6, three stages": {
        "img_size": 48,
        "window_size": 6,
        "depths": (3, 2, 2),
        "num_heads": (1, 2, 4),
        "pretrained_window_sizes": (0, 0, 0),
    },
    "one 24x24 window": {"img_size": 48, "window_size": 24},
    "shifted 3x3, patches of 4, one channel": {
        "img_size": 48,
        "window_size": 3,
        "patch_size": 4,
        "in_chans": 1,
    },
    "no qkv bias, another eps": {"qkv_bias": False, "norm_eps": 1e-2},
}


def half_checkpoint(model: nn.Module) -> Int8Checkpoint:
    """The float model's own weights, every layer in fp16."""
    arch = model.arch
    assert isinstance(arch, Architecture)
    precision = dict.fromkeys(layer_names(arch), "fp16")
    tensors = {}
    for name, spec in expected_tensors(arch, precision, 1).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "relative_position_bias_table":
            value = module.compact_relative_position_bias()  # type: ignore[operator]
        elif leaf == "softmax_scale":
            value = module.softmax_scale()  # type: ignore[operator]
        elif name.endswith("qkv.bias") and arch.version == 2:
            value = model.get_submodule(owner.rpartition(".")[0]).qkv_bias()  # type: ignore[operator]
        else:
            value = getattr(module, leaf)
        if value is None:
            value = torch.zeros(spec.shapes[0])
        tensors[name] = value.detach().to(spec.dtype)
    return Int8Checkpoint(tensors, arch, precision, 1, {}, None, {}, Path("half"))


def relative_error(model: nn.Module, batch: Tensor) -> float:
    with torch.no_grad():
        wanted = model(batch)
    found = Int8Swin(half_checkpoint(model))(batch)
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_logits_are_the_float_models_up_to_fp16(version: int, name: str) -> None:
    arch = made_architecture(version, **SIZES[name])
    model = lively_model(arch)
    assert relative_error(model, images(arch, 3)) < BOUND


def test_v2_with_the_steepest_softmax_agrees() -> None:
    arch = made_architecture(2)
    model = lively_model(arch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.fill_(5.0)  # clamped to ln 100
    # a cosine is off by 2^-10, so a logit by 0.1: probabilities move, by that much
    assert relative_error(model, images(arch, 3)) < 10 * BOUND


def forget_mask(self: windows.Windows, start: int, stop: int) -> Tensor:
    return self._tables[:1]  # of windows that no edge cuts


def rows_first(x: Tensor, resolution: int) -> Tensor:
    b, _, c = x.shape
    x = x.view(b, resolution // 2, 2, resolution // 2, 2, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(b, -1, 4 * c)


def key_from_query(window: int) -> Tensor:
    return relative_index(window).t()


def never_shift_back(self: windows.Windows, x: Tensor) -> Tensor:
    return x.reshape(-1, self.count * self.tokens, x.shape[-1])


def last_head_first(x: Tensor) -> Tensor:
    return x.flip(1).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (windows.Windows, "bias", forget_mask),
        (windows.Windows, "scatter", never_shift_back),
        (windows, "relative_index", key_from_query),
        (reference, "merge_neighbours", rows_first),
        (reference, "join_heads", last_head_first),
    ],
)
def test_the_comparison_sees_a_mistake(
    version: int,
    owner: object,
    name: str,
    mistake: Callable[..., Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, name, mistake)
    arch = made_architecture(version)
    assert relative_error(lively_model(arch), images(arch, 3)) > 3 * BOUND
