"""The substitution test: nothing is lost with a perfect SAE, the mean's loss is that of the mean, and every family
and kind of scheduler is predicted from as it was trained."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from helpers import pipelines
from neuraleraser.activations import activation_matrix, measure_loss_recovered
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sae import SAE
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, input_and_target

SITE = Site("unet.mid_block.attentions.0")
PROMPTS, SEEDS = ["a b", "c"], [1, 2]
SAMPLING = Sampling(num_inference_steps=3, batch_size=2)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def perfect(d: int) -> SAE:
    """Two features for each coordinate: its positive part and its negative one."""
    rows = torch.cat([torch.eye(d), -torch.eye(d)])
    return SAE(rows, torch.zeros(2 * d), rows, torch.zeros(d), torch.zeros(2 * d))


def dumb(mean: torch.Tensor) -> SAE:
    """An SAE in which nothing fires, so that it says the mean."""
    d = len(mean)
    return SAE(torch.zeros(2, d), torch.zeros(2), torch.eye(d)[:2], mean, torch.ones(2))


def test_a_perfect_sae_loses_nothing(pipe: Any):
    found = measure_loss_recovered(pipe, perfect(32), SITE, PROMPTS, SEEDS, SAMPLING, num_timesteps=2)
    assert [t.time for t in found.by_timestep] == [float(pipe.scheduler.timesteps[i]) for i in (0, 2)]
    for t in found.by_timestep:
        assert t.explained_variance > 0.9999 and t.l0 == pytest.approx(32, abs=0.1)
        assert t.loss_reconstructed == pytest.approx(t.loss, rel=1e-4) and t.loss_mean != t.loss
    assert found.difference < 1 and found.before.shape == found.after.shape == (2, 16, 16, 3)


def test_an_sae_that_says_the_mean_loses_what_the_mean_loses(pipe: Any):
    mean = activation_matrix(pipe, PROMPTS, SEEDS, [SITE], 10_000, SAMPLING)[SITE].mean(0)
    found = measure_loss_recovered(pipe, dumb(mean), SITE, PROMPTS, SEEDS, SAMPLING)
    assert len(found.by_timestep) == 3 and found.difference > 0
    for t in found.by_timestep:
        assert t.l0 == 0 and t.explained_variance <= 1e-6
        assert t.loss_reconstructed == pytest.approx(t.loss_mean, rel=1e-4)
        assert t.loss_mean <= t.loss or t.recovered == pytest.approx(0, abs=1e-3)


def test_the_pipeline_is_left_as_it_was(pipe: Any):
    before = pipelines.run(pipe, 0)
    hooks = [m for m in pipe.unet.modules() if m._forward_hooks or m._forward_pre_hooks]
    measure_loss_recovered(pipe, perfect(32), SITE, PROMPTS, SEEDS, SAMPLING, num_timesteps=1)
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(pipelines.run(pipe, 0), before)
    assert hooks == [m for m in pipe.unet.modules() if m._forward_hooks or m._forward_pre_hooks] == []


def test_what_does_not_fit_is_said(pipe: Any):
    with pytest.raises(DataError, match="is 32 wide, W_enc takes 16"):
        measure_loss_recovered(pipe, perfect(16), SITE, PROMPTS, SEEDS, SAMPLING)
    with pytest.raises(DataError, match="no prompts"):
        measure_loss_recovered(pipe, perfect(32), SITE, [], [], SAMPLING)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' own tables
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"prediction_type": "sample"}),
        ("DDPMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
)
def test_one_step_from_the_true_target_goes_towards_the_latents(kind: str, settings: dict[str, Any]):
    """The scheduler's own step from (noised, target) must come nearer to x_0, along the way on which it was noised."""
    scheduler = getattr(diffusers, kind)(**settings)
    scheduler.set_timesteps(8)
    g = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 4, 8, 8, generator=g)
    at = scheduler.timesteps[5]
    scheduler._step_index = 7  # as a run leaves it: it must not matter
    state, target = input_and_target(scheduler, x_0, noise, float(at))
    fresh = getattr(diffusers, kind)(**settings)
    fresh.set_timesteps(8)
    plain = state
    if kind == "EulerDiscreteScheduler":  # the denoiser is given a scaled state; the step takes the plain one
        plain = fresh.add_noise(x_0, noise, at[None])
        torch.testing.assert_close(state, fresh.scale_model_input(plain, at))
    stepped = fresh.step(target, at, plain, **({"generator": g} if kind == "DDPMScheduler" else {}))
    guess = getattr(stepped, "pred_original_sample", None)
    if guess is not None:
        torch.testing.assert_close(guess.clamp(-1, 1), x_0.clamp(-1, 1), atol=1e-4, rtol=1e-4)
    else:
        assert (stepped.prev_sample - x_0).norm() < 0.9 * (plain - x_0).norm()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_scheduler_that_is_not_known():
    scheduler = diffusers.DDIMScheduler(prediction_type="other")
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(SettingsError, match="DDIMScheduler predicts as 'other' is not known"):
        input_and_target(scheduler, x, x, float(scheduler.timesteps[1]))


@pytest.mark.parametrize("family", ["stable_diffusion_3", "flux", "pixart"])
def test_every_family(family: str, monkeypatch: pytest.MonkeyPatch):
    """From prompt embeddings, which `generate` does not pass: its call of the pipeline is given them here."""
    pipe = pipelines.BUILDERS[family]()
    plain = type(pipe).__call__
    given = pipelines.embeds(pipe, 2)

    def call(self: Any, prompts: Any, **settings: Any) -> Any:
        size: dict[str, Any] = {"height": 16, "width": 16}
        if family == "pixart":
            size["use_resolution_binning"] = False
        return plain(self, **{**settings, **given, **size})

    monkeypatch.setattr(type(pipe), "__call__", call)
    site = Site("transformer.transformer_blocks.1")
    found = measure_loss_recovered(pipe, perfect(16), site, PROMPTS, SEEDS, SAMPLING, num_timesteps=2)
    assert all(
        t.loss_reconstructed == pytest.approx(t.loss, rel=1e-3) and np.isfinite(t.loss_mean) for t in found.by_timestep
    )
