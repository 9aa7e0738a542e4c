"""UCE's weights are the minimum of its sum, and images have them inside the context alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.naive_guidance import draw
from neuraleraser.errors import SettingsError
from neuraleraser.methods import UnifiedConceptEditing
from neuraleraser.methods.unified_concept_editing import text_projections

METHOD = UnifiedConceptEditing("x", "style", (("x", "a"),), ("b", "c d"), erase_scale=2.0, damping=0.3)


def token(phrase: str, pipe: object) -> Tensor:
    """The text of a phrase's last token, by hand: after the start of the text come its words."""
    return pipe.encode_prompt([phrase], "cpu", 1, False)[0][0, len(phrase.split())]  # type: ignore[attr-defined]


def test_its_weights_are_the_minimum():
    pipe = pipelines.stable_diffusion().to(torch.float64)
    layers = text_projections(pipe)
    assert layers and all(name.endswith((".to_k", ".to_v")) for name in layers)
    e, g, kept = token("x", pipe), token("a", pipe), [token("b", pipe), token("c d", pipe)]
    for layer, found in zip(layers.values(), METHOD.weights(pipe, list(layers.values())), strict=True):
        old = layer.weight.detach()
        w = found.clone().requires_grad_()
        loss = 2.0 * (w @ e - old @ g).square().sum() + 0.3 * (w - old).square().sum()
        loss = loss + sum(((w - old) @ p).square().sum() for p in kept)
        (gradient,) = torch.autograd.grad(loss, w)
        assert gradient.abs().max() < 1e-8 and (found - old).abs().max() > 1e-3


def test_a_phrase_reads_as_another_where_nothing_else_weighs():
    pipe = pipelines.stable_diffusion().to(torch.float64)
    layers = list(text_projections(pipe).values())
    method = UnifiedConceptEditing("x", "style", (("x", "a"),), damping=1e-6)
    for layer, found in zip(layers, method.weights(pipe, layers), strict=True):
        torch.testing.assert_close(found @ token("x", pipe), layer.weight @ token("a", pipe), atol=1e-4, rtol=1e-4)


def test_it_acts_inside_its_context_alone():
    pipe = pipelines.stable_diffusion()
    base = draw(pipe, "x a")
    with METHOD.applied(pipe):
        last = draw(pipe, "x a")
    with replace(METHOD, tokens="rest").applied(pipe):
        rest = draw(pipe, "x a")
    assert not torch.equal(last, base) and not torch.equal(rest, last)
    with METHOD.watched(pipe):
        assert torch.equal(draw(pipe, "x a"), base)
    assert torch.equal(draw(pipe, "x a"), base)


def test_refusals_and_key():
    with pytest.raises(SettingsError, match="nothing to erase: pass pairs of a phrase of 'x'"):
        UnifiedConceptEditing("x", "style", ())
    with pytest.raises(SettingsError, match="damping is 0: pass a number above 0"):
        replace(METHOD, damping=0)
    with pytest.raises(SettingsError, match="StableDiffusionXLPipeline has no UNet that reads the text of one encoder"):
        METHOD.applied(pipelines.stable_diffusion_xl())
    changes = ({"tokens": "rest"}, {"damping": 1.0}, {"erase_scale": 1.0}, {"preserve_scale": 2.0}, {"preserved": ()})
    assert len({METHOD.key, *(replace(METHOD, **change).key for change in changes)}) == 6  # type: ignore[arg-type]
