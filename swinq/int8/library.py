"""libswinq: found, loaded, checked, and called with errors in words.

The library is $SWINQ_LIBRARY, or libswinq.so beside this file. Loading it needs no GPU.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any

from swinq.errors import EngineError, EngineFailedError
from swinq.int8 import abi

VARIABLE = "SWINQ_LIBRARY"
_ELF_HEADER = struct.Struct("<40sQ10xHH2x")  # where its table of sections is, and its size
_BUILD = "build it: SWINQ_CUDA=1 pip install -e . (needs nvcc and cmake, no GPU)"


class Library:
    """A loaded libswinq.

    Attributes:
        path: the file. version: what it says of itself.
    """

    def __init__(self, path: Path) -> None:
        """Load a file and declare its functions.

        Raises:
            EngineError: there is no such file, it cannot be loaded, is no libswinq, or has another
                ABI than this package.
        """
        self.path = path
        if not path.is_file():
            raise EngineError(f"{path}: no such file, wanted the engine libswinq.so", _fix())
        try:
            _require_whole(path)
            # absolute: a name without a slash would be looked for where the system's libraries are
            self._handle = ctypes.CDLL(str(path.absolute()))
        except OSError as error:
            raise EngineError(f"{path}: cannot be loaded ({error})", _fix()) from error
        self._require_abi()
        for name, arguments in abi.CALLS.items():
            function = self._symbol(name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            function.errcheck = self._raise
        self._last_error = self._symbol("swinq_last_error")
        self._last_error.argtypes, self._last_error.restype = [], ctypes.c_char_p
        self.plan_destroy = self._symbol("swinq_plan_destroy")
        self.plan_destroy.argtypes, self.plan_destroy.restype = [ctypes.c_void_p], None
        version = self._symbol("swinq_version")
        version.argtypes, version.restype = [], ctypes.c_char_p
        self.version: str = version().decode()

    def __getattr__(self, name: str) -> Any:
        """A function of `abi.CALLS` without its prefix: `library.forward(...)`."""
        full = f"swinq_{name}"
        if full not in abi.CALLS:
            raise AttributeError(f"libswinq has no function {full}")
        return getattr(self._handle, full)

    def _require_abi(self) -> None:
        version = self._symbol("swinq_abi_version")
        version.argtypes, version.restype = [], ctypes.c_int
        found = version()
        if found != abi.VERSION:
            raise EngineError(
                f"{self.path}: its ABI is version {found}, this swinq wants {abi.VERSION}", _fix()
            )

    def _symbol(self, name: str) -> Any:
        try:
            return getattr(self._handle, name)
        except AttributeError as error:
            raise EngineError(
                f"{self.path}: no libswinq of this version: it has no function {name}", _fix()
            ) from error

    def _raise(self, status: int, function: Any, arguments: Any) -> int:
        if status == abi.OK:
            return status
        said = (self._last_error() or b"").decode(errors="replace")
        problem, _, fix = said.partition("\n  fix: ")
        refused = status in (abi.INVALID_ARGUMENT, abi.UNSUPPORTED)
        kind = EngineError if refused else EngineFailedError
        raise kind(f"libswinq: {problem or f'status {status}'}", fix)


def library() -> Library:
    """The library, loaded at the first call.

    Raises:
        EngineError: it is missing or cannot be used; see `Library`.
    """
    return _loaded(_path())


def available() -> bool:
    """Whether the library can be loaded; says nothing about GPUs."""
    return not reason()


def reason() -> str:
    """Why the library cannot be used, in words; "" where it can."""
    try:
        library()
    except EngineError as error:
        return error.problem
    return ""


def _require_whole(path: Path) -> None:
    """Refuse a copy that was cut short: loading maps it, and what is not there ends the process.

    An ELF file of 64 bits names the table of its sections, which lies at its end.
    """
    with open(path, "rb") as file:
        head = file.read(_ELF_HEADER.size)
    if len(head) < _ELF_HEADER.size or not head.startswith(b"\x7fELF\2"):
        return  # the loader says what it is
    _, table, entry, count = _ELF_HEADER.unpack(head)
    size = path.stat().st_size
    if size < table + entry * count:
        raise EngineError(
            f"{path}: {size:,} bytes of {table + entry * count:,}, it was cut short", _fix()
        )


def _path() -> Path:
    return Path(os.environ.get(VARIABLE) or Path(__file__).with_name("libswinq.so"))


def _fix() -> str:
    if os.environ.get(VARIABLE):
        return f"correct {VARIABLE}, or unset it to use the library that swinq was installed with"
    return _BUILD


@cache
def _loaded(path: Path) -> Library:
    return Library(path)
