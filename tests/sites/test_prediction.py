"""Changes of the denoiser's prediction: added in every forward, compiled or not, and what is kept belongs to a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.sites import Call, FinishedForward, OnForward, Rows, edit_prediction


def half(finished: FinishedForward, rows: Rows) -> Tensor:
    return -0.5 * finished.call.prediction


def halved(pipe: Any, **settings: Any) -> Tensor:
    """What half of each prediction draws, by a hook of the test's own."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_hook(lambda module, args, output: (0.5 * output[0],))
    try:
        return pipelines.run(pipe, 0, n=2, **settings)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", pipelines.BUILDERS)
def test_the_change_is_added_in_every_family(family: str):
    pipe = pipelines.BUILDERS[family]()
    base, expected = pipelines.run(pipe, 0, n=2), halved(pipe)
    with edit_prediction(pipe, lambda call: half):
        changed = pipelines.run(pipe, 0, n=2)
    torch.testing.assert_close(changed, expected)
    assert not torch.allclose(changed, base)
    assert torch.equal(pipelines.run(pipe, 0, n=2), base) and pipelines.left(pipe) == []


def test_no_change_keeps_every_bit():
    pipe = pipelines.stable_diffusion()
    base = pipelines.run(pipe, 0, n=2)
    for change in (lambda finished, rows: None, lambda finished, rows: torch.zeros_like(finished.call.prediction)):
        with edit_prediction(pipe, lambda call, change=change: change):
            assert torch.equal(pipelines.run(pipe, 0, n=2), base)


def test_each_drawing_begins_anew_and_is_described():
    pipe, seen = pipelines.stable_diffusion(), []

    def start(call: Call) -> OnForward:
        steps: list[Rows] = []
        seen.append((call.pipeline is pipe, call.images, call.guidance, steps))
        return lambda finished, rows: steps.append(rows)

    with edit_prediction(pipe, start):
        pipelines.run(pipe, 0, n=2, steps=3)
        pipelines.run(pipe, 0, n=1, steps=2, guidance=1.0)
    assert [(call[:3], len(call[3])) for call in seen] == [((True, 2, 4.0), 3), ((True, 1, 1.0), 2)]
    assert seen[0][3][0] == Rows(2, (True, False), (False, True)) and seen[1][3][0] == Rows(1)


def test_a_compiled_graph_that_knows_no_hooks_is_changed_from_outside():
    pipe = pipelines.stable_diffusion()
    expected = halved(pipe)
    pipe.unet._compiled_call_impl = pipe.unet.forward  # as a graph that was compiled before the hooks were there
    with edit_prediction(pipe, lambda call: half):
        torch.testing.assert_close(pipelines.run(pipe, 0, n=2), expected)


def test_wrong_use():
    pipe = pipelines.stable_diffusion()
    with (
        pytest.raises(EraserNotAppliedError, match=r"is \[1, 4, 8, 8\], expected \[2, 4, 8, 8\]: return one of each"),
        edit_prediction(pipe, lambda call: lambda finished, rows: finished.call.prediction[:1]),
    ):
        pipelines.run(pipe, 0)
    with pytest.raises(EraserNotAppliedError, match="its unet was replaced"), edit_prediction(pipe, lambda call: half):
        pipe.unet = pipelines.stable_diffusion().unet
        pipelines.run(pipe, 0)
    with pytest.raises(SiteError, match="is no diffusers"), edit_prediction(object(), lambda call: half):
        pass
    assert pipelines.left(pipe) == []
