"""The engine's plans on kernels that are plain loops: forwards of libswinq without a GPU.

Plans, buffers, weight layouts and per-layer precisions are the engine's own; only the kernels are
those of csrc/tests/host_kernels.cpp. scripts/build_kernels.sh builds the library.
"""

import ctypes
import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from swinq.errors import EngineError
from swinq.export.format import allowed_precisions, encode, layers
from swinq.export.integrity import digests
from swinq.export.plain import collect_plain
from swinq.int8 import abi
from swinq.int8 import device as devices
from swinq.int8.engine import CudaSwin
from swinq.int8.library import VARIABLE, Library
from swinq.int8.model import Int8Swin
from swinq.int8.plan import Weights, _model
from swinq.models.architecture import Architecture
from tests.export.calibrated_model import lively_model
from tests.int8.made_checkpoint import (
    made_architecture,
    made_checkpoint,
    overflowing_attention,
    write_made,
)

HOST = 0x1000  # which csrc/tests/host_runtime.cpp says is no memory of the device
LIBRARY = Path(__file__).resolve().parents[1] / "build" / "kernels" / "libswinq_host.so"

# Narrow heads are padded, 10 classes too; 16 are not. Windows of 4 in stages of 16 and 8 tokens.
NARROW_HEADS = {"embed_dim": 48, "num_heads": (2, 4)}
ARCHITECTURES = {
    "v1": made_architecture(1),
    "v2": made_architecture(2),
    "v1 narrow heads": made_architecture(1, **NARROW_HEADS),
    # its hidden channels are 160 and 320 only if the ratio is a double
    "v2 narrow heads": made_architecture(2, **NARROW_HEADS, num_classes=16, mlp_ratio=10 / 3),
    "v1 three stages": made_architecture(
        1, depths=(1, 2, 1), num_heads=(1, 2, 4), pretrained_window_sizes=(0, 0, 0)
    ),
    "v2 large window": made_architecture(2, img_size=40, window_size=10, patch_size=2),
}


class Options(ctypes.Structure):
    """swinq_plan_options."""

    _fields_ = [
        ("fuse_mlp", ctypes.c_int32),
        ("fuse_norm", ctypes.c_int32),
        ("use_tile_cache", ctypes.c_int32),
    ]


@pytest.fixture(scope="module")
def library() -> Library:
    if not LIBRARY.is_file():
        pytest.skip(f"no {LIBRARY}: bash scripts/build_kernels.sh builds it where nvcc is")
    return Library(LIBRARY)


def call(library: Library, name: str, *arguments: object) -> None:
    """A function that the Python package has no use for, with errors in words."""
    function = getattr(library._handle, f"swinq_{name}")
    if function(*arguments) != abi.OK:
        raise EngineError((library._last_error() or b"").decode())


@contextmanager
def plan_of(library: Library, weights: Weights, *options: int) -> Iterator[ctypes.c_void_p]:
    tensors = {name: tensor.contiguous() for name, tensor in weights.tensors.items()}
    model = _model(weights.architecture, tensors, weights.precision)
    plan = ctypes.c_void_p()
    chosen = Options(*(options or (1, 1)), 0)
    call(
        library,
        "plan_create_with_options",
        ctypes.byref(model),
        ctypes.byref(chosen),
        0,
        ctypes.byref(plan),
    )
    try:
        yield plan
    finally:
        library.plan_destroy(plan)


def forward(library: Library, plan: ctypes.c_void_p, images: Tensor, classes: int) -> Tensor:
    """Logits of a batch, from a workspace whose every byte is part of a NaN."""
    size = ctypes.c_size_t()
    library.workspace_size(plan, len(images), ctypes.byref(size))
    memory = torch.full((size.value + 512,), 255, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    workspace = memory[start : start + size.value]
    logits = torch.full((len(images) + 1, classes), 7.0)
    library.forward(
        plan,
        images.data_ptr(),
        abi.TYPES[images.dtype],
        len(images),
        logits.data_ptr(),
        workspace.data_ptr(),
        size.value,
        None,
    )
    assert bool((memory[:start] == 255).all() and (memory[start + size.value :] == 255).all())
    assert bool((logits[-1] == 7.0).all())
    return logits[:-1]


def made_images(arch: Architecture, batch: int = 2) -> Tensor:
    return torch.randn(batch, arch.in_chans, arch.img_size, arch.img_size)


def require_close(found: Tensor, wanted: Tensor, share: float) -> None:
    """A wrong tensor, scale or buffer is off by the logits' own size; rounding is not."""
    error = (found - wanted).abs().max()
    assert error <= share * wanted.std(), f"{error:g} of {wanted.std():g}"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", [1, 2])
def test_plan_computes_what_the_reference_computes(library: Library, name: str, mode: int) -> None:
    arch = ARCHITECTURES[name]
    checkpoint = made_checkpoint(arch, mode=mode)
    images = made_images(arch)
    wanted = Int8Swin(checkpoint)(images)
    for options in itertools.product((0, 1), repeat=2):
        with plan_of(library, checkpoint, *options) as plan:
            found = forward(library, plan, images, arch.num_classes)
        require_close(found, wanted, 0.02)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_every_layer_has_its_own_precision(library: Library, version: int, seed: int) -> None:
    arch = made_architecture(version, **(NARROW_HEADS if seed % 2 else {}))
    chosen = random.Random(seed)
    mode = chosen.choice((1, 2))
    precision = {
        layer.name: chosen.choice(allowed_precisions(layer, mode)) for layer in layers(arch)
    }
    checkpoint = made_checkpoint(arch, mode=mode, precision=precision, seed=seed)
    images = made_images(arch).half()
    wanted = Int8Swin(checkpoint)(images)
    for options in ((0, 0), (1, 1)):
        with plan_of(library, checkpoint, *options) as plan:
            found = forward(library, plan, images, arch.num_classes)
        require_close(found, wanted, 0.02)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.02), ("fp32", 1e-4)])
def test_plain_models_compute_the_float_model(
    library: Library, name: str, precision: str, share: float
) -> None:
    arch = ARCHITECTURES[name]
    model = lively_model(arch)
    images = made_images(arch)
    with torch.no_grad():
        wanted = model(images)
    with plan_of(library, collect_plain(model, precision)) as plan:
        found = forward(library, plan, images, arch.num_classes)
    require_close(found, wanted, share)


def test_a_vector_of_input_scales_scales_each_channel(library: Library) -> None:
    for version in (1, 2):
        arch = made_architecture(version, **NARROW_HEADS)
        checkpoint = made_checkpoint(arch)
        for name, scale in checkpoint.tensors.items():
            if name.endswith(".input_scale"):
                width = checkpoint.tensors[name.replace("input_scale", "weight")].shape[1]
                checkpoint.tensors[name] = scale * (1 + torch.arange(width) % 5)
        images = made_images(arch)
        with plan_of(library, checkpoint) as plan:
            found = forward(library, plan, images, arch.num_classes)
        require_close(found, Int8Swin(checkpoint)(images), 0.02)


@pytest.mark.parametrize("version", [1, 2])
def test_an_image_has_the_same_logits_in_any_batch(library: Library, version: int) -> None:
    arch = ARCHITECTURES[f"v{version}"]
    images = made_images(arch, 3)
    with plan_of(library, made_checkpoint(arch)) as plan:
        together = forward(library, plan, images, arch.num_classes)
        alone = [forward(library, plan, x[None].contiguous(), arch.num_classes) for x in images]
        few, many = launches(library, plan, 1), launches(library, plan, 3)
    assert torch.equal(together, torch.cat(alone))
    # v2's MLPs of a small batch are separate kernels
    assert few == many if version == 1 else few > many


def launches(library: Library, plan: ctypes.c_void_p, batch: int) -> int:
    count = ctypes.c_int()
    library.launch_count(plan, batch, ctypes.byref(count))
    return count.value


def test_preparing_a_batch_runs_nothing_and_refuses_what_a_forward_does(library: Library) -> None:
    arch = ARCHITECTURES["v1"]
    images = made_images(arch)
    with plan_of(library, made_checkpoint(arch)) as plan:
        wanted = forward(library, plan, images, arch.num_classes)
        for batch in (0, 2, 300):
            library.prepare(plan, batch)
        assert torch.equal(forward(library, plan, images, arch.num_classes), wanted)
        with pytest.raises(EngineError, match="batch is -1"):
            library.prepare(plan, -1)
        with pytest.raises(EngineError, match="kernels count up to 1073741824"):
            library.prepare(plan, 1 << 24)


class OnHost(CudaSwin):
    """The engine with workspaces that are aligned as those of a GPU are."""

    def _workspace(self, size: int, keep: bool) -> Tensor:
        made = super()._workspace(size + 256, keep)
        return made[-made.data_ptr() % 256 :]


def test_threads_that_share_a_stream_do_not_mix(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(library.path))
    monkeypatch.setattr(devices, "require", lambda device: torch.device("cpu"))
    model = OnHost(made_checkpoint(ARCHITECTURES["v1"]))
    torch.manual_seed(0)
    batches = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    wanted = [model(batch) for batch in batches]

    def run(which: int) -> bool:
        return all(torch.equal(model(batches[which]), wanted[which]) for _ in range(10))

    with ThreadPoolExecutor(len(batches)) as pool:
        assert all(pool.map(run, range(len(batches))))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_only_the_logits_of_a_non_finite_image_are_nan(
    library: Library, version: int, bad: float
) -> None:
    arch = made_architecture(version)
    images = made_images(arch, 3)
    with plan_of(library, made_checkpoint(arch)) as plan:
        wanted = forward(library, plan, images, arch.num_classes)
        images[1, 2, 5, 7] = bad
        found = forward(library, plan, images, arch.num_classes)
    assert torch.equal(found[::2], wanted[::2])
    assert bool(found[1].isnan().all())


@pytest.mark.parametrize("version", [1, 2])
def test_an_overflow_of_the_stream_before_a_merge_makes_nan(library: Library, version: int) -> None:
    arch = made_architecture(version)
    checkpoint = made_checkpoint(arch)
    norm = "layers.0.blocks.1.norm2" if version == 2 else "patch_embed.norm"
    checkpoint.tensors[f"{norm}.bias"][3] = 7e4  # beyond fp16
    with plan_of(library, checkpoint) as plan:
        found = forward(library, plan, made_images(arch), arch.num_classes)
    assert bool(found.isnan().all())


@pytest.mark.parametrize(("version", "row"), [(1, 5), (1, 37), (1, 70), (2, 70)])
def test_an_overflow_in_an_fp16_attention_makes_nan_though_codes_would_hide_it(
    library: Library, version: int, row: int
) -> None:
    checkpoint = overflowing_attention(version, row)
    arch = checkpoint.architecture
    with plan_of(library, checkpoint) as plan:
        found = forward(library, plan, made_images(arch), arch.num_classes)
    assert bool(found.isnan().all())


@pytest.mark.parametrize("mode", [1, 2])
def test_a_plan_from_the_file_is_the_same_plan(library: Library, tmp_path: Path, mode: int) -> None:
    arch = ARCHITECTURES["v2 narrow heads"]
    path = write_made(tmp_path / "é \U0001f600.safetensors", arch, mode=mode)
    images = made_images(arch)
    with plan_of(library, made_checkpoint(arch, mode=mode)) as plan:
        wanted = forward(library, plan, images, arch.num_classes)
    plan = ctypes.c_void_p()
    call(library, "plan_create_from_file", bytes(path), mode, 0, ctypes.byref(plan))
    found = abi.ArchitectureStruct()
    call(library, "plan_architecture", plan, ctypes.byref(found))
    assert (found.version, found.img_size, found.num_classes) == (2, arch.img_size, 16)
    assert torch.equal(forward(library, plan, images, arch.num_classes), wanted)
    library.plan_destroy(plan)
    with pytest.raises(EngineError, match=f"int8 mode {mode}, int8 mode {3 - mode} was asked for"):
        call(library, "plan_create_from_file", bytes(path), 3 - mode, 0, ctypes.byref(plan))


def refused_file(library: Library, path: Path, words: str) -> None:
    plan = ctypes.c_void_p()
    with pytest.raises(EngineError, match=words):
        call(library, "plan_create_from_file", bytes(path), 0, 0, ctypes.byref(plan))


def test_a_damaged_file_is_refused(library: Library, tmp_path: Path) -> None:
    arch = made_architecture(1, depths=(1, 1))
    path = write_made(tmp_path / "model.safetensors", arch)
    good = path.read_bytes()
    chosen = random.Random(0)
    for _ in range(150):
        at = chosen.randrange(len(good))
        flipped = good[at] ^ 1 << chosen.randrange(8)
        path.write_bytes(good[:at] + bytes([flipped]) + good[at + 1 :])
        refused_file(library, path, r"fix: ")
        path.write_bytes(good[: chosen.randrange(len(good))])
        refused_file(library, path, r"fix: ")
    path.write_bytes(good)
    plan = ctypes.c_void_p()
    call(library, "plan_create_from_file", bytes(path), 1, 0, ctypes.byref(plan))
    library.plan_destroy(plan)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", "other", "format is 'other', wanted 'swinq-int8'"),
        ("format_version", "2", "format_version is '2', this swinq reads 1"),
        ("classes", None, "metadata: classes is missing"),
        ("more", "x", "metadata: 'more' is unknown"),
        ("int8_mode", "3", "int8_mode is '3', wanted 1 or 2"),
        ("int8_mode", "2", "fc2 is 'int8', which int8 mode 2 does not allow"),
        ("precision", '{"norm": "int8"}', "no precision given"),
        ("precision", "[]", "precision is a list, wanted an object"),
        ("transform", "{", "no JSON: a key is missing"),
        ("classes", "[1]", "neither a list of names nor null"),
        ("classes", '["a", "b", "c"]', "3 class names for a head of 10 classes"),
        ("architecture", "{}", "architecture: missing key version"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    library: Library, tmp_path: Path, key: str, value: str | None, words: str
) -> None:
    path = write_made(tmp_path / "model.safetensors", made_architecture(1, depths=(1, 1)))
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    metadata |= {key: value} if value is not None else {}
    if value is None:
        del metadata[key]
    metadata["digests"] = encode(digests(tensors, metadata))
    save_file(tensors, path, metadata)
    refused_file(library, path, words)


def test_forward_refuses_what_it_cannot_run(library: Library) -> None:
    arch = ARCHITECTURES["v1"]
    memory = torch.zeros(1 << 20, dtype=torch.uint8)
    at = memory.data_ptr() + -memory.data_ptr() % 256
    with plan_of(library, made_checkpoint(arch)) as plan:
        for changed, words in (
            ({0: None}, "plan is null"),
            ({1: None}, "images is null"),
            ({1: at + 2}, "images is at .* not aligned to 16 bytes"),
            ({2: abi.INT8}, "image_type is 0"),
            ({3: -1}, "batch is -1"),
            ({3: 1 << 24}, "kernels count up to 1073741824"),
            ({4: at + 4}, "logits is at"),
            ({1: HOST}, "images is at 0x1000 in the memory of the host, the plan is on device 0"),
            ({4: HOST}, "logits is at 0x1000 in the memory of the host"),
            ({5: HOST}, "workspace is at 0x1000 in the memory of the host"),
            ({5: at + 16}, "workspace is at .* not aligned to 256 bytes"),
            ({6: 1000}, "workspace has 1000 bytes, a batch of 1 wants"),
        ):
            good = {0: plan, 1: at, 2: abi.FLOAT, 3: 1, 4: at, 5: at, 6: 1 << 20, 7: None}
            with pytest.raises(EngineError, match=words):
                library.forward(*(good | changed).values())
        nothing = {0: plan, 1: None, 2: abi.FLOAT, 3: 0, 4: None, 5: None, 6: 0, 7: None}
        library.forward(*nothing.values())


def test_a_plan_names_what_is_wrong_with_a_model(library: Library) -> None:
    arch = ARCHITECTURES["v1"]
    qkv = "layers.0.blocks.0.attn.qkv"

    def refused(words: str, arch: Architecture = arch, **changes: object) -> None:
        made = made_checkpoint(arch)
        tensors = made.tensors | changes.pop("tensors", {})  # type: ignore[operator]
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        precision = made.precision | changes.pop("precision", {})  # type: ignore[operator]
        model = _model(made.architecture, tensors, precision)
        for field, value in changes.items():
            setattr(model.architecture, field, value)
        plan = ctypes.c_void_p()
        with pytest.raises(EngineError, match=words):
            library.plan_create(ctypes.byref(model), 0, ctypes.byref(plan))

    good = made_checkpoint(arch).tensors
    refused("missing tensor: norm.bias", tensors={"norm.bias": None})
    refused("does not have: more", tensors={"more": torch.zeros(3)})
    refused(
        r"qkv.bias is float32 \[95\], wanted float32 \[96\]",
        tensors={f"{qkv}.bias": torch.zeros(95)},
    )
    refused("qkv.weight is float16", tensors={f"{qkv}.weight": good[f"{qkv}.weight"].half()})
    refused(
        "holds the code -128", tensors={f"{qkv}.weight": good[f"{qkv}.weight"].clone().fill_(-128)}
    )
    refused(
        "1 of 32 values are NaN",
        tensors={"norm.bias": None}
        | {
            "patch_embed.norm.bias": torch.tensor([float("nan")] + [0.0] * 31),
            "norm.bias": good["norm.bias"],
        },
    )
    refused("holds the scale -1", tensors={f"{qkv}.input_scale": torch.tensor(-1.0)})
    refused("wanted 0 or at least 2", tensors={f"{qkv}.input_scale": torch.tensor(1e-39)})
    refused(
        r"holds 1e\+30, wanted at most 16384",
        tensors={f"{qkv}.input_scale": torch.tensor(1e30)},
    )
    refused(
        r"norm.bias holds -1e\+30, wanted at most 1.1259e\+15",
        tensors={"norm.bias": good["norm.bias"].clone().fill_(-1e30)},
    )
    refused("norm_eps is 0, wanted", norm_eps=0.0)
    refused("mlp_ratio 1025, wanted more than 0 and at most 1024", mlp_ratio=1025.0)
    refused("'int8-unrounded', wanted int8 or fp16", precision={qkv: "int8-unrounded"})
    refused("1 of 21 layers are fp32", precision={qkv: "fp32"})
    refused("other: not a layer", precision={"other": "int8"})
    refused("version is 3", version=3)
    refused("stages is 9; it must be at most 8", stages=9)
    refused("img_size 33 is not a multiple", img_size=33)
    refused("stage 0 has 512 windows across", made_architecture(1, img_size=1024, window_size=1))
    wide = made_architecture(1, img_size=64, patch_size=16, embed_dim=192, num_heads=(6, 12))
    refused("patch_size 16 with embed_dim 192 wants 294912 bytes of shared memory", wide)
    wide = made_architecture(1, img_size=600, window_size=150)
    refused("window_size 150 wants 270000 bytes of shared memory a block, the GPU has", wide)
    refused("window_size 5 does not divide", window_size=5)
    refused("far more than", depths=(ctypes.c_int32 * 8)(1 << 19, 1 << 19))
    refused(
        "64 channels a head in stage 0; kernels exist for up to 32",
        made_architecture(1, embed_dim=64),
    )
    refused("multiples of 16", made_architecture(1, embed_dim=24))
    refused(
        "kernels exist for up to 256 channels",
        made_architecture(1, embed_dim=512, num_heads=(16, 32)),
    )
