"""SalUn's mask, loss and training are those written out; it leaves the pipeline as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.naive_guidance import draw
from helpers.text_encoders import build
from neuraleraser.errors import SettingsError
from neuraleraser.methods import SalUn, SalUnSettings
from neuraleraser.methods.salun import _drawn_pictures, saliency_masks
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
FORGET, ANCHORS, RETAIN = ["x a", "x b"], ["a", "b"], ["c", "d", "e"]


def train(pipe: Any, forget: Any = FORGET, anchors: Any = ANCHORS, retain: Any = RETAIN, **settings: Any) -> SalUn:
    given: dict[str, Any] = {"steps": 3, "batch": 2, "images": 3, **settings}
    return SalUn.train(pipe, "x", "style", forget, anchors, retain, S, SalUnSettings(**given))


def test_pictures_are_final_latents_with_new_noise():
    pipe = pipelines.stable_diffusion_2()  # predicts v
    pictures = _drawn_pictures(pipe, FORGET, range(4, 7), S)
    generators: Any = [torch.Generator().manual_seed(4), torch.Generator().manual_seed(5)]
    expected: Any = pipe(
        ["x a", "x b"], num_inference_steps=3, guidance_scale=3.0, generator=generators, output_type="latent"
    )
    torch.testing.assert_close(pictures.latents[:2], expected.images)
    assert len(pictures.latents) == 3 and list(pictures.prompts) == [0, 1, 0]

    batch, target = pictures.noised(pipe.unet, [2, 0, 1], torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(3, (3,), generator=generator)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    pipe.scheduler.set_timesteps(3)
    times = pipe.scheduler.timesteps.sort().values
    for i, row in enumerate([2, 0, 1]):
        t, x, e = times[steps[i]], pictures.latents[row], noise[i]
        share = pipe.scheduler.alphas_cumprod[t]
        assert batch.time[i] == t
        torch.testing.assert_close(batch.state[i], share.sqrt() * x + (1 - share).sqrt() * e)
        torch.testing.assert_close(target[i], share.sqrt() * e - (1 - share).sqrt() * x)


def test_the_mask_is_the_largest_gradients_of_all_weights_together():
    gradients = {"a": torch.tensor([[3.0, -4.0], [0.5, 0.0]]), "b": torch.tensor([-1.0, 2.0, 0.1])}
    masks = saliency_masks(gradients, 3 / 7)
    assert masks["a"].tolist() == [[True, True], [False, False]] and masks["b"].tolist() == [False, True, False]
    every = saliency_masks(gradients, 1.0)
    assert [int(x.sum()) for x in every.values()] == [3, 3], "a weight without a gradient is never trained"
    generator = torch.Generator().manual_seed(0)
    some = {name: torch.randn(31, 7, generator=generator) for name in "abc"}
    median = torch.cat([x.abs().flatten() for x in some.values()]).median()
    for name, mask in saliency_masks(some, 0.5).items():
        assert torch.equal(mask, some[name].abs() >= median)


@pytest.mark.parametrize("cross_attentions_only", [False, True])
def test_training_is_what_is_written_out(cross_attentions_only: bool):
    pipe = pipelines.stable_diffusion().to(torch.float64)
    settings = {"steps": 3, "images": 3, "batch": 2, "learning_rate": 1e-3, "retain_weight": 0.7, "share": 0.3}
    method = train(pipe, seed=5, cross_attentions_only=cross_attentions_only, **settings)

    unet = copy.deepcopy(pipe.unet)
    weights = {n: p for n, p in unet.named_parameters() if ".attn2." in n or not cross_attentions_only}
    ours, others = (_drawn_pictures(pipe, p, seeds, S) for p, seeds in ((FORGET, range(5, 8)), (RETAIN, range(8, 11))))
    generator = torch.Generator().manual_seed(5)

    def ask(state: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        return unet(state, times, pipe.encode_prompt(prompts, "cpu", 1, False)[0]).sample

    def diffusion_loss(pictures: Any, prompts: list[str], rows: list[int]) -> Tensor:
        batch, noise = pictures.noised(unet, rows, generator)
        return (ask(batch.state, batch.time, [prompts[row % len(prompts)] for row in rows]) - noise).square().mean()

    total = 2 * diffusion_loss(ours, FORGET, [0, 1]) + diffusion_loss(ours, FORGET, [2])
    unet.zero_grad()
    total.backward()
    sizes = torch.cat([p.grad.abs().flatten() for p in weights.values() if p.grad is not None])
    count = sum(p.numel() for p in weights.values())
    least = sizes.sort(descending=True).values[round(0.3 * count) - 1]
    masks = {n: p.grad.abs() >= least for n, p in weights.items() if p.grad is not None}
    before = {n: p.detach().clone() for n, p in weights.items()}
    adam = torch.optim.Adam([p for n, p in weights.items() if n in masks], lr=1e-3)
    for _ in range(3):
        rows, other = ([int(i) for i in torch.randint(3, (2,), generator=generator)] for _ in range(2))
        batch, _ = ours.noised(unet, rows, generator)
        moved = ask(batch.state, batch.time, [FORGET[row % 2] for row in rows])
        target = ask(batch.state, batch.time, [ANCHORS[row % 2] for row in rows]).detach()
        loss = (moved - target).square().mean() + 0.7 * diffusion_loss(others, RETAIN, other)
        adam.zero_grad()
        loss.backward()
        for n, mask in masks.items():
            weights[n].grad *= mask
        adam.step()
    assert set(method.weights) == {n for n, mask in masks.items() if mask.any()}
    for n, x in method.weights.items():
        torch.testing.assert_close(x, weights[n].detach(), rtol=0, atol=1e-6)  # of steps of 1e-3
        assert torch.equal(x[~masks[n]], before[n][~masks[n]]), "the others keep their bits"
    changed = sum(int((x != before[n]).sum()) for n, x in method.weights.items())
    assert 0.29 * count < changed <= math.ceil(0.3 * count)


def test_it_moves_the_prompt_and_leaves_the_pipeline_as_it_was():
    pipe = pipelines.stable_diffusion()
    before, hooks = {name: x.clone() for name, x in pipe.unet.state_dict().items()}, pipelines.left(pipe)
    shown, instead = draw(pipe, "x a"), draw(pipe, "a")
    method = train(pipe, steps=40, learning_rate=3e-3, retain_weight=0.1)
    assert all(torch.equal(x, before[name]) for name, x in pipe.unet.state_dict().items())
    assert pipelines.left(pipe) == hooks and all(p.grad is None for p in pipe.unet.parameters())
    with method.applied(pipe):
        distance = (draw(pipe, "x a") - draw(pipe, "a")).norm()
    assert distance < 0.8 * (shown - instead).norm()
    assert torch.equal(draw(pipe, "x a"), shown)
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        _ = 1 / 0
    assert torch.equal(draw(pipe, "x a"), shown)
    assert method.made_with.seeds == ((0, 5),) and method.made_with.prompts == (*FORGET, *ANCHORS, *RETAIN)


def test_it_is_the_same_again_and_its_key_tells_others_apart():
    first, again, other = (train(pipelines.stable_diffusion(), seed=seed) for seed in (0, 0, 1))
    assert first.key == again.key != other.key
    assert train(pipelines.stable_diffusion(), anchors=["b", "a"]).key != first.key


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_it_trains_denoisers_of_other_families(name: str):
    method = train(build(name), steps=1, batch=1, images=1)
    assert method.weights and all(x.isfinite().all() for x in method.weights.values())


def test_what_is_wrong_is_refused():
    pipe = pipelines.stable_diffusion()
    with pytest.raises(SettingsError, match="2 prompts are to be forgotten, and there are 1 anchors"):
        train(pipe, anchors=["a"])
    with pytest.raises(SettingsError, match=r"retain is \[\]: pass a list"):
        train(pipe, retain=[])
    with pytest.raises(SettingsError, match="forget is 'x': pass a list"):
        train(pipe, forget="x")
    with pytest.raises(SettingsError, match="share is 0"):
        SalUnSettings(share=0)
    with pytest.raises(SettingsError, match="no cross-attentions called attn2: SalUn trains these"):
        train(pipelines.flux(), cross_attentions_only=True)
