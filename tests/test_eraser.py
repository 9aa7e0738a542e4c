"""The eraser's arithmetic against plain loops, and what it does to a pipeline that is attached to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import handmade
import tiny
from handmade import SHUT, make_correction, make_eraser, make_gate, random
from neuraleraser.eraser import KINDS, Correction, Eraser, Gate, LowRank, Scaling, attach, time_bin
from neuraleraser.eraser.corrections import BatchedLowRank
from neuraleraser.errors import DataError, NotApplied, SettingsError, SiteError
from neuraleraser.fit.edits import scale
from neuraleraser.sae import SAE
from neuraleraser.sites import EditContext, Site, record

SITE = Site("unet.mid_block.attentions.0")


def double(part: Any) -> Any:
    """A gate or correction in float64."""
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    for name, v in values.items():
        if isinstance(v, Tensor) and v.is_floating_point():
            values[name] = v.double()
        elif isinstance(v, dict):
            values[name] = {k: x.double() for k, x in v.items()}
    return type(part)(**values)


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.stable_diffusion()


# The arithmetic.


def naive_nearest(times: Tensor, t: float) -> int:
    gaps = [abs(float(v) - t) for v in times]
    return gaps.index(min(gaps))


def naive_gate(g: Gate, x: Tensor, t: Tensor) -> list[float]:
    out = []
    for b in range(x.shape[0]):
        evidence = 0.0
        for i in range(len(g.features)):
            z = []
            for p in range(x.shape[1]):
                pre = float(g.bias[i]) + sum(float(g.rows[i, k]) * float(x[b, p, k]) for k in range(x.shape[2]))
                z.append(pre if pre > float(g.threshold[i]) else 0.0)
            strongest = sorted(z, reverse=True)[: max(1, round(len(z) * g.share))]
            evidence += float(g.weight[i]) * sum(strongest) / len(strongest)
        k = naive_nearest(g.times, float(t[b]))
        low, high = float(g.low[k]), float(g.high[k])
        out.append(min(max((evidence - low) / (high - low), 0.0), 1.0))
    return out


def naive_delta(c: Correction, x: Tensor, t: Tensor) -> Tensor:
    """One position at a time, each by itself: an implementation that reads a neighbour cannot agree."""
    out, v = torch.zeros_like(x), c.tensors()
    for b in range(x.shape[0]):
        k = naive_nearest(v["times"], float(t[b]))
        for p in range(x.shape[1]):
            here = x[b, p]
            if c.KIND == "low_rank":
                for j in range(len(here)):
                    low = [sum(here * v["down"][k, :, r]) for r in range(v["down"].shape[2])]
                    out[b, p, j] = v["bias"][k, j] + sum(a * v["up"][k, r, j] for r, a in enumerate(low))
                continue
            pre = [float(v["bias"][i] + sum(v["rows"][i] * here)) for i in range(len(v["rows"]))]
            for i, a in enumerate(a if a > float(v["threshold"][i]) else 0.0 for i, a in enumerate(pre)):
                out[b, p] += a * (v["factor"][k, i] - 1) * v["decoder"][i]
    return out


@pytest.mark.parametrize("share", [1.0, 0.34])
def test_the_gate_against_loops(share: float) -> None:
    gate = double(make_gate(SITE, 4, share=share, low=0.2, high=2.0, threshold=0.3))
    x, t = random(6, 5, 4, seed=3).double(), torch.tensor([0, 499, 501, 999, 250, 750])
    want = naive_gate(gate, x, t)
    assert 0 < sum(want) < 6 and any(0 < w < 1 for w in want)
    torch.testing.assert_close(gate(x, t), torch.tensor(want, dtype=torch.double))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_mode_against_loops(kind: str) -> None:
    c = double(make_correction(SITE, 4, kind))
    x, t = random(4, 5, 4, seed=4).double(), torch.tensor([0.0, 299.0, 301.5, 999.0])
    want = naive_delta(c, x, t)
    torch.testing.assert_close(c.delta(x, t), want)
    if kind != "low_rank":  # some positions fire, some do not, and those are exactly 0
        quiet = (want == 0).all(-1)
        assert 0 < quiet.sum() < quiet.numel() and not c.delta(x, t)[quiet].any()


def test_the_sae_s_error_never_enters() -> None:
    """With an SAE that reconstructs badly: what is added is decode(z') - decode(z), not x_hat' - x."""
    d, n = 8, 20
    w = torch.nn.functional.normalize(random(n, d, seed=1), dim=1)
    sae = SAE(random(n, d, seed=2), random(n, seed=3), w, random(d, seed=4), torch.full((n,), 0.5)).double()
    x = random(2, 40, d, seed=5).double()
    z = sae.encode(x)
    assert float((sae.decode(z) - x).norm() / x.norm()) > 0.5
    features = torch.tensor([1, 4, 7])
    for factor in (0.0, -3.0, 2.0):
        changed = z.clone()
        changed[..., features] *= factor
        correction = double(scale(sae, SITE, features, torch.tensor([900.0, 1.0]), factor))
        delta = correction.delta(x, torch.tensor([900.0, 1.0]))
        # scale() keeps float32 copies of the rows
        torch.testing.assert_close(delta, sae.decode(changed) - sae.decode(z), atol=1e-5, rtol=1e-5)
        quiet = (z[..., features] == 0).all(-1)
        assert quiet.any() and not delta[quiet].any()
    ablated = x + double(scale(sae, SITE, features, torch.tensor([1.0]))).delta(x, torch.zeros(2))
    wanted = x - z[..., features] @ w[features].double()
    torch.testing.assert_close(ablated, wanted, atol=1e-5, rtol=1e-5)


@given(
    st.lists(st.floats(0, 999, width=32), min_size=1, max_size=8, unique=True).map(sorted),
    st.lists(st.floats(-10, 1010, width=32), min_size=1, max_size=5),
)
def test_the_nearest_time(times: list[float], asked: list[float]) -> None:
    t, a = torch.tensor(times), torch.tensor(asked)
    gaps = (a[:, None] - t).abs()
    index = time_bin(t, a)
    assert index.dtype == torch.int64
    best = gaps.amin(1)
    assert torch.allclose(gaps.gather(1, index[:, None])[:, 0], best, atol=1e-3)
    assert torch.equal(time_bin(t, t), torch.arange(len(t)))
    whole = a.round()
    assert torch.equal(time_bin(t, whole.long()), time_bin(t, whole))  # integers are times too
    assert torch.equal(time_bin(t, whole.double()), time_bin(t, whole))


def test_one_time_bin_serves_all_times() -> None:
    assert time_bin(torch.tensor([500.0]), torch.tensor([0.0, 999.0])).tolist() == [0, 0]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_rows_and_positions_stand_alone(kind: str) -> None:
    gate, c = make_gate(SITE, 8, low=0.2, high=2.0, share=0.5), make_correction(SITE, 8, kind)
    x, t = random(3, 6, 8), torch.tensor([10.0, 500.0, 990.0])
    other = torch.cat([x[:1], 9 * random(2, 6, 8, seed=7)])
    assert torch.equal(gate(x, t)[0], gate(other, t)[0])
    assert torch.equal(c.delta(x, t)[0], c.delta(other, t)[0])
    turned = x.flip(1)
    torch.testing.assert_close(gate(turned, t), gate(x, t))  # pooled over positions, in any order
    torch.testing.assert_close(c.delta(turned, t), c.delta(x, t).flip(1))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradients_of_an_edit(kind: str) -> None:
    gate = double(make_gate(SITE, 4, low=0.01, high=50.0, share=0.5))
    c = double(make_correction(SITE, 4, kind))
    t = torch.tensor([10.0, 600.0])

    def edited(x: Tensor) -> Tensor:
        return x + gate(x, t).view(-1, 1, 1) * c.delta(x, t)

    x = random(2, 4, 4, seed=11).double().requires_grad_()
    assert bool((gate(x, t) > 0).all())
    assert torch.autograd.gradcheck(edited, (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bounds_hold_in_every_dtype(dtype: torch.dtype) -> None:
    """Bounds closer than half precision can tell, and bounds beyond its range, make no NaN."""
    x, t = random(2, 5, 8).to(dtype), torch.tensor([0.0, 999.0])
    typical = float(make_gate(SITE, 8).evidence(x.float()).mean())
    for low, high in ((typical, typical * 1.0001), (1e9, 2e9), (1e-6, 2e-6)):
        opening = make_gate(SITE, 8, low=low, high=high)(x, t)
        assert bool(torch.isfinite(opening).all()) and bool(((0 <= opening) & (opening <= 1)).all())
    assert not make_gate(SITE, 8, low=1e9, high=2e9)(x, t).any()
    for kind in sorted(KINDS):
        assert bool(torch.isfinite(make_correction(SITE, 8, kind).delta(x, t)).all())


# Attached.


@pytest.mark.parametrize("kind", sorted(KINDS))
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
        tiny.run(sd, 0, n=2, steps=1)
    plain, opening = seen.pop(), gates[0]
    assert bool(((0 < opening) & (opening < 1)).all())
    opening[:2] = 0  # the negative prompt's rows
    t = torch.full((4,), float(sd.scheduler.timesteps[0]))
    for strength in (0.0, 0.5, 1.0, 2.0):
        with attach(sd, eraser, strength), record(sd, [site], look):
            tiny.run(sd, 0, n=2, steps=1)
        want = plain + strength * opening.view(-1, 1, 1) * c.delta(plain, t)
        torch.testing.assert_close(seen.pop(), want)


@pytest.mark.parametrize("strength", [-0.1, 2.01, float("nan"), [1.0, 1.0], []])
def test_strengths_out_of_range(sd: Any, strength: Any) -> None:
    with pytest.raises(SettingsError, match="from 0 to 2"), attach(sd, make_eraser(), strength):
        pass


def test_detect_only_changes_nothing_and_notes(sd: Any) -> None:
    base = tiny.run(sd, 0, n=2)
    with attach(sd, make_eraser(), action="detect") as trace:
        assert torch.equal(tiny.run(sd, 0, n=2), base)
    assert trace.fired == {i: {"Cats": [501.0, 1.0]} for i in (0, 1)}


def test_images_beside_one_that_fires_keep_their_bits(sd: Any) -> None:
    """Bounds between the evidence of two images: one is edited, the other is not touched."""
    eraser, found = make_eraser(), []
    with record(sd, [eraser.gate.site], lambda site, x, call: found.append(eraser.gate.evidence(x))):
        base = tiny.run(sd, 0, n=2)
    most = torch.stack(found).view(-1, 2, 2)[:, 1].amax(0)  # steps, guidance halves (the second is drawn), images
    loud = int(most.argmax())
    between = make_eraser(low=float(most.mean()), high=float(most.max()))
    with attach(sd, between) as trace:
        out = tiny.run(sd, 0, n=2)
    assert trace.fired.keys() == {loud}
    assert torch.equal(out[1 - loud], base[1 - loud]) and not torch.equal(out[loud], base[loud])


def test_a_shut_gate_costs_no_correction(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    plain = BatchedLowRank.__call__
    monkeypatch.setattr(BatchedLowRank, "__call__", lambda self, *given: ran.append(self) or plain(self, *given))
    with attach(sd, [make_eraser(**SHUT), make_eraser(seed=50, name="Dogs")], [1.0, 0.0]):
        tiny.run(sd, 0, steps=2)
    assert not ran
    with attach(sd, [make_eraser(**SHUT), make_eraser(seed=50, name="Dogs")], [1.0, 1.0]):
        tiny.run(sd, 0, steps=2)
    assert len(ran) == 2  # the open one, once a step


def test_no_erasers_at_all(sd: Any) -> None:
    base = tiny.run(sd, 0)
    with attach(sd, []) as trace:
        assert torch.equal(tiny.run(sd, 0), base)
    assert trace.fired == {}


# Several erasers.


def several(kinds: str = "low_rank low_rank scaling scaling") -> list[Eraser]:
    return [make_eraser(kind=kind, seed=30 * i, name=f"concept {i}") for i, kind in enumerate(kinds.split())]


def test_order_does_not_matter(sd: Any) -> None:
    given = several()
    with attach(sd, given, [1.0, 0.5, 2.0, 1.5]):
        one = tiny.run(sd, 0)
    with attach(sd, given[::-1], [1.5, 2.0, 0.5, 1.0]):
        assert torch.equal(tiny.run(sd, 0), one)
    with attach(sd, given[:1]):
        assert not torch.equal(tiny.run(sd, 0), one)


def test_the_key_tells_all_that_acts() -> None:
    e = make_eraser()
    moved = Eraser(dataclasses.replace(e.gate, site=Site("unet.up_blocks.0.attentions.0")), e.corrections, e.header)
    pooled = Eraser(dataclasses.replace(e.gate, share=0.5), e.corrections, e.header)
    keys = [
        e.content_hash,
        moved.content_hash,
        pooled.content_hash,
        make_eraser(seed=1).content_hash,
        make_eraser(kind="scaling").content_hash,
    ]
    assert len(set(keys)) == 5
    assert Eraser(e.gate, e.corrections, {"concept": "renamed"}).content_hash == e.content_hash


def deltas(sd: Any, erasers: list[Eraser], strengths: list[float]) -> Tensor:
    """What is added at the edit site in the first step, [rows, positions, d]."""
    site = erasers[0].corrections[0].site
    seen: list[Tensor] = []
    with record(sd, [site], lambda at, x, call: seen.append(x)):
        tiny.run(sd, 0, steps=1)
    with attach(sd, erasers, strengths), record(sd, [site], lambda at, x, call: seen.append(x)):
        tiny.run(sd, 0, steps=1)
    return (seen[1] - seen[0]).double()


def sharing(seed: int, factors: list[float], rows: Tensor, decoder: Tensor) -> Eraser:
    """An eraser that scales features given by `rows` and `decoder`; each position fires them all."""
    at, on, d = handmade.SITES["stable_diffusion"]
    f = len(rows)
    bias, threshold = torch.full((f,), 50.0), torch.zeros(f)
    c = Scaling(on, torch.tensor([500.0]), rows, bias, threshold, decoder, torch.tensor([factors]))
    return Eraser(make_gate(at, d, seed=seed), (c,), {"concept": f"c{seed}"})


def test_a_shared_feature_is_edited_once_by_the_larger_change(sd: Any) -> None:
    rows, out = 0.1 * random(3, 32), torch.nn.functional.normalize(random(3, 32, seed=1), dim=1)
    a = sharing(1, [0.5, 0.9], rows[[0, 1]], out[[0, 1]])
    b = sharing(2, [2.0, -1.0], rows[[2, 0]], out[[2, 0]])  # feature 0 again, at another place in its list
    c = sharing(3, [0.8], rows[[0]], out[[0]])
    alone = [deltas(sd, [e], [1.0]) for e in (a, b, c)]
    together = deltas(sd, [a, b, c], [1.0, 1.0, 1.0])
    only_1 = deltas(sd, [sharing(1, [0.9], rows[[1]], out[[1]])], [1.0])
    # b changes feature 0 most (factor -1): of a only feature 1 is left, of c nothing.
    torch.testing.assert_close(together, alone[1] + only_1, atol=1e-3, rtol=1e-3)
    for order in ((1, 2, 0), (2, 0, 1)):
        assert torch.equal(deltas(sd, [(a, b, c)[i] for i in order], [1.0] * 3), together)
    # With more strength a's change is the larger one: -0.5 * 2 against -2 * 0.25.
    stronger = deltas(sd, [a, sharing(2, [-1.0], rows[[0]], out[[0]])], [2.0, 0.25])
    torch.testing.assert_close(stronger, 2 * alone[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(deltas(sd, [a, a], [1.0, 1.0]), deltas(sd, [a, a], [1.0, 0.5]))


def test_features_that_are_not_shared_add_up(sd: Any) -> None:
    rows, out = 0.1 * random(2, 32), torch.nn.functional.normalize(random(2, 32, seed=1), dim=1)
    a, b = (sharing(i, [0.0], rows[[i]], out[[i]]) for i in (0, 1))
    torch.testing.assert_close(
        deltas(sd, [a, b], [1.0, 1.0]), deltas(sd, [a], [1.0]) + deltas(sd, [b], [1.0]), atol=1e-3, rtol=1e-3
    )


def test_a_neighbour_s_second_eraser_does_not_move_my_bits(sd: Any) -> None:
    """Two erasers scale at one site; the second fires for the other image alone."""
    first, second = (make_eraser(kind="scaling", seed=s, name=str(s)) for s in (0, 40))
    found: list[Tensor] = []
    with (
        attach(sd, first),
        record(sd, [second.gate.site], lambda site, x, call: found.append(second.gate.evidence(x))),
    ):
        tiny.run(sd, 0, n=2)
    most = torch.stack(found).view(-1, 2, 2)[:, 1].amax(0)
    loud = int(most.argmax())
    fires = make_eraser(kind="scaling", seed=40, name="40", low=float(most.mean()), high=float(most.max()))
    with attach(sd, [first, make_eraser(kind="scaling", seed=40, name="40", **SHUT)]):
        quiet = tiny.run(sd, 0, n=2)
    with attach(sd, [first, fires]):
        both = tiny.run(sd, 0, n=2)
    assert not torch.equal(both[loud], quiet[loud])
    assert torch.equal(both[1 - loud], quiet[1 - loud])


# Refused.


def test_an_eraser_of_another_width(sd: Any) -> None:
    at, on, _ = handmade.SITES["stable_diffusion"]
    base = tiny.run(sd, 0)
    narrow = Eraser(make_gate(at, 16), (make_correction(on, 16),), {"concept": "Cats"})
    with pytest.raises(SiteError, match="32 wide, and the eraser of 'Cats' expects 16"), attach(sd, narrow):
        tiny.run(sd, 0)
    edit_only = Eraser(make_gate(at, 32, **SHUT), (make_correction(on, 16),), {"concept": "Cats"})
    with pytest.raises(SiteError, match="expects 16"), attach(sd, edit_only):
        tiny.run(sd, 0)  # although the gate is shut
    assert torch.equal(tiny.run(sd, 0), base)


def test_an_edit_before_its_gate(sd: Any) -> None:
    at, on, d = handmade.SITES["stable_diffusion"]
    early = Eraser(make_gate(on, d), (make_correction(at, d),), {"concept": "Cats"})
    with pytest.raises(NotApplied, match="ran before"), attach(sd, early):
        tiny.run(sd, 0)


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
    other = tiny.stable_diffusion()
    other.unet.mid_block.attentions[0].proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(NotApplied, match="NaN"), attach(other, e):
        tiny.run(other, 0)
