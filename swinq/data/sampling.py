"""Which images are used and which rank takes them; the answers never depend on how many there are.

A batch is a run of consecutive indices that is fixed before anything is shared out, so any number
of ranks computes the same batches and only divides them differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from swinq.data.dataset import ImageDataset
from swinq.errors import ConfigError, DataError


def calibration_indices(n: int, count: int, seed: int) -> list[int]:
    """`count` of `n` images, drawn without replacement.

    Args:
        n: images in the data set.
        count: images wanted, exactly.
        seed: 0 to 2**32-1; the same seed gives the same images with every version of NumPy, whose
            RandomState is frozen.

    Returns:
        sorted indices.

    Raises:
        DataError: more images wanted than there are.
        ConfigError: nothing wanted, or a seed out of range.
    """
    if count < 1:
        raise ConfigError(f"calibration on {count} images: want at least 1")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed}: want 0 to {2**32 - 1}")
    if count > n:
        raise DataError(
            f"calibration wants {count:,} images, the data set holds {n:,}",
            "lower --num-calib-batch or --calib-batchsz, or give more images",
        )
    return sorted(np.random.RandomState(seed).permutation(n)[:count].tolist())


def sample_digest(dataset: ImageDataset, indices: Iterable[int]) -> str:
    """SHA-256 over names and stored bytes of some images: says which sample a file came from.

    The order of `indices` does not matter. A folder and the zip made of it give the same digest.

    Raises:
        UnreadableImageError: an image whose bytes cannot be read.
    """
    digest = hashlib.sha256()
    for index in sorted(indices):
        for part in (dataset.path(index).encode("utf-8", "surrogateescape"), dataset.raw(index)):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def batches_of_rank(n: int, batch_size: int, rank: int, world: int) -> list[range]:
    """The batches that a rank computes: batch b is images [b*B, (b+1)*B), b % world == rank.

    Args:
        n: images, all ranks together.
        batch_size: B; only the last batch may hold fewer.
        rank: this process, 0 to world-1.
        world: number of processes.

    Raises:
        ConfigError: a batch size below 1, or a rank that does not exist.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: want at least 1")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world} does not exist")
    return [
        range(start, min(start + batch_size, n))
        for start in range(rank * batch_size, n, world * batch_size)
    ]
