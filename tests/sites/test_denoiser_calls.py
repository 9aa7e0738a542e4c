"""Denoiser calls as data: replayed they give the same prediction, and rows of them give rows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import pipelines
from helpers.erasers import FAMILIES, make_eraser
from neuraleraser.eraser import attach
from neuraleraser.sites import DenoiserCall, denoiser, denoiser_calls, replay

SETTINGS: dict[str, Any] = {"n": 3, "steps": 2}


def calls_of(pipe: Any, **settings: Any) -> list[DenoiserCall]:
    calls: list[DenoiserCall] = []
    with denoiser_calls(pipe, calls.append):
        pipelines.run(pipe, 0, **{**SETTINGS, **settings})
    return calls


def again(pipe: Any, call: DenoiserCall, **other: Any) -> Tensor:
    with torch.no_grad():
        return replay(
            pipe,
            other.get("state", call.state),
            other.get("timestep", call.timestep),
            other.get("conditioning", call.conditioning),
        )


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.BUILDERS[request.param]()


def test_a_call_replayed_is_the_same_prediction(pipe: Any) -> None:
    base = pipelines.run(pipe, 0, **SETTINGS)
    calls = calls_of(pipe)
    assert len(calls) == 2
    for call in calls:
        assert torch.equal(again(pipe, call), call.prediction)
    assert torch.equal(pipelines.run(pipe, 0, **SETTINGS), base)


def test_rows_of_a_call_are_rows_of_its_prediction(pipe: Any) -> None:
    call = calls_of(pipe)[0]
    b = call.state.shape[0]
    for index in (torch.tensor([1]), torch.tensor([b - 1, 0]), torch.arange(b)):
        part = call.rows(index)
        assert torch.equal(part.state, call.state[index])
        assert torch.equal(part.prediction, call.prediction[index])
        torch.testing.assert_close(again(pipe, part), call.prediction[index])


def test_rows_may_come_from_different_steps(pipe: Any) -> None:
    first, second = (call.rows(torch.tensor([k])) for k, call in enumerate(calls_of(pipe)))
    times = torch.cat([first.timestep.flatten()[:1], second.timestep.flatten()[:1]]).to(torch.float32)
    conditioning = joined(dict(first.conditioning), dict(second.conditioning))
    state = torch.cat([first.state, second.state])
    both = again(pipe, first, state=state, timestep=times, conditioning=conditioning)
    torch.testing.assert_close(both, torch.cat([first.prediction, second.prediction]))


def joined(a: Any, b: Any) -> Any:
    if isinstance(a, dict):
        return {k: a[k] if k in ("img_ids", "txt_ids") else joined(a[k], b[k]) for k in a}
    return torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a


def test_another_s_conditioning_changes_the_prediction(pipe: Any) -> None:
    call = calls_of(pipe)[0]
    other = dict(call.conditioning)
    other["encoder_hidden_states"] = other["encoder_hidden_states"] + 1
    assert not torch.equal(again(pipe, call, conditioning=other), call.prediction)
    assert torch.equal(again(pipe, call), call.prediction)  # nothing was changed in place


def test_gradients_and_edits_reach_a_replay(pipe: Any) -> None:
    family = next(name for name, build in pipelines.BUILDERS.items() if type(build()) is type(pipe))
    call = calls_of(pipe)[0]
    state = call.state.clone().requires_grad_()
    with attach(pipe, make_eraser(family)):
        out = replay(pipe, state, call.timestep, call.conditioning)
    assert not torch.equal(out, call.prediction)
    out.sum().backward()
    assert state.grad is not None and state.grad.abs().sum() > 0


def test_the_hook_goes_whatever_happens(pipe: Any) -> None:
    def fail(call: DenoiserCall) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), denoiser_calls(pipe, fail):
        pipelines.run(pipe, 0, steps=1)
    module: nn.Module = denoiser(pipe)
    assert not module._forward_hooks and pipelines.run(pipe, 0, steps=1) is not None


def test_arguments_may_come_by_position_or_by_name() -> None:
    pipe = pipelines.stable_diffusion()
    state, words, t = torch.randn(2, 4, 8, 8), torch.randn(2, pipelines.WORDS, pipelines.WIDTH), torch.tensor(7)
    calls: list[DenoiserCall] = []
    with denoiser_calls(pipe, calls.append), torch.no_grad():
        pipe.unet(state, t, words)
        pipe.unet(sample=state, timestep=t, encoder_hidden_states=words, return_dict=False)
    for call in calls:
        assert torch.equal(call.state, state) and call.timestep is t
        assert torch.equal(call.conditioning["encoder_hidden_states"], words)
        assert "return_dict" not in call.conditioning
        assert torch.equal(again(pipe, call), calls[0].prediction)
