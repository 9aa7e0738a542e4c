"""Number formats by processor: bfloat16 where it is fast, float32 elsewhere."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_bf16() -> bool:
    """Return True if this CPU multiplies bfloat16 in hardware, or if torch is too old to say.

    Without AMX or AVX512-BF16, torch emulates it: a product takes about a hundred times as long as in float32.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return not known or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 for accelerators and for CPUs that have it, float32 for other CPUs."""
    return torch.bfloat16 if torch.device(device).type != "cpu" or has_bf16() else torch.float32
