"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from neuraleraser.families.family import Blocks, Family, has_transformer

STABLE_DIFFUSION_3 = Family(
    name="stable-diffusion-3",
    matches=has_transformer("SD3Transformer2DModel"),
    distilled={"stable-diffusion-3.5-large-turbo": (4, 0.0)},  # its model card
    blocks=Blocks(text_first=("JointTransformerBlock",)),
)
