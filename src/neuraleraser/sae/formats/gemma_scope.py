"""Gemma Scope: params.npz with W_enc [d, n], b_enc, W_dec [n, d], b_dec, threshold [n]; x W_enc + b_enc, where that
is above its threshold: b_dec is not taken off x. Only read."""

from __future__ import annotations

from pathlib import Path

from neuraleraser.sae.formats import files
from neuraleraser.sae.formats.source import Source

WEIGHTS = "params.npz"


def read(path: Path) -> Source:
    """The dictionary at `path`."""
    arrays = files.read_npz(path)
    W = files.take(arrays, "W_enc", (None, None), path).T
    n, d = W.shape
    return Source(
        W,
        files.take(arrays, "b_enc", (n,), path),
        files.take(arrays, "W_dec", (n, d), path),
        files.take(arrays, "b_dec", (d,), path),
        files.take(arrays, "threshold", (n,), path),
        subtracts=False,
    )
