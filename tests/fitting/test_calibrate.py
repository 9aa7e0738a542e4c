"""Erasers on other models: refused on architecture, warned of on weights, and their gates fitted anew."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, make_correction, make_eraser, make_gate, with_picture
from neuraleraser import attach, calibrate, load_eraser
from neuraleraser.activations import collect
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, EraserHeader, model_card
from neuraleraser.errors import ConceptError, DataError, SettingsError, SiteError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import IMAGE_ROUTES, PROMPT_ROUTES, Fingerprint, Site, denoiser, made_for

AT = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2")  # reads the prompt and little else
ON = Site("unet.up_blocks.0.attentions.1")
S = Sampling(num_inference_steps=2, batch_size=2)
CONCEPT = Concept("x", "other", tuple(Pair(f"x x x x {c}", f"b c d e {c}") for c in "abcd"))
NEAR = Concept("y", "other", (Pair("g h i k", "b c"),))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def eraser(pipe: Any) -> Eraser:
    """One feature that tells CONCEPT from its matches; a gate that stays shut."""
    means: list[Tensor] = []
    for prompts in ([p.positive for p in CONCEPT.pairs], [p.negative for p in CONCEPT.pairs]):
        seen: list[Tensor] = []
        collect(
            pipe, prompts, range(4), [AT], lambda s, seen=seen: seen.append(s.x.mean((0, 1))) if s.branch else None, S
        )
        means.append(torch.stack(seen).mean(0))
    row = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    gate = make_gate(AT, len(row), f=1, **SHUT)
    gate = replace(gate, rows=row[None], bias=-(row @ (means[0] + means[1]))[None] / 2, weight=torch.ones(1))
    sites = [AT, ON]
    header = EraserHeader("x", "other", prompts=("made with this",), seeds=(3, 9), measured={"ua": 1.0})
    header = replace(header, made_for=made_for(pipe, sites))
    return Eraser(gate, (make_correction(ON, 32),), header)


def images(pipe: Any, eraser: Eraser, prompts: list[str]) -> set[int]:
    with attach(pipe, eraser, action="detect") as trace:
        generate(pipe, prompts, range(50, 50 + len(prompts)), S)
    return set(trace.fired)


def silent(pipe: Any, eraser: Eraser) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(pipe, eraser):
            pass


def test_an_image_gate_is_left_out_and_the_header_says_so(pipe: Any, eraser: Eraser) -> None:
    """Nothing fits it to other weights: a start image must be warned of again."""
    header = replace(
        eraser.header, routes=(*PROMPT_ROUTES, *IMAGE_ROUTES), image_separation=(0.5, 0.5), least_strength=0.5
    )
    fitted = calibrate(
        pipe, with_picture(replace(eraser, header=header), pipe), CONCEPT, [NEAR], num_pairs=4, sampling=S
    )
    assert fitted.image_gate is None and fitted.guided is None
    assert fitted.routes == PROMPT_ROUTES and fitted.header.image_separation == ()
    assert fitted.header.tradeoff == ()
    assert fitted.header.least_strength is None


def test_a_gate_is_fitted_to_the_model_it_is_on(pipe: Any, eraser: Eraser) -> None:
    shows, lacks = [p.positive for p in CONCEPT.pairs], [p.negative for p in CONCEPT.pairs]
    assert not images(pipe, eraser, shows)
    fitted = calibrate(pipe, eraser, CONCEPT, [NEAR], num_pairs=4, sampling=S)
    assert len(images(pipe, fitted, shows)) >= 3 and len(images(pipe, fitted, lacks)) <= 1  # of four, with new seeds
    assert fitted.corrections is eraser.corrections and torch.equal(fitted.gate.rows, eraser.gate.rows)
    seen = fitted.header.calibrated
    assert seen is not None and seen.prompts == 9 and seen.open_share == 1.0 and min(seen.separation) >= 0.5
    # What it was fitted to may not be tested with, and what was measured before does not hold.
    assert set(fitted.header.prompts) == {"made with this", *shows, *lacks, NEAR.pairs[0].positive}
    assert fitted.header.seeds == (0, 9) and not fitted.header.measured


def test_other_weights_are_warned_of_until_the_gate_is_fitted(pipe: Any, eraser: Eraser) -> None:
    silent(pipe, eraser)
    tuned = copy.deepcopy(pipe)
    torch.manual_seed(5)
    for p in tuned.unet.parameters():
        p.data += 0.1 * p.data.abs().mean() * torch.randn_like(p)
    with pytest.warns(UserWarning, match="other weights of this architecture.*--calibrate"), attach(tuned, eraser):
        pass
    with pytest.warns(UserWarning, match="other weights"):
        load_eraser(copy.deepcopy(tuned), eraser)
    fitted = calibrate(tuned, eraser, CONCEPT, num_pairs=4, sampling=S)
    silent(tuned, fitted)
    assert len(images(tuned, fitted, [p.positive for p in CONCEPT.pairs])) >= 3


def test_what_leaves_the_weights_as_they_are_is_no_warning(pipe: Any, eraser: Eraser) -> None:
    silent(copy.deepcopy(pipe).to(torch.bfloat16), eraser)
    peft = pytest.importorskip("peft")
    adapted = copy.deepcopy(pipe)
    adapted.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    silent(adapted, eraser)
    wrapped = copy.deepcopy(pipe)
    wrapped.unet = torch.compile(wrapped.unet, backend="eager")
    silent(wrapped, eraser)
    packed = copy.deepcopy(pipe)
    for p in packed.unet.parameters():  # as quantisation leaves them: there is nothing to compare
        p.requires_grad_(False).data = p.data.to(torch.int8)
    silent(packed, eraser)


def test_another_architecture_is_refused(pipe: Any, eraser: Eraser) -> None:
    wide = pipelines.stable_diffusion(cross_attention_dim=24)  # the same sites, as wide, reading another text encoder
    with pytest.raises(SiteError, match=r"another architecture \(the weights at its sites have other shapes"):
        load_eraser(wide, eraser)
    assert eraser.header.made_for is not None
    told = replace(eraser.header, made_for=replace(eraser.header.made_for, model_class="UNetMotionModel"))
    with (
        pytest.raises(SiteError, match="made for a UNetMotionModel, and this is a UNet2DConditionModel"),
        attach(pipe, replace(eraser, header=told)),
    ):
        pass


@pytest.mark.parametrize("made", [7, "text", Fingerprint(weights={"x": (1.0,)}), Fingerprint(model_class="a\nb")])
def test_a_header_that_cannot_be_is_refused(pipe: Any, eraser: Eraser, made: Any) -> None:
    bad = replace(eraser, header=replace(eraser.header, made_for=made))
    with pytest.raises(DataError, match="field made_for"), attach(pipe, bad):
        pass


@pytest.mark.parametrize("made", [None, Fingerprint()])
def test_a_header_that_says_nothing_is_no_warning(pipe: Any, eraser: Eraser, made: Fingerprint | None) -> None:
    silent(pipe, replace(eraser, header=replace(eraser.header, made_for=made)))


def test_the_card_names_the_model_and_prints_no_weights(eraser: Eraser) -> None:
    card = str(model_card(eraser.header))
    assert "| made for | UNet2DConditionModel |" in card
    assert eraser.header.made_for is not None and next(iter(eraser.header.made_for.weights)) not in card


def test_what_cannot_be_calibrated(pipe: Any, eraser: Eraser) -> None:
    with pytest.raises(SettingsError, match="at least 2"):
        calibrate(pipe, eraser, CONCEPT, num_pairs=1, sampling=S)
    blind = replace(eraser, gate=replace(eraser.gate, rows=-eraser.gate.rows, bias=-eraser.gate.bias))
    with pytest.raises(ConceptError, match="do not tell it from its matches"):
        calibrate(pipe, blind, CONCEPT, num_pairs=4, sampling=S)
    elsewhere = replace(eraser, gate=replace(eraser.gate, site=Site("text_encoder.encoder.layers.0")))
    with pytest.raises(SettingsError, match="only those in a denoiser"):
        calibrate(pipe, elsewhere, CONCEPT, num_pairs=4, sampling=S)
    with pytest.raises(SiteError):
        calibrate(pipelines.flux(), make_eraser(), CONCEPT, num_pairs=4, sampling=S)
    assert denoiser(pipe) is pipe.unet and not pipe.unet.mid_block.attentions[0]._forward_hooks
