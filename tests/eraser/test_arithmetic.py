"""The eraser's arithmetic against plain loops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.erasers import make_correction, make_gate, random
from helpers.scaling import scale
from neuraleraser.eraser import CORRECTION_KINDS, Correction, Gate, time_bin
from neuraleraser.sae import SAE
from neuraleraser.sites import Site

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
            for i, a in enumerate(a if a > float(v["threshold"][k, i]) else 0.0 for i, a in enumerate(pre)):
                out[b, p] += a * (v["factor"][k, i] - 1) * v["decoder"][i]
    return out


@pytest.mark.parametrize("share", [1.0, 0.34])
def test_the_gate_against_loops(share: float) -> None:
    gate = double(make_gate(SITE, 4, share=share, low=0.2, high=2.0, threshold=0.3))
    x, t = random(6, 5, 4, seed=3).double(), torch.tensor([0, 499, 501, 999, 250, 750])
    want = naive_gate(gate, x, t)
    assert 0 < sum(want) < 6 and any(0 < w < 1 for w in want)
    torch.testing.assert_close(gate(x, t), torch.tensor(want, dtype=torch.double))


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
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


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
def test_rows_and_positions_stand_alone(kind: str) -> None:
    gate, c = make_gate(SITE, 8, low=0.2, high=2.0, share=0.5), make_correction(SITE, 8, kind)
    x, t = random(3, 6, 8), torch.tensor([10.0, 500.0, 990.0])
    other = torch.cat([x[:1], 9 * random(2, 6, 8, seed=7)])
    assert torch.equal(gate(x, t)[0], gate(other, t)[0])
    assert torch.equal(c.delta(x, t)[0], c.delta(other, t)[0])
    turned = x.flip(1)
    torch.testing.assert_close(gate(turned, t), gate(x, t))  # pooled over positions, in any order
    torch.testing.assert_close(c.delta(turned, t), c.delta(x, t).flip(1))


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
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
    for kind in sorted(CORRECTION_KINDS):
        assert bool(torch.isfinite(make_correction(SITE, 8, kind).delta(x, t)).all())
