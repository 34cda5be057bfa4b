"""One changed bit changes a digest."""

import hashlib

import torch

from swinq.export.integrity import digest, digests


def test_digest_is_of_the_bytes_in_row_major_order() -> None:
    x = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    assert digest(x) == hashlib.sha256(bytes([1, 2, 3, 4, 5, 6])).hexdigest()
    assert digest(x.t()) == hashlib.sha256(bytes([1, 4, 2, 5, 3, 6])).hexdigest()
    assert digest(torch.tensor(1.0)) == hashlib.sha256(b"\x00\x00\x80\x3f").hexdigest()


def test_digest_of_metadata_leaves_out_only_the_digests() -> None:
    one = digests({}, {"int8_mode": "1", "digests": "a"})
    assert one == digests({}, {"int8_mode": "1", "digests": "b"})
    assert one != digests({}, {"int8_mode": "2", "digests": "a"})
