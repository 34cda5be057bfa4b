"""Float Swin against timm's on the same weights, the places quantizers hold on to, input errors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from swinq.errors import DataError
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.layers import (
    DropPath,
    SwinBase,
    merge_neighbours,
    set_drop_path,
    window_partition,
    window_reverse,
)
from swinq.models.variants import VARIANTS, variant_name

Randomise = Callable[[nn.Module], nn.Module]

# timm's model and depths -> the same stages' windows as the full model, in seconds on a CPU
SHALLOW = {
    "swin_base_patch4_window12_384": (2, 1, 1, 1),
    "swinv2_tiny_window16_256": (2, 1, 2, 1),
    "swinv2_base_window12_192": (2, 1, 2, 1),
    "swinv2_base_window12to16_192to256": (2, 1, 2, 1),
    "swinv2_base_window12to24_192to384": (2, 1, 1, 1),
}
ALL_OF_TIMM = [
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base", "large")),
    *(f"swin_{size}_patch4_window12_384" for size in ("base", "large")),
    *(f"swinv2_{size}_window{w}_256" for size in ("tiny", "small", "base") for w in (8, 16)),
    *(
        f"swinv2_{size}_{window}"
        for size in ("base", "large")
        for window in ("window12_192", "window12to16_192to256", "window12to24_192to384")
    ),
]


def _official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names as microsoft's, written independently of the loader."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        if parts[:2] == ["head", "fc"]:
            del parts[1]
        renamed[".".join(parts)] = tensor
    return renamed


def _worst_difference(name: str, randomise: Randomise, **changes: tuple[int, ...]) -> float:
    """Largest difference of logits between timm's model and ours; logits are of order 1."""
    oracle = randomise(timm.create_model(name, num_classes=1000, **changes))
    official = variant_name(name)
    assert official is not None
    arch = replace(VARIANTS[official], num_classes=1000, **changes)
    model = build_model(arch).eval()
    model.load_state_dict(_official_names(oracle.state_dict()))
    image = torch.randn(1, 3, arch.img_size, arch.img_size)
    with torch.inference_mode():
        expected, logits = oracle(image), model(image)
    assert expected.std() > 0.1  # a comparison of zeros would prove nothing
    return float((expected - logits).abs().max())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_tiny_logits_equal_timms(name: str, randomise: Randomise) -> None:
    assert _worst_difference(name, randomise) < 1e-5


@pytest.mark.parametrize("name", SHALLOW)
def test_logits_equal_timms_for_every_kind_of_window(name: str, randomise: Randomise) -> None:
    assert _worst_difference(name, randomise, depths=SHALLOW[name]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_OF_TIMM)
def test_full_size_logits_equal_timms(
    name: str, randomise: Randomise, record_property: Callable[[str, object], None]
) -> None:
    worst = _worst_difference(name, randomise)
    record_property("worst_difference", worst)
    print(f"{name}: {worst:.2e}")
    assert worst < 1e-5


def test_a_batch_gives_each_image_its_own_logits(tiny_model: SwinBase) -> None:
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        together = tiny_model(images)
        alone = torch.cat([tiny_model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_no_qkv_bias_runs_in_both_versions(
    tiny_architecture: Architecture, tiny_architecture_v2: Architecture, randomise: Randomise
) -> None:
    for arch in (tiny_architecture, tiny_architecture_v2):
        model = randomise(build_model(replace(arch, qkv_bias=False)))
        names = set(model.state_dict())
        assert not any(name.endswith(("qkv.bias", "q_bias", "v_bias")) for name in names)
        assert model(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_window_partition_goes_row_by_row_and_back() -> None:
    x = torch.arange(2 * 4 * 8 * 1).view(2, 4, 8, 1)
    windows = window_partition(x, 4)
    assert windows.shape == (4, 16, 1)
    assert torch.equal(windows[1].flatten(), x[0, :, 4:, 0].flatten())
    assert torch.equal(window_reverse(windows, 4, 4, 8), x)


def test_merge_stacks_the_left_column_first() -> None:
    x = torch.randn(2, 16, 3)
    grid = x.view(2, 4, 4, 3)
    corners = [grid[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
    assert torch.equal(merge_neighbours(x, 4), torch.cat(corners, -1).view(2, 4, 12))


def test_mask_separates_exactly_what_the_roll_brought_together(tiny_model: SwinBase) -> None:
    block = tiny_model.layers[0].blocks[1]
    side, window, shift = block.resolution, block.window, block.shift
    assert shift == 2
    place = torch.stack(
        torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), dim=-1
    )[None]
    rolled = torch.roll(place, (-shift, -shift), (1, 2))
    windows = window_partition(rolled, window)  # (nW, N, 2): where each token came from
    distance = (windows[:, :, None] - windows[:, None]).abs().amax(-1)
    assert torch.equal(block.attn_mask == 0, distance < window)
    assert set(block.attn_mask.unique().tolist()) == {-100.0, 0.0}


@pytest.mark.parametrize("version", [1, 2])
def test_attention_exposes_bias_and_scale_for_the_quantizers(
    version: int, tiny_model: SwinBase, tiny_model_v2: SwinBase
) -> None:
    attn = (tiny_model if version == 1 else tiny_model_v2).layers[1].blocks[0].attn
    tokens, heads = 16, 2
    table = attn.compact_relative_position_bias()
    assert table.shape == (49, heads)
    assert attn.relative_position_index.shape == (tokens, tokens)
    bias = attn.relative_position_bias()
    assert torch.equal(bias, table[attn.relative_position_index].permute(2, 0, 1))
    scale = attn.softmax_scale()
    assert scale.shape == (heads,) and scale.dtype == torch.float32
    if version == 1:
        assert torch.equal(scale, torch.full((heads,), attn.scale))
    else:
        torch.testing.assert_close(scale, attn.logit_scale.view(-1).exp().clamp(max=100.0))
        assert table.min() > 0 and table.max() < 16
        assert torch.equal(attn.qkv_bias(), torch.cat([attn.q_bias, torch.zeros(64), attn.v_bias]))


def test_temperature_never_exceeds_100(tiny_model_v2: SwinBase) -> None:
    attn = tiny_model_v2.layers[0].blocks[0].attn
    with torch.no_grad():
        attn.logit_scale.fill_(50.0)
    torch.testing.assert_close(attn.softmax_scale(), torch.tensor([100.0]))


@pytest.mark.parametrize("version", [1, 2])
def test_stream_sees_every_write_of_the_residual(
    version: int, tiny_model: SwinBase, tiny_model_v2: SwinBase
) -> None:
    model = tiny_model if version == 1 else tiny_model_v2
    seen = []
    for name, module in model.named_modules():
        if name.endswith("stream"):
            module.register_forward_hook(lambda m, i, out, name=name: seen.append((name, out)))
    model(torch.randn(1, 3, 32, 32))
    blocks = [f"layers.{s}.blocks.{b}.stream" for s in (0, 1) for b in (0, 1) for _ in range(2)]
    merge = "layers.0.downsample.stream"
    assert [n for n, _ in seen] == ["patch_embed.stream", *blocks[:4], merge, *blocks[4:]]
    assert [tuple(x.shape) for _, x in seen] == [(1, 256, 32)] * 5 + [(1, 64, 64)] * 5


def test_recomputing_blocks_leaves_gradients_as_they_are(tiny_model: SwinBase) -> None:
    image = torch.randn(2, 3, 32, 32)
    gradients = []
    for on in (False, True):
        tiny_model.train()
        tiny_model.set_gradient_checkpointing(on)
        tiny_model.zero_grad()
        tiny_model(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in tiny_model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_drop_path_grows_with_depth(tiny_architecture: Architecture) -> None:
    model = build_model(tiny_architecture, drop_path_rate=0.3)
    rates = [float(block.drop_path.rate) for s in model.layers for block in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_fresh_v2_blocks_start_as_identity(tiny_architecture_v2: Architecture) -> None:
    block = build_model(tiny_architecture_v2).layers[0].blocks[1]
    x = torch.randn(1, 256, 32)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (torch.zeros(1, 3, 32, 64), r"\(batch, 3, 32, 32\), got a tensor \(1, 3, 32, 64\)"),
        (torch.zeros(1, 1, 32, 32), r"\(1, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images are torch.uint8"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "images are torch.float64"),
    ],
)
def test_a_wrong_input_is_named(tiny_model: SwinBase, image: Tensor, named: str) -> None:
    with pytest.raises(DataError, match=named) as caught:
        tiny_model(image)
    assert caught.value.fix


def test_autocast_may_mix_dtypes(tiny_model: SwinBase) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = tiny_model(torch.zeros(1, 3, 32, 32, dtype=torch.bfloat16))
    assert logits.shape == (1, 10)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean() -> None:
    path = DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    y = path(x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y, (kept.float() / 0.75).view(-1, 1, 1).expand_as(y))
    assert 0.72 < float(kept.float().mean()) < 0.78
    assert path(x.bfloat16()).dtype == torch.bfloat16
    assert path.eval()(x) is x
    assert not path.state_dict()


def test_drop_path_rates_can_be_set_on_a_built_model(tiny_model: SwinBase) -> None:
    set_drop_path(tiny_model, 0.6)
    rates = [float(block.drop_path.rate) for s in tiny_model.layers for block in s.blocks]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6])
