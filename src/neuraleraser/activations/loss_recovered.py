"""Loss of a pipeline whose activations are replaced by an SAE's reconstructions."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.activations.collecting import ActivationBatch, collect
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.sae import SAE
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import (
    DenoiserCall,
    Site,
    denoiser,
    denoiser_calls,
    edit,
    input_and_target,
    replay,
    scheduler_steps,
)


@dataclass(frozen=True)
class TimestepLoss:
    """Figures of one timestep. Losses are means of ||target - prediction||^2 over images, noise and values.

    Examples:
        >>> found = measure_loss_recovered(pipe, sae, site, prompts, [0, 1], quick)
        >>> found.by_timestep[0].l0 > 0
        True
    """

    time: float
    explained_variance: float
    """Of the activations at this timestep, about their own mean."""
    l0: float
    loss: float
    """Of the model as it is."""
    loss_reconstructed: float
    """With the reconstructions in place of the activations."""
    loss_mean: float
    """With the activations' mean, over all timesteps, in their place."""

    @property
    def recovered(self) -> float:
        """Share of the loss that the activations are worth that is recovered: 1 as good as the model, 0 as the mean."""
        worth = self.loss_mean - self.loss
        return 1 - (self.loss_reconstructed - self.loss) / worth if worth > 0 else float("nan")


@dataclass(frozen=True)
class LossRecovered:
    """Findings of `measure_loss_recovered`: figures by timestep, and the images before and after the replacement.

    Examples:
        >>> found = measure_loss_recovered(pipe, sae, site, prompts, [0, 1], quick)
        >>> found.difference > 0
        True
    """

    by_timestep: tuple[TimestepLoss, ...]
    before: Images
    after: Images

    @property
    def difference(self) -> float:
        """Root mean square difference of the images' values, of 255."""
        return float(np.sqrt(np.square(self.before.astype(np.float64) - self.after).mean()))


@torch.no_grad()
def measure_loss_recovered(
    pipe: Any,
    sae: SAE,
    site: Site,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    num_timesteps: int = 6,
) -> LossRecovered:
    """Measure how much of a pipeline's denoising loss an SAE's reconstructions recover.

    The images are generated with and without the reconstructions at `site` (at every step, position and guidance
    branch), all in one batch. For the loss, the model's own final latents x_0 are noised anew, as its scheduler does,
    and predicted from with the prompt, without guidance: at each timestep with the same noise for the model as it is,
    with reconstructions, and with the mean.

    Args:
        pipe: The diffusers pipeline.
        sae: The SAE.
        site: The site that it reads.
        prompts: One prompt per image.
        seeds: One seed per image.
        sampling: How images are generated; None: as `default_sampling` says.
        num_timesteps: Number of timesteps at which the loss is compared.

    Returns:
        Figures by timestep, and the images without and with the reconstructions.

    Raises:
        DataError: There are no prompts, or the SAE has another width than the site.
        SettingsError: The scheduler's noise or target is not known.

    Examples:
        >>> found = measure_loss_recovered(pipe, sae, site, prompts, [0, 1], quick)
        >>> [figures.time for figures in found.by_timestep]
        [999.0, 499.0]
        >>> found.after.shape  # images drawn with the reconstructions
        (2, 64, 64, 3)
    """
    if not prompts:
        raise DataError("there are no prompts to draw: pass at least one")
    s = replace(sampling or default_sampling(pipe), batch_size=len(prompts))
    sae = copy.deepcopy(sae).to(next(denoiser(pipe).parameters()).device)
    sums: dict[float, _Sums] = {}
    calls: dict[float, DenoiserCall] = {}
    final: deque[Tensor] = deque(maxlen=1)

    def on_activations(seen: ActivationBatch) -> None:
        if seen.x.shape[2] != sae.d_in:
            raise DataError(
                f"{site} is {seen.x.shape[2]} wide, W_enc takes {sae.d_in}: pass the site it was trained on"
            )
        sums.setdefault(seen.timestep, _Sums()).add(sae, seen.x.float().flatten(0, 1))

    def on_call(call: DenoiserCall) -> None:
        assert call.layout is not None
        index, time = call.layout.first_conditional(), float(call.timestep.flatten()[0])
        if index is not None and time not in calls:
            calls[time] = call.rows(torch.tensor(index[: len(prompts)], device=call.state.device))

    with denoiser_calls(pipe, on_call), scheduler_steps(pipe, final.append):
        before = collect(pipe, prompts, seeds, [site], on_activations, s)
    known = list(dict.fromkeys(pipe.scheduler.timesteps.tolist()))
    if len(known) != len(calls):
        raise SettingsError(
            f"{len(calls)} timesteps were drawn, of the scheduler's {len(known)}: pass a plain pipeline"
        )
    mean = torch.stack([part.sum for part in sums.values()]).sum(0) / sum(part.n for part in sums.values())
    edits_of = {
        "loss": {},
        "loss_reconstructed": {site: lambda x, call: sae(x.float()) - x.float()},
        "loss_mean": {site: lambda x, call: mean.to(x.device).float().expand_as(x) - x.float()},
    }
    count = min(num_timesteps, len(known))
    chosen = [round(i * (len(known) - 1) / max(count - 1, 1)) for i in range(count)]
    found = []
    for step in chosen:
        time, call = list(calls.items())[step]
        noise = torch.randn(final[0].shape, generator=torch.Generator().manual_seed(step)).to(final[0].device)
        state, target = input_and_target(pipe.scheduler, final[0].float(), noise, known[step])
        losses = {}
        for name, edits in edits_of.items():
            with edit(pipe, edits):
                out = replay(pipe, state.to(call.state.dtype), call.timestep, call.conditioning)
            out = out[:, : target.shape[1]].float()  # some models predict the variance, too
            losses[name] = float((out - target).square().mean())
        found.append(TimestepLoss(time, *sums[_key_of_time(time, sums)].figures(), **losses))
    with edit(pipe, edits_of["loss_reconstructed"]):
        after = generate(pipe, prompts, seeds, s)
    return LossRecovered(tuple(found), before, after)


class _Sums:
    """Sums of one timestep that explained variance and L0 are made of."""

    def __init__(self) -> None:
        self.n, self.fired, self.error, self.square = 0, 0, 0.0, 0.0
        self.sum: Tensor = torch.zeros(())

    def add(self, sae: SAE, x: Tensor) -> None:
        """Take in vectors x [N, d]."""
        z = sae.encode(x)
        self.n += len(x)
        self.fired += int((z > 0).sum())
        self.error += float((x - sae.decode(z)).double().square().sum())
        self.square += float(x.double().square().sum())
        self.sum = self.sum.to(x.device) + x.double().sum(0)

    def figures(self) -> tuple[float, float]:
        """(explained variance, L0)."""
        total = self.square - float(self.sum.square().sum()) / self.n
        return (1 - self.error / total if total > 0 else 0.0), self.fired / self.n


def _key_of_time(time: float, sums: dict[float, Any]) -> float:
    """The key of this time: sites outside the denoiser have one for all."""
    return time if time in sums else next(iter(sums))
