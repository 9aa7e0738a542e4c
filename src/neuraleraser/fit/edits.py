"""The edits: what is added where the gate is open, in the three modes of law 2."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuraleraser.eraser import Correction
from neuraleraser.sae import SAE
from neuraleraser.sites import Call, DenoiserCall, Site, denoiser, edit, record, replay


def groups(times: Sequence[float], count: int) -> Tensor:
    """Ascending centres [count] of `count` groups of neighbouring timesteps."""
    ordered = torch.tensor(list(times), dtype=torch.float32).unique()
    return torch.stack([part.mean() for part in ordered.tensor_split(min(count, len(ordered)))])


def learnt(
    pipe: Any,
    sites: dict[Site, int],
    states: Sequence[tuple[DenoiserCall, DenoiserCall]],
    *,
    rank: int = 8,
    bins: int = 5,
    steps: int = 200,
    batch: int = 24,
    lr: float = 4e-3,
    seconds: float = 60.0,
    seed: int = 0,
    spans: Mapping[Site, Tensor] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[Correction, ...]:
    """Fit delta = x V_t U_t + b_t at all `sites` (site -> width d) together.

    At a site in `spans` (decoder rows [q, d] of an SAE) U_t and b_t stay in the span of those rows, so that the
    edit reads as features put in place of features.

    Each element of `states` is one sampling step: a call whose conditioning shows the concept, at the states to
    be corrected, and a call whose prediction is the target: the frozen model's own for the matched prompt at
    the same states. The loss is the squared error between the two predictions, over all steps at once.
    """
    generator = torch.Generator().manual_seed(seed)
    times = groups([float(c.timestep.flatten()[0]) for c, _ in states], bins)
    device, g = states[0][0].state.device, len(times)
    spans = spans or {}
    params: dict[Site, dict[str, Tensor]] = {}
    for site, d in sites.items():
        q = len(spans[site]) if site in spans else d
        params[site] = {
            "down": torch.randn(g, d, rank, generator=generator).div(d**0.5).to(device).requires_grad_(),
            "up": torch.zeros(g, rank, q, device=device, requires_grad=True),
            "bias_out": torch.zeros(g, q, device=device, requires_grad=True),
        }

    def correction(site: Site) -> Correction:
        p = params[site]
        if site in spans:
            p = {"down": p["down"], "up": p["up"] @ spans[site], "bias_out": p["bias_out"] @ spans[site]}
        return Correction(site, "learnt", times.to(device), p)

    def at(site: Site) -> Callable[[Tensor, Call], Tensor]:
        return lambda x, call: correction(site).delta(x, call.timestep)

    n = states[0][0].state.shape[0]
    net = denoiser(pipe)
    frozen = [(p, p.requires_grad) for p in net.parameters()]
    adam = torch.optim.Adam([p for group in params.values() for p in group.values()], lr=lr, betas=(0.9, 0.98))
    started = time.monotonic()
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        # Plain products: on a CPU the fused kernel's backward pass is several times slower.
        with sdpa_kernel([SDPBackend.MATH]), edit(pipe, {site: at(site) for site in sites}):
            for step in range(steps):
                which = torch.randint(len(states), (batch,), generator=generator).tolist()
                rows = torch.randint(n, (batch,), generator=generator).tolist()
                shown = _gather([states[k][0] for k in which], rows)
                target = torch.stack([states[k][1].prediction[r] for k, r in zip(which, rows, strict=True)])
                with torch.autocast(device.type, torch.bfloat16):
                    out = replay(pipe, shown.state, shown.timestep, shown.conditioning)
                loss = F.mse_loss(out.float(), target.float())
                adam.zero_grad(set_to_none=True)
                loss.backward()
                share = max(step / steps, (time.monotonic() - started) / seconds)
                if share >= 1:
                    break
                for group in adam.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / 10, 2.5 * (1 - share))
                adam.step()
                if on_step:
                    on_step(step, float(loss.detach()))
    finally:
        for p, needs in frozen:
            p.requires_grad_(needs)
    fitted = (correction(site) for site in sites)
    return tuple(Correction(c.site, c.mode, c.times, {k: v.detach() for k, v in c.tensors.items()}) for c in fitted)


def _gather(calls: Sequence[DenoiserCall], rows: Sequence[int]) -> DenoiserCall:
    """Row `rows[i]` of `calls[i]`, stacked, each with its own timestep."""
    parts = [c.rows(torch.tensor([r], device=c.state.device)) for c, r in zip(calls, rows, strict=True)]

    def cat(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {k: cat([v[k] for v in values]) for k in values[0]}
        return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].ndim else values[0]

    return DenoiserCall(
        torch.cat([p.state for p in parts]),
        torch.cat([p.timestep.flatten()[:1] for p in parts]),
        cat([dict(p.conditioning) for p in parts]),
        torch.cat([p.prediction for p in parts]),
    )


def scale(sae: SAE, site: Site, features: Tensor, times: Tensor, factor: float = 0.0) -> Correction:
    """Multiply the selected features: z'_i = factor z_i, so delta = (factor - 1) sum_i z_i d_i. 0 ablates, a
    negative factor steers away as SAeUron does (arXiv 2501.18052, equation 6)."""
    return Correction(
        site,
        "scale",
        times.sort().values[:1].float(),
        _rows(sae, features)
        | {"decoder": sae.W_dec[features].clone(), "factor": torch.full((1, len(features)), float(factor))},
    )


def replace(pipe: Any, sae: SAE, site: Site, features: Tensor, plain: Sequence[DenoiserCall]) -> Correction:
    """Within the span of the selected decoder rows, put the mean over matched prompts without the concept:
    delta = P (c_t - x), with c_t the mean activation at timestep t."""
    centres: list[Tensor] = []

    def note(_: Site, x: Tensor, call: Call) -> None:
        centres.append(x.detach().float().mean((0, 1)))

    with record(pipe, [site], note), torch.no_grad():
        for call in plain:
            replay(pipe, call.state, call.timestep, call.conditioning)
    times = torch.tensor([float(c.timestep.flatten()[0]) for c in plain])
    order = times.argsort()
    basis = torch.linalg.qr(sae.W_dec[features].float().T).Q
    return Correction(
        site,
        "replace",
        times[order],
        _rows(sae, features) | {"basis": basis.contiguous(), "centre": torch.stack(centres)[order]},
    )


def _rows(sae: SAE, features: Tensor) -> dict[str, Tensor]:
    rows = sae.W_enc[features].float()
    return {
        "rows": rows.clone(),
        "bias": sae.b_enc[features].float() - rows @ sae.b_dec.float(),
        "threshold": sae.threshold[features].float().clone(),
    }
