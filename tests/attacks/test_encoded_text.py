"""Prompts that are encoded as something else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from neuraleraser.attacks import encoded_prompts
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=2, batch_size=2)


def encoded(pipe: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt([prompt], "cpu", 1, False)[0]


@pytest.mark.parametrize("make", [pipelines.stable_diffusion, pipelines.stable_diffusion_2])
def test_a_prompt_draws_what_its_embeddings_say(make: Any) -> None:
    pipe = make()
    expected, hooks = generate(pipe, ["b c", "d"], [0, 1], S), pipelines.left(pipe)
    given = encoded(pipe, "b c")
    with encoded_prompts(pipe, {"a": given}):
        found = generate(pipe, ["a", "d"], [0, 1], S)  # with guidance: the empty prompts stay as they are
    assert np.array_equal(found, expected) and pipelines.left(pipe) == hooks
    generators = [torch.Generator().manual_seed(0)]
    settings = {"num_inference_steps": 2, "guidance_scale": S.guidance_scale, "output_type": "np"}
    one = pipe(prompt_embeds=given, generator=generators, **settings).images
    with encoded_prompts(pipe, {"a": given}):
        again = pipe("a", generator=[torch.Generator().manual_seed(0)], **settings).images
    assert np.array_equal(one, again)


def test_gradients_come_back_and_errors_leave_nothing() -> None:
    pipe = pipelines.stable_diffusion()
    given = encoded(pipe, "b").requires_grad_()
    with pytest.raises(ZeroDivisionError), encoded_prompts(pipe, {"a": given}):
        pipe.encode_prompt(["a", "c"], "cpu", 1, False)[0].sum().backward()
        assert given.grad is not None and bool((given.grad == 1).all())
        _ = 1 / 0
    assert not torch.equal(encoded(pipe, "a"), given) and pipelines.left(pipe) == pipelines.left(
        pipelines.stable_diffusion()
    )


def test_embeddings_of_another_shape() -> None:
    pipe = pipelines.stable_diffusion()
    with pytest.raises(SettingsError, match=r"the embeddings of 'a' are \[8, 16\]: pass \[1, 8, 16\]"):
        encoded_prompts(pipe, {"a": torch.zeros(8, 16)}).__enter__()
    with pytest.raises(SettingsError, match="several text encoders or none"):
        encoded_prompts(pipelines.stable_diffusion_xl(), {}).__enter__()
