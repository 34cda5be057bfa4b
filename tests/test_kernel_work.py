"""What a forward's kernels must do: operations, bytes, floors, and which layer a kernel is of."""

import profile_kernels
import pytest
from benchmarking import work

from swinq.models.variants import find_variant
from tests.int8.made_checkpoint import made_architecture

GIGA_MACS = {  # published by timm, which also counts norms, biases and v2's position MLP
    "swin_tiny_patch4_window7_224": 4.51,
    "swin_large_patch4_window7_224": 34.53,
    "swinv2_tiny_patch4_window8_256": 5.96,
    "swinv2_base_patch4_window16_256": 22.02,
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": 55.25,
}
STARTS = {"embed": "patch_embed", "norm": "prenorm", "linear": "gemm"}


def separate(pieces: list[work.Piece]) -> list[str]:
    """Kernel names of an engine that fuses nothing."""
    return [STARTS.get(piece.kind, piece.kind) + "_kernel" for piece in pieces]


@pytest.mark.parametrize("name", GIGA_MACS)
def test_multiplications_are_those_that_timm_counts(name: str) -> None:
    arch = find_variant(name)
    assert arch is not None
    counted = work.macs(arch, 2) / 2e9
    assert 0.98 * GIGA_MACS[name] < counted <= GIGA_MACS[name]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("mode", [1, 2, None])
def test_each_kernel_gets_its_layer(version: int, mode: int | None) -> None:
    pieces = work.pieces(made_architecture(version), 2, mode)
    names = ["clear_status_kernel", *separate(pieces)]
    groups = work.assign(names, pieces)
    assert groups == [[], *([piece] for piece in pieces)]


def test_fused_kernels_get_several_layers_and_move_less() -> None:
    pieces = work.pieces(made_architecture(1), 2, 1)
    names: list[str] = []
    for piece, name in zip(pieces, separate(pieces), strict=True):
        if piece.name == "norm2":
            names.append("mlp_kernel")
        elif piece.name not in ("fc1", "fc2", "merge norm"):  # the reduction takes its norm along
            names.append(name)
    with pytest.raises(ValueError, match="nothing to do"):
        work.assign([*names, "pool_kernel"], pieces)
    groups = work.assign(names, pieces)
    assert [p for group in groups for p in group] == pieces
    (mlp, *_) = [g for g, name in zip(groups, names, strict=True) if name == "mlp_kernel"]
    assert [p.name for p in mlp][:3] == ["norm2", "fc1", "fc2"]
    stream = 2 * 2 * 16 * 16 * 32  # bytes: fp16, two images of 16 x 16 tokens, 32 channels
    weights = 2 * 32 * 64
    assert work.moved(mlp[:3]) == 2 * stream + weights
    assert work.moved(mlp[:3]) < sum(work.moved([p]) for p in mlp[:3])


def test_a_fused_mlp_of_v2_takes_its_norm_last() -> None:
    pieces = work.pieces(made_architecture(2), 2, 1)
    names = [
        "mlp_kernel" if piece.name == "fc1" else name
        for piece, name in zip(pieces, separate(pieces), strict=True)
        if piece.name not in ("fc2", "norm2")
    ]
    groups = work.assign(names, pieces)
    assert [p for group in groups for p in group] == pieces
    (mlp, *_) = [g for g, name in zip(groups, names, strict=True) if name == "mlp_kernel"]
    assert [p.name for p in mlp] == ["fc1", "fc2", "norm2"]
    values = 2 * 16 * 16 * 32  # of two images of 16 x 16 tokens, 32 channels
    weights = 2 * 32 * 64
    assert work.moved(mlp) == 2 * values + 2 * 2 * values + weights  # codes and fp16, in and out


def test_an_unfinished_forward_is_noticed() -> None:
    pieces = work.pieces(made_architecture(1), 2, 1)
    with pytest.raises(ValueError, match="head"):
        work.assign(separate(pieces)[:-1], pieces)


def test_floors_are_of_the_tighter_bound() -> None:
    device = work.DEVICES["H100"]
    compute = work.Piece("a", "linear", 0, macs=10**12, int8=True, reads={"x": 10**6})
    memory = work.Piece("b", "norm", 0, reads={"x": 10**9})
    assert work.floor([compute], device) == work.Floor(2e12 / device.int8, "tensor cores")
    assert work.floor([memory], device) == work.Floor(1e9 / device.memory, "memory")
    assert work.find_device("NVIDIA H100 80GB HBM3") is device
    assert work.find_device("another") is None


def test_kernels_that_overlap_count_from_the_end_of_the_one_before() -> None:
    events = [{"cat": "cpu_op", "ts": 0, "dur": 9, "name": "x"}]
    for start in (0.0, 100.0, 200.0):
        name = "void swinq::(anonymous namespace)::gemm_mma_kernel<1>(Arguments)"
        events.append({"cat": "kernel", "ts": start + 10, "dur": 10, "name": name})
        events.append({"cat": "kernel", "ts": start + 15, "dur": 12, "name": "pool_kernel"})
    assert profile_kernels.per_kernel(events, 3) == [
        ("gemm_mma_kernel", 10.0),
        ("pool_kernel", 7.0),
    ]
    with pytest.raises(Exception, match="did not all run the same"):
        profile_kernels.per_kernel(events[:-1], 3)


def test_kernel_table_adds_equal_layers_up() -> None:
    one = {"kernel": "gemm_kernel", "layers": "qkv", "stage": 0, "us": 2.0, "macs": 10**9}
    one |= {"bytes": 4 * 10**6, "floor_us": 1.0, "bound": "L2"}
    flags = {"kernel": "clear", "layers": "flags", "stage": -1, "us": 1.0, "macs": 0, "bytes": 0}
    lines = profile_kernels.kernel_table({"kernels": [flags, one, dict(one)]})
    assert lines[2] == "| qkv | 1 | `gemm_kernel` | 2 | 4.0 | 80.0 | 1000 | 2000 | 2.0 | 50 | L2 |"
    assert lines[-1].startswith("| all |  |  | 3 | 5.0 | 100 |")
