"""Images in zips: one with {train,val}/<class>/<image>, or {split}.zip with {split}_map.txt.

Nothing is ever unpacked to disk. The archive's directory is read once, by zipfile; images are then
read by position with our own dozen lines, because a zipfile handle cannot be shared by forked
workers and opening one again takes seconds for a million images.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swinq.data.dataset import (
    ImageDataset,
    Transform,
    check_classes,
    check_same_classes,
    class_rows,
    repeated,
)
from swinq.data.images import (
    MAX_ENCODED_BYTES,
    UnreadableImageError,
    is_image_name,
    listed,
    shown,
)
from swinq.errors import ConfigError, DataError

CACHE_MODES = ("no", "part", "full")
_MEMORY_SHARE = 0.8  # of the memory that is free now; more than that and the system starts to swap
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE 4.3.7


@dataclass(frozen=True)
class ZipMember:
    """Where an image lies in its archive."""

    header: int  # offset of the local header in bytes
    stored: int  # bytes in the archive
    size: int  # bytes after decompression
    crc: int
    deflated: bool


class ZipDirectory:
    """The safe part of an archive's directory: image members by name.

    Raises:
        DataError: no zip, damaged, encrypted or compressed in a way that we do not read; a member
            whose name is absolute or leads outside; the same name twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except (OSError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
            raise DataError(
                f"{path} cannot be opened as a zip: {error}",
                "check that it was copied whole (unzip -t)",
            ) from error
        _refuse_unsafe(path, entries)
        self.members = {
            entry.filename: ZipMember(
                entry.header_offset,
                entry.compress_size,
                entry.file_size,
                entry.CRC,
                entry.compress_type == zipfile.ZIP_DEFLATED,
            )
            for entry in entries
            if _is_image_member(entry.filename)
        }


class ZipDataset(ImageDataset):
    """Images of one archive, optionally kept in memory.

    Args:
        directory: the archive's.
        members: the member's name of each image.
        cache_mode: "no": read at every use. "part": what `preload` names, that is this rank's
            share, is kept. "full": everything is kept, from now on.

    Raises:
        ConfigError: an unknown cache mode.
        DataError: the images to keep do not fit in memory.
    """

    def __init__(
        self,
        directory: ZipDirectory,
        members: list[str],
        names: list[str],
        labels: list[int],
        classes: list[str],
        transform: Transform,
        cache_mode: str,
    ) -> None:
        if cache_mode not in CACHE_MODES:
            raise ConfigError(
                f"cache mode '{cache_mode}' is not known", f"use one of {', '.join(CACHE_MODES)}"
            )
        super().__init__(names, labels, classes, transform, str(directory.path))
        self.archive = directory.path
        self.cache_mode = cache_mode
        entries = [directory.members[member] for member in members]
        # Arrays, not objects: forked workers would copy every object's page by counting references
        self._places = np.array([(e.header, e.stored, e.size, e.crc) for e in entries], np.int64)
        self._deflated = np.array([e.deflated for e in entries], np.bool_)
        self._kept: dict[int, bytes] = {}
        self._file: int | None = None
        if cache_mode == "full":
            self._keep(range(len(self)))

    def raw(self, index: int) -> bytes:
        """The member's bytes, decompressed and checked against its CRC-32."""
        kept = self._kept.get(index)
        return self._read(index) if kept is None else kept

    def preload(self, indices: Iterable[int]) -> None:
        """Keeps these images in memory, unless the cache mode is "no".

        Raises:
            DataError: they do not fit in memory.
        """
        if self.cache_mode != "no":
            self._keep(indices)

    def with_transform(self, transform: Transform) -> ZipDataset:
        """The same images under another transform; what is kept of them serves both."""
        other: ZipDataset = super().with_transform(transform)  # type: ignore[assignment]
        other._kept = self._kept
        return other

    def __getstate__(self) -> dict[str, Any]:
        # A copy for another process opens the file itself and does not carry the cache along
        return {**self.__dict__, "_file": None, "_kept": {}}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)  # type: ignore[arg-type]

    def _keep(self, indices: Iterable[int]) -> None:
        wanted = [index for index in indices if index not in self._kept]
        need, free = int(self._places[wanted, 2].sum()), _free_memory()
        if free is not None and need > _MEMORY_SHARE * free:
            raise DataError(
                f"keeping {len(wanted):,} images of {self.archive} takes {need / 2**30:.1f} GiB of "
                f"memory, {free / 2**30:.1f} GiB are free",
                "use --cache-mode no",
            )
        for index in wanted:
            with contextlib.suppress(UnreadableImageError):  # named when the image is used
                self._kept[index] = self._read(index)

    def _read(self, index: int) -> bytes:
        header, stored, size, crc = self._places[index].tolist()
        if size > MAX_ENCODED_BYTES or stored > MAX_ENCODED_BYTES:
            raise UnreadableImageError(self.path(index), f"larger than {MAX_ENCODED_BYTES:,} bytes")
        try:
            fixed = self._bytes_at(header, _LOCAL_HEADER.size)
            signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(fixed)
            if signature != b"PK\x03\x04":
                raise UnreadableImageError(self.path(index), "its header in the zip is damaged")
            start = header + _LOCAL_HEADER.size + name_length + extra_length
            data = self._bytes_at(start, stored)
            if self._deflated[index]:
                # size + 1: enough to notice a member that is longer than it says, and no more
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except OSError as error:
            raise UnreadableImageError(self.path(index), error.strerror or str(error)) from error
        except zlib.error as error:
            raise UnreadableImageError(self.path(index), f"damaged in the zip: {error}") from error
        if len(data) != size or zlib.crc32(data) != crc:
            raise UnreadableImageError(self.path(index), "damaged in the zip: wrong checksum")
        return data

    def _bytes_at(self, offset: int, count: int) -> bytes:
        """`count` bytes of the archive; pread has no position that processes could disturb."""
        if self._file is None:
            self._file = os.open(self.archive, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        data = b""
        while len(data) < count:  # one call may read less, on a network file system for instance
            more = os.pread(self._file, count - len(data), offset + len(data))
            if not more:
                raise OSError(0, "the zip ends before the image does")
            data += more
        return data


def open_class_zip(
    path: Path, split: str, transform: Transform, num_classes: int | None, cache_mode: str
) -> ZipDataset:
    """One archive with `{split}/<class>/**/<image>`, perhaps below a single folder.

    Raises:
        DataError: as ZipDirectory; no such split; splits with different classes; a class count
            other than `num_classes`.
    """
    directory = ZipDirectory(path)
    splits: dict[str, list[tuple[str, str]]] = {}
    member_of: dict[str, str] = {}
    for member in directory.members:
        parts = member.split("/")
        at = next((i for i in (0, 1) if parts[i : i + 1] and parts[i] in ("train", "val")), None)
        if at is None or len(parts) < at + 3:
            continue
        name = "/".join(parts[at:])
        if name in member_of:
            raise DataError(
                f"{path} has {member_of[name]} and {member}, which are one image's place",
                "keep one data set in the zip: train/ and val/ at its top or below one folder",
            )
        member_of[name] = member
        splits.setdefault(parts[at], []).append((parts[at + 1], "/".join(parts[at + 2 :])))
    if split not in splits:
        tops = sorted({"".join(member.partition("/")[:2]) for member in directory.members})
        held = f"it holds {listed(tops)}" if tops else "it holds no images"
        raise DataError(
            f"{path} has no images at {split}/<class>/<image>; {held}",
            f"put the class folders below {split}/; for {split}.zip with {split}_map.txt give "
            "the folder that holds both",
        )
    classes, names, labels = class_rows(splits[split])
    for other, members in splits.items():
        if other != split:
            check_same_classes(split, classes, other, class_rows(members)[0])
    check_classes(classes, num_classes, f"{path}, {split}/,")
    names = [f"{split}/{name}" for name in names]
    return ZipDataset(
        directory, [member_of[n] for n in names], names, labels, classes, transform, cache_mode
    )


def open_mapped_zip(
    root: Path, split: str, transform: Transform, num_classes: int | None, cache_mode: str
) -> ZipDataset:
    """Microsoft's layout: `{split}.zip` and `{split}_map.txt` with lines `relpath<TAB>label`.

    Raises:
        DataError: a file is missing; a wrong line; a label out of range; an image that is listed
            twice or not in the archive.
    """
    archive, listing = root / f"{split}.zip", root / f"{split}_map.txt"
    absent = [str(path) for path in (archive, listing) if not path.is_file()]
    if absent:
        raise DataError(
            f"--zip wants {archive.name} and {listing.name} in {root}; "
            f"{' and '.join(absent)} not found",
            f"make them as {split}/<class>/<image> zipped with lines `relpath<TAB>label`, "
            "or drop --zip for plain folders",
        )
    names, labels = _read_map(listing, num_classes)
    directory = ZipDirectory(archive)
    lost = [name for name in names if name not in directory.members]
    if lost:
        example = next(iter(directory.members), "no image at all")
        raise DataError(
            f"{len(lost)} of the {len(names)} images of {listing} are not in {archive}: "
            f"{listed(lost)}; the archive holds {shown(example)}",
            "list the names exactly as they are in the archive (unzip -l)",
        )
    classes = _map_classes(names, labels, num_classes)
    return ZipDataset(
        directory, names, [f"{split}/{n}" for n in names], labels, classes, transform, cache_mode
    )


def _read_map(path: Path, num_classes: int | None) -> tuple[list[str], list[int]]:
    names: list[str] = []
    labels: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.rpartition("\t")
        label = label.strip()
        if not name or not (label.isascii() and label.isdigit() and len(label) < 10):
            raise DataError(
                f"{path}, line {number}: {shown(line[:80])}: want `relpath<TAB>label`",
                "separate them with one tab; the label is a whole number from 0",
            )
        if num_classes is not None and int(label) >= num_classes:
            raise DataError(
                f"{path}, line {number}: label {label} of {shown(name)} is out of range: "
                f"the model has {num_classes} classes (labels 0 to {num_classes - 1})",
                "use the map the model was trained with; labels count from 0",
            )
        names.append(name)
        labels.append(int(label))
    if not names:
        raise DataError(f"{path} lists no images", "write one line `relpath<TAB>label` an image")
    if twice := repeated(names):
        raise DataError(
            f"{path} lists {len(twice)} images more than once: {listed(twice)}",
            "keep one line an image",
        )
    return names, labels


def _map_classes(names: list[str], labels: list[int], num_classes: int | None) -> list[str]:
    """Folder names where each label has exactly one folder of its own, numbers otherwise."""
    classes = [str(label) for label in range(num_classes or max(labels) + 1)]
    pairs = {(label, name.split("/")[0]) for name, label in zip(names, labels, strict=True)}
    foldered = all("/" in name for name in names)
    if foldered and len(pairs) == len({label for label, _ in pairs}) == len({f for _, f in pairs}):
        for label, folder in pairs:
            classes[label] = folder
    return classes


def _refuse_unsafe(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    outside = [name for name in names if _leads_outside(name)]
    if outside:
        raise DataError(
            f"{path} holds names that lead outside the archive: {listed(outside)}",
            "do not use this file; make a new one with relative names",
        )
    if twice := repeated(names):
        raise DataError(
            f"{path} holds {len(twice)} names more than once: {listed(twice)}",
            "make the archive again from a folder",
        )
    images = [entry for entry in entries if _is_image_member(entry.filename)]
    locked = [entry.filename for entry in images if entry.flag_bits & 0x1]
    if locked:
        raise DataError(f"{path} is encrypted: {listed(locked)}", "zip it without a password")
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    odd = [entry.filename for entry in images if entry.compress_type not in methods]
    if odd:
        raise DataError(
            f"{path}: members that are neither stored nor deflated: {listed(odd)}",
            "zip it without compression (zip -0), images do not get smaller",
        )


def _leads_outside(name: str) -> bool:
    parts = re.split(r"[/\\]", name)
    drive = re.match(r"[A-Za-z]:", name) is not None
    return not name or name[0] in "/\\" or drive or ".." in parts or "\0" in name


def _is_image_member(name: str) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and is_image_name(name)


def _free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"^MemAvailable:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
