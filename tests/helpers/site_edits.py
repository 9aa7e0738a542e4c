"""Edits that do little, all sites of a pipeline, and what a context may leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from helpers import pipelines
from neuraleraser.sites import EditContext, Site, candidate_sites, denoiser, edit

FAMILIES = sorted(pipelines.BUILDERS)
MIDDLE = Site("unet.mid_block.attentions.0")


def zero(x: Tensor, context: EditContext[Any]) -> Tensor:
    return torch.zeros_like(x)


def shift(x: Tensor, context: EditContext[Any]) -> Tensor:
    return torch.full_like(x, 0.5)


def nothing(x: Tensor, context: EditContext[Any]) -> None:
    return None


def leftovers(pipe: Any) -> list[str]:
    """Everything that a context could have left behind."""
    found = [name for name in ("progress_bar", "maybe_free_model_hooks") if name in vars(pipe)]
    for part in pipe.components.values():
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            found += [path for name, hooks in vars(module).items() if "hooks" in name and hooks]
    return found


def all_sites(pipe: Any) -> list[Site]:
    sites = [Site(site.path, tap) for site in candidate_sites(pipe) for tap in ("output", "update")]
    if type(pipe).__name__ in ("FluxPipeline", "StableDiffusion3Pipeline"):
        sites += [Site(site.path, site.tap, "text") for site in sites if not last_of_sd3(pipe, site)]
    return sites + [Site(site.path, "input", "text") for site in candidate_sites(pipe)]


def last_of_sd3(pipe: Any, site: Site) -> bool:
    return type(pipe).__name__ == "StableDiffusion3Pipeline" and site.path.endswith(".2")


def recorded(pipe: Any, sites: list[Site], **call: Any) -> dict[Site, list[tuple[Tensor, EditContext[Any]]]]:
    seen: dict[Site, list[tuple[Tensor, EditContext[Any]]]] = {site: [] for site in sites}

    def keep(site: Site) -> Callable[[Tensor, EditContext[Any]], None]:
        return lambda x, context: seen[site].append((x.detach().clone(), context))

    with edit(pipe, {site: keep(site) for site in sites}, new_state=dict):
        pipelines.run(pipe, 0, **call)
    return seen


def swap_denoiser(pipe: Any) -> nn.Module:
    """Another model in the denoiser's place, as a user would put it; returns the one that was there."""
    own = denoiser(pipe)
    other = copy.deepcopy(own)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    set_denoiser(pipe, other)
    return own


def set_denoiser(pipe: Any, model: nn.Module) -> None:
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", model)
