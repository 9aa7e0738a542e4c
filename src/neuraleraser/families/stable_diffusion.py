"""Stable Diffusion 1 and 2."""

from __future__ import annotations

from typing import Any

from neuraleraser.families.family import Family, PublishedSAE, RecommendedSite, unet_config
from neuraleraser.site import Site

_SAEURON = "SAeUron (arXiv 2501.18052), Stable Diffusion 1.5"


def matches(pipe: Any) -> bool:
    """Return True if `pipe` denoises with a UNet of the first kind."""
    config = unet_config(pipe)
    return config is not None and config.get("addition_embed_type") != "text_time"


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    matches=matches,
    distilled={"sd-turbo": (1, 0.0)},  # its model card
    sites=(
        RecommendedSite(Site("unet.up_blocks.1.attentions.1"), "object", "objects", _SAEURON),
        RecommendedSite(Site("unet.up_blocks.1.attentions.2"), "style", "styles", _SAEURON),
    ),
    published=(
        PublishedSAE(
            ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5"),
            Site("unet.up_blocks.1.attentions.1"),
            "bcywinski/SAeUron_coco",
            "unet.up_blocks.1.attentions.1",
            ("cfg.json", "sae.safetensors"),
            "SAeUron (arXiv 2501.18052), trained on captions of COCO",
        ),
    ),
)
