"""FLUX.1."""

from __future__ import annotations

from neuraleraser.families.family import Family, PublishedSAE, RecommendedSite, has_transformer
from neuraleraser.sae.formats import openai
from neuraleraser.sites import Site

_LAST_DOUBLE = Site("transformer.transformer_blocks.18")  # of 19 double blocks

FLUX = Family(
    name="flux",
    matches=has_transformer("FluxTransformer2DModel"),
    sites=(
        RecommendedSite(
            _LAST_DOUBLE,
            "any",
            "features of the published SAE",
            "sdxl-unbox (its folder flux_integration), FLUX.1",
        ),
    ),
    published=(
        PublishedSAE(
            ("black-forest-labs/FLUX.1-schnell",),
            _LAST_DOUBLE,
            "antoniomari/SAE_flux_18",
            "",
            (openai.UNBOX_CONFIG, openai.UNBOX_WEIGHTS, *openai.STATISTICS.values()),
            "sdxl-unbox (utils/loaders.py)",
        ),
    ),
)
