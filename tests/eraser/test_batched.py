"""Many erasers as a few tensors do what each does by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import pipelines
from helpers.erasers import SHUT, make_correction, make_eraser, make_gate, random
from neuraleraser.eraser import Eraser, EraserHeader, attach
from neuraleraser.eraser.batched import BatchedGates
from neuraleraser.eraser.corrections import BatchedLowRank, LowRank
from neuraleraser.eraser.corrections.correction import sites_of
from neuraleraser.eraser.site_edit import SiteEdit
from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.sites import Site

SITE = Site("unet.mid_block.attentions.0")
T = torch.tensor([30.0, 420.0, 980.0])


def gates() -> list[Any]:
    """Three kinds of pooling, two of time bins, and one gate that shares two features with another."""
    bounds = {"low": 1.3, "high": 30.0}
    many = [
        make_gate(SITE, 6, f=4, seed=9 * i, share=s, threshold=0.3 * (i + 1), **bounds)
        for i, s in enumerate((1.0, 0.3, 0.3))
    ]
    many.append(make_gate(SITE, 6, f=4, seed=50, times=(100.0, 500.0, 900.0), threshold=0.2, **bounds))
    shared = {name: getattr(many[3], name).clone() for name in ("rows", "bias", "threshold")}
    for name, own in shared.items():
        own[1:3] = getattr(many[0], name)[:2]
    many[3] = replace(many[3], weight=torch.tensor([1.0, -0.5, 2.0, -1.0]), **shared)
    return many


@pytest.mark.parametrize("timestep", [T, T[:1]])
@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_gates_together(timestep: Tensor, threshold: float) -> None:
    x, many = random(3, 10, 6, seed=3), [replace(g, threshold=threshold * g.threshold) for g in gates()]
    together = BatchedGates(many)
    assert together.rows.shape[0] == 14  # of 16 features, two stand twice
    evidence, pre = together.evidence(x)
    low, width = together.bounds_at(timestep)
    opening = ((evidence - low) / width).clamp(0, 1)
    assert 0 < int((opening == 0).sum()) and int((opening > 0).sum()) > 3
    for column, i in enumerate(together.order):
        torch.testing.assert_close(opening[:, column], many[i](x, timestep.expand(3)))
        torch.testing.assert_close(evidence[:, column], many[i].evidence(x))
        where = many[i].activations(x) @ many[i].weight
        torch.testing.assert_close(together.evidence_by_position(pre)[..., column], where)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("f", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 1e6])
def test_what_is_not_finite_shows_in_the_evidence(bad: float, share: float, f: int, threshold: float) -> None:
    x = random(2, 10, 6, seed=3)
    x[1, 4, 2] = bad
    evidence, _ = BatchedGates([make_gate(SITE, 6, share=share, threshold=threshold, f=f)]).evidence(x)
    assert torch.isfinite(evidence[0]).all() and not torch.isfinite(evidence[1]).all()


@pytest.mark.parametrize("timestep", [T, T[:1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_corrections_together(timestep: Tensor, dtype: torch.dtype) -> None:
    some = [make_correction(SITE, 6, seed=9 * i, rank=r) for i, r in enumerate((2, 3, 1))]
    x, amounts = random(3, 10, 6, seed=3).to(dtype), torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    want = sum(c.delta(x.float(), timestep.expand(3)) * a.view(3, 1, 1) for c, a in zip(some, amounts.T, strict=True))
    together = BatchedLowRank(some)
    for _ in range(2):  # the second time from the kept tables
        got, low = together(x, timestep, amounts)
        assert got.dtype == dtype and not got[1].any() and low is not None and torch.isfinite(low).all()
        near = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(got.float(), want, atol=near, rtol=near)
    for bad in (float("nan"), float("inf")):  # of any value in x, the projections tell
        x[2, 9, 5] = bad
        assert torch.isfinite(together(x, timestep, amounts)[1].sum((1, 2))).tolist() == [True, True, False]
    many = [some[0], make_correction(SITE, 6, times=(1.0, 2.0)), some[1]]
    assert [index for index, _ in LowRank.batched(many, separate=False)] == [[0, 2], [1]]
    assert [index for index, _ in LowRank.batched(many, separate=True)] == [[0], [1], [2]]


def test_sites_behind_shut_gates_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = pipelines.stable_diffusion(), []
    call = SiteEdit.__call__
    monkeypatch.setattr(SiteEdit, "__call__", lambda at, x, c: (seen.append(at.site), call(at, x, c))[1])
    shut = make_eraser(**SHUT)
    with attach(pipe, shut):
        pipelines.run(pipe, 0, steps=4)
    acts = shut.corrections[0].site
    assert seen.count(shut.gate.site) == 4 and seen.count(acts) == 1  # once, to see its width


class Counted(TorchDispatchMode):
    """How many operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(("erasers", "most"), [(1, 35), (20, 35)])
def test_what_a_shut_gate_costs(erasers: int, most: int) -> None:
    """Operations beyond those of the plain denoiser: as few for twenty erasers as for one."""
    pipe = pipelines.stable_diffusion()

    def operations() -> int:
        with Counted() as counted:
            pipe.unet(torch.zeros(2, 4, 8, 8), torch.tensor(500), torch.zeros(2, pipelines.WORDS, pipelines.WIDTH))
        return counted.count

    plain = operations()
    with attach(pipe, [make_eraser(seed=20 * i, name=str(i), **SHUT) for i in range(erasers)]):
        operations()  # the first looks at widths, too
        assert 0 < operations() - plain <= most


def test_erasers_of_different_widths_at_one_site() -> None:
    pipe = pipelines.stable_diffusion()
    wide = make_eraser()
    narrow = Eraser(make_gate(wide.gate.site, 16), (make_correction(wide.gate.site, 16),), EraserHeader("Dogs"))
    with pytest.raises(SiteError, match="'Dogs' expects 16, 'Cats' expects 32"), attach(pipe, [wide, narrow]):
        pass
    assert not pipe.unet.mid_block.attentions[0]._forward_hooks


def test_twenty_at_once_are_the_sum_of_each() -> None:
    """Weak enough that one does not change what the next one sees."""
    pipe = pipelines.stable_diffusion()
    base = pipelines.run(pipe, 0, steps=1)
    many = [make_eraser(seed=20 * i, name=str(i)) for i in range(20)]
    alone = []
    for e in many:
        with attach(pipe, e, 0.01):
            alone.append(pipelines.run(pipe, 0, steps=1) - base)
    with attach(pipe, many, 0.01) as trace:
        together = pipelines.run(pipe, 0, steps=1) - base
    assert trace.fired[0].keys() == {e.name for e in many}
    torch.testing.assert_close(together, torch.stack(alone).sum(0), atol=0.05 * float(together.abs().max()), rtol=0)


# One correction for several sites.

READ = tuple(Site(path, "input", "text") for path in ("unet.up_blocks.0.attentions.0", "unet.up_blocks.1.attentions.0"))


def reader(sites: tuple[Site, ...], seed: int = 0, d: int = pipelines.WIDTH, **gate: Any) -> Eraser:
    """Looks at the middle, changes the prompt that later blocks read."""
    correction = make_correction(sites[0], d, seed=seed, also=sites[1:])
    return Eraser(make_gate(SITE, 32, seed=seed, **gate), (correction,), EraserHeader(f"Cats {seed}"))


def apart(eraser: Eraser) -> Eraser:
    """The same with a correction of its own at each site."""
    (c,) = eraser.corrections
    return Eraser(eraser.gate, tuple(replace(c, site=site, also=()) for site in sites_of(c)), eraser.header)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_change_repeated_is_that_made_at_each_site(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, products = pipelines.stable_diffusion(), list[int]()
    shared, plain = [reader(READ, 0), reader(READ[1:], 30)], BatchedLowRank.__call__
    base = pipelines.run(pipe, 3, n=2)
    with attach(pipe, [apart(e) for e in shared], strength):
        want = pipelines.run(pipe, 3, n=2)
    monkeypatch.setattr(BatchedLowRank, "__call__", lambda self, *a: (products.append(1), plain(self, *a))[1])
    with attach(pipe, shared, strength):
        assert torch.equal(pipelines.run(pipe, 3, n=2, steps=2), want)
    assert len(products) == 2 * 2 and not torch.equal(want, base)  # two erasers, two steps: each made once
    with attach(pipe, [reader(READ, **SHUT), shared[1]], [1.0, 0.0]):
        assert torch.equal(pipelines.run(pipe, 3, n=2), base)


def test_blocks_share_the_changed_prompt_where_they_read_the_same_one() -> None:
    pipe, read = pipelines.stable_diffusion(), list[torch.Tensor]()
    eraser = reader((*READ, Site("unet.up_blocks.1.attentions.1", "input", "text")))
    blocks = [pipe.unet.get_submodule(site.path.removeprefix("unet.")) for site in sites_of(eraser.corrections[0])]

    def doubled(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"encoder_hidden_states": 2 * kwargs["encoder_hidden_states"]}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        read.append(kwargs["encoder_hidden_states"])

    handles = [pipe.unet.register_forward_pre_hook(note, with_kwargs=True)]
    handles += [blocks[2].register_forward_pre_hook(doubled, with_kwargs=True)]  # reads another prompt
    with attach(pipe, eraser):
        handles += [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        pipelines.run(pipe, 3, steps=1)
    for handle in handles:
        handle.remove()
    given, first, second, third = read
    assert first is second and not torch.equal(first, given)
    torch.testing.assert_close(third - 2 * given, first - given)


def test_what_is_not_finite_is_noticed_where_a_change_is_repeated() -> None:
    pipe = pipelines.stable_diffusion()
    text = torch.full((1, pipelines.WORDS, pipelines.WIDTH), float("nan"))

    def spoil(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"encoder_hidden_states": text.expand_as(kwargs["encoder_hidden_states"])}

    handle = pipe.unet.up_blocks[1].attentions[0].register_forward_pre_hook(spoil, with_kwargs=True)
    with pytest.raises(EraserNotAppliedError, match="NaN"), attach(pipe, reader(READ)):
        pipelines.run(pipe, 3)
    handle.remove()


def test_changes_that_cannot_be_repeated() -> None:
    pipe, block = pipelines.stable_diffusion(), Site("unet.up_blocks.0")
    with pytest.raises(EraserNotAppliedError, match="ran before"), attach(pipe, reader(READ[::-1])):
        pipelines.run(pipe, 3)
    image = (Site("unet.up_blocks.0.attentions.1"), block)  # 4 x 4 positions, then 8 x 8
    with pytest.raises(EraserNotAppliedError, match="do not read the same"), attach(pipe, reader(image, d=32)):
        pipelines.run(pipe, 3)
    many = [reader(image, d=32), reader((block,), d=16)]
    with pytest.raises(SiteError, match="erasers of different pipelines"), attach(pipe, many):
        pass
