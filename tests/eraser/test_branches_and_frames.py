"""Rows of a call that are no prompt's or no image's: negative prompts, passes of their own, frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from helpers import pipelines
from helpers.erasers import make_eraser
from helpers.prompted_calls import LOUD, QUIET, hears, prompts, twin
from neuraleraser import (
    ConceptRefusedError,
    attach,
)
from neuraleraser.sites import record


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


# The negative prompt.


@pytest.mark.parametrize("action", ["erase", "detect", "refuse"])
def test_a_concept_in_the_negative_prompt_is_not_asked_for(sd: Any, action: str) -> None:
    base = prompts(sd, QUIET, QUIET, negative=LOUD)
    with attach(sd, hears(sd), action=action) as trace:
        assert torch.equal(prompts(sd, QUIET, QUIET, negative=LOUD), base)
    assert not trace.fired
    with attach(sd, hears(sd), action="detect") as trace:
        prompts(sd, LOUD, QUIET, negative=LOUD)
    assert list(trace.fired) == [0]


def test_while_guidance_does_not_push_away_the_negative_prompt_counts(sd: Any) -> None:
    """A callback turns guidance down: what is drawn then leans to the negative prompt."""

    def weaker(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.5
        return given

    with attach(sd, hears(sd), action="detect") as trace:
        prompts(sd, QUIET, negative=LOUD)
    assert not trace.fired
    pipe = type("Guided", (StableDiffusionPipeline,), {"do_classifier_free_guidance": property(lambda self: True)})
    always = twin(sd, pipe)
    with attach(always, hears(sd), action="detect") as trace:
        prompts(always, QUIET, negative=LOUD, callback_on_step_end=weaker)
    assert trace.fired == {0: {"Cats": [1.0]}}


def test_a_negative_pass_of_its_own() -> None:
    pipe = pipelines.flux()
    given = pipelines.embeds(pipe, 2)
    negative = {f"negative_{name}": value + 1 for name, value in given.items()}
    call: dict[str, Any] = {"n": 2, "true_cfg_scale": 2.0, **negative}
    seen: list[tuple[bool, ...]] = []
    eraser = make_eraser("flux")
    with record(pipe, [eraser.gate.site], lambda site, x, context: seen.append(context.rows.counts)):
        pipelines.run(pipe, 0, **call)
    assert seen == [(True,), (False,)] * 2
    with attach(pipe, eraser, action="detect") as trace:
        pipelines.run(pipe, 0, **call)
    assert sorted(trace.fired) == [0, 1]


# Rows that are no halves of images.


def test_frames_of_a_video_are_one_image() -> None:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    pipe = pipelines.stable_diffusion()
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )  # fmt: skip
    video = AnimateDiffPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, adapter, pipe.scheduler)
    video.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "num_frames": 3, "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0), "prompt": LOUD,
    }  # fmt: skip
    eraser = make_eraser()
    with attach(video, eraser) as trace:
        video(**call)
    assert sorted(trace.fired) == [0] and len(trace.records()) == 1
    with pytest.raises(ConceptRefusedError) as refused, attach(video, eraser, action="refuse"):
        video(**call)
    assert refused.value.images == {0: ["Cats"]}


def test_a_pipeline_without_prepared_latents_draws_one_image() -> None:
    from diffusers import LDMTextToImagePipeline

    pipe = pipelines.stable_diffusion()

    class Bert(torch.nn.Module):
        """Encoder of the kind that the pipeline calls."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        @property
        def device(self) -> torch.device:
            return self.inner.device

        def forward(self, ids: Tensor) -> Any:
            return self.inner(ids)

    tokenizer = pipelines.tokenizer(77)
    text = pipelines.CLIPTextModel(pipelines.clip_text(max_position_embeddings=77)).eval()
    ldm: Any = LDMTextToImagePipeline(pipe.vae, Bert(text), tokenizer, pipe.unet, pipe.scheduler)
    ldm.set_progress_bar_config(disable=True)
    with pytest.raises(ConceptRefusedError) as refused, attach(ldm, make_eraser(), action="refuse"):
        ldm(LOUD, height=16, width=16, num_inference_steps=2, guidance_scale=4.0, output_type="np")
    assert refused.value.images == {0: ["Cats"]}
