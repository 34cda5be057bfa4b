"""From float to integers: the INT8 model computes the codes of the fake-quant model it came from.

Whole models cannot be compared code by code: one code that falls the other way changes others after
it, and two runs of the same fake-quant model that differ in the last bit of their input end with
many. So every layer is given the inputs that the integer model had there, and its codes are
compared with the integer model's own. What is left are values on the edge between two codes:

- a GEMM's epilogue is one fused multiply-add in the integer model, a product and a sum rounded
  apart in the fake-quant model;
- GELU and the softmax's exponential are two implementations, equal up to the last bits;
- a LayerNorm sees the same fp16 stream, but may sum its row in another order.

Each moves a value by about 1e-7 of its size, and about one value in 1e5 lies so close to an edge.
An fp16 number of the stream has 16 times as many edges as a code: of 2048 values, not 128.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinq
from swinq.data.datasets import open_dataset
from swinq.data.transforms import eval_transform
from swinq.demo.checkpoint import CHECKPOINT
from swinq.int8.model import Int8Swin
from swinq.models.architecture import Architecture
from swinq.models.layers import merge_neighbours, window_partition, window_reverse
from swinq.quant.attention import QuantAttention
from swinq.quant.insert import set_int8_mode
from swinq.quant.linear import QuantLinear
from swinq.quant.quantizer import TensorQuantizer
from swinq.quant.stream import half_stream
from tests.export.calibrated_model import images as noise
from tests.export.calibrated_model import lively_model

EDGES = 3e-5  # share of codes that may fall the other way; the largest seen is 7e-6
STREAM_EDGES = 3e-4  # the same of the residual stream's fp16 numbers; the largest seen is 1e-4

Pair = tuple[str, Tensor, Tensor]  # a tensor's name, the integer model's codes, the fake-quant's


def value(quantizer: TensorQuantizer, codes: Tensor) -> Tensor:
    """What codes stand for."""
    scale, _ = quantizer.scale()
    return codes.float() * quantizer.broadcast(scale, codes.ndim)


class SameInputs:
    """A fake-quant model, layer by layer, on what an integer model had before each layer."""

    def __init__(self, model: nn.Module, trace: dict[str, Tensor]) -> None:
        self.model, self.trace = model, trace
        self.pre_norm = model.arch.version == 1

    def pairs(self) -> Iterator[Pair]:
        """Every int8 tensor and every write to the residual stream."""
        x = self.stream("patch_embed.stream")
        for i, stage in enumerate(self.model.layers):
            for j, block in enumerate(stage.blocks):
                name = f"layers.{i}.blocks.{j}"
                yield from self.attention(f"{name}.attn", block, x)
                yield from self.mlp(f"{name}.mlp", block, self.stream(f"{name}.attn.stream"))
                x = self.stream(f"{name}.mlp.stream")
            if stage.downsample is not None:
                yield from self.merge(f"layers.{i}.downsample", stage.downsample, x)
                x = self.stream(f"layers.{i}.downsample.stream")

    def stream(self, name: str) -> Tensor:
        """The residual stream as the integer model wrote it, fp16 values."""
        return self.trace[name].float()

    def linear(self, name: str, layer: QuantLinear, x: Tensor) -> Iterator[Pair]:
        """Input and, where it is rounded, output of a linear layer whose input is x."""
        yield f"{name}.input", self.trace[f"{name}.input"], layer.input_quantizer.codes(x)[0]
        if layer.output_quantizer.enabled:
            output, _ = layer.output_quantizer.codes(self.computed(name, layer))
            yield f"{name}.output", self.trace[f"{name}.output"], output

    def computed(self, name: str, layer: QuantLinear) -> Tensor:
        """The layer's output for the codes that the integer model fed it."""
        output: Tensor = layer(value(layer.input_quantizer, self.trace[f"{name}.input"]))
        return output

    def passed_on(self, name: str, layer: QuantLinear) -> Tensor:
        """What follows the layer in the integer model, as far as codes tell: else computed."""
        if layer.output_quantizer.enabled:
            return value(layer.output_quantizer, self.trace[f"{name}.output"])
        return self.computed(name, layer)

    def attention(self, name: str, block: nn.Module, x: Tensor) -> Iterator[Pair]:
        attn: QuantAttention = block.attn
        windows = self.windows(block, block.norm1(x) if self.pre_norm else x)
        yield from self.linear(f"{name}.qkv", attn.qkv, windows)
        y = self.computed(f"{name}.qkv", attn.qkv)  # (W, N, 3C)
        q, k, v = y.view(*y.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        if not self.pre_norm:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        operands = {}
        for part, tensor in (("q", q), ("k", k), ("v", v)):
            quantizer: TensorQuantizer = getattr(attn, f"{part}_quantizer")
            codes = self.trace[f"{name}.{part}"]
            yield f"{name}.{part}", codes, quantizer.codes(tensor)[0]
            scale = quantizer.broadcast(quantizer.scale()[0], 4)
            operands[part] = (codes.float(), scale)
        # unit vectors in place of v give p / sum p, and the largest p of a row is 255
        found = self.trace[f"{name}.probabilities"]  # (W, heads, N, N) u8
        unit = torch.eye(found.shape[-1]).expand_as(found), torch.ones(())
        shares = self.attended(block, operands["q"], operands["k"], unit)
        shares = shares.unflatten(2, found.shape[1::2]).transpose(1, 2)
        p = (255 * shares / shares.amax(-1, keepdim=True)).round()
        yield f"{name}.probabilities", found, p
        output = self.attended(block, operands["q"], operands["k"], operands["v"])
        yield from self.linear(f"{name}.proj", attn.proj, output)
        y = self.unwindowed(block, self.passed_on(f"{name}.proj", attn.proj))
        yield self.added(f"{name}.stream", x, y if self.pre_norm else block.norm1(y))

    @staticmethod
    def attended(block: nn.Module, *operands: tuple[Tensor, Tensor]) -> Tensor:
        """Attention on (codes, scale) of q, k and v: (W, N, C)."""
        scale = block.attn.softmax_scale()
        return block.attn.attend_codes(*operands, mask=block.attn_mask, softmax_scale=scale)

    def mlp(self, name: str, block: nn.Module, x: Tensor) -> Iterator[Pair]:
        mlp: nn.Module = block.mlp
        fc1: QuantLinear = mlp.fc1
        fc2: QuantLinear = mlp.fc2
        yield from self.linear(f"{name}.fc1", fc1, block.norm2(x) if self.pre_norm else x)
        hidden = mlp.act(self.computed(f"{name}.fc1", fc1))
        yield from self.linear(f"{name}.fc2", fc2, hidden)
        y = self.passed_on(f"{name}.fc2", fc2)
        yield self.added(f"{name}.stream", x, y if self.pre_norm else block.norm2(y))

    def merge(self, name: str, merge: nn.Module, x: Tensor) -> Iterator[Pair]:
        reduction: QuantLinear = merge.reduction
        squares = merge_neighbours(x, merge.resolution)
        squares = merge.norm(squares) if self.pre_norm else squares
        yield from self.linear(f"{name}.reduction", reduction, squares)
        y = self.passed_on(f"{name}.reduction", reduction)
        yield self.added(f"{name}.stream", 0.0, y if self.pre_norm else merge.norm(y))

    def added(self, name: str, x: Tensor | float, y: Tensor) -> Pair:
        """A write to the stream: fp16 numbers as integers in their order, an ulp apart."""
        return name, in_order(self.trace[name]), in_order((x + y).half())

    @staticmethod
    def windows(block: nn.Module, x: Tensor) -> Tensor:
        """(B, H*W, C) -> (B*nW, N, C)."""
        side, shift = block.resolution, block.shift
        grid = x.view(len(x), side, side, -1).roll((-shift, -shift), (1, 2))
        return window_partition(grid, block.window)

    @staticmethod
    def unwindowed(block: nn.Module, x: Tensor) -> Tensor:
        """(B*nW, N, C) -> (B, H*W, C)."""
        side, shift = block.resolution, block.shift
        grid = window_reverse(x, block.window, side, side)
        return grid.roll((shift, shift), (1, 2)).flatten(1, 2)


def in_order(x: Tensor) -> Tensor:
    """fp16 numbers as consecutive integers."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


class Differences:
    """Codes that differ, by the kind of tensor: "qkv.input", "attn.q", "mlp.stream", ..."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.codes: dict[str, int] = defaultdict(int)
        self.differing: dict[str, int] = defaultdict(int)
        self.largest: dict[str, int] = defaultdict(int)
        for name, integer, fake in pairs:
            kind = ".".join(name.split(".")[-2:])
            apart = (integer.int() - fake.int()).abs()
            self.codes[kind] += apart.numel()
            self.differing[kind] += int((apart > 0).sum())
            self.largest[kind] = max(self.largest[kind], int(apart.max()))

    def share(self, kind: str) -> float:
        return self.differing[kind] / self.codes[kind]


@dataclass(frozen=True)
class Calibrated:
    """A calibrated model, and images that it was not calibrated on."""

    model: nn.Module
    few: Tensor  # to be compared code by code
    many: Tensor  # to be judged as a whole

    def in_mode(self, mode: int) -> nn.Module:
        return set_int8_mode(self.model, mode)

    def exported(self, mode: int, folder: Path) -> Int8Swin:
        path = folder / f"mode{mode}.safetensors"
        swinq.export_model(self.model, path, int8_mode=mode)
        return Int8Swin.load(path)


@pytest.fixture(scope="module", params=["digits", "v1", "v2"])
def calibrated(
    request: pytest.FixtureRequest,
    tiny_architecture: Architecture,
    tiny_architecture_v2: Architecture,
) -> Calibrated:
    """The demo's trained model on digits; tiny ones of either version with made-up weights."""
    if request.param == "digits":
        squash = eval_transform("squash", 32)
        train, val = (open_dataset("digits", split, squash) for split in ("train", "val"))
        model = swinq.calibrate(swinq.load(CHECKPOINT), [train[20 * i][0] for i in range(64)])
        many = torch.stack([image for image, _ in (val[i] for i in range(len(val)))])
        return Calibrated(model, many[:128], many)
    arch = tiny_architecture if request.param == "v1" else tiny_architecture_v2
    model = swinq.calibrate(lively_model(arch), noise(arch, 16))
    return Calibrated(model, noise(arch, 24, seed=3), noise(arch, 400, seed=9))


@pytest.mark.parametrize("mode", [1, 2])
def test_codes_are_those_of_fake_quantization_for_the_same_inputs(
    calibrated: Calibrated, mode: int, tmp_path: Path
) -> None:
    trace = calibrated.exported(mode, tmp_path).trace(calibrated.few, streams=True)
    with torch.no_grad():
        pairs = list(SameInputs(calibrated.in_mode(mode), trace).pairs())
    assert {name for name, _, _ in pairs} == trace.keys() - {"patch_embed.stream", "logits"}
    found = Differences(pairs)
    assert min(found.codes.values()) > 90_000  # enough to see one in 1e4
    for kind in found.codes:
        told = f"{kind}: {found.differing[kind]} of {found.codes[kind]}"
        assert found.largest[kind] <= 1, told
        assert found.share(kind) <= (STREAM_EDGES if kind.endswith("stream") else EDGES), told


def sharpen_softmax(model: nn.Module) -> None:
    attn = model.get_submodule("layers.0.blocks.1.attn")
    scale = attn.softmax_scale()
    attn.softmax_scale = lambda: scale * 1.01


def forget_correction(model: nn.Module) -> None:
    model.get_submodule("layers.1.blocks.0.mlp.fc1").bias_correction.zero_()


def widen_range(model: nn.Module) -> None:
    quantizer = model.get_submodule("layers.0.blocks.0.attn.v_quantizer")
    quantizer.load_calib_amax(quantizer.amax * 1.001)


def shrink_column(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("layers.0.downsample.reduction").weight[:, 5] *= 0.98


@pytest.mark.parametrize(
    ("mistake", "kind"),
    [
        (sharpen_softmax, "attn.probabilities"),
        (forget_correction, "fc2.input"),
        (widen_range, "attn.v"),
        (shrink_column, "reduction.output"),
    ],
)
def test_the_comparison_sees_a_mistake(
    mistake: Callable[[nn.Module], None], kind: str, calibrated: Calibrated, tmp_path: Path
) -> None:
    trace = calibrated.exported(1, tmp_path).trace(calibrated.few, streams=True)
    wrong = copy.deepcopy(calibrated.in_mode(1))
    mistake(wrong)
    with torch.no_grad():
        found = Differences(SameInputs(wrong, trace).pairs())
    assert found.share(kind) > 10 * EDGES


@pytest.mark.parametrize("mode", [1, 2])
def test_whole_model_differs_no_more_than_fake_quantization_from_itself(
    calibrated: Calibrated, mode: int, tmp_path: Path
) -> None:
    """The noise floor: the same fake-quant model whose residual stream is rounded to fp16."""
    model, images = calibrated.in_mode(mode), calibrated.many
    with torch.no_grad():
        fake = model(images)
        with half_stream(model):
            half = model(images)
        integer = calibrated.exported(mode, tmp_path)(images)
    assert agreement(integer, fake) >= agreement(half, fake) - 0.5
    assert rms(integer - fake) <= 1.5 * rms(half - fake)  # the largest seen is 1.13
    assert rms(half - fake) <= 0.01 * rms(fake)


def agreement(first: Tensor, second: Tensor) -> float:
    """Images with the same largest logit, in percent."""
    return 100 * float((first.argmax(1) == second.argmax(1)).double().mean())


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
