"""Several erasers at once: their order does not matter, and what they share is edited once."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import erasers, pipelines
from helpers.erasers import SHUT, make_eraser, make_gate, random
from neuraleraser.eraser import Eraser, EraserHeader, attach
from neuraleraser.eraser.corrections import Scaling
from neuraleraser.sites import Site, record


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipelines.stable_diffusion()


def several(kinds: str = "low_rank low_rank scaling scaling") -> list[Eraser]:
    return [make_eraser(kind=kind, seed=30 * i, name=f"concept {i}") for i, kind in enumerate(kinds.split())]


def test_order_does_not_matter(sd: Any) -> None:
    given = several()
    with attach(sd, given, [1.0, 0.5, 2.0, 1.5]):
        one = pipelines.run(sd, 0)
    with attach(sd, given[::-1], [1.5, 2.0, 0.5, 1.0]):
        assert torch.equal(pipelines.run(sd, 0), one)
    with attach(sd, given[:1]):
        assert not torch.equal(pipelines.run(sd, 0), one)


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
    assert Eraser(e.gate, e.corrections, EraserHeader("renamed")).content_hash == e.content_hash


def deltas(sd: Any, erasers: list[Eraser], strengths: list[float]) -> Tensor:
    """What is added at the edit site in the first step, [rows, positions, d]."""
    site = erasers[0].corrections[0].site
    seen: list[Tensor] = []
    with record(sd, [site], lambda at, x, call: seen.append(x)):
        pipelines.run(sd, 0, steps=1)
    with attach(sd, erasers, strengths), record(sd, [site], lambda at, x, call: seen.append(x)):
        pipelines.run(sd, 0, steps=1)
    return (seen[1] - seen[0]).double()


def sharing(seed: int, factors: list[float], rows: Tensor, decoder: Tensor) -> Eraser:
    """An eraser that scales features given by `rows` and `decoder`; each position fires them all."""
    at, on, d = erasers.SITES["stable_diffusion"]
    f = len(rows)
    bias, threshold = torch.full((f,), 50.0), torch.zeros(1, f)
    c = Scaling(on, torch.tensor([500.0]), rows, bias, threshold, decoder, torch.tensor([factors]))
    return Eraser(make_gate(at, d, seed=seed), (c,), EraserHeader(f"c{seed}"))


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
        pipelines.run(sd, 0, n=2)
    most = torch.stack(found).view(-1, 2, 2)[:, 1].amax(0)
    loud = int(most.argmax())
    fires = make_eraser(kind="scaling", seed=40, name="40", low=float(most.mean()), high=float(most.max()))
    with attach(sd, [first, make_eraser(kind="scaling", seed=40, name="40", **SHUT)]):
        quiet = pipelines.run(sd, 0, n=2)
    with attach(sd, [first, fires]):
        both = pipelines.run(sd, 0, n=2)
    assert not torch.equal(both[loud], quiet[loud])
    assert torch.equal(both[1 - loud], quiet[1 - loud])
