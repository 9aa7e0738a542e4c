"""FLUX.1, and what is built like it: FLUX.2 and Chroma."""

from __future__ import annotations

from neuraleraser.families.family import Blocks, Family, PublishedSAE, RecommendedSite, has_transformer
from neuraleraser.site import Site

_LAST_DOUBLE = Site("transformer.transformer_blocks.18")  # of 19 double blocks
_POSITIONS = ("img_ids", "txt_ids")

FLUX = Family(
    name="flux",
    matches=has_transformer("FluxTransformer2DModel"),
    blocks=Blocks(text_first=("FluxTransformerBlock", "FluxSingleTransformerBlock")),
    distilled={"flux.1-schnell": (4, 0.0)},  # its model card
    guidance_names=("true_cfg_scale",),  # guidance_scale is the distilled one
    position_arguments=_POSITIONS,
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
            ("config.json", "state_dict.pth", "mean.pt", "std.pt"),
            "sdxl-unbox (utils/loaders.py)",
        ),
    ),
)

FLUX_2 = Family(
    name="flux-2",
    matches=has_transformer("Flux2Transformer2DModel"),
    blocks=Blocks(text_first=("Flux2TransformerBlock",), one_sequence=("Flux2SingleTransformerBlock",)),
    position_arguments=_POSITIONS,
)

CHROMA = Family(
    name="chroma",
    matches=has_transformer("ChromaTransformer2DModel"),
    blocks=Blocks(text_first=("ChromaTransformerBlock",)),
    position_arguments=_POSITIONS,
)
