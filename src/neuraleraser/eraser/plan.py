"""The plan of some erasers on one device: what is done at each site. Immutable, made once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.eraser.batched import BatchedGates, gate_features
from neuraleraser.eraser.corrections import BatchedCorrection, Correction
from neuraleraser.eraser.corrections.correction import sites_of
from neuraleraser.eraser.guided import Guided
from neuraleraser.eraser.part import Part
from neuraleraser.errors import SiteError
from neuraleraser.sites import Site

LOOKS = 2
"""Levels of noise, an image gate's cleanest, at which it is shown start images first (docs/LOG.md)."""


@dataclass(frozen=True)
class CorrectionGroup:
    """Corrections of `erasers` that are computed together at `site`, and added at the sites of `also`, too.

    number: one of its own in the plan.
    """

    number: int
    site: Site
    erasers: tuple[int, ...]
    correction: BatchedCorrection
    also: tuple[Site, ...]


@dataclass(frozen=True)
class SitePlan:
    """Work at one site.

    Erasers are numbered by their parts (`Eraser.parts`): each has a gate, and what acts while that is open.

    gates: those that look here, with the eraser of each column in `gate_erasers`. pictures: columns of image gates,
    bool [erasers], None if there are none. gate_tokens: lengths of text that gates were made for, each with its
    columns, bool [erasers]. same_features: columns whose gates read the same features: of their erasers only the one
    with the largest change acts. corrections: made and added here. repeated: made at an earlier site, added here, too.
    waits_for: erasers that act here. shared_key: see `Edit`.
    """

    gates: BatchedGates | None
    gate_erasers: tuple[int, ...]
    pictures: Tensor | None
    gate_tokens: tuple[tuple[int, Tensor], ...]
    same_features: tuple[tuple[int, ...], ...]
    corrections: tuple[CorrectionGroup, ...]
    repeated: tuple[CorrectionGroup, ...]
    waits_for: frozenset[int]
    shared_key: tuple[int, ...] | None
    width: int
    width_of: str


@dataclass(frozen=True)
class Plan:
    """Plan of every site, with tensors on `device`.

    guided: corrections of the prediction, by part. first_look: timesteps at which image gates are shown start images
    before any is drawn. holding: parts that correct, and whose gates hold.
    """

    device: torch.device
    sites: Mapping[Site, SitePlan]
    guided: Mapping[int, Guided]
    first_look: tuple[float, ...]
    holding: frozenset[int]


def make_plan(parts: Sequence[Part], actions: Sequence[str], order: Sequence[int], device: torch.device) -> Plan:
    """Return the plan of parts of erasers, taken in `order`; only those whose action is "erase" correct.

    Raises SiteError for erasers that expect different widths at one site.
    """
    placed = [part.to(device) for part in parts]
    looking: dict[Site, list[int]] = {}
    acting: dict[Site, list[tuple[int, Correction]]] = {}
    for i in order:
        looking.setdefault(placed[i].gate.site, []).append(i)
        for correction in placed[i].corrections if actions[i] == "erase" else ():
            acting.setdefault(correction.site, []).append((i, correction))
    numbers = itertools.count()
    groups = {site: _groups(site, found, device.type == "cpu", numbers) for site, found in acting.items()}
    repeated: dict[Site, list[CorrectionGroup]] = {}
    for group in (group for found in groups.values() for group in found):
        for site in group.also:
            repeated.setdefault(site, []).append(group)
    widths = _widths(placed, actions)
    sites = {}
    for site in dict.fromkeys([*looking, *acting, *repeated]):
        gates = BatchedGates([placed[i].gate for i in looking[site]]) if site in looking else None
        columns = tuple(looking[site][k] for k in gates.order) if gates else ()
        made, again = tuple(groups.get(site, ())), tuple(repeated.get(site, ()))
        shared = [group.number for group in (*made, *again) if group.also]
        only = len(shared) == len(made) + len(again) and gates is None
        sites[site] = SitePlan(
            gates=gates,
            gate_erasers=columns,
            pictures=_pictures([placed[i] for i in columns], device),
            gate_tokens=_tokens([placed[i] for i in columns], device),
            same_features=_same_features([placed[i] for i in columns], [actions[i] for i in columns]),
            corrections=made,
            repeated=again,
            waits_for=frozenset(i for group in (*made, *again) for i in group.erasers),
            shared_key=tuple(shared) if only else None,
            width=widths[site][0],
            width_of=widths[site][1],
        )
    guided = {i: placed[i].guided for i in order if actions[i] == "erase"}
    # A gate whose correction acts in the sampled steps alone has no use for an earlier look.
    looks_first = [
        part for part, action in zip(parts, actions, strict=True) if part.guided is not None or action != "erase"
    ]
    times = {time for part in looks_first if part.gate.picture for time in part.gate.times[:LOOKS].tolist()}
    holding = frozenset(i for i in order if actions[i] == "erase" and placed[i].gate.holds)
    found = {i: correction for i, correction in guided.items() if correction is not None}
    return Plan(device, sites, found, tuple(sorted(times)), holding)


def _groups(
    site: Site, found: Sequence[tuple[int, Correction]], separate: bool, numbers: Iterator[int]
) -> list[CorrectionGroup]:
    """Return the corrections at one site as groups of one kind and of the same further sites."""
    alike: dict[tuple[type[Correction], tuple[Site, ...]], list[tuple[int, Correction]]] = {}
    for i, correction in found:
        alike.setdefault((type(correction), correction.also), []).append((i, correction))
    groups: list[CorrectionGroup] = []
    for (kind, also), part in alike.items():
        for index, batched in kind.batched([correction for _, correction in part], separate):
            erasers = tuple(part[k][0] for k in index)
            groups.append(CorrectionGroup(next(numbers), site, erasers, batched, also))
    return groups


def _pictures(parts: Sequence[Part], device: torch.device) -> Tensor | None:
    """Return which columns are image gates; None if none is."""
    pictures = [part.gate.picture for part in parts]
    return torch.tensor(pictures, device=device) if True in pictures else None


def _tokens(erasers: Sequence[Part], device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    """Return the lengths of text that gates were made for, each with its columns."""
    lengths = [e.gate.text_tokens for e in erasers]
    return tuple(
        (tokens, torch.tensor([length == tokens for length in lengths], device=device))
        for tokens in dict.fromkeys(lengths)
        if tokens is not None
    )


def _same_features(erasers: Sequence[Part], actions: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return groups of columns whose gates read the same features, and which erase (law 11)."""
    groups: dict[tuple[bool, frozenset[bytes]], list[int]] = {}
    for column, (e, action) in enumerate(zip(erasers, actions, strict=True)):
        if action == "erase":
            groups.setdefault((e.gate.holds, gate_features(e.gate)), []).append(column)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _widths(erasers: Sequence[Part], actions: Sequence[str]) -> dict[Site, tuple[int, str]]:
    """Return the width that is expected at each site, and the name of an eraser that expects it."""
    found: dict[Site, dict[int, str]] = {}
    for e, action in zip(erasers, actions, strict=True):
        found.setdefault(e.gate.site, {})[e.gate.width] = e.name
        for correction in e.corrections if action == "erase" else ():
            for site in sites_of(correction):
                found.setdefault(site, {})[correction.width] = e.name
    for site, widths in found.items():
        if len(widths) > 1:
            names = ", ".join(f"{name!r} expects {width}" for width, name in sorted(widths.items()))
            raise SiteError(f"erasers of different pipelines: at {site} that of {names}")
    return {site: next(iter(widths.items())) for site, widths in found.items()}
