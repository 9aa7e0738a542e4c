"""Guidance of the conditional prediction: by image and call, alike in one batch and in two passes, and gone after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from helpers import pipelines, text_encoders
from neuraleraser.errors import SettingsError
from neuraleraser.methods import ConceptRemovalGuidance, DynamicNegativeGuidance
from neuraleraser.sites import denoiser_calls, text_of

CRG = ConceptRemovalGuidance("x", "style", "x", threshold=-0.5)
DNG = DynamicNegativeGuidance("x", "style", "x", prior=0.3)
METHODS = pytest.mark.parametrize("method", [CRG, DNG], ids=["crg", "dng"])


class TwoPasses(StableDiffusionPipeline):
    """Guidance by a forward for each of the two prompts, as FLUX and Wan have it."""

    @torch.no_grad()
    def __call__(self, prompt: list[str], guidance_scale: float, negative_prompt: list[str], latents: Tensor) -> Tensor:  # type: ignore[override]
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(prompt, "cpu", 1, True, negative_prompt)
        self.scheduler.set_timesteps(3)
        for t in self.scheduler.timesteps:
            shown = self.unet(latents, t, encoder_hidden_states=prompt_embeds).sample
            plain = self.unet(latents, t, encoder_hidden_states=negative_prompt_embeds).sample
            guided = plain + guidance_scale * (shown - plain)
            latents = self.scheduler.step(guided, t, latents).prev_sample
        return latents


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion().to(torch.float64)


def noise(n: int) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def draw(pipe: Any, *texts: str, negative: str = "", **settings: Any) -> Tensor:
    both = {"prompt": list(texts), "negative_prompt": [negative] * len(texts), "latents": noise(len(texts))}
    return pipelines.run(pipe, 0, n=len(texts), steps=3, **both, **settings)


@METHODS
def test_it_acts_inside_its_context_alone(pipe: Any, method: Any):
    base = draw(pipe, "a x", "b")
    with method.watched(pipe) as trace:
        assert trace is None and torch.equal(draw(pipe, "a x", "b"), base)
    with method.applied(pipe) as trace:
        assert trace is None and (draw(pipe, "a x", "b") - base).abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(draw(pipe, "a x", "b"), base) and pipelines.left(pipe) == []
    off = type(method)("x", "style", "x", strength=0)
    with off.applied(pipe):
        assert torch.equal(draw(pipe, "a x", "b"), base)


@METHODS
def test_images_and_calls_know_nothing_of_each_other(pipe: Any, method: Any):
    with method.applied(pipe):
        first = draw(pipe, "a x", "b")
        assert torch.equal(draw(pipe, "a x", "b"), first), "a new call starts anew"
        other = draw(pipe, "a x", "x x x")
        assert torch.equal(other[0], first[0]) and not torch.equal(other[1], first[1])


@METHODS
@pytest.mark.parametrize("prompt", ["a x", ""], ids=["named", "empty"])
def test_guidance_in_one_batch_and_in_two_passes(pipe: Any, method: Any, prompt: str):
    """An empty prompt is the negative one, too: nothing in the texts tells the two blocks apart."""
    twin = TwoPasses(**pipe.components, requires_safety_checker=False)
    with method.applied(pipe):
        together = draw(pipe, prompt, prompt)
    with method.applied(pipe):
        apart = twin([prompt] * 2, 4.0, [""] * 2, noise(2))
    assert not torch.allclose(together, draw(pipe, prompt, prompt), atol=1e-3)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize(("method", "family"), [(CRG, "stable_diffusion_xl"), (DNG, "flux")])
def test_other_families(method: Any, family: str):
    pipe = text_encoders.build(family)
    settings: dict[str, Any] = {**text_encoders.READING[family][1], "n": 1, "steps": 3}
    base = pipelines.run(pipe, 0, **settings)
    with method.applied(pipe):
        changed = pipelines.run(pipe, 0, **settings)
    assert torch.isfinite(changed).all() and not torch.equal(changed, base)
    assert torch.equal(pipelines.run(pipe, 0, **settings), base)


def test_a_learned_variance_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """PixArt's transformer returns it behind the prediction, in four further channels."""
    pipe, seen = pipelines.pixart(), []
    with denoiser_calls(pipe, seen.append):
        pipelines.run(pipe, 0)
    texts = [text_of(seen[0].conditioning, row) for row in range(2)]
    monkeypatch.setattr("neuraleraser.methods.conditional.prompt_texts", lambda pipe, prompts, sampling: texts)
    with DNG.applied(pipe), denoiser_calls(pipe, seen.append):
        pipelines.run(pipe, 0)
    base, changed = seen[0].prediction, seen[2].prediction  # of the first step, whose state is the same
    assert torch.equal(base[:, 4:], changed[:, 4:]) and torch.equal(base[0], changed[0])
    assert not torch.allclose(base[1, :4], changed[1, :4])


def test_everything_that_acts_is_in_the_key():
    crg = [replace(CRG, **other) for other in ({"strength": 1.5}, {"threshold": 0.25}, {"prompt": "y"})]
    changes = ({"strength": 1.5}, {"prior": 0.5}, {"temperature": 1.0}, {"offset": 0.1}, {"prompt": "y"})
    methods = [CRG, DNG, *crg, *(replace(DNG, **other) for other in changes)]
    assert len({m.key for m in methods}) == len(methods)
    with pytest.raises(SettingsError, match="strength is -1: pass a number from 0"):
        ConceptRemovalGuidance("x", "style", "x", strength=-1)
    with pytest.raises(SettingsError, match="prior is 1: pass a number from"):
        DynamicNegativeGuidance("x", "style", "x", prior=1)
