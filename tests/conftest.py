"""Fixtures for every test: two threads, one seed, tiny shapes, real files where there are any."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.threads import threads_of_torch

if TYPE_CHECKING:
    from swinq.models.architecture import Architecture

REPO_ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Two threads at most: results and timings must not depend on how big the machine is."""
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_device)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, alone or in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caller's torchrun variables or colours."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run a test on the CPU and, where there is one, on the GPU."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root of the checkout."""
    return REPO_ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of real checkpoints and images: $SWINQ_SHARED, or `shared` beside the checkout."""
    path = Path(os.environ.get("SWINQ_SHARED", REPO_ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no folder of real checkpoints and images at {path} (set SWINQ_SHARED)")
    return path


@pytest.fixture(scope="session")
def shared_checkpoints(shared_dir: Path) -> dict[str, Path]:
    """Real `.pth` checkpoints by file stem."""
    found = {path.stem: path for path in sorted(shared_dir.glob("checkpoints/*.pth"))}
    if not found:
        pytest.skip(f"no .pth under {shared_dir / 'checkpoints'}")
    return found


def _tiny(version: int) -> "Architecture":
    from swinq.models.architecture import Architecture

    return Architecture(
        version=version,
        img_size=32,
        patch_size=2,
        in_chans=3,
        num_classes=10,
        embed_dim=32,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,  # stage 0 is 16x16: shifted windows are really there
        mlp_ratio=2.0,
        qkv_bias=True,
        pretrained_window_sizes=(0, 0),
        norm_eps=1e-5,
    )


@pytest.fixture(scope="session")
def tiny_architecture() -> "Architecture":
    """Two-stage Swin v1: 32 channels, head dimension 32, 4x4 windows on 16x16, then 8x8 tokens."""
    return _tiny(version=1)


@pytest.fixture(scope="session")
def tiny_architecture_v2() -> "Architecture":
    """The same sizes as `tiny_architecture`, as a Swin v2."""
    return _tiny(version=2)


@pytest.fixture
def single_thread() -> Iterator[None]:
    """One thread for the length of a test that compares bits of float sums."""
    with threads_of_torch(1):
        yield
