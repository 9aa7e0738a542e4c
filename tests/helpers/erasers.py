"""Erasers made by hand, of random rows: what they erase means nothing, what they do is known exactly.

`make_eraser` is for any of the small pipelines, `open_eraser` and `half_open` for the small Stable Diffusion alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from helpers import pipelines
from neuraleraser.eraser import CORRECTION_KINDS, Correction, Eraser, EraserHeader, Gate, Guided, LowRank
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, denoiser_calls, record, text_of

# Of each small pipeline: where the gate looks, where the edit acts (it runs later), and how wide both are.
SITES: dict[str, tuple[Site, Site, int]] = {
    "stable_diffusion": (Site("unet.mid_block.attentions.0"), Site("unet.up_blocks.0.attentions.1"), 32),
    "stable_diffusion_xl": (Site("unet.mid_block.attentions.0"), Site("unet.up_blocks.0.attentions.1"), 32),
    "stable_diffusion_3": (Site("transformer.transformer_blocks.0"), Site("transformer.transformer_blocks.1"), 16),
    "flux": (Site("transformer.transformer_blocks.1"), Site("transformer.single_transformer_blocks.0"), 16),
    "pixart": (Site("transformer.transformer_blocks.0"), Site("transformer.transformer_blocks.1"), 16),
}
FAMILIES = sorted(SITES)
SHUT: dict[str, Any] = {"low": 1e6, "high": 2e6}
"""Bounds that no evidence of a random model reaches."""

# Where erasers of `open_eraser` look and act.
GATE = Site("unet.down_blocks.1.attentions.0")  # 32 wide, 4 x 4 positions
EDIT = Site("unet.up_blocks.1.attentions.0")  # 16 wide
WIDTHS = {GATE: 32, EDIT: 16}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_gate(
    site: Site,
    d: int,
    *,
    f: int = 3,
    seed: int = 0,
    low: float = 0.0,
    high: float = 1e-3,
    threshold: float = 0.0,
    share: float = 1.0,
    times: Sequence[float] = (250.0, 750.0),
    window: int = 1,
) -> Gate:
    """By default it opens wide at the least evidence."""
    t = torch.tensor(times)
    return Gate(
        site=site,
        features=torch.arange(f),
        rows=random(f, d * window**2, seed=seed + 1),
        bias=0.1 * random(f, seed=seed + 2),
        threshold=torch.full((f,), threshold),
        weight=random(f, seed=seed + 3).abs(),
        share=share,
        times=t,
        low=torch.full_like(t, low),
        high=torch.full_like(t, high),
        window=window,
    )


def make_correction(
    site: Site,
    d: int,
    kind: str = "low_rank",
    *,
    f: int = 3,
    rank: int = 2,
    seed: int = 0,
    times: Sequence[float] = (100.0, 500.0, 900.0),
    also: tuple[Site, ...] = (),
    **tensors: Tensor,
) -> Correction:
    """`tensors` replace those made here."""
    t = len(times)
    rows = {
        "rows": random(f, d, seed=seed + 5),
        "bias": 0.1 * random(f, seed=seed + 6),
        "threshold": random(t, f, seed=seed + 7).abs(),
    }
    made = {
        "scaling": rows
        | {
            "decoder": torch.nn.functional.normalize(random(f, d, seed=seed + 8), dim=1),
            "factor": random(t, f, seed=seed + 9),
        },
        "low_rank": {
            "down": random(t, d, rank, seed=seed + 5) / d**0.5,
            "up": 0.3 * random(t, rank, d, seed=seed + 6),
            "bias": 0.3 * random(t, d, seed=seed + 7),
        },
    }[kind]
    return CORRECTION_KINDS[kind].from_tensors(site, {"times": torch.tensor(times)} | made | tensors, also)


def make_eraser(
    family: str = "stable_diffusion", kind: str = "low_rank", *, seed: int = 0, name: str = "Cats", **gate: Any
) -> Eraser:
    """An eraser for the small pipeline of a family; `gate` goes to `make_gate`."""
    at, on, d = SITES[family]
    scale = 1e-3 if family == "flux" else 1.0  # its time runs from 0 to 1
    times = [scale * t for t in gate.pop("times", (250.0, 750.0))]
    correction = make_correction(on, d, kind, seed=seed, times=[scale * t for t in (100.0, 500.0, 900.0)])
    header = EraserHeader(name, kind="object", seeds=(0, 9))
    return Eraser(make_gate(at, d, seed=seed, times=times, **gate), (correction,), header)


def with_picture(eraser: Eraser, pipe: Any, *, weight: float = 0.5, seed: int = 5, **gate: Any) -> Eraser:
    """The eraser with an image gate where its gate looks, and a guided correction between two random texts."""
    given: list[dict[str, Tensor]] = []
    with denoiser_calls(pipe, lambda call: given.append(text_of(call.conditioning, 0))):
        pipelines.run(pipe, 0, steps=1)
    without, shown = (
        {
            k: random(*x.shape, seed=s).to(x) if x.is_floating_point() and k != "txt_ids" else x
            for k, x in given[0].items()
        }
        for s in (11, 12)
    )
    d, times = eraser.gate.rows.shape[1], eraser.gate.times.tolist()
    looks = make_gate(eraser.gate.site, d, seed=seed, times=times, **gate)
    return replace(eraser, image_gate=replace(looks, picture=True), guided=Guided(weight, without, shown, ("b", "a")))


def open_eraser(
    name: str = "Van_Gogh",
    kind: str = "style",
    seed: int = 0,
    bins: int = 2,
    gate: tuple[Site, int] = (GATE, WIDTHS[GATE]),
    edit: tuple[Site, int] = (EDIT, WIDTHS[EDIT]),
) -> Eraser:
    """Random features and a random correction at sites with their widths; its gate opens for every image."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    looks = Gate(
        site=gate[0],
        features=torch.arange(4) + 10 * seed,
        rows=random(4, gate[1]),
        bias=torch.zeros(4),
        threshold=torch.zeros(4),
        weight=torch.ones(4),
        share=1.0,
        times=torch.linspace(0, 900, bins),
        low=torch.zeros(bins),
        high=torch.full((bins,), 1e-3),
    )
    down, up, bias = random(bins, edit[1], 2), random(bins, 2, edit[1]), random(bins, edit[1])
    header = EraserHeader(name, kind, seeds=(0, 23), prompts=("made with this",), seconds=12.5, peak_bytes=2**30)
    return Eraser(looks, (LowRank(edit[0], looks.times, down, up, bias),), header)


def half_open(eraser: Eraser, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], s: Sampling) -> Eraser:
    """The eraser with bounds such that its gate opens for half of these images."""
    tops: list[Tensor] = []
    starts: list[int] = []

    def note(site: Site, x: Tensor, context: EditContext[None]) -> None:
        evidence = eraser.gate.evidence(x)
        tops[-1] = torch.maximum(tops[-1], evidence.view(2, s.batch_size).amax(0))

    def begin(first: int, real: int) -> None:
        tops.append(torch.zeros(s.batch_size))
        starts.append(real)

    with record(pipe, [GATE], note):
        generate(pipe, prompts, seeds, s, on_batch_start=begin)
    every = torch.cat([top[:real] for top, real in zip(tops, starts, strict=True)]).sort().values
    bound = (every[len(every) // 2 - 1] + every[len(every) // 2]) / 2
    low = bound.expand_as(eraser.gate.low).clone()
    return replace(eraser, gate=replace(eraser.gate, low=low, high=low * 1.0001 + 1e-6))
