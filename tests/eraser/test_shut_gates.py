"""Gates whose bounds cannot be reached at a timestep: they are not read there, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipelines
from helpers.erasers import make_eraser, make_gate, with_picture
from neuraleraser.eraser import Eraser, Gate, attach
from neuraleraser.eraser.batched import BatchedGates
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import Site

SITE = Site("unet.mid_block.attentions.0")
STEPS = 10  # of a thousand timesteps: five above and five below 500


def shut_from(gate: Gate, *shut: bool) -> Gate:
    """The gate, shut at these of its times."""
    low = torch.where(torch.tensor(shut), SHUT_BOUND, gate.low)
    return replace(gate, low=low, high=2 * low + 1e-3)


def prompts_alone() -> Eraser:
    """Its gate opens in the second half of sampling alone."""
    eraser = make_eraser()
    return replace(eraser, gate=shut_from(eraser.gate, False, True))


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []
    plain = BatchedGates.evidence
    monkeypatch.setattr(BatchedGates, "evidence", lambda self, *a: (reads.append(1), plain(self, *a))[1])
    return reads


@given(st.lists(st.tuples(st.sampled_from([(30.0, 500.0), (100.0, 400.0, 900.0)]), st.integers(0, 7)), min_size=1))
def test_lower_bounds_as_numbers(kinds: list[tuple[tuple[float, ...], int]]) -> None:
    gates = [
        shut_from(make_gate(SITE, 3, seed=i, times=times), *(bool(bits >> k & 1) for k in range(len(times))))
        for i, (times, bits) in enumerate(kinds)
    ]
    together = BatchedGates(gates)
    for t in ([10.0], [265.0], [266.0], [700.0], [10.0, 700.0], [999.0, 450.0, 300.0]):
        low, _ = together.bounds_at(torch.tensor(t))
        assert together.lows_at(torch.tensor(t)) == low.amin(0).tolist()


def test_a_shut_gate_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, eraser, reads = pipelines.stable_diffusion(), prompts_alone(), count_reads(monkeypatch)
    low = torch.tensor([0.0, SHUT_BOUND / 10])  # which is read, and not reached
    with attach(pipe, replace(eraser, gate=replace(eraser.gate, low=low, high=2 * low + 1e-3))):
        asked = pipelines.run(pipe, 0, steps=STEPS)
    assert len(reads) == STEPS
    reads.clear()
    with attach(pipe, eraser) as trace:
        assert torch.equal(pipelines.run(pipe, 0, steps=STEPS), asked)
    assert len(reads) == STEPS // 2 and set(trace.fired) == {0}
    reads.clear()
    never = replace(eraser, gate=shut_from(eraser.gate, True, True))
    base = pipelines.run(pipe, 0)
    with attach(pipe, never):
        assert torch.equal(pipelines.run(pipe, 0), base)
    assert not reads


def test_beside_one_that_may_open_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reads, other = pipelines.stable_diffusion(), count_reads(monkeypatch), make_eraser(seed=20, name="Dogs")
    eraser = make_eraser()
    eraser = replace(eraser, gate=shut_from(eraser.gate, True, False))
    with attach(pipe, other):
        alone = pipelines.run(pipe, 0, steps=1)  # at timestep 1
    with attach(pipe, [eraser, other]):
        assert torch.equal(pipelines.run(pipe, 0, steps=1), alone)
    assert len(reads) == 2


def test_image_gates_too(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, reads = pipelines.stable_diffusion(), count_reads(monkeypatch)
    eraser = with_picture(prompts_alone(), pipe, window=3)
    assert eraser.image_gate is not None
    with attach(pipe, replace(eraser, image_gate=shut_from(eraser.image_gate, False, True))):
        pipelines.run(pipe, 0, steps=STEPS)
    assert len(reads) == STEPS // 2  # both look at one site


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_noticed_where_no_gate_is_read(bad: float) -> None:
    pipe, eraser = pipelines.stable_diffusion(), prompts_alone()

    def spoil(module: Any, args: Any, output: Any) -> Any:
        output[0][0, 0, 0, 0] = bad
        return output

    with attach(pipe, replace(eraser, gate=shut_from(eraser.gate, True, True))):
        pipelines.run(pipe, 0)
    handle = pipe.unet.mid_block.attentions[0].register_forward_hook(spoil)
    with pytest.raises(EraserNotAppliedError, match=r"mid_block\.attentions\.0.*NaN"):
        with attach(pipe, replace(eraser, gate=shut_from(eraser.gate, True, True))):
            pipelines.run(pipe, 0)
    handle.remove()
