"""Files that appear whole or not at all.

A file is written under a temporary name beside its final one, synced, read back if the caller can
check it, and only then renamed over the old one; the directory is synced last. At every moment the
final name is the old file or the complete new one, whatever fails or is killed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from swinq.errors import ExportError

# .NAME.HOST.PID.RANDOM.partial
_PARTIAL = re.compile(r"\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{16}\.partial$")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(
    path: str | os.PathLike[str],
    write: Callable[[Path], object],
    *,
    size: int = 0,
    verify: Callable[[Path], object] | None = None,
) -> Path:
    """Write a file so that its final name never shows half of it.

    Args:
        path: final name; its folder is made if need be. A symlink is written through.
        write: fills the file whose name it is given.
        size: bytes that `write` will need, if known: refused beforehand where they are not free.
        verify: reads the written file back and raises if it is not what was meant.

    Returns:
        The final name.

    Raises:
        ExportError: names the path, what failed and the bytes needed. What was there before is
            untouched, unless the error says that only the last sync failed.
    """
    return write_together({Path(path): write}, size=size, verify=verify)[0]


def write_together(
    writers: Mapping[Path, Callable[[Path], object]],
    *,
    size: int = 0,
    verify: Callable[[Path], object] | None = None,
) -> list[Path]:
    """Write files as `write_atomically` does one, and rename them when all are complete.

    Args:
        writers: what fills each file, by final name.
        size, verify: of each of them.
    """
    partials: dict[Path, Path] = {}
    final = Path()
    try:
        for path, write in writers.items():
            final = Path(os.path.realpath(path))
            partials[final] = _begin(final, size)
            write(partials[final])
            _sync(partials[final])
            if verify is not None:
                verify(partials[final])
        for final, partial in partials.items():
            os.replace(partial, final)
    except BaseException as error:  # Ctrl-C too: nothing may be left behind
        for partial in partials.values():
            _remove(partial)
        if isinstance(error, OSError):
            raise _failure(final, error, size) from error
        raise
    for folder in {final.parent: final for final in partials}.values():
        _sync_folder(folder)
    return list(partials)


def _begin(final: Path, size: int) -> Path:
    """An empty file beside the final name, where there is room for it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    _remove_leftovers(final)
    _require_space(final, size)
    return _create_partial(final)


def _create_partial(final: Path) -> Path:
    """An empty file beside `final`, by a name that nobody can guess, with the usual rights."""
    host = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"
    name = f".{final.name}.{host}.{os.getpid()}.{secrets.token_hex(8)}.partial"
    partial = final.with_name(name)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return partial


def _remove_leftovers(final: Path) -> None:
    """Clear what a killed process of this machine left behind when it wrote the same file."""
    host = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"
    for found in final.parent.iterdir():
        if not found.name.startswith(f".{final.name}."):
            continue
        match = _PARTIAL.fullmatch(found.name[len(final.name) + 1 :])
        if match and match["host"] == host and not _is_running(int(match["pid"])):
            _remove(found)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _require_space(final: Path, size: int) -> None:
    if size and shutil.disk_usage(final.parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _sync(partial: Path) -> None:
    """Force a file to the disk, and out of the page cache so that a check reads the disk."""
    with partial.open("rb+") as file:
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # advice only; not every file system takes it
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(final: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    try:
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return  # some network file systems have no such call; the rename stands
        raise ExportError(
            f"{final}: written whole, but its folder could not be synced ({error.strerror})",
            "the file is usable; check the disk before relying on it after a power failure",
        ) from error


def _remove(partial: Path) -> None:
    with suppress(OSError):  # the first error is the one to tell; the next writer clears this
        partial.unlink(missing_ok=True)


def _failure(final: Path, error: OSError, size: int) -> ExportError:
    needed = f" ({size:,} bytes needed)" if size else ""
    problem = f"cannot write {final}: {error.strerror or error}{needed}"
    if error.errno in _NO_SPACE:
        return ExportError(problem, f"free space in {final.parent}, or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ExportError(problem, f"make {final.parent} writable, or choose another folder")
    if error.errno == errno.EISDIR:
        return ExportError(problem, "give the name of a file, such as model.int8.safetensors")
    return ExportError(problem, "check the path and its disk, then run the command again")
