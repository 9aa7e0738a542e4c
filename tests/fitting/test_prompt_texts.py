"""Prompts as a denoiser is given them: what the pipeline's own call gives it, in every family and task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines, text_encoders
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.settings import Sampling
from neuraleraser.sites import denoiser_calls, text_of

SMALL = Sampling(height=16, width=16)


def build(name: str) -> Any:
    task = name.partition(" ")[2]
    pipe = text_encoders.build(name.partition(" ")[0])
    return pipelines.as_task(pipe, task) if task else pipe


@pytest.mark.parametrize(
    "name",
    [
        *("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"),
        *("stable_diffusion Img2Img", "stable_diffusion Inpaint"),
    ],
)
def test_texts_are_those_of_the_pipelines_own_call(name: str):
    pipe, calls = build(name), []
    with denoiser_calls(pipe, calls.append):
        pipelines.run(pipe, 0, steps=1, guidance=1.0, prompt="b c")
    own = text_of(calls[0].conditioning, 0)
    with_b_c, empty = prompt_texts(pipe, ["b c", ""], SMALL)
    assert with_b_c.keys() == empty.keys() == own.keys()
    assert all(x.shape == empty[key].shape for key, x in with_b_c.items())
    for key, x in own.items():
        torch.testing.assert_close(with_b_c[key], x)
    assert not torch.allclose(empty["encoder_hidden_states"], with_b_c["encoder_hidden_states"])
