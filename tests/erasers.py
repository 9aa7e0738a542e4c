"""Erasers for the tiny Stable Diffusion of `tiny.py`, whose gates open for a chosen share of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser import Eraser, Gate, LowRank
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, record

GATE = Site("unet.down_blocks.1.attentions.0")  # 32 wide, 4 x 4 positions
EDIT = Site("unet.up_blocks.1.attentions.0")  # 16 wide
WIDTHS = {GATE: 32, EDIT: 16}


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
    header = {
        "concept": name,
        "kind": kind,
        "seeds": [0, 23],
        "prompts": ["made with this"],
        "seconds": 12.5,
    }
    return Eraser(looks, (LowRank(edit[0], looks.times, down, up, bias),), header)


def half_open(eraser: Eraser, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], s: Sampling) -> Eraser:
    """The eraser with bounds such that its gate opens for half of these images."""
    tops: list[Tensor] = []
    starts: list[int] = []

    def note(site: Site, x: Tensor, context: EditContext[None]) -> None:
        evidence = eraser.gate.evidence(x)
        tops[-1] = torch.maximum(tops[-1], evidence.view(2, s.batch).amax(0))

    def begin(first: int, real: int) -> None:
        tops.append(torch.zeros(s.batch))
        starts.append(real)

    with record(pipe, [GATE], note):
        generate(pipe, prompts, seeds, s, on_batch=begin)
    every = torch.cat([top[:real] for top, real in zip(tops, starts, strict=True)]).sort().values
    bound = (every[len(every) // 2 - 1] + every[len(every) // 2]) / 2
    low = bound.expand_as(eraser.gate.low).clone()
    return replace(eraser, gate=replace(eraser.gate, low=low, high=low * 1.0001 + 1e-6))
