"""The work of a forward, piece by piece: multiplications, and the bytes that must move.

Kernels may do several pieces in a row; what one piece hands to the next within a kernel then moves
nothing. Counted are the products of matrices and of attention, without padding, and every tensor
once; statistics, softmax and GELU count as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from swinq.models.architecture import Architecture, Stage

_HALF, _FLOAT = 2, 4  # bytes
_PIXEL_BYTES = _HALF


@dataclass(frozen=True)
class Piece:
    """A layer of a forward.

    Attributes:
        kind: embed, norm, linear, attention or pool. stage: -1 before, the last one after.
        macs: multiplications. int8: whether they are of codes.
        reads, writes: bytes by tensor. weights: bytes.
    """

    name: str
    kind: str
    stage: int
    macs: int = 0
    int8: bool = False
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    weights: int = 0


@dataclass(frozen=True)
class Device:
    """Datasheet rates, operations and bytes in a second; and how many bytes the L2 hands over."""

    int8: float
    half: float
    memory: float
    cache: float
    cache_bytes: float


# The cache's rate is the low end of what is published; a product counts as two operations
DEVICES = {
    "H100": Device(1979e12, 989e12, 3.35e12, 5.5e12, 30e6),
    "H200": Device(1979e12, 989e12, 4.8e12, 5.5e12, 30e6),
    "A100": Device(624e12, 312e12, 2.04e12, 4.5e12, 24e6),
}


def find_device(name: str) -> Device | None:
    """By a GPU's own name; None where its rates are not known."""
    return next((device for key, device in DEVICES.items() if key in name), None)


def pieces(arch: Architecture, batch: int, mode: int | None) -> list[Piece]:
    """A forward in the order of its layers.

    Args:
        mode: INT8 mode 1 or 2, or None for FP16.
    """
    return _Pieces(arch, batch, mode).all()


def macs(arch: Architecture, batch: int) -> int:
    """Multiplications of a forward."""
    return sum(piece.macs for piece in pieces(arch, batch, 1))


class _Pieces:
    def __init__(self, arch: Architecture, batch: int, mode: int | None) -> None:
        self.arch, self.batch, self.mode = arch, batch, mode
        self.operand = 1 if mode else _HALF  # bytes of what GEMMs read
        self.made: list[Piece] = []

    def all(self) -> list[Piece]:
        arch, stages = self.arch, self.arch.stages()
        tokens = self.batch * stages[0].resolution ** 2
        patch = arch.in_chans * arch.patch_size**2
        written = {"x": _HALF * tokens * arch.embed_dim}
        if arch.version == 2 and self.mode:
            written["operand"] = tokens * arch.embed_dim
        self.made.append(
            Piece(
                "patch embedding",
                "embed",
                -1,
                macs=tokens * arch.embed_dim * patch,
                reads={"images": _PIXEL_BYTES * tokens * patch},
                writes=written,
                weights=_HALF * arch.embed_dim * patch,
            )
        )
        for stage in stages:
            for _ in range(stage.depth):
                self._block_v1(stage) if arch.version == 1 else self._block_v2(stage)
            if stage.merges:
                self._merge(stage)
        last = stages[-1]
        pooled = _HALF * self.batch * last.dim
        self._add("norm, pool", "pool", last.index, {"x": self._stream(last)}, {"pooled": pooled})
        self.made.append(
            Piece(
                "head",
                "linear",
                last.index,
                macs=self.batch * last.dim * arch.num_classes,
                reads={"pooled": pooled},
                writes={"logits": _FLOAT * self.batch * arch.num_classes},
                weights=_HALF * last.dim * arch.num_classes,
            )
        )
        return self.made

    # ---- blocks ----

    def _block_v1(self, stage: Stage) -> None:
        x, a, dim, hidden = self._sizes(stage)
        self._add("norm1", "norm", stage.index, {"x": x}, {"operand": a})
        self._attention(stage, {"operand": a})
        self._product("proj", stage, dim * dim, {"o": a, "x": x}, {"x": x})
        self._add("norm2", "norm", stage.index, {"x": x}, {"operand": a})
        wide = hidden * self._rows(stage) * self.operand
        self._product("fc1", stage, hidden * dim, {"operand": a}, {"hidden": wide})
        self._product("fc2", stage, hidden * dim, {"hidden": wide, "x": x}, {"x": x})

    def _block_v2(self, stage: Stage) -> None:
        x, a, dim, hidden = self._sizes(stage)
        reads = {"operand": a} if self.mode else {"x": x}
        written = {"x": x, "operand": a} if self.mode else {"x": x}
        rounded = self._rows(stage) * dim * (1 if self.mode else _FLOAT)
        unrounded = self._rows(stage) * dim * (1 if self.mode == 1 else _FLOAT)
        self._attention(stage, reads)
        self._product("proj", stage, dim * dim, {"o": a}, {"y": rounded})
        self._add("norm1", "norm", stage.index, {"y": rounded, "x": x}, written)
        wide = hidden * self._rows(stage) * self.operand
        self._product("fc1", stage, hidden * dim, reads, {"hidden": wide})
        self._product("fc2", stage, hidden * dim, {"hidden": wide}, {"y": unrounded})
        self._add("norm2", "norm", stage.index, {"y": unrounded, "x": x}, written)

    def _attention(self, stage: Stage, reads: Mapping[str, int]) -> None:
        rows, a = self._rows(stage), self._activation(stage)
        self._product("qkv", stage, 3 * stage.dim**2, reads, {"qkv": 3 * a})
        self.made.append(
            Piece(
                "attention",
                "attention",
                stage.index,
                macs=2 * rows * stage.window**2 * stage.dim,
                int8=bool(self.mode),
                reads={"qkv": 3 * a},
                writes={"o": a},
                weights=_FLOAT * stage.heads * (2 * stage.window - 1) ** 2,
            )
        )

    def _merge(self, stage: Stage) -> None:
        x, a = self._stream(stage), self._activation(stage)
        self._add("merge norm", "norm", stage.index, {"x": x}, {"merged": a})
        rows, dim = self._rows(stage) // 4, stage.dim
        y = 2 * dim * rows * (1 if self.mode == 1 else _FLOAT)
        two = self.arch.version == 2
        self.made.append(
            Piece(
                "reduction",
                "linear",
                stage.index,
                macs=rows * 4 * dim * 2 * dim,
                int8=bool(self.mode),
                reads={"merged": a},
                writes={"y": y} if two else {"x": x // 2},
                weights=8 * dim * dim * self.operand,
            )
        )
        if two:
            written = {"x": x // 2, "operand": a // 2} if self.mode else {"x": x // 2}
            self._add("merge norm", "norm", stage.index, {"y": y}, written)

    # ---- parts ----

    def _product(
        self,
        name: str,
        stage: Stage,
        size: int,
        reads: Mapping[str, int],
        writes: Mapping[str, int],
    ) -> None:
        self.made.append(
            Piece(
                name,
                "linear",
                stage.index,
                macs=self._rows(stage) * size,
                int8=bool(self.mode),
                reads=reads,
                writes=writes,
                weights=size * self.operand,
            )
        )

    def _add(
        self,
        name: str,
        kind: str,
        stage: int,
        reads: Mapping[str, int],
        writes: Mapping[str, int],
    ) -> None:
        self.made.append(Piece(name, kind, stage, reads=reads, writes=writes))

    def _rows(self, stage: Stage) -> int:
        return self.batch * stage.resolution**2

    def _sizes(self, stage: Stage) -> tuple[int, int, int, int]:
        """Bytes of the stream and of an operand, channels, hidden channels."""
        hidden = int(stage.dim * self.arch.mlp_ratio)
        return self._stream(stage), self._activation(stage), stage.dim, hidden

    def _stream(self, stage: Stage) -> int:
        return _HALF * self._rows(stage) * stage.dim

    def _activation(self, stage: Stage) -> int:
        return self.operand * self._rows(stage) * stage.dim


def moved(group: Iterable[Piece]) -> int:
    """Bytes that a kernel doing these pieces must read and write.

    What one piece writes and a later one reads stays in the kernel, and is written only if it is
    the residual stream or the last that the kernel makes of it.
    """
    total = 0
    held: dict[str, int] = {}  # made here, not yet read
    seen: set[str] = set()  # read or made here
    stream = 0
    for piece in group:
        for name, size in piece.reads.items():
            if name not in seen:
                total += size
            held.pop(name, None)
            seen.add(name)
        for name, size in piece.writes.items():
            if name == "x":
                stream = size
            else:
                held[name] = size
            seen.add(name)
        total += piece.weights
    return total + stream + sum(held.values())


@dataclass(frozen=True)
class Floor:
    """The shortest time of a kernel by datasheet rates."""

    seconds: float
    bound: str  # tensor cores, L2 or memory


def floor(group: Sequence[Piece], device: Device) -> Floor:
    """By the products and by the bytes, whichever takes longer."""
    products = sum(2 * p.macs / (device.int8 if p.int8 else device.half) for p in group)
    size = moved(group)
    fits = size < device.cache_bytes
    bytes_time = size / (device.cache if fits else device.memory)
    if products >= bytes_time:
        return Floor(products, "tensor cores")
    return Floor(bytes_time, "L2" if fits else "memory")


# Kinds or names of what a kernel may start with, by a word in its name; the first found counts
_KERNELS = (
    ("mlp", ("norm2", "fc1")),
    ("patch_embed", ("embed",)),
    ("attention", ("attention",)),
    ("prenorm", ("norm",)),
    ("postnorm", ("norm",)),
    ("pool", ("pool",)),
    ("gemm", ("linear",)),
)
_MLP = 3  # norm2, fc1, fc2; in v2 norm2 is last


def assign(kernels: Sequence[str], todo: Sequence[Piece]) -> list[list[Piece]]:
    """Which pieces each kernel of a forward does, from the kernels' names in order.

    A piece that no kernel starts with belongs to the kernel before it.

    Raises:
        ValueError: the kernels are not those of this forward.
    """
    groups: list[list[Piece]] = []
    left = list(todo)
    for name in kernels:
        word, starts = next(((w, {*s}) for w, s in _KERNELS if w in name), ("", set()))
        groups.append([])
        if not word:
            continue  # such as clearing flags
        before = next((g for g in reversed(groups[:-1]) if g), None)
        while left and not starts & {left[0].kind, left[0].name} and before is not None:
            before.append(left.pop(0))
        if not left or not starts & {left[0].kind, left[0].name}:
            raise ValueError(f"{name} has nothing to do in this forward")
        count = _MLP if word == "mlp" else 1
        groups[-1] += left[:count]
        del left[:count]
    if left:
        raise ValueError(f"{left[0].name} of stage {left[0].stage} is done by no kernel")
    return groups
