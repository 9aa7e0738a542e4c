"""Wan: pictures and videos; Wan 2.2 has two denoisers, each with a guidance scale of its own."""

from __future__ import annotations

from neuraleraser.families.family import Family, has_transformer

WAN = Family(
    name="wan",
    matches=has_transformer("WanTransformer3DModel"),
    further_denoisers=("transformer_2",),
    guidance_names=("current_guidance_scale",),  # that of the denoiser whose turn it is
)
