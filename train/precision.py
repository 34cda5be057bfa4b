"""The types that matrix products may have in training."""

from __future__ import annotations

import torch

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def autocast(device: torch.device, amp: str, *, cache: bool = True) -> torch.autocast:
    """The context of a forward.

    Args:
        amp: one of AMP_TYPES; "fp32" is no autocast.
        cache: cast a weight once, until the context ends.
    """
    dtype = AMP_TYPES[amp]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=cache)
