"""Weights before the first step: random features that fire about equally often."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from neuraleraser.sae.sparse_ops import Weights

FIRST_SPREAD = 0.25  # standard deviation of every first pre-activation, of x scaled to E||x||^2 = d
MEDIAN_SAMPLE = 4096  # vectors that the median is taken of
SMALLEST_EIGENVALUE = 1e-3  # of the covariance, over the mean one: what is smaller is taken for it


def first_weights(x: Tensor, n: int, seed: int) -> Weights:
    """Return the weights of n features before the first step, by the first vectors x [N, d], scaled:

        S = covariance of x about its geometric median b (of a sample),   g_i random of norm 1
        W_enc_i = FIRST_SPREAD S^(-1/2) g_i,   W_dec_i = S^(1/2) g_i / |S^(1/2) g_i|,   b_enc = 0,   b_dec = b

    Encoder rows that are random themselves read above all the few directions along which x spreads widest: those next
    to these win everywhere, and of 2,048 features on the canvas half never fire again. Here pre-activations of all
    features spread alike, and a decoder row points to where x is on average when its encoder reads much.
    """
    b = geometric_median(x[:: max(1, len(x) // MEDIAN_SAMPLE)])
    values, vectors = torch.linalg.eigh((x - b).T @ (x - b) / len(x))
    root = values.clamp_min(SMALLEST_EIGENVALUE * float(values.mean())).sqrt()
    g = normalize(torch.randn(n, x.shape[1], generator=torch.Generator().manual_seed(seed)), dim=1).to(x.device)
    encoder, decoder = (g @ (vectors * power) @ vectors.T for power in (FIRST_SPREAD / root, root))
    return Weights(encoder, g.new_zeros(n), normalize(decoder, dim=1), b)


def geometric_median(x: Tensor, rounds: int = 50) -> Tensor:
    """The point [d] of least summed distance to the rows of x [N, d] (Weiszfeld's iteration)."""
    median = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - median).norm(dim=1).clamp_min(1e-8 * float(x.abs().max()) + 1e-30)
        new = (weight @ x) / weight.sum()
        done = float((new - median).norm()) <= 1e-6 * float(median.norm())
        median = new
        if done:
            break
    return median
