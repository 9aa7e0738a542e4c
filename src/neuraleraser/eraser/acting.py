"""Erasers at work: what the hooks of one attachment share, and what they do at each site.

Plain classes that hold no pipeline, so that a model that is copied or pickled carries its own. Strengths lie in
one tensor, and nothing that a compiled graph would look at changes with their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from neuraleraser.eraser.file import Eraser
from neuraleraser.eraser.parts import Correction, nearest
from neuraleraser.eraser.trace import Trace
from neuraleraser.errors import NotApplied, SettingsError, SiteError
from neuraleraser.sites import Call, Site


class Acting:
    """Some erasers, their strengths [erasers, images] (or [erasers, 1]: the same for all images), their trace.

    `at` holds the edit of each site.
    """

    def __init__(
        self, erasers: Sequence[Eraser], strengths: Tensor, device: torch.device, trace: Trace, detect_only: bool
    ) -> None:
        self.erasers, self.trace, self.device = list(erasers), trace, device
        self.rows = 0  # of the latest call of the denoiser, where strengths differ by image
        self.at: dict[Site, At] = {}
        # An order set by content, so that sums have the same bits in whatever order erasers are given.
        for i in sorted(range(len(erasers)), key=lambda i: (erasers[i].key, strengths[i].tolist())):
            self._at(erasers[i].gate.site).gates.append(i)
            for k, c in enumerate(erasers[i].corrections if not detect_only else ()):
                self._at(c.site).work.append((i, k))
        self.set(strengths)
        self.place(device)

    def _at(self, site: Site) -> At:
        return self.at.setdefault(site, At(self, site))

    def set(self, strengths: Tensor) -> None:
        """From the next call on. Another tensor of the same shape: a compiled graph does not tell."""
        self.strengths = strengths.to(self.device)
        self.idle = (strengths == 0).all(1).tolist()  # known here, so that no device is asked

    def place(self, device: torch.device) -> None:
        """Bring all tensors to `device`."""
        self.device, self.strengths = device, self.strengths.to(device)
        self.placed = [_to(e, device) for e in self.erasers]
        for at in self.at.values():
            at.share()

    def amount(self, i: int, opening: Tensor) -> Tensor | None:
        """Strength times opening [rows] of eraser i, or None where it is known to be 0 throughout."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.idle[i]:
            return None
        own, rows = self.strengths[i].to(opening), opening.shape[0]
        images = own.shape[0]
        if images > 1:
            self.rows = rows
            if rows % images:
                raise SettingsError(f"strengths for {images} images, but the denoiser was given {rows} rows: {_ONE}")
            if rows > images:  # guidance halves: image j owns rows j, j + images, ...
                own = own.repeat(rows // images)
        amount = own * opening
        # Whether it acts at all: asking costs nothing on a CPU, and would stall a GPU.
        return None if not compiling and amount.device.type == "cpu" and not bool(amount.any()) else amount

    def check_rows(self, allowed: set[int]) -> None:
        """SettingsError where strengths by image met a batch of another number of images in the latest call."""
        rows, images = self.rows, self.strengths.shape[1]
        self.rows = 0
        if rows and images > 1 and rows // images not in allowed:
            raise SettingsError(
                f"strengths for {images} images, but the denoiser was given {rows} rows, and an image has "
                f"{' or '.join(map(str, sorted(allowed)))}: {_ONE}"
            )


_ONE = "set as many strengths as the call draws images, or one for all"


class At:
    """The edit of one site: gates that look here, then corrections that act here."""

    def __init__(self, acting: Acting, site: Site) -> None:
        self.acting, self.site = acting, site
        self.gates: list[int] = []  # erasers
        self.work: list[tuple[int, int]] = []  # erasers, and which of their corrections

    def share(self) -> None:
        """Tell what acts alone from what scales and may share features, once all of `work` is known."""
        placed = self.acting.placed
        every = [(i, placed[i].corrections[k]) for i, k in self.work]
        scaling = [(i, c) for i, c in every if c.mode == "scale"]
        self.scaled = scaling if len(scaling) > 1 else []
        self.once = Once([c for _, c in self.scaled]) if self.scaled else None
        self.adding = [(i, c) for i, c in every if not self.scaled or c.mode != "scale"]

    def __call__(self, x: Tensor, call: Call) -> Tensor | None:
        acting, site = self.acting, self.site
        if x.device != acting.device and not torch.compiler.is_compiling():
            acting.place(x.device)  # the pipeline was moved
        amounts: dict[int, Tensor | None] = call.memo.setdefault("amounts", {})
        for i in self.gates:
            gate = acting.placed[i].gate
            _check_width(acting.placed[i], site, gate.rows.shape[1], x)
            index = nearest(gate.times, call.timestep)
            opening = gate.at(x, index)
            acting.trace.note(i, index, opening)
            amounts[i] = acting.amount(i, opening)
        for i, k in self.work:
            _check_width(acting.placed[i], site, acting.placed[i].corrections[k].width, x)
            if i not in amounts:
                raise NotApplied(
                    f"{site} ran before {acting.placed[i].gate.site}, whose gate it waits for: swap the sites"
                )
        parts = []
        for i, c in self.adding:
            amount = amounts[i]
            if amount is not None:
                parts.append(c.delta(x, call.timestep) * amount.view(-1, 1, 1))
        if self.once is not None and any(amounts[i] is not None for i, _ in self.scaled):
            parts.append(self.once(x, call.timestep, [amounts[i] for i, _ in self.scaled]))
        return sum(parts[1:], parts[0]) if parts else None


class Once:
    """The sum of corrections that scale, in which a feature that several share is changed once, by the largest
    change (law 11).

    A feature is told by its encoder row and bias, in the half precision of files: a number in an SAE would not
    tell two SAEs apart.
    """

    def __init__(self, corrections: Sequence[Correction]) -> None:
        self.corrections = list(corrections)
        numbers: dict[bytes, int] = {}
        decoder: list[Tensor] = []
        self.index: list[Tensor] = []
        for c in corrections:
            t, mine = c.tensors, []
            told = torch.cat([t["rows"], t["bias"].unsqueeze(1)], 1).detach().half().cpu().numpy()
            for row, out in zip(told, t["decoder"], strict=True):
                feature = row.tobytes()
                if feature not in numbers:
                    numbers[feature] = len(numbers)
                    decoder.append(out)
                mine.append(numbers[feature])
            self.index.append(torch.tensor(mine, device=t["rows"].device))
        self.back = torch.stack(decoder)

    def __call__(self, x: Tensor, timestep: Tensor, amounts: Sequence[Tensor | None]) -> Tensor:
        """x [B, P, d], timestep [B], how much of each correction [B] -> delta [B, P, d]."""
        changes = []
        for c, features, amount in zip(self.corrections, self.index, amounts, strict=True):
            if amount is not None:
                z = c.change(x, timestep) * amount.view(-1, 1, 1)
                changes.append(z.new_zeros(*z.shape[:2], len(self.back)).index_copy(-1, features.to(z.device), z))
        every = torch.stack(changes)
        largest = every.gather(0, every.abs().argmax(0, keepdim=True))[0]
        return largest @ self.back.to(largest)


def _check_width(eraser: Eraser, site: Site, width: int, x: Tensor) -> None:
    if x.shape[-1] != width:
        raise SiteError(
            f"{site} is {x.shape[-1]} wide, and the eraser of {eraser.name!r} expects {width}: "
            "use it with the pipeline it was made for"
        )


def _to(eraser: Eraser, device: torch.device) -> Eraser:
    """The eraser with its tensors on `device`."""
    gate = replace(eraser.gate, **{k: v.to(device) for k, v in vars(eraser.gate).items() if isinstance(v, Tensor)})
    edits = tuple(
        Correction(c.site, c.mode, c.times.to(device), {k: v.to(device) for k, v in c.tensors.items()})
        for c in eraser.corrections
    )
    return Eraser(gate, edits, eraser.header)
