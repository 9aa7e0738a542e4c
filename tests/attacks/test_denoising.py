"""Predictions through a method: as the denoiser makes them, with gradients, and with nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import attach
from neuraleraser.attacks.denoising import attacked, denoising_target, usable_tokens
from neuraleraser.attacks.encoded_text import encoded_prompts
from neuraleraser.errors import SettingsError

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([100, 900])


def state(pipe: Any) -> list[Any]:
    kept = {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in vars(pipe.scheduler).items()
    }
    weights = [*pipe.unet.parameters(), *pipe.text_encoder.parameters()]
    return [pipelines.left(pipe), kept, [p.requires_grad for p in weights], [p.grad is None for p in weights]]


def test_a_prediction_is_the_denoiser_s() -> None:
    pipe = pipelines.stable_diffusion()
    with torch.no_grad():
        ids = pipe.tokenizer(["a", "b c"], padding="max_length", return_tensors="pt").input_ids
        expected = pipe.unet(X, TIMES, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
        with attacked(pipe, nullcontext) as predict:
            assert torch.equal(predict(X, TIMES, ["a", "b c"]), expected)
        with attacked(pipe, lambda using: attach(using, make_eraser())) as predict:
            assert not torch.equal(predict(X, TIMES, ["a", "b c"]), expected)


def test_everything_is_left_as_it_was_after_errors_too() -> None:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler.set_timesteps(7)
    pipe.unet.conv_in.weight.requires_grad_(False)
    before = state(pipe)
    with pytest.raises(ZeroDivisionError), attacked(pipe, lambda using: attach(using, make_eraser())) as predict:
        x = X.clone().requires_grad_()
        predict(x, TIMES, ["a", "b"]).sum().backward()
        assert x.grad is not None and x.grad.abs().sum() > 0
        assert not any(p.requires_grad for p in pipe.unet.parameters()) and state(pipe) != before
        _ = 1 / 0
    assert state(pipe) == before


def test_a_method_acts_on_what_an_attack_puts_in() -> None:
    """The eraser's hooks run behind the attack's own."""
    pipe = pipelines.stable_diffusion()
    seen: list[torch.Tensor] = []

    @contextmanager
    def applied(using: Any) -> Iterator[None]:
        handle = using.text_encoder.register_forward_hook(lambda m, a, o: seen.append(o[0]))
        yield
        handle.remove()

    with attacked(pipe, applied, encoded_prompts(pipe, {"a": torch.ones(1, 8, 16)})) as predict:
        predict(X, TIMES, ["a", "b"])
    assert bool((seen[0][0] == 1).all()) and not bool((seen[0][1] == 1).all())


def test_special_tokens_are_not_usable() -> None:
    assert usable_tokens(pipelines.stable_diffusion()).tolist() == list(range(2, 54))


def test_a_scheduler_that_cannot_noise_to_any_timestep_is_refused() -> None:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = EulerDiscreteScheduler(prediction_type="v_prediction")
    with pytest.raises(
        SettingsError, match=r"EulerDiscreteScheduler does not noise to any timestep: set pipe\.scheduler"
    ):
        denoising_target(pipe, X, X, TIMES)
