"""Modules of a pipeline: its components, those that denoise, and the module of a site."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from neuraleraser.errors import SiteError
from neuraleraser.families import known_names
from neuraleraser.site import Site

_DENOISERS = ("unet", "transformer")
"""Names of the component that denoises, in every family."""


def components(pipe: Any) -> dict[str, nn.Module]:
    """Return the pipeline's modules by name, as it holds them. SiteError for what is no diffusers pipeline."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if isinstance(pipe, (str, Path)):
        raise SiteError(
            f"{str(pipe)!r} was passed as the pipeline, expected a pipeline object: open_pipeline opens one"
        )
    if not isinstance(pipe, DiffusionPipeline):
        raise SiteError(
            f"{type(pipe).__name__} is no diffusers DiffusionPipeline, whose modules could be hooked (modular "
            "pipelines are not supported): pass one, made of the same components if need be."
        )
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def is_denoiser(name: str) -> bool:
    """Return True if a component of this name denoises."""
    return name in _DENOISERS or name in known_names(lambda family: family.further_denoisers)


def is_text_encoder(name: str) -> bool:
    """Return True if a component of this name encodes prompts."""
    return name.startswith("text_encoder")


def denoiser(pipe: Any) -> nn.Module:
    """Return the pipeline's UNet or transformer, as the pipeline holds it. SiteError where it has neither."""
    return getattr(pipe, denoiser_name(pipe))


def denoisers(pipe: Any) -> list[str]:
    """Return the names of the components that denoise."""
    return [name for name in components(pipe) if is_denoiser(name)]


def resolve(pipe: Any, site: Site) -> nn.Module:
    """Return the module of a site. SiteError names the nearest that exist."""
    names = site.path.split(".")
    owner: Any = pipe
    children: Mapping[str, nn.Module | None] = components(pipe)
    for depth, name in enumerate(names):
        found = children.get(name)
        if found is None:
            near = [".".join([*names[:depth], other]) for other in _similar_names(name, list(children))]
            raise SiteError(
                f"{site}: {type(pipe).__name__} has no module {'.'.join(names[: depth + 1])!r}; "
                + (f"the nearest are {', '.join(near)}." if near else f"{type(owner).__name__} has no parts.")
            )
        owner = unwrap(found)
        children = owner._modules
    return owner


def check_stream(site: Site, module: nn.Module) -> None:
    """SiteError for the text stream of a block that has, reads or returns none, and for an image as input."""
    kind = type(module).__name__
    if site.tap == "input":
        if site.stream != "text":
            raise SiteError(f"{site}: of what a block is given, only the text is a site; use {site.path}:input:text.")
        if "encoder_hidden_states" not in forward_arguments(module):
            raise SiteError(f"{site}: {kind} reads no prompt; a block with cross-attentions does.")
    elif site.stream == "text":
        if not is_text_first(module):
            raise SiteError(f"{site}: {kind} has one stream; use stream 'image' ({Site(site.path, site.tap)}).")
        if getattr(module, "context_pre_only", False):
            raise SiteError(f"{site}: this is the last {kind}, which returns no text; use an earlier one.")


def forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the names of forward's arguments, without self. Of the class: offloading shadows the instance's."""
    return _arguments_of(type(module).forward)


@cache
def _arguments_of(method: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a method's arguments, without self. Asked in each step, and slow to find."""
    return tuple(inspect.signature(method).parameters)[1:]


def is_text_first(module: nn.Module) -> bool:
    """Return True if this block carries two streams and returns (text, image)."""
    return is_one_of(module, known_names(lambda family: family.blocks.text_first))


def is_one_of(module: nn.Module, names: Collection[str]) -> bool:
    """Return True if the module's class, or one that it inherits from, has one of these names."""
    return any(base.__name__ in names for base in type(module).__mro__)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module itself where torch.compile(module) wrapped it: its hooks are the ones that run."""
    return getattr(module, "_orig_mod", module)


def _similar_names(name: str, names: list[str]) -> list[str]:
    numbers = [other for other in names if other.isdigit()]
    if numbers:  # what helps is the range, not the spelling
        return [numbers[0], numbers[-1]] if len(numbers) > 1 else numbers
    return difflib.get_close_matches(name, names, n=3, cutoff=0.0)


def denoiser_name(pipe: Any) -> str:
    """Return "unet" or "transformer". SiteError where the pipeline has neither."""
    for name in _DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise SiteError(f"{type(pipe).__name__} has neither a unet nor a transformer, only {', '.join(pipe.components)}.")
