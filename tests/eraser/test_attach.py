"""Erasers on a pipeline that they are attached to: strengths, shut gates, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import erasers, pipelines
from helpers.erasers import SHUT, make_correction, make_eraser, make_gate
from neuraleraser.eraser import CORRECTION_KINDS, Eraser, EraserHeader, LowRank, attach
from neuraleraser.eraser.corrections import BatchedLowRank
from neuraleraser.errors import DataError, EraserNotAppliedError, SettingsError, SiteError
from neuraleraser.sites import EditContext, Site, record


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipelines.stable_diffusion()


# Attached.


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
def test_strength_scales_the_edit(sd: Any, kind: str) -> None:
    """x' = x + strength * gate * delta, of the x that the eraser reads: measured at the site itself."""
    eraser = make_eraser(kind=kind, low=0.0, high=50.0)
    site, c = eraser.corrections[0].site, eraser.corrections[0]
    seen: list[Tensor] = []
    gates: list[Tensor] = []

    def look(at: Site, x: Tensor, context: EditContext[None]) -> None:
        (gates if at == eraser.gate.site else seen).append(
            eraser.gate(x, context.timestep) if at == eraser.gate.site else x
        )

    with record(sd, [site, eraser.gate.site], look):
        pipelines.run(sd, 0, n=2, steps=1)
    plain, opening = seen.pop(), gates[0]
    assert bool(((0 < opening) & (opening < 1)).all())
    opening[:2] = 0  # the negative prompt's rows
    t = torch.full((4,), float(sd.scheduler.timesteps[0]))
    for strength in (0.0, 0.5, 1.0, 2.0):
        with attach(sd, eraser, strength), record(sd, [site], look):
            pipelines.run(sd, 0, n=2, steps=1)
        want = plain + strength * opening.view(-1, 1, 1) * c.delta(plain, t)
        torch.testing.assert_close(seen.pop(), want)


@pytest.mark.parametrize("strength", [-0.1, 2.01, float("nan"), [1.0, 1.0], []])
def test_strengths_out_of_range(sd: Any, strength: Any) -> None:
    with pytest.raises(SettingsError, match="from 0 to 2"), attach(sd, make_eraser(), strength):
        pass


def test_detect_only_changes_nothing_and_notes(sd: Any) -> None:
    base = pipelines.run(sd, 0, n=2)
    with attach(sd, make_eraser(), action="detect") as trace:
        assert torch.equal(pipelines.run(sd, 0, n=2), base)
    assert trace.fired == {i: {"Cats": [501.0, 1.0]} for i in (0, 1)}


def test_images_beside_one_that_fires_keep_their_bits(sd: Any) -> None:
    """Bounds between the evidence of two images: one is edited, the other is not touched."""
    eraser, found = make_eraser(), []
    with record(sd, [eraser.gate.site], lambda site, x, call: found.append(eraser.gate.evidence(x))):
        base = pipelines.run(sd, 0, n=2)
    most = torch.stack(found).view(-1, 2, 2)[:, 1].amax(0)  # steps, guidance halves (the second is drawn), images
    loud = int(most.argmax())
    between = make_eraser(low=float(most.mean()), high=float(most.max()))
    with attach(sd, between) as trace:
        out = pipelines.run(sd, 0, n=2)
    assert trace.fired.keys() == {loud}
    assert torch.equal(out[1 - loud], base[1 - loud]) and not torch.equal(out[loud], base[loud])


def test_a_shut_gate_costs_no_correction(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    plain = BatchedLowRank.__call__
    monkeypatch.setattr(BatchedLowRank, "__call__", lambda self, *given: ran.append(self) or plain(self, *given))
    with attach(sd, [make_eraser(**SHUT), make_eraser(seed=50, name="Dogs")], [1.0, 0.0]):
        pipelines.run(sd, 0, steps=2)
    assert not ran
    with attach(sd, [make_eraser(**SHUT), make_eraser(seed=50, name="Dogs")], [1.0, 1.0]):
        pipelines.run(sd, 0, steps=2)
    assert len(ran) == 2  # the open one, once a step


def test_no_erasers_at_all(sd: Any) -> None:
    base = pipelines.run(sd, 0)
    with attach(sd, []) as trace:
        assert torch.equal(pipelines.run(sd, 0), base)
    assert trace.fired == {}


# ConceptRefusedError.


def test_an_eraser_of_another_width(sd: Any) -> None:
    at, on, _ = erasers.SITES["stable_diffusion"]
    base = pipelines.run(sd, 0)
    narrow = Eraser(make_gate(at, 16), (make_correction(on, 16),), EraserHeader("Cats"))
    with pytest.raises(SiteError, match="32 wide, and the eraser of 'Cats' expects 16"), attach(sd, narrow):
        pipelines.run(sd, 0)
    edit_only = Eraser(make_gate(at, 32, **SHUT), (make_correction(on, 16),), EraserHeader("Cats"))
    with pytest.raises(SiteError, match="expects 16"), attach(sd, edit_only):
        pipelines.run(sd, 0)  # although the gate is shut
    assert torch.equal(pipelines.run(sd, 0), base)


def test_an_edit_before_its_gate(sd: Any) -> None:
    at, on, d = erasers.SITES["stable_diffusion"]
    early = Eraser(make_gate(on, d), (make_correction(at, d),), EraserHeader("Cats"))
    with pytest.raises(EraserNotAppliedError, match="ran before"), attach(sd, early):
        pipelines.run(sd, 0)


def test_erasers_whose_parts_do_not_fit(sd: Any) -> None:
    e = make_eraser()
    twice = Eraser(e.gate, e.corrections * 2, e.header)
    without = Eraser(e.gate, (), e.header)
    unsorted = Eraser(dataclasses.replace(e.gate, times=e.gate.times.flip(0)), e.corrections, e.header)
    elsewhere = Eraser(dataclasses.replace(e.gate, site=Site("text_encoder.encoder")), e.corrections, e.header)
    for bad in (twice, without, unsorted, elsewhere):
        with pytest.raises(DataError, match="cannot be attached"), attach(sd, bad):
            pass


def test_nan_in_an_eraser_or_in_the_model_is_no_image(sd: Any) -> None:
    e = make_eraser()
    tensors = e.corrections[0].tensors()
    spoilt = LowRank.from_tensors(e.corrections[0].site, tensors | {"up": tensors["up"] * float("nan")})
    bad = Eraser(e.gate, (spoilt,), e.header)
    with pytest.raises(DataError, match="NaN"), attach(sd, bad):
        pass
    other = pipelines.stable_diffusion()
    other.unet.mid_block.attentions[0].proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(EraserNotAppliedError, match="NaN"), attach(other, e):
        pipelines.run(other, 0)
