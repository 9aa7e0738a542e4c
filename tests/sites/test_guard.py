"""Fail closed: what was not read or edited as asked is an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.site_edits import FAMILIES, MIDDLE, nothing, set_denoiser, shift, swap_denoiser, zero
from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import EditContext, Site, candidate_sites, denoiser, edit, record


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.BUILDERS[request.param]()


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def test_a_replaced_denoiser_is_noticed(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    for context in (edit(pipe, {site: shift}), record(pipe, [site], lambda *_: None)):
        with context:
            pipelines.run(pipe, 0, steps=1)
            own = swap_denoiser(pipe)
            with pytest.raises(EraserNotAppliedError, match=site.path):
                pipelines.run(pipe, 0, steps=1)
            set_denoiser(pipe, own)


def test_a_forward_before_the_call_does_not_stand_for_one_in_it(sd: Any) -> None:
    with edit(sd, {MIDDLE: shift}), torch.no_grad():
        sd.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, pipelines.WORDS, pipelines.WIDTH))
        own = swap_denoiser(sd)
        with pytest.raises(EraserNotAppliedError):
            pipelines.run(sd, 0)
        set_denoiser(sd, own)


def test_a_replaced_block_is_noticed(pipe: Any) -> None:
    site = candidate_sites(pipe)[1]
    owner, _, last = site.path.partition(".")[2].rpartition(".")
    blocks = denoiser(pipe).get_submodule(owner)
    with edit(pipe, {site: shift}):
        blocks[int(last)] = copy.deepcopy(blocks[int(last)])
        blocks[int(last)]._forward_hooks.clear()
        with pytest.raises(EraserNotAppliedError, match=r"did not run in a forward"):
            pipelines.run(pipe, 0)


def test_a_skipped_layer_is_noticed() -> None:
    pipe = pipelines.stable_diffusion_3()
    with pytest.raises(EraserNotAppliedError, match=r"blocks\.1:output"), edit(pipe, {candidate_sites(pipe)[1]: shift}):
        pipelines.run(pipe, 0, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_noticed(sd: Any, bad: float) -> None:
    def one(x: Tensor, context: EditContext[Any]) -> Tensor:
        delta = torch.zeros_like(x)
        delta[0, 3, 1] = bad
        return delta

    with pytest.raises(EraserNotAppliedError, match=r"mid_block.*NaN or infinity"), edit(sd, {MIDDLE: one}):
        pipelines.run(sd, 0)
    with torch.no_grad():
        sd.unet.mid_block.attentions[0].proj_out.bias[0] = bad
    for change in (nothing, zero):
        with pytest.raises(EraserNotAppliedError, match=r"mid_block.*NaN or infinity"), edit(sd, {MIDDLE: change}):
            pipelines.run(sd, 0)


def test_a_shape_that_is_not_the_activations_is_noticed(sd: Any) -> None:
    with pytest.raises(EraserNotAppliedError, match=r"returned \[2, 16\], expected \[2, 16, 32\]"):
        with edit(sd, {MIDDLE: lambda x, call: x[..., 0]}):
            pipelines.run(sd, 0)


def test_a_block_outside_a_forward_has_no_time(sd: Any) -> None:
    with edit(sd, {MIDDLE: shift}), pytest.raises(EraserNotAppliedError, match="no timestep is bound"):
        sd.unet.mid_block.attentions[0](torch.zeros(1, 32, 4, 4), torch.zeros(1, pipelines.WORDS, pipelines.WIDTH))
    with edit(sd, {MIDDLE: shift}), pytest.raises(EraserNotAppliedError, match="without a timestep"):
        sd.unet(torch.zeros(1, 4, 8, 8), timestep=None, encoder_hidden_states=torch.zeros(1, 8, 16))
    words = torch.zeros(2, pipelines.WORDS, pipelines.WIDTH)
    sd.unet.forward = lambda state, timestep: sd.unet.mid_block.attentions[0](state, words)
    with edit(sd, {MIDDLE: shift}), pytest.raises(EraserNotAppliedError, match="timesteps have shape"):
        sd.unet(torch.zeros(2, 32, 4, 4), torch.zeros(3))


def test_gradient_checkpointing_through_a_site_is_refused() -> None:
    pipe = pipelines.flux()
    denoiser(pipe).enable_gradient_checkpointing()
    given = pipelines.embeds(pipe)
    given["prompt_embeds"].requires_grad_()

    def squared(x: Tensor, context: EditContext[Any]) -> Tensor:
        return 0.1 * x * x  # keeps x for its gradient: the backward pass must run the edit again

    with edit(pipe, {candidate_sites(pipe)[0]: squared}), pytest.raises(EraserNotAppliedError, match="checkpointing"):
        pipelines.run(pipe, 0, grad=True, steps=1, **given).sum().backward()


def test_an_encoder_that_was_not_needed_is_noticed(sd: Any) -> None:
    site = Site("text_encoder.encoder.layers.0")
    with edit(sd, {site: shift}):
        pipelines.run(sd, 0, prompt="a b")
        with pytest.raises(EraserNotAppliedError, match="prompt_embeds"):
            pipelines.run(sd, 0)  # from embeddings that the edit never saw
