"""Loaded erasers under torch.compile: nothing is compiled again for a strength, and nothing is passed over."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SITES, make_correction, make_gate
from neuraleraser import attach, disable_erasers, load_eraser, set_erasers, unload_erasers
from neuraleraser.eraser import Eraser, EraserHeader
from neuraleraser.errors import EraserNotAppliedError, SettingsError
from neuraleraser.sites import candidate_sites, edits_for


def compiled(test: Any) -> Any:
    """torch.compile warns of what it traces, and of torch's own tracing of autograd functions."""
    for ignored in ("ignore::UserWarning", "ignore:.*should not be instantiated:DeprecationWarning"):
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


@pytest.fixture
def small() -> Any:
    """One text-conditioned block: little to trace."""
    pipe = pipelines.stable_diffusion()
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    pipe.unet = pipelines.unet(**blocks).eval()
    torch._dynamo.reset()
    yield pipe
    torch._dynamo.reset()


def attached(pipe: Any, erasers: Any, strength: Any = 1.0) -> Tensor:
    with attach(pipe, erasers, strength):
        return pipelines.run(pipe, 0)


def one_block(seed: int, mode: str) -> Eraser:
    site, _, d = SITES["stable_diffusion"]
    return Eraser(make_gate(site, d, seed=seed), (make_correction(site, d, mode, seed=seed),), EraserHeader(str(seed)))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@compiled
def test_a_strength_that_changes_compiles_nothing_again(small: Any) -> None:
    many = [one_block(0, "low_rank"), one_block(30, "scaling"), one_block(60, "scaling")]
    plans = [[1.0, 1.0, 1.0], [0.5, 2.0, 0.0], [0.0, 0.0, 0.0], [0.25, 0.0, 1.5]]
    base = pipelines.run(small, 0)
    want = [attached(small, many, plan) for plan in plans]
    for eraser in many:
        load_eraser(small, eraser)
    small.unet.compile(backend="eager", fullgraph=True)
    for _ in range(2):  # the trace's tensors are made in the first forward
        pipelines.run(small, 0)
    before = graphs()
    for plan, image in zip(plans, want, strict=True):
        set_erasers(small, ["0", "30", "60"], plan)
        torch.testing.assert_close(pipelines.run(small, 0), image)
    disable_erasers(small)
    assert torch.equal(pipelines.run(small, 0), base)
    assert graphs() == before
    by_image = {"n": 2, "guidance": 1.0}
    alone = []
    for plan in (plans[0], plans[3]):
        set_erasers(small, ["0", "30", "60"], plan)
        alone.append(pipelines.run(small, 0, **by_image))
    set_erasers(small, ["0", "30", "60"], list(zip(plans[0], plans[3], strict=True)))
    torch.testing.assert_close(pipelines.run(small, 0, **by_image), torch.stack([alone[0][0], alone[1][1]]))
    pipelines.run(small, 0, **by_image)
    before = graphs()
    set_erasers(small, ["0", "30", "60"], [[0.0, 1.0], [2.0, 0.0], [0.0, 0.5]])
    pipelines.run(small, 0, **by_image)
    assert graphs() == before
    with pytest.raises(SettingsError, match="strengths for 2 images"):
        pipelines.run(small, 0, n=4, guidance=1.0)


@pytest.mark.slow
@compiled
def test_loaded_after_a_compiled_call_is_an_error_and_after_a_compile_is_not(small: Any) -> None:
    base = pipelines.run(small, 0)
    whole = attached(small, one_block(0, "low_rank"))
    small.unet.compile(backend="eager", fullgraph=True)
    load_eraser(small, one_block(0, "low_rank"))  # compiled, but nothing has run yet
    torch.testing.assert_close(pipelines.run(small, 0), whole)
    load_eraser(small, one_block(30, "low_rank"))  # a second one is seen
    assert not torch.equal(pipelines.run(small, 0), whole)
    unload_erasers(small)
    assert torch.equal(pipelines.run(small, 0), base)
    load_eraser(small, one_block(0, "low_rank"))  # the graph of the call before has no hooks
    with pytest.raises(EraserNotAppliedError, match="compiled and called before"):
        pipelines.run(small, 0)
    torch._dynamo.reset()
    torch.testing.assert_close(pipelines.run(small, 0), whole)


@pytest.mark.slow
@compiled
def test_a_change_that_later_blocks_repeat_is_in_the_graph(small: Any) -> None:
    small.unet = pipelines.unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    ).eval()
    first = candidate_sites(small)[0]
    read = edits_for(small, first)[1:]
    many = [
        Eraser(
            make_gate(first, 16, seed=seed),
            (make_correction(read[0], pipelines.WIDTH, seed=seed, also=read[1:]),),
            EraserHeader(str(seed)),
        )
        for seed in (0, 30)
    ]
    base, want = pipelines.run(small, 0), [attached(small, many, plan) for plan in ([1.0, 0.5], [0.0, 2.0])]
    assert len(read) > 1 and not torch.equal(want[0], base)
    for eraser in many:
        load_eraser(small, eraser)
    small.unet.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        pipelines.run(small, 0)
    before = graphs()
    for plan, image in zip(([1.0, 0.5], [0.0, 2.0]), want, strict=True):
        set_erasers(small, ["0", "30"], plan)
        torch.testing.assert_close(pipelines.run(small, 0), image)
    disable_erasers(small)
    assert torch.equal(pipelines.run(small, 0), base) and graphs() == before


@pytest.mark.slow
@compiled
def test_a_gate_that_holds_is_in_the_graph(small: Any) -> None:
    """Shut, opening and held: one graph."""
    small.unet = pipelines.unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    ).eval()
    at = candidate_sites(small)[1]
    read = edits_for(small, at)
    gate = dataclasses.replace(make_gate(at, 16), holds=True)
    eraser = Eraser(gate, (make_correction(read[0], pipelines.WIDTH, also=read[1:]),), EraserHeader("x"))
    base, want = pipelines.run(small, 0), [attached(small, eraser, plan) for plan in (1.0, 0.5)]
    assert not torch.equal(want[0], base)
    load_eraser(small, eraser)
    small.unet.compile(backend="eager", fullgraph=True)
    pipelines.run(small, 0)
    before = graphs()
    for strength, image in zip((1.0, 0.5), want, strict=True):
        set_erasers(small, ["x"], [strength])
        torch.testing.assert_close(pipelines.run(small, 0), image)
    disable_erasers(small)
    assert torch.equal(pipelines.run(small, 0), base) and graphs() == before
