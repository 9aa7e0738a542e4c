"""Qwen-Image."""

from __future__ import annotations

from neuraleraser.families.family import Blocks, Family, has_transformer

QWEN_IMAGE = Family(
    name="qwen-image",
    matches=has_transformer("QwenImageTransformer2DModel"),
    blocks=Blocks(text_first=("QwenImageTransformerBlock",)),
    guidance_names=("true_cfg_scale",),  # guidance_scale is the distilled one
)
