"""Reads tensors and plain values out of a torch `.pth` file without executing anything in it.

A `.pth` is a zip of one pickle (`data.pkl`) and raw storages (`data/0`, ...). A pickle is a
program: here its globals never reach real objects. Plain containers and the descriptions of
tensors are known by name; every other global becomes an inert dictionary, so training checkpoints
that hold a yacs CfgNode, numpy scalars or an argparse.Namespace open, and an exploit does nothing.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from swinq.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20  # an official training checkpoint has 0.3 MB
MAX_DIMENSIONS = 8
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_NEW_DTYPES = (torch.uint16, torch.uint32, torch.uint64)
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (*_STORAGE_DTYPES.values(), *_NEW_DTYPES)
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that lies in the file: what `TorchFile.load` needs to read it."""

    storage: str  # name of the storage's record, without the folder
    dtype: torch.dtype
    offset: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("changes a tensor after its description")


class Inert(dict[Any, Any]):
    """Stands for an object whose class is not known here; keeps only dictionary items and state.

    `origin` is the global's name. Each global gets a subclass of its own, since a pickle may want
    to instantiate it; whatever is asked of it, it stores or ignores.
    """

    origin = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Make an empty one, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def append(self, item: Any) -> None:
        """Accept an item of a list-like object, and drop it."""

    def extend(self, items: Any) -> None:
        """Accept items of a list-like object, and drop them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Do nothing."""
        return self


class _Plain(dict[Any, Any]):
    """An OrderedDict of the file; its attributes (`_metadata`) are not wanted."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Known:
    """A global that is known by name: a function of ours or a value, closed to modification."""

    __slots__ = ("_function", "value")

    def __init__(self, value: Any = None, function: Callable[..., Any] | None = None) -> None:
        self.value = value
        self._function = function

    def __call__(self, *args: Any) -> Any:
        if self._function is None:
            raise pickle.UnpicklingError("calls a value")
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("changes a function")


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *_: Any
) -> StoredTensor | Inert:
    """Describe a view of a storage; a view that needs more bytes than the storage is refused."""
    if isinstance(storage, Inert):  # of a dtype that no Swin has, such as a complex one
        return storage
    if not isinstance(storage, StoredTensor):
        raise pickle.UnpicklingError("a tensor without a storage")
    numbers = (offset, *shape, *stride)
    sound = len(shape) == len(stride) <= MAX_DIMENSIONS
    if not sound or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise pickle.UnpicklingError(f"a tensor of shape {shape!r} and stride {stride!r}")
    elements, last = 1, offset
    for size, step in zip(shape, stride, strict=True):
        elements *= size
        last += (size - 1) * step
    available = storage.shape[0]
    if elements and (last >= available or elements > available):
        raise pickle.UnpicklingError(
            f"a tensor of shape {tuple(shape)} needs more than the {available} elements of its "
            f"storage {storage.storage}"
        )
    return StoredTensor(storage.storage, storage.dtype, offset, tuple(shape), tuple(stride))


def _rebuild_tensor_of_dtype(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> StoredTensor | Inert:
    """Describe a view of raw bytes: how torch saves the dtypes that have no storage class."""
    if not isinstance(dtype, _Known) or not isinstance(dtype.value, torch.dtype):
        return Inert()
    if not isinstance(storage, StoredTensor):
        raise pickle.UnpicklingError("a tensor without a storage")
    size = dtype.value.itemsize
    typed = StoredTensor(storage.storage, dtype.value, 0, (storage.shape[0] // size,), (1,))
    return _rebuild_tensor(typed, offset, shape, stride)


def _first(first: Any, *_: Any) -> Any:
    return first


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda build, kind, arguments, state: build(*arguments),
    "torch.Size": tuple,
}


class _TensorOnlyUnpickler(pickle.Unpickler):
    """Unpickles plain containers; a tensor becomes a StoredTensor, anything else is inert."""

    def __init__(self, program: bytes, storage_bytes: dict[str, int]) -> None:
        super().__init__(io.BytesIO(program))
        self._storage_bytes = storage_bytes

    def find_class(self, module: str, name: str) -> Any:
        """Look a global up among the known names; nothing is ever imported."""
        path = f"{module}.{name}"
        if path == "collections.OrderedDict":
            return _Plain
        if path in _FUNCTIONS:
            return _Known(function=_FUNCTIONS[path])
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _Known(_STORAGE_DTYPES[name])
        if module == "torch" and name in _DTYPES:
            return _Known(_DTYPES[name])
        return type("Inert", (Inert,), {"origin": path})

    def persistent_load(self, pid: Any) -> StoredTensor | Inert:
        """Describe a storage: the only thing that may lie outside the pickle."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a reference to something that is no storage")
        _, kind, key, _, _ = pid[:5]
        if isinstance(kind, type) and issubclass(kind, Inert):
            return kind()
        if not isinstance(kind, _Known) or not isinstance(kind.value, torch.dtype):
            raise pickle.UnpicklingError("a storage of an unknown type")
        if key not in self._storage_bytes:
            raise pickle.UnpicklingError(f"storage {key!r}, which is not in the file")
        elements = self._storage_bytes[key] // kind.value.itemsize
        return StoredTensor(key, kind.value, 0, (elements,), (1,))


def _check_program(program: bytes) -> None:
    """Refuse opcodes that escape `find_class`, and memo indices made to exhaust memory."""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name.startswith("EXT") or opcode.name == "PERSID":
            raise pickle.UnpicklingError(f"the opcode {opcode.name}")
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > len(program):
            raise pickle.UnpicklingError("a memo larger than the pickle")


class TorchFile:
    """An open `.pth`: `tree` holds its plain values and StoredTensors, `load` reads a tensor.

    Only what is loaded is read (an optimizer's state is not), and all that is read is verified by
    the CRC-32 that the zip keeps.
    """

    def __init__(self, path: Path) -> None:
        """Open the file and read its pickle.

        Raises:
            CheckpointError: damaged, not a zip written by torch.save, or not readable safely.
        """
        self.path = path
        self._storages: dict[str, bytearray] = {}
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            self._damaged(f"the zip cannot be opened ({error})")
        try:
            self._records = self._check_records()
            program = self._read("data.pkl")
            self.tree = self._unpickle(program)
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._storages.clear()
        self._zip.close()

    def load(self, stored: StoredTensor) -> Tensor:
        """Read one tensor, contiguous, on the CPU, in the dtype of the file.

        Raises:
            CheckpointError: its bytes do not have the CRC-32 that the file states.
        """
        if stored.storage not in self._storages:
            self._storages[stored.storage] = bytearray(self._read(f"data/{stored.storage}"))
        storage = self._storages[stored.storage]
        try:
            if 0 in stored.shape:
                return torch.empty(stored.shape, dtype=stored.dtype)
            whole = len(storage) // stored.dtype.itemsize
            flat = torch.frombuffer(storage, dtype=stored.dtype, count=whole)
            return flat.as_strided(stored.shape, stored.stride, stored.offset).contiguous()
        except (RuntimeError, ValueError) as error:
            self._damaged(f"a tensor of shape {stored.shape} cannot be built ({error})")

    def _check_records(self) -> dict[str, zipfile.ZipInfo]:
        """Records by name without their common folder, none larger than the file."""
        infos = self._zip.infolist()
        folders = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
        names = {info.filename for info in infos}
        if any(name.endswith("/constants.pkl") for name in names):
            raise CheckpointError(
                f"{self.path} is a TorchScript archive; wanted a state dict",
                "save the parameters: torch.save(model.state_dict(), 'model.pth')",
            )
        if len(folders) != 1:
            raise CheckpointError(
                f"{self.path} is a zip without one data.pkl ({', '.join(sorted(names)[:3])}); "
                "wanted a file written by torch.save",
                "pass the .pth or .safetensors file itself",
            )
        folder = folders[0].removesuffix("data.pkl")
        total = self.path.stat().st_size
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            self._damaged("it has compressed records, which torch.save never writes")
        if sum(info.file_size for info in infos) > total or len(names) != len(infos):
            self._damaged("its records overlap or are larger than the file")
        return {
            info.filename.removeprefix(folder): info
            for info in infos
            if info.filename.startswith(folder)
        }

    def _read(self, record: str) -> bytes:
        info = self._records.get(record)
        if info is None:
            self._damaged(f"it has no record {record}")
        if record == "data.pkl" and info.file_size > MAX_PICKLE_BYTES:
            self._damaged(f"its pickle has {info.file_size} bytes, more than {MAX_PICKLE_BYTES}")
        try:
            data = self._zip.read(info)  # verifies the CRC-32
        except Exception as error:  # zipfile raises struct.error, EOFError, RuntimeError and more
            self._damaged(f"record {record}: {error}")
        if len(data) != info.file_size:
            self._damaged(f"record {record} is cut short")
        return data

    def _unpickle(self, program: bytes) -> Any:
        if self._records.get("byteorder") and self._read("byteorder").strip() != b"little":
            raise CheckpointError(
                f"{self.path} was written on a big-endian machine; wanted little-endian numbers",
                "save it again on a little-endian machine",
            )
        sizes = {
            name.removeprefix("data/"): info.file_size
            for name, info in self._records.items()
            if name.startswith("data/")
        }
        try:
            _check_program(program)
            return _TensorOnlyUnpickler(program, sizes).load()
        except Exception as error:  # a malformed pickle can raise anything
            reason = str(error)[:200] or type(error).__name__
            self._damaged(f"its pickle cannot be read: {reason}")

    def _damaged(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path} is not a sound .pth file: {reason}",
            "copy or download the file again and compare its size and sha256 with the source",
        )
