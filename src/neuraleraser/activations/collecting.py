"""Activations of a pipeline while it generates images, and a random sample of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import DataError
from neuraleraser.sae.mixing_buffer import Unwanted
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, current_batch, record

CONDITIONAL, UNCONDITIONAL = 1, 0


@dataclass(frozen=True)
class ActivationBatch:
    """Activations of one site in one denoiser call, one guidance branch: x [B, P, d] of `images`, at `timestep`.

    grid: height and width of the P positions, None where they are not known.
    """

    site: Site
    x: Tensor
    timestep: float
    images: range
    branch: int
    grid: tuple[int, int] | None = None


def collect(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sites: Sequence[Site],
    on_activations: Callable[[ActivationBatch], None],
    sampling: Sampling | None = None,
    image: Images | None = None,
    on_batch_start: Callable[[int, int], None] | None = None,
) -> Images:
    """Generate images and call `on_activations` with the activations at each site.

    A row whose text is the negative prompt is of the unconditional branch, whether it comes in one batch with the
    conditional one or in a pass of its own; all others are conditional (a text encoder's pass over the negative prompt,
    too). Frames of a video are positions of their image.

    Args:
        pipe: The diffusers pipeline.
        prompts: One prompt per image.
        seeds: One seed per image.
        sites: Sites whose activations are wanted.
        on_activations: Called with the activations of one site in one denoiser call. Their `x` is the model's own
            tensor: copy what you keep.
        sampling: How images are generated; None: as `default_sampling` says.
        image: Start images of an image-to-image pipeline, uint8 [N, H, W, 3].
        on_batch_start: Called before each batch of images, as in `generate`.

    Returns:
        The images, uint8 [N, H, W, 3].

    Examples:
        >>> seen = []
        >>> drawn = collect(pipe, prompts, [0, 1], [site], seen.append, quick)
        >>> [(part.timestep, part.branch, part.x.shape) for part in seen[:2]]
        [(999.0, 0, torch.Size([2, 64, 128])), (999.0, 1, torch.Size([2, 64, 128]))]
    """

    def split_branches(site: Site, x: Tensor, context: EditContext[None]) -> None:
        batch, frames = current_batch(), context.rows.frames(x.shape[0])
        assert batch is not None
        images = range(batch.first, batch.first + batch.real)
        t = float(context.timestep[0])
        for negative, part in context.rows.branches(x):
            part = part.unflatten(0, (-1, frames)).flatten(1, 2) if frames > 1 else part
            branch, grid = UNCONDITIONAL if negative else CONDITIONAL, context.grid if frames == 1 else None
            on_activations(ActivationBatch(site, part[: batch.real], t, images, branch, grid))

    with record(pipe, sites, split_branches):
        return generate(pipe, prompts, seeds, sampling, image=image, on_batch_start=on_batch_start)


@dataclass(frozen=True)
class Sample:
    """Activations kept of one site: x [N, P, d], maps of P vectors each; the image [N] and the guidance branch [N] that
    each comes from. As many of every image, images in a row."""

    x: Tensor
    image: Tensor
    branch: Tensor


def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sites: Sequence[Site],
    groups: int,
    generator: torch.Generator,
    sampling: Sampling | None = None,
    group_size: int = 1,
    unwanted: Callable[[], bool] | None = None,
) -> dict[Site, Sample]:
    """Generate images and keep random groups of activation vectors of each.

    Groups are drawn from all steps, positions and guidance branches. What is kept stays in the model's dtype and
    memory.

    Args:
        pipe: The diffusers pipeline.
        prompts: One prompt per image.
        seeds: One seed per image.
        sites: Sites whose activations are wanted.
        groups: Groups to keep of each image and site; all if there are fewer.
        generator: Generator of the choice, on the CPU.
        sampling: How images are generated; None: as `default_sampling` says.
        group_size: Vectors in a group: random positions of one denoiser call.
        unwanted: Called again and again; `Unwanted` is raised as soon as it returns True.

    Returns:
        The groups of each site.

    Raises:
        DataError: NaN or infinity (the message names site, timestep and prompts), or a site has fewer positions than a
            group has vectors.
        Unwanted: `unwanted()` is true.
    """
    kept: dict[tuple[Site, int], tuple[Tensor, Tensor, Tensor]] = {}

    def keep_some(seen: ActivationBatch) -> None:
        if unwanted and unwanted():
            raise Unwanted
        _check_finite(seen, prompts)
        b, p, _ = seen.x.shape
        whole = p // group_size
        if not whole:
            raise DataError(
                f"{seen.site} has {p} positions, too few for a group of {group_size}: pass a smaller group_size"
            )
        # Every map gets a random key, and those of the largest keys stay: a fair draw, however many calls follow.
        key, which = torch.rand((b, whole), generator=generator).topk(min(whole, groups), 1)
        positions = torch.arange(whole)[None, :, None].expand(b, -1, -1)
        if group_size > 1:
            positions = (
                torch.rand((b, p), generator=generator).argsort(1)[:, : whole * group_size].unflatten(1, (whole, -1))
            )
        positions = positions.gather(1, which[..., None].expand(-1, -1, group_size)).to(seen.x.device)
        x = seen.x.detach()[torch.arange(b, device=positions.device)[:, None, None], positions]
        branch = torch.full_like(which, seen.branch)
        home = seen.site, seen.images.start
        if home in kept:
            key, x, branch = (torch.cat(pair, 1) for pair in zip(kept[home], (key, x, branch), strict=True))
            key, stay = key.topk(min(groups, key.shape[1]), 1)
            x = x[torch.arange(b, device=x.device)[:, None], stay.to(x.device)]
            branch = branch.gather(1, stay)
        kept[home] = key, x, branch

    collect(pipe, prompts, seeds, sites, keep_some, sampling)
    out = {}
    for site in sites:
        parts = [(first, *rest) for (at, first), rest in kept.items() if at == site]
        image = [(first + torch.arange(len(key)))[:, None].expand_as(key) for first, key, _, _ in parts]
        out[site] = Sample(
            torch.cat([x.flatten(0, 1) for _, _, x, _ in parts]),
            torch.cat([i.flatten() for i in image]),
            torch.cat([branch.flatten() for _, _, _, branch in parts]),
        )
    return out


def activation_matrix(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sites: Sequence[Site],
    vectors_per_image: int = 256,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> dict[Site, Tensor]:
    """Return a random sample of activation vectors, over steps, positions and guidance branches.

    Args:
        pipe: The diffusers pipeline.
        prompts: One prompt per image.
        seeds: One seed per image.
        sites: Sites whose activations are wanted.
        vectors_per_image: Vectors per image; all of them if there are fewer.
        sampling: How images are generated; None: as `default_sampling` says.
        seed: Seed of the choice.

    Returns:
        For each site [up to images * vectors_per_image, d], float32 on the CPU, in random order.

    Raises:
        DataError: There are no prompts; or NaN or infinity, with the site, timestep and prompts.

    Examples:
        >>> found = activation_matrix(pipe, prompts, [0, 1], [site], vectors_per_image=100, sampling=quick)
        >>> found[site].shape
        torch.Size([200, 128])
    """
    if not prompts:
        raise DataError("there are no prompts, so there are no activations: pass at least one")
    generator = torch.Generator().manual_seed(seed)
    found = sample(pipe, prompts, seeds, sites, vectors_per_image, generator, sampling)
    order = torch.Generator().manual_seed(seed + 1)
    return {site: s.x[torch.randperm(len(s.x), generator=order), 0].float().cpu() for site, s in found.items()}


def _check_finite(seen: ActivationBatch, prompts: Sequence[str]) -> None:
    """DataError for NaN or infinity, which a sum keeps."""
    good = torch.isfinite(seen.x.sum((1, 2), dtype=torch.float32))
    if not bool(good.all()):
        bad = [prompts[i] for i, ok in zip(seen.images, good.tolist(), strict=True) if not ok]
        raise DataError(
            f"NaN or infinity in the activations of {seen.site} at timestep {seen.timestep:g}, "
            f"prompts {bad[:3]}: use float32 or bfloat16"
        )
