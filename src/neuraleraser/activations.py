"""From prompts to activations: what a pipeline computes at chosen sites while it draws.

`collect` is the stream; `bank` is a random sample of its vectors, for training an SAE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import DataError
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Call, Site, record

CONDITIONAL, UNCONDITIONAL = 1, 0


@dataclass(frozen=True)
class Seen:
    """Activations of one site in one denoiser call, one guidance branch: x [B, P, d] of `images`, at `timestep`."""

    site: Site
    x: Tensor
    timestep: float
    images: range
    branch: int


def collect(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sites: Sequence[Site],
    on: Callable[[Seen], None],
    sampling: Sampling | None = None,
    init: Images | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Images:
    """Draw the images and tell `on` all activations at `sites`, and `on_batch` of each batch as `generate` does;
    returns the images.

    With guidance in one batch the first half of a call's rows is the unconditional branch; else all rows count
    as conditional (so a text encoder's pass over the negative prompt does too). `x` is the model's own tensor:
    copy what you keep.
    """
    s = sampling or Sampling()
    now = {"first": 0, "real": 0}

    def begin(first: int, real: int) -> None:
        now.update(first=first, real=real)
        if on_batch:
            on_batch(first, real)

    def note(site: Site, x: Tensor, call: Call) -> None:
        size = s.batch if s.pad else min(s.batch, len(prompts))
        t = float(call.timestep[0])
        images = range(now["first"], now["first"] + now["real"])
        if x.shape[0] == 2 * size:
            on(Seen(site, x[: now["real"]], t, images, UNCONDITIONAL))
            on(Seen(site, x[size : size + now["real"]], t, images, CONDITIONAL))
        else:
            on(Seen(site, x[: now["real"]], t, images, CONDITIONAL))

    with record(pipe, sites, note):
        return generate(pipe, prompts, seeds, s, init=init, on_batch=begin)


def bank(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sites: Sequence[Site],
    per_image: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> dict[Site, Tensor]:
    """A random sample of activation vectors, at most `per_image` an image on average, over steps, positions and
    branches: as many of every call, so fewer in all where calls have few positions or only one branch.

    -> {site: [up to images * per_image, d]}, in random order. Raises DataError where there are no prompts, and on
    NaN or infinity, naming the site, timestep and prompts.
    """
    if not prompts:
        raise DataError("there are no prompts, so there are no activations: pass at least one")
    s = sampling or Sampling()
    kept: dict[Site, list[Tensor]] = {site: [] for site in sites}
    calls = s.steps * (2 if s.guidance > 1 else 1)
    generator = torch.Generator().manual_seed(seed)

    def on(seen: Seen) -> None:
        b, p, _ = seen.x.shape
        n = -(-per_image // calls)
        # Every image of the call gives its own n positions.
        index = torch.rand((b, p), generator=generator).topk(min(n, p), -1).indices.to(seen.x.device)
        x = seen.x[torch.arange(b, device=seen.x.device)[:, None], index].flatten(0, 1).float().cpu()
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                f"NaN or infinity in the activations of {seen.site} at timestep {seen.timestep:g}, "
                f"prompts {[prompts[i] for i in seen.images][:3]}: use float32 or bfloat16"
            )
        kept[seen.site].append(x)

    collect(pipe, prompts, seeds, sites, on, s)
    order = torch.Generator().manual_seed(seed + 1)
    out = {}
    for site, parts in kept.items():
        x = torch.cat(parts)
        out[site] = x[torch.randperm(len(x), generator=order)[: per_image * len(prompts)]]
    return out
