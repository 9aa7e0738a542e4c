"""Scalings of an SAE's features, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from neuraleraser.eraser.corrections import Scaling
from neuraleraser.sae import SAE
from neuraleraser.sites import Site


def scale(sae: SAE, site: Site, features: Tensor, times: Tensor, factor: float = 0.0) -> Scaling:
    """Multiply the selected features: z'_i = factor z_i, so delta = (factor - 1) sum_i z_i d_i. 0 ablates, a
    negative factor steers away."""
    rows = sae.W_enc[features].float()
    return Scaling(
        site,
        times=times.sort().values[:1].float(),
        rows=rows.clone(),
        bias=sae.b_enc[features].float() - rows @ sae.b_dec.float(),
        threshold=sae.threshold[features].float()[None],
        decoder=sae.W_dec[features].clone(),
        factor=torch.full((1, len(features)), float(factor)),
    )
