"""Features before the first step: each is as likely to fire as any other, and points to what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from neuraleraser.sae.first_weights import FIRST_SPREAD, first_weights, geometric_median


def stretched(count: int = 20_000, d: int = 12) -> Tensor:
    """Vectors that spread forty times as wide along one direction as along another, off the origin."""
    g = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    return torch.randn(count, d, generator=g) * torch.logspace(0, 1.6, d) @ turn + 5


def test_every_feature_fires():
    """Of the largest pre-activation of each vector, random rows get most from few features: the control."""
    x = stretched()
    w = first_weights(x, 256, seed=0)
    random = torch.nn.functional.normalize(torch.randn(256, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    winners = [((x - w.b_dec) @ rows.T).argmax(1).unique().numel() for rows in (w.W_enc, random)]
    assert winners[0] == 256 and winners[1] < 220


def test_pre_activations_spread_alike_and_decoders_point_to_what_is_read():
    x = stretched()
    w = first_weights(x, 256, seed=1)
    into = x - w.b_dec
    pre = into @ w.W_enc.T
    torch.testing.assert_close(pre.square().mean(0).sqrt(), torch.full((256,), FIRST_SPREAD), rtol=1e-3, atol=0)
    read = torch.nn.functional.normalize(pre.T @ into, dim=1)  # where x is, weighed by what an encoder reads
    torch.testing.assert_close(read, w.W_dec, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(w.W_dec.norm(dim=1), torch.ones(256))
    assert torch.equal(w.b_dec, geometric_median(x[::4])) and not w.b_enc.any()


def test_vectors_of_fewer_directions_than_values():
    w = first_weights(stretched(5), 64, seed=0)
    assert all(bool(torch.isfinite(p).all()) for p in w)
    again = first_weights(stretched(5), 64, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(w, again, strict=True))
