"""Checkpoints of every library give the same logits, or microsoft's names back unchanged."""

import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from swinq.errors import CheckpointError
from swinq.models.architecture import Architecture
from swinq.models.build import build_model
from swinq.models.checkpoint import LoadedCheckpoint, load_checkpoint, load_into
from swinq.models.layers import SwinBase
from swinq.models.variants import VARIANTS

State = dict[str, Tensor]
Randomise = Callable[[nn.Module], nn.Module]


@pytest.fixture(params=[1, 2], ids=["v1", "v2"])
def model(
    request: pytest.FixtureRequest, tiny_model: SwinBase, tiny_model_v2: SwinBase
) -> SwinBase:
    return tiny_model if request.param == 1 else tiny_model_v2


def _with_buffers(model: SwinBase) -> State:
    """The state dict as microsoft's code saves it: with indices, coordinates and masks."""
    return model.state_dict() | {
        name: buffer for name, buffer in model.named_buffers() if "attn" in name
    }


def _check_equal(loaded: LoadedCheckpoint, model: SwinBase, layout: str) -> None:
    want = model.state_dict()
    assert loaded.layout == layout
    assert loaded.architecture == model.arch
    assert set(loaded.state) == set(want)
    assert all(torch.equal(loaded.state[name], want[name]) for name in want)


def _save(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def _renamed(state: State, *rules: tuple[str, str]) -> State:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_official_file_with_buffers_loads_equal(
    tmp_path: Path, model: SwinBase, suffix: str
) -> None:
    path = _save(_with_buffers(model), tmp_path / f"any_name{suffix}")
    _check_equal(load_checkpoint(path), model, "official")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"modelopt_state": {}, "model_state_dict": s},
        lambda s: {f"module.{n}": t for n, t in s.items()},
        lambda s: {"model": {f"module._orig_mod.{n}": t for n, t in s.items()}},
    ],
)
def test_wrapped_and_prefixed_state_dicts_load_equal(
    tmp_path: Path, model: SwinBase, wrap: Callable[[State], dict[str, object]]
) -> None:
    torch.save(wrap(_with_buffers(model)), tmp_path / "a.pth")
    _check_equal(load_checkpoint(tmp_path / "a.pth"), model, "official")


def _timm_names(state: State) -> State:
    def next_stage(match: re.Match[str]) -> str:
        return f"layers.{int(match[1]) + 1}.downsample"

    return {
        re.sub(r"^head\.", "head.fc.", re.sub(r"^layers\.(\d+)\.downsample", next_stage, n)): t
        for n, t in state.items()
    }


def test_timm_layout_loads_equal(tmp_path: Path, model: SwinBase) -> None:
    path = _save(_timm_names(_with_buffers(model)), tmp_path / "model.safetensors")
    _check_equal(load_checkpoint(path), model, "timm")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_timm_files_give_timms_logits(tmp_path: Path, randomise: Randomise, name: str) -> None:
    oracle = randomise(timm.create_model(name, depths=(1, 1, 2, 1)))
    folder = tmp_path / "hub"
    folder.mkdir()
    _save(oracle.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": name}))
    arch = None
    if "v2" in name:  # the name's depths are not these: the window has to be given
        with pytest.raises(CheckpointError, match="window size is not stored"):
            load_checkpoint(folder)
        values = VARIANTS["swinv2_tiny_patch4_window8_256"].to_dict() | {"depths": [1, 1, 2, 1]}
        arch = Architecture.from_dict(values)
    loaded = load_checkpoint(folder, architecture=arch)
    assert loaded.layout == "timm"
    _check_logits(loaded, oracle)


def _check_logits(loaded: LoadedCheckpoint, oracle: nn.Module) -> None:
    assert loaded.architecture is not None
    ours = build_model(loaded.architecture).eval()
    load_into(ours, loaded)
    size = loaded.architecture.img_size
    image = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected, logits = oracle(image), ours(image)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("swin_t", "swin_tiny_patch4_window7_224"),
        ("swin_v2_t", "swinv2_tiny_patch4_window8_256"),
    ],
)
def test_torchvision_files_give_torchvisions_logits(
    tmp_path: Path, randomise: Randomise, name: str, official: str
) -> None:
    oracle = randomise(torchvision.models.get_model(name, weights=None))
    loaded = load_checkpoint(_save(oracle.state_dict(), tmp_path / "weights.pth"))
    assert loaded.layout == "torchvision"
    assert loaded.architecture == VARIANTS[official]
    _check_logits(loaded, oracle)


def _transformers_names(model: SwinBase, spelling: str, prefix: str) -> State:
    """Our parameters as transformers names them: `old` on the hub, `new` in memory (v1 only)."""
    old = spelling == "old"
    state: State = {}
    for name, tensor in model.state_dict().items():
        dim = tensor.shape[0] // 3
        where, _, last = name.rpartition(".")
        if where.endswith("attn.qkv"):
            for i, part in enumerate(("query", "key", "value")):
                module = f"self.{part}" if old else f"{part[0]}_proj"
                state[f"{where[:-4]}.{module}.{last}"] = tensor[i * dim : (i + 1) * dim]
        elif last in ("q_bias", "v_bias"):
            state[f"{where}.self.{'query' if last == 'q_bias' else 'value'}.bias"] = tensor
        else:
            state[name] = tensor
    inner = "self" if old else "relative_position_bias"
    state = _renamed(
        state,
        (r"^head\.", "classifier."),
        (r"^norm\.", "layernorm."),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^patch_embed\.", "embeddings."),
        (r"^layers\.", "encoder.layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense." if old else ".attention.o_proj."),
        (r"\.attn\.(relative|logit)", rf".attention.{inner}.\1"),
        (r"\.attn\.cpb_mlp\.", ".attention.self.continuous_position_bias_mlp."),
        (r"\.attn\.", ".attention."),
        (r"\.mlp\.fc1\.", ".intermediate.dense." if old else ".mlp.fc1."),
        (r"\.mlp\.fc2\.", ".output.dense." if old else ".mlp.fc2."),
    )
    return {n if n.startswith("classifier") else prefix + n: t for n, t in state.items()}


def _hub_folder(folder: Path, model: SwinBase, state: State, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    arch = model.arch
    config = {
        "model_type": "swin" if arch.version == 1 else "swinv2",
        "image_size": arch.img_size,
        "window_size": arch.window_size,
        "layer_norm_eps": arch.norm_eps,
        "hidden_act": "gelu",
        "id2label": {str(i): f"class {i}" for i in range(arch.num_classes)},
    }
    if arch.version == 2:
        config["pretrained_window_sizes"] = [0, 0, 0, 0]
    (folder / "config.json").write_text(json.dumps(config | changes))
    _save(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_transformers_folders_load_equal(
    tmp_path: Path, tiny_model: SwinBase, spelling: str, prefix: bool
) -> None:
    state = _transformers_names(tiny_model, spelling, "swin." if prefix else "")
    loaded = load_checkpoint(_hub_folder(tmp_path / "hub", tiny_model, state))
    _check_equal(loaded, tiny_model, "transformers")
    assert loaded.classes == [f"class {i}" for i in range(10)]


@pytest.mark.parametrize("prefix", [True, False])
def test_transformers_v2_folders_take_windows_from_config_json(
    tmp_path: Path, tiny_model_v2: SwinBase, prefix: bool
) -> None:
    state = _transformers_names(tiny_model_v2, "old", "swinv2." if prefix else "")
    loaded = load_checkpoint(_hub_folder(tmp_path / "hub", tiny_model_v2, state))
    _check_equal(loaded, tiny_model_v2, "transformers")
    assert "window 4 from the config.json" in loaded.notes


def test_the_epsilon_of_config_json_is_kept_and_never_contradicted(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    state = _transformers_names(tiny_model, "old", "swin.")
    folder = _hub_folder(tmp_path / "hub", tiny_model, state, layer_norm_eps=1e-6)
    loaded = load_checkpoint(folder)
    assert loaded.architecture is not None and loaded.architecture.norm_eps == 1e-6
    with pytest.raises(CheckpointError, match="norm_eps: 1e-06 in the file, 1e-05 wanted"):
        load_checkpoint(folder, architecture=tiny_model.arch)


@pytest.mark.parametrize("version", ["Swin", "Swinv2"])
def test_transformers_own_files_give_its_logits(
    tmp_path: Path, randomise: Randomise, version: str
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{version}Config")(
        embed_dim=32, depths=[2, 2], num_heads=[1, 2], window_size=4, image_size=64
    )
    oracle = randomise(getattr(transformers, f"{version}ForImageClassification")(config))
    oracle.save_pretrained(tmp_path)
    torch.save(oracle.state_dict(), tmp_path / "memory.pth")  # names in memory, not on disk
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = oracle(pixel_values=image).logits
    from_folder = load_checkpoint(tmp_path)
    for loaded in (
        from_folder,
        load_checkpoint(tmp_path / "memory.pth", architecture=from_folder.architecture),
    ):
        assert loaded.architecture is not None
        ours = build_model(loaded.architecture).eval()
        load_into(ours, loaded)
        with torch.inference_mode():
            torch.testing.assert_close(ours(image), expected, atol=1e-5, rtol=0)


def _linears(model: SwinBase) -> list[str]:
    ends = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "reduction")
    return [name for name, _ in model.named_modules() if name.endswith(ends)]


def _attentions(model: SwinBase) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("attn")]


def _faster_transformer(model: SwinBase) -> State:
    state = _with_buffers(model)
    for i, name in enumerate(_linears(model)):
        for j, quantizer in enumerate(("input", "weight", "aftergemm")):
            state[f"{name}._{quantizer}_quantizer._amax"] = torch.tensor(1.0 + i + j / 4)
    for name in _attentions(model):
        for part in ("matmul_q", "matmul_k", "matmul_v", "matmul_a", "softmax"):
            state[f"{name}.{part}_input_quantizer._amax"] = torch.tensor(2.0)
        if model.arch.version == 2:
            state[f"{name}.mha_q_input_quantizer._amax"] = torch.tensor(1.0)
            state[f"{name}.mha_k_input_quantizer._amax"] = torch.tensor(1.0)
        block = name.removesuffix(".attn")
        for part in ("layernorm_input1", "layernorm_input2", "add1_local_input",
                     "add1_residual_input", "add2_local_input", "add2_residual_input"):  # fmt: skip
            state[f"{block}.{part}_quantizer._amax"] = torch.tensor(3.0)
    return state


def test_faster_transformer_ranges_are_renamed(tmp_path: Path, model: SwinBase) -> None:
    loaded = load_checkpoint(_save(_faster_transformer(model), tmp_path / "calib.pth"))
    _check_equal(loaded, model, "fastertransformer")
    first = _linears(model)[0]
    ranges = [f"{first}.{q}_quantizer._amax" for q in ("input", "weight", "output")]
    assert [loaded.amax[name].item() for name in ranges] == [1.0, 1.25, 1.5]
    attention = _attentions(model)[1]
    wanted = ["q", "k", "v", "a"] + (["mha_q", "mha_k"] if model.arch.version == 2 else [])
    assert all(f"{attention}.{part}_quantizer._amax" in loaded.amax for part in wanted)
    assert len(loaded.amax) == 3 * len(_linears(model)) + len(wanted) * len(_attentions(model))
    assert any("4 softmax_input_quantizer" in note for note in loaded.notes)


def _calibrated(model: SwinBase, weight_shape: tuple[int, ...] = (-1, 1)) -> State:
    state = _with_buffers(model)
    for name in _linears(model):
        weight = state[f"{name}.weight"]
        state[f"{name}.input_quantizer._amax"] = torch.tensor(2.5)
        state[f"{name}.weight_quantizer._amax"] = weight.abs().amax(1).view(weight_shape)
    return state


def test_modelopt_ranges_are_flattened_and_follow_the_layout(
    tmp_path: Path, tiny_model: SwinBase
) -> None:
    state = _calibrated(tiny_model)
    state["layers.0.blocks.0.norm1.input_quantizer._amax"] = torch.tensor(1.0)
    for layout, names in (("official", state), ("timm", _timm_names(state))):
        loaded = load_checkpoint(_save(names, tmp_path / f"{layout}.pth"))
        _check_equal(loaded, tiny_model, "modelopt")
        for name in _linears(tiny_model):
            weight = tiny_model.state_dict()[f"{name}.weight"]
            assert torch.equal(loaded.amax[f"{name}.weight_quantizer._amax"], weight.abs().amax(1))
            assert loaded.amax[f"{name}.input_quantizer._amax"].shape == ()
        assert len(loaded.amax) == 2 * len(_linears(tiny_model))
        assert any("dropped" in note for note in loaded.notes)


def test_own_calibrated_files_come_back_with_ranges_and_metadata(
    tmp_path: Path, model: SwinBase
) -> None:
    state = _calibrated(model, (-1,))
    first = _linears(model)[0]
    state[f"{first}.input_quantizer._amax"] = torch.rand(32)  # a vector over channels
    state[f"{_attentions(model)[0]}.q_quantizer._amax"] = torch.tensor([float("nan")])
    state[f"{first}.bias_correction"] = torch.rand(96)
    metadata = {
        "format": "swinq-calibrated",
        "architecture": json.dumps(model.arch.to_dict()),
        "classes": json.dumps([str(i) for i in range(10)]),
    }
    save_file(state, tmp_path / "calib.safetensors", metadata)
    loaded = load_checkpoint(tmp_path / "calib.safetensors")
    _check_equal(loaded, model, "swinq")
    wanted = {name for name in state if name.endswith("_amax")}
    assert set(loaded.amax) == wanted
    assert all(loaded.amax[name].shape == state[name].shape for name in wanted)
    assert torch.equal(
        loaded.amax[f"{first}.input_quantizer._amax"], state[f"{first}.input_quantizer._amax"]
    )
    assert torch.equal(
        loaded.corrections[f"{first}.bias_correction"], state[f"{first}.bias_correction"]
    )
    assert loaded.metadata == metadata
    assert loaded.classes == [str(i) for i in range(10)]


def test_a_quantized_v2_models_own_bias_names_are_understood(
    tmp_path: Path, tiny_model_v2: SwinBase
) -> None:
    state = _renamed(_with_buffers(tiny_model_v2), (r"attn\.([qv]_bias)$", r"attn.qkv.\1"))
    _check_equal(load_checkpoint(_save(state, tmp_path / "a.pth")), tiny_model_v2, "official")


def test_a_negative_range_is_refused_by_name(tmp_path: Path, tiny_model: SwinBase) -> None:
    state = _calibrated(tiny_model)
    state["layers.0.blocks.0.attn.qkv.input_quantizer._amax"] = torch.tensor(-1.0)
    with pytest.raises(CheckpointError, match="layers.0.blocks.0.attn.qkv.input_quantizer"):
        load_checkpoint(_save(state, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("layers.0.blocks.1.mlp._moe_layer.gates.0.wg.weight", "Swin-MoE"),
        ("layers.0.blocks.0.spatial_mlp.weight", "Swin-MLP"),
        ("absolute_pos_embed", "absolute position embedding"),
        ("swin.embeddings.position_embeddings", "absolute position embedding"),
        ("encoder.mask_token", "SimMIM"),
        ("decoder.0.weight", "SimMIM"),
        ("layers.0.blocks.0.attn.qkv.input_quantizer._pre_quant_scale", "smoothed by ModelOpt"),
    ],
)
def test_models_that_swinq_does_not_run_are_refused_by_name(
    tmp_path: Path, tiny_model: SwinBase, name: str, what: str
) -> None:
    state = tiny_model.state_dict() | {name: torch.zeros(3)}
    with pytest.raises(CheckpointError, match=what) as caught:
        load_checkpoint(_save(state, tmp_path / "a.pth"))
    assert name in caught.value.problem and caught.value.fix


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"QK_SCALE": 0.2}, "custom QK_SCALE 0.2"),
        ({"APE": True}, "APE"),
        ({"PATCH_NORM": False}, "PATCH_NORM"),
    ],
)
def test_a_stored_configuration_that_changes_the_arithmetic_is_refused(
    tmp_path: Path, tiny_model: SwinBase, section: dict[str, object], what: str
) -> None:
    from yacs.config import CfgNode

    config = CfgNode({"MODEL": {"TYPE": "swin", "SWIN": section}})
    torch.save({"model": tiny_model.state_dict(), "config": config}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=what):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act gelu_new"),
        ({"image_size": [32, 64]}, "non-square"),
        ({"use_absolute_embeddings": True}, "absolute position embedding"),
    ],
)
def test_a_hub_configuration_that_changes_the_arithmetic_is_refused(
    tmp_path: Path, tiny_model: SwinBase, change: dict[str, object], what: str
) -> None:
    state = _transformers_names(tiny_model, "old", "swin.")
    with pytest.raises(CheckpointError, match=what):
        load_checkpoint(_hub_folder(tmp_path, tiny_model, state, **change))


def test_unknown_layouts_are_refused_with_some_of_their_names(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    with pytest.raises(CheckpointError, match="cls_token, pos_embed"):
        load_checkpoint(_save(state, tmp_path / "a.pth"))


def test_loading_imports_nothing_that_the_file_names(
    tmp_path: Path, tiny_model: SwinBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_where_it_was_saved")
    module.Config = type(
        "Config", (dict,), {"__module__": module.__name__, "__qualname__": "Config"}
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        torch.save(
            {"model": _with_buffers(tiny_model), "config": module.Config(a=1)}, tmp_path / "a.pth"
        )
    _check_equal(load_checkpoint(tmp_path / "a.pth"), tiny_model, "official")
    assert module.__name__ not in sys.modules
