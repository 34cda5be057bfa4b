"""Files appear whole or not at all, whatever fails."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swinq.errors import ExportError
from swinq.files import write_atomically

OLD, NEW = b"old file " * 100, b"new file " * 200


def write_new(path: Path) -> None:
    path.write_bytes(NEW)


@pytest.fixture
def old_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(OLD)
    return path


def only_file(path: Path) -> bool:
    return [found.name for found in path.parent.iterdir()] == [path.name]


def test_new_file_replaces_the_old_one_and_leaves_nothing_else(old_file: Path) -> None:
    assert write_atomically(old_file, write_new) == old_file
    assert old_file.read_bytes() == NEW
    assert only_file(old_file)


def test_missing_folders_are_made(tmp_path: Path) -> None:
    path = write_atomically(tmp_path / "a" / "b" / "model.safetensors", write_new)
    assert path.read_bytes() == NEW


def test_symlink_is_written_through(old_file: Path) -> None:
    link = old_file.with_name("latest.safetensors")
    link.symlink_to(old_file.name)
    write_atomically(link, write_new)
    assert link.is_symlink()
    assert old_file.read_bytes() == NEW


def test_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    written = write_atomically(tmp_path / "written", write_new)
    assert written.stat().st_mode == plain.stat().st_mode


def failing(error: OSError, real: Callable[..., Any], nth: int = 1) -> Callable[..., Any]:
    """`real`, but its nth call raises."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            raise error
        return real(*args, **kwargs)

    return call


STEPS = [
    ("open", os.open),
    ("fsync", os.fsync),
    ("replace", os.replace),
]


@pytest.mark.parametrize(("name", "real"), STEPS, ids=[name for name, _ in STEPS])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_failure_at_any_step_leaves_the_old_file(
    old_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    real: Callable[..., Any],
    code: int,
) -> None:
    monkeypatch.setattr(os, name, failing(OSError(code, os.strerror(code)), real))
    with pytest.raises(ExportError, match="cannot write") as caught:
        write_atomically(old_file, write_new, size=1800)
    monkeypatch.undo()
    assert old_file.read_bytes() == OLD
    assert only_file(old_file)
    assert str(old_file) in caught.value.problem
    assert os.strerror(code) in caught.value.problem
    assert "1,800 bytes" in caught.value.problem
    assert caught.value.fix


def test_failure_while_writing_leaves_the_old_file(old_file: Path) -> None:
    def half_written(path: Path) -> None:
        path.write_bytes(NEW[:50])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ExportError, match="No space left") as caught:
        write_atomically(old_file, half_written, size=len(NEW))
    assert "free space" in caught.value.fix
    assert old_file.read_bytes() == OLD
    assert only_file(old_file)


def test_file_that_does_not_verify_is_not_renamed(old_file: Path) -> None:
    def verify(path: Path) -> None:
        assert path.read_bytes() == NEW
        raise ExportError("digest mismatch")

    with pytest.raises(ExportError, match="digest mismatch"):
        write_atomically(old_file, write_new, verify=verify)
    assert old_file.read_bytes() == OLD
    assert only_file(old_file)


def test_interrupt_leaves_the_old_file(old_file: Path) -> None:
    def interrupted(path: Path) -> None:
        path.write_bytes(NEW[:50])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(old_file, interrupted)
    assert old_file.read_bytes() == OLD
    assert only_file(old_file)


def test_too_little_space_is_said_before_anything_is_written(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(old_file.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=999))
    with pytest.raises(ExportError, match=r"No space left.*1,000 bytes needed"):
        write_atomically(old_file, lambda path: pytest.fail("was written"), size=1000)
    assert old_file.read_bytes() == OLD


def test_folder_that_cannot_be_synced_is_told_and_the_new_file_is_whole(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EIO, "I/O error"), os.fsync, nth=2))
    with pytest.raises(ExportError, match="written whole"):
        write_atomically(old_file, write_new)
    assert old_file.read_bytes() == NEW
    assert only_file(old_file)


def test_file_system_without_folder_sync_is_fine(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EINVAL, "Invalid"), os.fsync, nth=2))
    write_atomically(old_file, write_new)
    assert old_file.read_bytes() == NEW


def test_advice_that_is_refused_is_no_failure(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = failing(OSError(errno.EINVAL, "Invalid"), os.posix_fadvise)
    monkeypatch.setattr(os, "posix_fadvise", refused)
    write_atomically(old_file, write_new)
    assert old_file.read_bytes() == NEW


def test_folder_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Is a directory") as caught:
        write_atomically(tmp_path, write_new)
    assert "name of a file" in caught.value.fix


def test_file_in_place_of_a_folder_is_named(old_file: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.safetensors/below"):
        write_atomically(old_file / "below", write_new)


def test_leftover_of_a_dead_process_is_cleared_and_that_of_a_living_one_kept(
    old_file: Path,
) -> None:
    seen: list[str] = []
    write_atomically(old_file, lambda path: (seen.append(path.name), write_new(path))[1])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = old_file.with_name(seen[0].replace(f".{os.getpid()}.", f".{gone.pid}."))
    alive = old_file.with_name(seen[0])
    other = old_file.with_name(seen[0].replace("model", "another"))
    for path in (dead, alive, other):
        path.touch()
    write_atomically(old_file, write_new)
    assert [path.exists() for path in (dead, alive, other)] == [False, True, True]


def test_leftover_of_a_process_that_may_not_be_asked_is_kept(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    write_atomically(old_file, lambda path: (seen.append(path), write_new(path))[1])
    seen[0].touch()
    monkeypatch.setattr(os, "kill", failing(PermissionError(1, "not yours"), os.kill))
    write_atomically(old_file, write_new)
    assert seen[0].exists()


def test_failure_to_clean_up_does_not_hide_the_first(
    old_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(OSError(errno.EIO, "I/O error"), os.replace))
    monkeypatch.setattr(Path, "unlink", failing(OSError(errno.EACCES, "denied"), Path.unlink))
    with pytest.raises(ExportError, match="I/O error"):
        write_atomically(old_file, write_new)
    assert old_file.read_bytes() == OLD


def test_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    program = (
        "from pathlib import Path; from swinq.files import write_atomically\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    data = bytes([n % 256]) * 3_000_000\n"
        f"    write_atomically({str(path)!r}, lambda partial: partial.write_bytes(data))\n"
        "    print(n, flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()  # the first file is there; the next ones come back to back
    time.sleep(0.03)
    for writer in writers:  # the second goes on while the first is killed
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        data = path.read_bytes()
        assert len(data) == 3_000_000
        assert len(set(data)) == 1
