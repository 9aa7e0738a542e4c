"""Deep copies of pipelines that are hooked: they act as their originals do, and can be freed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import attach, disable_erasers, load_eraser, set_erasers, unload_erasers
from neuraleraser.sites import denoiser


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def test_a_copy_has_erasers_of_its_own(sd: Any) -> None:
    base = pipelines.run(sd, 0)
    load_eraser(sd, make_eraser())
    whole, twin = pipelines.run(sd, 0), copy.deepcopy(sd)
    disable_erasers(sd)
    assert torch.equal(pipelines.run(sd, 0), base) and torch.equal(pipelines.run(twin, 0), whole)
    unload_erasers(twin)
    assert not pipelines.left(twin) and torch.equal(pipelines.run(twin, 0), base)
    set_erasers(sd, "Cats")
    assert torch.equal(pipelines.run(sd, 0), whole)
    assert any(m._forward_hooks for m in pickle.loads(pickle.dumps(denoiser(sd))).modules())


def test_hooks_that_a_copy_brought_along_are_taken_off(sd: Any) -> None:
    """A copy of what is hooked acts, as its original does; what holds the original's hooks cannot take them off."""
    base = pipelines.run(sd, 0, n=2)
    with attach(sd, make_eraser()):
        copied, erased = copy.deepcopy(sd), pipelines.run(sd, 0, n=2)
        unload_erasers(sd)
        assert pipelines.left(sd) and torch.equal(pipelines.run(sd, 0, n=2), erased), "what is entered stays"
    assert (
        pipelines.left(copied) and torch.equal(pipelines.run(copied, 0, n=2), erased) and not torch.equal(erased, base)
    )
    unload_erasers(copied)
    assert not pipelines.left(copied) and torch.equal(pipelines.run(copied, 0, n=2), base)
    with attach(copied, make_eraser()):
        assert torch.equal(pipelines.run(copied, 0, n=2), erased)

    load_eraser(sd, make_eraser())
    sd.vae = copy.deepcopy(sd.vae)
    unload_erasers(sd)
    assert not pipelines.left(sd) and torch.equal(pipelines.run(sd, 0, n=2), base)
