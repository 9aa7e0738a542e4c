"""Stable Diffusion XL and its distilled forms."""

from __future__ import annotations

from typing import Any

from neuraleraser.families.family import Family, PublishedSAE, RecommendedSite, unet_config
from neuraleraser.site import Site

_UNBOX = "sdxl-unbox (arXiv 2410.22366), SDXL Turbo"


def matches(pipe: Any) -> bool:
    """Return True if `pipe` denoises with a UNet that is given sizes and crops beside the text."""
    config = unet_config(pipe)
    return config is not None and config.get("addition_embed_type") == "text_time"


def _published(path: str) -> PublishedSAE:
    return PublishedSAE(
        ("stabilityai/sdxl-turbo",),
        Site(path, "update"),
        "surokpro2/Unboxing_SDXL_with_SAEs",
        f"checkpoints/{path}_k10_hidden5120_auxk256_bs4096_lr0.0001/final",
        ("config.json", "state_dict.pth", "mean.pt", "std.pt"),
        "sdxl-unbox (arXiv 2410.22366)",
        "space",
    )


SDXL = Family(
    name="sdxl",
    matches=matches,
    distilled={"sdxl-turbo": (1, 0.0)},  # its model card
    sites=(
        # Composition is which things a picture shows and where they stand, so this is where an object is looked for.
        RecommendedSite(Site("unet.down_blocks.2.attentions.1", "update"), "object", "composition", _UNBOX),
        RecommendedSite(Site("unet.mid_block.attentions.0", "update"), "", "spatial relations", _UNBOX),
        RecommendedSite(Site("unet.up_blocks.0.attentions.0", "update"), "", "details", _UNBOX),
        RecommendedSite(Site("unet.up_blocks.0.attentions.1", "update"), "style", "colour, light and style", _UNBOX),
    ),
    published=tuple(
        _published(path)
        for path in (
            "unet.down_blocks.2.attentions.1",
            "unet.mid_block.attentions.0",
            "unet.up_blocks.0.attentions.0",
            "unet.up_blocks.0.attentions.1",
        )
    ),
)
