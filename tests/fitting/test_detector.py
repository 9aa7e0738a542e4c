"""Choosing features and bounds: what is planted is found, and nothing without the concept opens the gate."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.erasers import random
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import ConceptError
from neuraleraser.fitting.detector import BUDGETS, build_gate, choose_features, gate_bounds, trade_off
from neuraleraser.fitting.trajectories import SHARES, pool
from neuraleraser.sae import SAE
from neuraleraser.sites import Site


def planted(own: list[int], shared: list[int], n: int = 40) -> tuple[Tensor, Tensor]:
    """shows [20, 3, shares, n], lacks [60, 3, shares, n]: features `own` fire with the concept alone, `shared`
    with its neighbour "b" too, and all others at random."""
    g = torch.Generator().manual_seed(0)

    def noise(rows: int) -> Tensor:
        x = torch.rand(rows, 3, len(SHARES), n, generator=g) * (torch.rand(rows, 3, 1, n, generator=g) < 0.2)
        x[..., own + shared] = 0
        return x

    shows, lacks = noise(20), noise(60)
    labels = ["b", "c", "d"] * 20
    shows[..., own + shared] = 1 + torch.rand(20, 3, len(SHARES), len(own + shared), generator=g)
    for i, label in enumerate(labels):
        if label == "b":
            lacks[i, :, :, shared] = 1.5
    return shows, lacks


def test_a_feature_that_tells_by_itself_is_the_gate() -> None:
    shows, lacks = planted(own=[17], shared=[5, 6])
    found = choose_features(shows, lacks)
    assert found.features.tolist() == [17] and found.weight.tolist() == [1]
    assert bool((found.separation == 1).all())


def test_features_that_tell_only_together_are_weighed() -> None:
    """Each of three fires for some of the rows with the concept."""
    shows, lacks = planted(own=[3, 17, 30], shared=[5, 6])
    for i, feature in enumerate((3, 17, 30)):
        shows[i::3, :, :, feature] = 0
    found = choose_features(shows, lacks, count=3)
    assert set(found.features.tolist()) == {3, 17, 30}
    assert bool((found.weight > 0).all()) and bool((found.separation == 1).all())


def test_what_only_neighbours_have_speaks_against() -> None:
    """Feature 5 fires with the concept and with its neighbour; 9 with the neighbour alone, and tells them apart."""
    shows, lacks = planted(own=[], shared=[5])
    lacks[::3, :, :, 9] = 3.0  # the rows of neighbour b
    shows[..., 9] = 0
    found = choose_features(shows, lacks, count=4)
    weight = dict(zip(found.features.tolist(), found.weight.tolist(), strict=True))
    assert weight[5] > 0 > weight[9] and float(found.separation.min()) > 0.9


def test_choosing_repeats() -> None:
    given = planted(own=[3, 17], shared=[5])
    one, other = choose_features(*given, count=4), choose_features(*given, count=4)
    assert torch.equal(one.features, other.features) and torch.equal(one.weight, other.weight)


def test_more_features_may_be_asked_for_than_there_are() -> None:
    found = choose_features(*planted(own=[1], shared=[], n=5), count=100)
    assert 1 <= len(found.features) <= 5 and 1 in found.features.tolist()


def test_nothing_tells_them_apart() -> None:
    shows = torch.zeros(4, 2, len(SHARES), 8)
    with pytest.raises(ConceptError, match="no feature"):
        choose_features(shows, torch.rand(6, 2, len(SHARES), 8))


@given(st.integers(0, 1000), st.floats(-5, 5), st.integers(2, 30), st.integers(2, 30))
def test_bounds_are_always_usable(seed: int, gap: float, n: int, m: int) -> None:
    """Whatever the trade between strictness and recall: a gate that can be built, and that opens for what it is for."""
    shows, lacks = (random(k, 4, seed=seed + k).abs() + d for k, d in ((n, max(gap, 0)), (m, max(-gap, 0))))
    low, high = gate_bounds(shows, lacks)
    shut = low == SHUT_BOUND
    assert bool((low >= 0).all()) and bool((high > low).all()) and bool(torch.isfinite(high).all())
    assert bool((shut | (shows.median(0).values > low)).all())  # it opens for a typical row with the concept, or never
    assert bool(shut[shows.amax(0) < lacks.amin(0)].all())


def test_bounds_part_what_is_apart() -> None:
    shows, lacks = 10 + random(50, 4, seed=1).abs(), random(200, 4, seed=2).abs()
    low, high = gate_bounds(shows, lacks)
    assert bool(((lacks > low).float().mean(0) <= 0.005).all()) and bool(((shows > low).float().mean(0) > 0.9).all())
    assert bool((high < shows.quantile(0.9, 0)).all())  # and most rows open it wide


@given(st.lists(st.floats(0, 0.5), min_size=2, max_size=2), st.integers(0, 100))
def test_a_gate_keeps_to_the_damage_that_it_may_do_and_a_larger_one_lets_it_see_more(
    some: list[float], seed: int
) -> None:
    shows, lacks = 1 + random(40, 3, seed=seed), random(300, 3, seed=seed + 1)
    less, more = sorted(some)
    (low, _), (lower, _) = gate_bounds(shows, lacks, less), gate_bounds(shows, lacks, more)
    assert bool(((lacks > low).float().mean(0) <= less).all()) and bool((lower <= low).all())


def test_the_trade_off_says_what_each_setting_gives() -> None:
    shows, lacks = 1.5 + random(60, 3, seed=1), random(400, 3, seed=2)
    found = trade_off(shows, lacks)
    budget, seen, other = found[-1]
    low, _ = gate_bounds(shows, lacks, budget)
    assert seen == pytest.approx(float((shows > low).any(1).float().mean()), abs=1e-4)
    assert other == pytest.approx(float((lacks > low).any(1).float().mean()), abs=1e-4)
    assert [row[0] for row in found] == list(BUDGETS) and found[0][2] == 0.0
    assert all(b[1] >= a[1] and b[2] >= a[2] for a, b in pairwise(found)) and seen > found[0][1]


def test_some_of_the_evidence_opens_it_where_nothing_else_comes_near() -> None:
    """As of a concept that shares its picture with another: half of it opens the gate wide."""
    shows, lacks = 10 + random(50, 4, seed=1), 0.1 * random(200, 4, seed=2).abs()
    low, high = gate_bounds(shows, lacks)
    assert bool((lacks.amax(0) < low).all()) and bool((high < 5).all())


def test_of_few_rows_none_without_the_concept_opens_the_gate() -> None:
    shows, lacks = 3 + random(8, 4, seed=1).abs(), random(16, 4, seed=2).abs()
    low, high = gate_bounds(shows, lacks)
    assert bool((lacks <= low).all())
    assert torch.allclose(gate_bounds(shows, lacks / 100)[0], shows.quantile(0.1, 0) / 2)  # nor what they do not show
    assert bool((high > low).all())


def test_the_gate_weighs_the_sae_s_own_features() -> None:
    """Rows copied, the decoder's bias folded in: z and evidence are those of `SAE.encode`."""
    w = torch.nn.functional.normalize(random(20, 8, seed=1), dim=1)
    sae = SAE(random(20, 8, seed=2), random(20, seed=3), w, random(8, seed=4), random(20, seed=5).abs())
    shows, lacks = planted(own=[3, 7, 11], shared=[], n=20)
    found = choose_features(shows, lacks, count=3)
    times = torch.tensor([900.0, 500.0, 100.0])  # descending, as sampled
    low, high = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([6.0, 5.0, 4.0])
    gate = build_gate(sae, Site("unet.mid_block"), found, times, low, high)
    assert gate.times.tolist() == [100.0, 500.0, 900.0]
    assert gate.low.tolist() == [1.0, 2.0, 3.0] and gate.high.tolist() == [4.0, 5.0, 6.0]
    x = 2 * random(5, 32, 8, seed=6)
    z = sae.encode(x)
    torch.testing.assert_close(gate.activations(x), z[..., found.features], atol=1e-5, rtol=1e-4)
    want = pool(z, SHARES[found.share])[:, found.features] @ found.weight
    torch.testing.assert_close(gate.evidence(x), want, atol=1e-4, rtol=1e-4)
    sae.W_enc.data.zero_()  # the gate keeps its own rows
    torch.testing.assert_close(gate.evidence(x), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share", [1.0, 1 / 16, 0.3])
def test_pooling_takes_the_strongest_positions(share: float) -> None:
    z = random(2, 33, 4).relu()
    k = max(1, round(33 * share))
    want = torch.stack(
        [torch.stack([row[:, f].sort(descending=True).values[:k].mean() for f in range(4)]) for row in z]
    )
    torch.testing.assert_close(pool(z, share), want)
