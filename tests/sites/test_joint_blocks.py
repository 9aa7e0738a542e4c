"""Models in which text and image are one sequence: the image stream is the image's positions, or there is no site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
)

from helpers import pipelines
from neuraleraser import Site, candidate_sites, record
from neuraleraser.errors import SiteError
from neuraleraser.sites import text_streams

IMAGE = 16
"""Positions of the image in all of them."""


def auraflow() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=16, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    pipe = AuraFlowPipeline(None, None, pipelines.vae(), model, FlowMatchEulerDiscreteScheduler())  # type: ignore[arg-type]
    call = {}
    for side in ("", "negative_"):
        call |= {f"{side}prompt_embeds": torch.ones(1, 8, 16), f"{side}prompt_attention_mask": torch.ones(1, 8)}
    return pipe, call | {"height": 16, "width": 16}


def chroma() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 2, 2), approximator_hidden_dim=16, approximator_num_channels=64,
        approximator_layers=1,
    )  # fmt: skip
    pipe = ChromaPipeline(FlowMatchEulerDiscreteScheduler(), pipelines.vae(), None, None, model)  # type: ignore[arg-type]
    call = {}
    for side in ("", "negative_"):
        call |= {f"{side}prompt_embeds": torch.ones(1, 8, 16), f"{side}prompt_attention_mask": torch.ones(1, 8).bool()}
    return pipe, call | {"height": 16, "width": 16}


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # Chroma imports it so itself
@pytest.mark.parametrize(("build", "joint", "single"), [
    (auraflow, "transformer.joint_transformer_blocks", "transformer.single_transformer_blocks.0"),
    (chroma, "transformer.transformer_blocks", "transformer.single_transformer_blocks.0"),
])  # fmt: skip
def test_the_image_is_the_image(build: Any, joint: str, single: str) -> None:
    pipe, call = build()
    pipe.set_progress_bar_config(disable=True)
    sites = candidate_sites(pipe)
    assert [site.path for site in sites] == [f"{joint}.{i}" for i in range(2)]
    seen: dict[Site, int] = {}
    with record(pipe, [*sites, *text_streams(pipe)], lambda site, x, context: seen.update({site: x.shape[1]})):
        pipe(**call, num_inference_steps=1, output_type="latent")
    assert {seen[site] for site in sites} == {IMAGE} and len(text_streams(pipe)) == 2
    with pytest.raises(SiteError, match=rf"the image has {IMAGE}, as text"):
        with record(pipe, [Site(single)], lambda *_: None):
            pipe(**call, num_inference_steps=1, output_type="latent")


def test_single_blocks_of_other_models_are_no_candidates() -> None:
    flux2 = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
    )  # fmt: skip
    lumina = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16), cap_feat_dim=16,
    )  # fmt: skip
    kinds: list[tuple[Any, Any, int]] = [(Flux2Pipeline, flux2, 1), (Lumina2Pipeline, lumina, 0)]
    for kind, model, blocks in kinds:
        pipe = kind(
            transformer=model, vae=None, text_encoder=None, tokenizer=None, scheduler=FlowMatchEulerDiscreteScheduler()
        )
        assert len(candidate_sites(pipe)) == blocks
