"""Fitting of low-rank corrections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuraleraser.eraser import LowRank
from neuraleraser.precision import fast_dtype
from neuraleraser.sites import DenoiserCall, EditContext, Site, denoiser, edit, record, replay


@dataclass(frozen=True)
class TrainingExample:
    """Example that a correction learns from.

    One sampling step of some images, as a call whose conditioning shows the concept, and the prediction [B, ...] that
    is wanted instead: the frozen model's own for the matched prompt at the same states.
    """

    call: DenoiserCall
    wanted: Tensor


def train_corrections(
    pipe: Any,
    edits: Sequence[tuple[Site, ...]],
    examples: Sequence[TrainingExample],
    *,
    rank: int = 32,
    steps: int = 160,
    batch: int = 24,
    lr: float = 4e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[LowRank, ...]:
    """Fit delta = x V U + b, one for each tuple of sites in `edits`, all together; at all timesteps the same, as the
    prompt is.

    The loss is the squared error between the prediction and the one that is wanted, over all examples and their rows
    alike.
    """
    generator = torch.Generator().manual_seed(seed)
    times = torch.stack([example.call.timestep.flatten()[0].float().cpu() for example in examples]).mean()[None]
    device = examples[0].call.state.device
    sizes = _widths(pipe, [sites[0] for sites in edits], examples[0].call)
    params: dict[Site, dict[str, Tensor]] = {}
    for (first, *_), d in zip(edits, sizes, strict=True):
        params[first] = {
            "down": torch.randn(1, d, rank, generator=generator).div(d**0.5).to(device).requires_grad_(),
            "up": torch.zeros(1, rank, d, device=device, requires_grad=True),
            "bias": torch.zeros(1, d, device=device, requires_grad=True),
        }

    def correction(sites: tuple[Site, ...]) -> LowRank:
        return LowRank(sites[0], times.to(device), **params[sites[0]], also=sites[1:])

    def at(sites: tuple[Site, ...]) -> Callable[[Tensor, EditContext[None]], Tensor]:
        return lambda x, context: correction(sites).delta(x, context.timestep)

    rows = [(k, r) for k, example in enumerate(examples) for r in range(len(example.wanted))]
    net = denoiser(pipe)
    frozen = [(p, p.requires_grad) for p in net.parameters()]
    adam = torch.optim.Adam([p for group in params.values() for p in group.values()], lr=lr, betas=(0.9, 0.98))
    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        # Plain products: on a CPU the fused kernel's backward pass is several times slower.
        with sdpa_kernel([SDPBackend.MATH]), edit(pipe, {site: at(sites) for sites in edits for site in sites}):
            for step in range(steps):
                which = [rows[i] for i in torch.randint(len(rows), (batch,), generator=generator).tolist()]
                shown = _gather([examples[k].call for k, _ in which], [r for _, r in which])
                target = torch.stack([examples[k].wanted[r] for k, r in which])
                with torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16):
                    out = replay(pipe, shown.state, shown.timestep, shown.conditioning)
                loss = F.mse_loss(out.float(), target.float())
                adam.zero_grad(set_to_none=True)
                loss.backward()
                for group in adam.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / 10, 2.5 * (1 - step / steps))
                adam.step()
                if on_step:
                    on_step(step, float(loss.detach()))
    finally:
        for p, needs in frozen:
            p.requires_grad_(needs)
    fitted = map(correction, edits)
    return tuple(LowRank.from_tensors(c.site, {k: v.detach() for k, v in c.tensors().items()}, c.also) for c in fitted)


@torch.no_grad()
def _widths(pipe: Any, sites: Sequence[Site], call: DenoiserCall) -> list[int]:
    """The width of each site's activations."""
    seen: dict[Site, int] = {}

    def note(site: Site, x: Tensor, _: EditContext[None]) -> None:
        seen[site] = x.shape[2]

    with record(pipe, dict.fromkeys(sites), note):
        one = call.rows(torch.tensor([0], device=call.state.device))
        replay(pipe, one.state, one.timestep, one.conditioning)
    return [seen[site] for site in sites]


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
