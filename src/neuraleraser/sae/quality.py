"""Quality of an SAE on activations it has not seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import DataError
from neuraleraser.sae.model import SAE

_EDGES = [-6.0 + 0.5 * i for i in range(13)]  # log10 of firing rates, 1e-6 to 1
_CHUNK = 2**22  # activations of features held at a time


@torch.no_grad()
def measure_sae(sae: SAE, x: Tensor) -> dict[str, Any]:
    """Measure an SAE on raw activations.

    Args:
        sae: The SAE.
        x: Raw activations, [N, d].

    Returns:
        Plain numbers that fit into a header:

            vectors            N
            explained_variance 1 - sum ||x - x_hat||^2 / sum ||x - mean(x)||^2; negative if worse than the mean
            l0                 features that fire for a vector, on average
            dead_share         share of features that never fired on x
            rates              `log10_edges` and `features`, the number of features with a firing rate between
                               two edges (the lowest bin takes all that is rarer; features that never fired
                               are in none)

    Raises:
        DataError: There are no vectors, they have another width, or they have NaN or infinity.

    Examples:
        >>> from neuraleraser.sae import measure_sae
        >>> x = activation_matrix(pipe, prompts, [0, 1], [site], sampling=quick)[site]
        >>> list(measure_sae(sae, x))
        ['vectors', 'explained_variance', 'l0', 'dead_share', 'rates']
    """
    if x.ndim != 2 or x.shape[0] == 0 or x.shape[1] != sae.d_in:
        raise DataError(f"activations have shape {tuple(x.shape)}: pass [N, {sae.d_in}] with N > 0")
    if bad := int((~torch.isfinite(x)).sum()):
        raise DataError(f"{bad} of {x.numel()} activation values are NaN or infinite: nothing to measure")
    mean = x.double().mean(0)
    error = total = 0.0
    fired = torch.zeros(sae.n_features, dtype=torch.int64, device=x.device)
    for part in x.split(max(1, _CHUNK // sae.n_features)):
        part = part.to(sae.W_enc.dtype)
        z = sae.encode(part)
        error += float((part - sae.decode(z)).double().square().sum())
        total += float((part.double() - mean).square().sum())
        fired += (z > 0).sum(0)
    rates = (fired[fired > 0].double() / x.shape[0]).log10().clamp(_EDGES[0], _EDGES[-1]).cpu()
    bins = torch.histogram(rates, torch.tensor(_EDGES, dtype=torch.float64)).hist
    return {
        "vectors": x.shape[0],
        "explained_variance": 1 - error / total if total > 0 else (1.0 if error == 0 else 0.0),
        "l0": float(fired.sum()) / x.shape[0],
        "dead_share": float((fired == 0).double().mean()),
        "rates": {"log10_edges": _EDGES, "features": [int(c) for c in bins]},
    }
