"""Useful sites of a pipeline: blocks, their text streams, cross-attentions, text encoders' layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from neuraleraser.errors import SettingsError, SiteError
from neuraleraser.families import family_of, known_names
from neuraleraser.families.defaults import recommended_sites
from neuraleraser.site import Site
from neuraleraser.sites.modules import (
    check_stream,
    components,
    denoiser,
    denoiser_name,
    forward_arguments,
    is_one_of,
    is_text_encoder,
    is_text_first,
    resolve,
    unwrap,
)


def candidate_sites(pipe: Any) -> list[Site]:
    """Return the text-conditioned blocks of a pipeline: a UNet's Transformer2DModels, a DiT's blocks.

    Blocks in which text and image are one sequence are left out.

    Args:
        pipe: The diffusers pipeline.

    Returns:
        The sites, in the order they run.

    Examples:
        >>> for found in candidate_sites(pipe)[:2]:
        ...     print(found)
        unet.down_blocks.0.attentions.0:output:image
        unet.down_blocks.1.attentions.0:output:image
    """
    name = denoiser_name(pipe)
    root = unwrap(denoiser(pipe))
    if name == "unet":
        # a UNet registers its mid block after the up blocks, so named_modules() alone is out of order
        paths = [
            f"{part}.{path}"
            for part in ("down_blocks", "mid_block", "up_blocks")
            for path, module in _unwrapped_modules(getattr(root, part, None) or nn.Module())
            if type(module).__name__ == "Transformer2DModel"
        ]
    else:
        paths = [
            f"{part}.{i}"
            for part in family_of(pipe).blocks.lists
            for i, block in enumerate(getattr(root, part, ()))
            if _reads_text_apart(unwrap(block))
        ]
    return [Site(f"{name}.{path}") for path in paths]


def text_streams(pipe: Any) -> list[Site]:
    """Return the text streams of those candidate blocks that carry and return one, in the order they run."""
    return [Site(site.path, stream="text") for site in candidate_sites(pipe) if _has_text(pipe, site)]


def cross_attention_sites(pipe: Any) -> list[Site]:
    """Return the outputs of the attentions from image to text: what the prompt writes into each position.

    UNets, PixArt and Sana have one or more in each candidate block.

    Args:
        pipe: The diffusers pipeline.

    Returns:
        The sites, in the order they run; [] if text and image are one sequence (SD3, FLUX).

    Examples:
        >>> print(cross_attention_sites(pipe)[0])
        unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2:output:image
    """
    return [
        Site(f"{block.path}.{path}")
        for block in candidate_sites(pipe)
        for path, module in _unwrapped_modules(resolve(pipe, block))
        if getattr(module, "is_cross_attention", False)  # of diffusers' Attention
    ]


def default_gate_site(pipe: Any, kind: str) -> Site:
    """Return where a concept of this kind ("style", "object" or "other") is best looked for.

    That is the site that is recommended for its kind in the pipeline's family, or else for any; else the first that is
    recommended at all; else a text-conditioned block in the middle.

    Raises SettingsError for a pipeline without such a block.
    """
    known = recommended_sites(pipe)
    for wanted in (kind, "any"):
        for recommended in known:
            if recommended.kind == wanted:
                return recommended.site
    blocks = candidate_sites(pipe)
    found = [*(recommended.site for recommended in known), *blocks[len(blocks) // 2 :]]
    if not found:
        raise SettingsError(f"{type(pipe).__name__} has no text-conditioned block that is known here: pass a site")
    return found[0]


def default_image_site(pipe: Any) -> Site:
    """Return where an image gate looks: the site that the pipeline's family names for it, else the output of the block
    three quarters through the denoiser.

    Raises SettingsError for a pipeline without such a block.
    """
    known = family_of(pipe).image_site
    if known is not None:
        return known
    blocks = candidate_sites(pipe)
    if not blocks:
        raise SettingsError(f"{type(pipe).__name__} has no text-conditioned block that is known here")
    return Site(blocks[3 * len(blocks) // 4].path)


def default_block_site(pipe: Any, kind: str) -> Site:
    """Return where a concept of this kind is best looked for and edited in the image stream itself.

    That is the block that is recommended for its kind in the pipeline's family; else the last text-conditioned block
    but one: late enough that little brings the concept back, and not the last, which can be a bottleneck.

    Raises SettingsError for a pipeline without a text-conditioned block.
    """
    blocks = candidate_sites(pipe)
    paths = {block.path for block in blocks}
    for known in recommended_sites(pipe):
        if known.kind == kind and known.site.path in paths:
            return known.site
    if not blocks:
        raise SettingsError(f"{type(pipe).__name__} has no text-conditioned block that is known here: pass a site")
    return blocks[-2:][0]


def text_encoder_sites(pipe: Any) -> list[Site]:
    """Return the layers of each text encoder that the pipeline holds. They run once per prompt.

    Args:
        pipe: The diffusers pipeline.

    Returns:
        The sites, in order.

    Examples:
        >>> print(text_encoder_sites(pipe)[0])
        text_encoder.encoder.layers.0:output:image
    """
    return [
        Site(f"{name}.{path}.{i}")
        for name, part in components(pipe).items()
        if is_text_encoder(name)
        for path, layers in _layer_lists(unwrap(part))
        for i in range(len(layers))
    ]


def _reads_text_apart(block: nn.Module) -> bool:
    """Return True for a block that has the prompt beside its image; not where both are one sequence."""
    if is_text_first(block):
        return True
    together = known_names(lambda family: family.blocks.one_sequence)
    return "encoder_hidden_states" in forward_arguments(block) and not is_one_of(block, together)


def _unwrapped_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield `named_modules` without the wrappers of torch.compile, whose names no site has."""
    for path, module in root.named_modules():
        if unwrap(module) is module:
            yield ".".join(name for name in path.split(".") if name != "_orig_mod"), module


def _layer_lists(encoder: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return CLIP's and Gemma's `layers`, T5's `block`: the first such list, which holds all others."""
    found = [
        (path, module)
        for path, module in _unwrapped_modules(encoder)
        if isinstance(module, nn.ModuleList) and path.rpartition(".")[2] in ("layers", "block")
    ]
    return found[:1]


def _has_text(pipe: Any, site: Site) -> bool:
    try:
        check_stream(Site(site.path, stream="text"), resolve(pipe, site))
    except SiteError:
        return False
    return True


def edits_for(pipe: Any, site: Site) -> tuple[Site, ...]:
    """Return where an eraser whose gate looks at `site` edits: what blocks read of the prompt, from the first on.

    In a UNet, PixArt or Sana all blocks read the same prompt, and one correction serves them all. In SD3 and FLUX the
    text changes from block to block, and what is written into it stays: there it is what the first block reads.

    Raises SiteError for a site that is in no text-conditioned block.
    """
    blocks = candidate_sites(pipe)
    if not any(f"{site.path}.".startswith(f"{b.path}.") for b in blocks):
        raise SiteError(f"{site} is in none of the blocks that are known: pass the sites to edit")
    component = site.path.partition(".")[0]
    read = [Site(b.path, "input", "text") for b in blocks if b.path.partition(".")[0] == component]
    return tuple(read[:1] if text_streams(pipe) else read)
