"""Gemma Scope: params.npz with W_enc [d, n], b_enc, W_dec [n, d], b_dec, threshold [n]; x W_enc + b_enc, where that
is above its threshold: b_dec is not taken off x. Only read."""

from __future__ import annotations

from pathlib import Path

from neuraleraser.io import untrusted
from neuraleraser.sae.conversion import Source

WEIGHTS = "params.npz"


def read(path: Path) -> Source:
    """Return the SAE at `path`."""
    arrays = untrusted.read_npz(path)
    W = untrusted.get_tensor(arrays, "W_enc", (None, None), path).T
    n, d = W.shape
    return Source(
        W,
        untrusted.get_tensor(arrays, "b_enc", (n,), path),
        untrusted.get_tensor(arrays, "W_dec", (n, d), path),
        untrusted.get_tensor(arrays, "b_dec", (d,), path),
        untrusted.get_tensor(arrays, "threshold", (n,), path),
        subtracts=False,
    )
