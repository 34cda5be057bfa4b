"""Digests that notice a single changed bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from swinq.export.format import METADATA_DIGEST, encode


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 in hex of a tensor's elements as the file holds them: row-major, little-endian."""
    elements = np.ascontiguousarray(tensor.detach().cpu().numpy())
    return hashlib.sha256(elements.data).hexdigest()


def digests(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Digest of every tensor, and under `__metadata__` that of all metadata but the digests."""
    with ThreadPoolExecutor() as pool:  # hashing runs outside of Python's lock
        found = dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
    rest = {key: value for key, value in metadata.items() if key != "digests"}
    found[METADATA_DIGEST] = hashlib.sha256(encode(rest).encode()).hexdigest()
    return found
