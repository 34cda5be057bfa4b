"""Read an INT8 checkpoint, or refuse it with what was found, what was wanted and what to do.

Nothing in the file is executed. Names, dtypes and shapes are judged from the header, before any
tensor is loaded; digests are of the bytes in memory, so what was checked is what is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from swinq.errors import CheckpointError, ConfigError, SwinqError
from swinq.export.format import (
    FORMAT,
    FORMAT_VERSION,
    JSON_KEYS,
    LARGEST_NUMBER,
    LARGEST_SCALE,
    MODES,
    PLAIN_KEYS,
    SMALLEST_SCALE,
    TensorSpec,
    decode,
    dtype_name,
    expected_tensors,
    precision_problems,
)
from swinq.export.integrity import digests
from swinq.models.architecture import Architecture

_EXPORT_AGAIN = "export the model again; this file cannot be repaired"
_COPY_AGAIN = "copy or download the file again, or export the model again"
_NAMES_SHOWN = 6
_DTYPES = {"I8": torch.int8, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Int8Checkpoint:
    """What an INT8 checkpoint holds, checked."""

    tensors: dict[str, torch.Tensor]
    architecture: Architecture
    precision: dict[str, str]  # layer name -> int8, int8-unrounded or fp16
    int8_mode: int
    calibration: dict[str, Any]
    classes: list[str] | None
    transform: dict[str, Any]
    path: Path
    swinq_version: str = ""


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    int8_mode: int | None = None,
    architecture: Architecture | None = None,
    verify: bool = True,
) -> Int8Checkpoint:
    """Read and check an INT8 checkpoint.

    Args:
        path: the safetensors file that `write_checkpoint` made.
        int8_mode: what the caller asked for, if anything; a file of the other mode is refused.
        architecture: likewise.
        verify: compare every digest. Names, dtypes, shapes and scales are checked in any case.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, newer than this reader, or
            contradicts itself or the caller.
        ConfigError: `int8_mode` is none.
    """
    path = Path(path)
    if int8_mode not in (None, *MODES):
        raise ConfigError(
            f"int8_mode is {int8_mode!r}, wanted 1 or 2",
            "leave it out to run the file as it is",
        )
    with _opened(path) as file:
        names = list(file.keys())
        metadata = dict(file.metadata() or {})
        _require_int8_format(path, metadata, names)
        fields = _decoded(path, metadata)
        arch = _architecture(path, fields["architecture"], len(names))
        mode = _mode(path, metadata["int8_mode"], int8_mode)
        _require_a_class_each(path, fields["classes"], arch)
        if architecture is not None:
            _require_same_architecture(path, arch, architecture)
        precision = _precision(path, arch, fields["precision"], mode)
        specs = expected_tensors(arch, precision, mode)
        _require_names(path, names, specs)
        for name, spec in specs.items():
            _require_form(path, name, file.get_slice(name), spec)
        # cloned: the mapped file may be changed or cut short by others while we compute
        tensors = {name: file.get_tensor(name).clone() for name in specs}
    if verify:
        require_digests(path, fields["digests"], tensors, metadata)
    for name, spec in specs.items():
        _require_sound(path, name, tensors[name], spec)
    return Int8Checkpoint(
        tensors=tensors,
        architecture=arch,
        precision=precision,
        int8_mode=mode,
        calibration=fields["calibration"],
        classes=fields["classes"],
        transform=fields["transform"],
        path=path,
        swinq_version=metadata["swinq_version"],
    )


def is_int8_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself that it is an INT8 checkpoint; only its header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as safetensors sees it; everything that can go wrong in there gets a name."""
    _require_safetensors(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as error:
        raise CheckpointError(
            f"{path}: damaged or cut short ({str(error).splitlines()[0][:160]})", _COPY_AGAIN
        ) from error


def _require_safetensors(path: Path) -> None:
    """Tell a missing file, a folder, a pickle and a truncated file apart."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror})",
            "give the .safetensors file that --export wrote",
        ) from error
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise CheckpointError(
            f"{path}: a torch checkpoint, wanted an INT8 checkpoint (safetensors)",
            f"calibrate and export it first: torchrun swinq/main.py --calib --pretrained {path}",
        )
    header = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{":
        raise CheckpointError(
            f"{path}: not a safetensors file ({size:,} bytes)",
            "give the .safetensors file that --export wrote",
        )
    if header > size - 8:
        raise CheckpointError(
            f"{path}: cut short: {size:,} bytes, its header alone wants {header + 8:,}", _COPY_AGAIN
        )


def _require_int8_format(path: Path, metadata: Mapping[str, str], names: list[str]) -> None:
    if metadata.get("format") != FORMAT:
        if any(name.endswith("_amax") for name in names):
            raise CheckpointError(
                f"{path}: a calibrated checkpoint with fake quantizers, wanted an INT8 checkpoint",
                f"export it first: torchrun swinq/main.py --export --resume {path}",
            )
        raise CheckpointError(
            f"{path}: format is {metadata.get('format', 'not given')!r}, wanted {FORMAT!r}; "
            "a float model has no scales",
            f"calibrate and export it first: torchrun swinq/main.py --calib --pretrained {path}",
        )
    version = metadata.get("format_version", "")
    if not (version.isascii() and version.isdigit()) or int(version[:9]) == 0:
        raise CheckpointError(
            f"{path}: format_version is {version!r}, wanted {FORMAT_VERSION}", _COPY_AGAIN
        )
    if int(version[:9]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version[:9]}, this swinq reads up to {FORMAT_VERSION}",
            f"update swinq (the file was written by {metadata.get('swinq_version', '?')!r}), "
            "or export the model with this one",
        )


def _decoded(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The structured metadata, each field of the right kind."""
    known = (*JSON_KEYS, *PLAIN_KEYS)
    odd = [f"{key} is missing" for key in known if key not in metadata]
    odd += [f"{key[:60]!r} is unknown" for key in metadata if key not in known]
    if odd:
        raise CheckpointError(f"{path}: metadata: {_listed(odd)}", _EXPORT_AGAIN)
    fields = {}
    for key in JSON_KEYS:
        try:
            fields[key] = decode(metadata[key])
        except ValueError as error:
            raise CheckpointError(
                f"{path}: metadata: {key} is not JSON ({error})", _COPY_AGAIN
            ) from error
    for key in JSON_KEYS:
        if key != "classes" and not isinstance(fields[key], dict):
            raise CheckpointError(
                f"{path}: metadata: {key} is a {type(fields[key]).__name__}, wanted an object",
                _EXPORT_AGAIN,
            )
    classes = fields["classes"]
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise CheckpointError(
            f"{path}: metadata: classes is neither a list of names nor null", _EXPORT_AGAIN
        )
    return fields


def _architecture(path: Path, fields: dict[str, Any], tensors: int) -> Architecture:
    try:
        arch = Architecture.from_dict(fields)
    except SwinqError as error:
        raise CheckpointError(f"{path}: {error.problem}", _EXPORT_AGAIN) from error
    # before anything is listed block by block: depths may claim millions
    if sum(arch.depths) > tensors:
        raise CheckpointError(
            f"{path}: depths are {list(arch.depths)}, far more than its {tensors} tensors fill",
            _EXPORT_AGAIN,
        )
    return arch


def _require_a_class_each(path: Path, classes: list[str] | None, arch: Architecture) -> None:
    if classes is not None and len(classes) != arch.num_classes:
        raise CheckpointError(
            f"{path}: metadata: {len(classes)} class names for a head of {arch.num_classes} "
            "classes",
            _EXPORT_AGAIN,
        )


def _mode(path: Path, text: str, asked: int | None) -> int:
    if text not in map(str, MODES):
        raise CheckpointError(
            f"{path}: int8_mode is {text[:20]!r}, wanted one of {MODES}", _EXPORT_AGAIN
        )
    if asked is not None and int(text) != asked:
        raise CheckpointError(
            f"{path}: was exported in int8 mode {text}, int8 mode {asked} was asked for",
            f"leave --int8-mode out to run it as it is, or export again with --int8-mode {asked}",
        )
    return int(text)


def _require_same_architecture(path: Path, here: Architecture, wanted: Architecture) -> None:
    differences = here.differences(wanted)
    if differences:
        raise CheckpointError(
            f"{path}: not the model that was asked for (here = the file):\n  "
            + "\n  ".join(differences[:_NAMES_SHOWN])
            + (f"\n  and {len(differences) - 6} more" if len(differences) > 6 else ""),
            "leave --cfg out (the file describes itself), or give the file of that model",
        )


def _precision(path: Path, arch: Architecture, table: dict[str, Any], mode: int) -> dict[str, str]:
    problems = precision_problems(arch, table, mode)
    if problems:
        raise CheckpointError(f"{path}: precision: {_listed(problems)}", _EXPORT_AGAIN)
    return table


def _require_names(path: Path, names: list[str], specs: Mapping[str, TensorSpec]) -> None:
    missing = [name for name in specs if name not in set(names)]
    extra = sorted(set(names) - set(specs))
    if missing:
        raise CheckpointError(f"{path}: missing tensors: {_listed(missing)}", _EXPORT_AGAIN)
    if extra:
        raise CheckpointError(
            f"{path}: tensors that such a model does not have: {_listed(extra)}", _EXPORT_AGAIN
        )


def _require_form(path: Path, name: str, found: Any, spec: TensorSpec) -> None:
    dtype, shape = found.get_dtype(), tuple(found.get_shape())
    if _DTYPES.get(dtype) is not spec.dtype:
        shown = dtype_name(_DTYPES[dtype]) if dtype in _DTYPES else dtype
        raise CheckpointError(
            f"{path}: {name} is {shown}, wanted {dtype_name(spec.dtype)}", _EXPORT_AGAIN
        )
    if shape not in spec.shapes:
        raise CheckpointError(
            f"{path}: {name} has shape {list(shape)}, wanted {spec}", _EXPORT_AGAIN
        )


def require_digests(
    path: Path,
    wanted: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Raise CheckpointError if a tensor or the metadata are not those that were written."""
    found = digests(tensors, metadata)
    changed = [name for name in found if wanted.get(name) != found[name]]
    changed += sorted(wanted.keys() - found.keys())
    if changed:
        first = changed[0]
        raise CheckpointError(
            f"{path}: changed since it was written: {_listed(changed)}\n"
            f"  {first}: sha256 {found.get(first)}, wanted {str(wanted.get(first))[:64]}",
            _COPY_AGAIN,
        )


def _require_sound(path: Path, name: str, tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Refuse numbers that no export writes: they would run, and be wrong."""
    if spec.dtype is torch.int8:
        if bool((tensor == -128).any()):
            raise CheckpointError(
                f"{path}: {name} holds the code -128, wanted -127 to 127", _EXPORT_AGAIN
            )
        return
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{path}: {name}: {bad} of {tensor.numel()} values are NaN or infinite", _EXPORT_AGAIN
        )
    low, high = map(float, tensor.aminmax())
    largest = LARGEST_SCALE if spec.is_scale else LARGEST_NUMBER
    if max(-low, high) > largest:
        raise CheckpointError(
            f"{path}: {name} holds {high if high > largest else low:g}, wanted at most "
            f"{largest:g} for it to stay within fp32",
            _EXPORT_AGAIN,
        )
    if not spec.is_scale:
        return
    if low < 0:
        raise CheckpointError(
            f"{path}: {name} holds {low:g}; a scale is not negative", _EXPORT_AGAIN
        )
    if bool(((tensor > 0) & (tensor < SMALLEST_SCALE)).any()):
        raise CheckpointError(
            f"{path}: {name} holds a scale below {SMALLEST_SCALE:g}, wanted 0 or more than that",
            _EXPORT_AGAIN,
        )


def _listed(items: list[str]) -> str:
    """The first few of a list, and how many more there are."""
    more = len(items) - _NAMES_SHOWN
    return ", ".join(items[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
