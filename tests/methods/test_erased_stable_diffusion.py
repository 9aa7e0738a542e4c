"""ESD-x trains what its formula says, changes cross-attentions alone, and leaves the pipeline as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.naive_guidance import draw
from neuraleraser.errors import SettingsError
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods import ErasedStableDiffusion, ESDSettings
from neuraleraser.methods.erased_stable_diffusion import negative_guidance_loss
from neuraleraser.methods.fine_tuning import DrawnState, StateBatch, drawn_states
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)


def loss_of(pipe: Any, states: list[DrawnState], weights: Any, strength: float, before: Any = None) -> float:
    """The loss of weights at states of the prompts "x" and "x a"."""
    empty, *texts = prompt_texts(pipe, ["", "x", "x a"], S)
    shown = [texts[s.prompt] for s in states]
    batch = StateBatch.of(pipe.unet, states)
    return float(negative_guidance_loss(batch, weights, before or {}, empty, shown, strength).detach())


def train(pipe: Any, **settings: Any) -> ErasedStableDiffusion:
    return ErasedStableDiffusion.train(
        pipe,
        "x",
        "style",
        ["x", "x a"],
        S,
        ESDSettings(**{"steps": 4, "batch": 3, "images": 3, "refresh": 2} | settings),
    )


@torch.no_grad()
def test_the_loss_is_its_formula():
    pipe = pipelines.stable_diffusion().to(torch.float64)
    states = drawn_states(pipe, ["x", "x a"], [0, 1, 0], range(3), S)
    assert len(states) == 9 and [s.prompt for s in states[:3]] == [0, 1, 0], "each image in each step"
    batch = [states[0], states[4], states[8]]
    name = next(n for n, _ in pipe.unet.named_parameters() if n.endswith("attn2.to_k.weight"))
    changed = {name: pipe.unet.get_parameter(name) + 0.5}
    total = 0.0
    for s in batch:
        without, shown = (
            pipe.unet(s.call.state, s.call.timestep, pipe.encode_prompt([text], "cpu", 1, False)[0]).sample
            for text in ("", ["x", "x a"][s.prompt])
        )
        pipe.unet.get_parameter(name).data += 0.5
        own = pipe.unet(s.call.state, s.call.timestep, pipe.encode_prompt([["x", "x a"][s.prompt]], "cpu", 1, False)[0])
        pipe.unet.get_parameter(name).data -= 0.5
        total += float((own.sample - (without - 2 * (shown - without))).square().mean()) / 3
    assert loss_of(pipe, batch, changed, 2.0) == pytest.approx(total, rel=1e-6)
    both = {name: pipe.unet.get_parameter(name) + 0.2}
    once = loss_of(pipe, batch, {}, 2.0, before=both)
    pipe.unet.get_parameter(name).data += 0.2
    again = loss_of(pipe, batch, {name: pipe.unet.get_parameter(name) - 0.2}, 2.0)
    assert once == pytest.approx(again, rel=1e-6), "the target is of the weights before"


def test_training_lowers_it_and_leaves_the_pipeline_as_it_was():
    pipe = pipelines.stable_diffusion()
    before = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    base = draw(pipe, "x a")
    method = train(pipe, steps=40, learning_rate=1e-2)
    assert all(torch.equal(x, before[name]) for name, x in pipe.unet.state_dict().items())
    assert all(x.requires_grad and x.grad is None for x in pipe.unet.parameters())
    assert method.weights and all(".attn2." in name for name in method.weights)
    states = drawn_states(pipe, ["x", "x a"], [0, 1, 0], range(9, 12), S)
    trained, own = (loss_of(pipe, states, weights, 1.0) for weights in (method.weights, {}))
    assert trained < 0.8 * own
    with method.applied(pipe):
        assert not torch.equal(draw(pipe, "x a"), base)
    assert torch.equal(draw(pipe, "x a"), base)
    assert method.made_with.seeds == ((0, 59),) and method.made_with.prompts == ("x", "x a")


def test_it_is_the_same_again_and_its_key_tells_others_apart():
    first, again, other = (train(pipelines.stable_diffusion(), seed=seed) for seed in (0, 0, 1))
    assert first.key == again.key != other.key


def test_weights_of_another_model_are_refused():
    method = train(pipelines.stable_diffusion(), steps=1)
    with (
        pytest.raises(SettingsError, match=r"use them with the model that they were made for"),
        method.applied(pipelines.pixart()),
    ):
        pass
    with pytest.raises(SettingsError, match="no cross-attentions called attn2"):
        train(pipelines.flux())
