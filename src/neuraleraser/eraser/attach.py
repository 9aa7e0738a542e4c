"""`attach`: gates and corrections as edits of a pipeline's sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser.file import Eraser
from neuraleraser.eraser.parts import Correction, nearest
from neuraleraser.eraser.trace import Trace
from neuraleraser.errors import DataError, NotApplied, SettingsError, SiteError
from neuraleraser.sites import Call, Site, edit

MAX_STRENGTH = 2.0


def _strengths(erasers: Sequence[Eraser], strength: float | Sequence[float]) -> list[float]:
    values = [float(strength)] * len(erasers) if isinstance(strength, (int, float)) else [float(s) for s in strength]
    if len(values) != len(erasers) or not all(0 <= s <= MAX_STRENGTH for s in values):
        raise SettingsError(f"strengths {values} for {len(erasers)} erasers: pass one each, from 0 to {MAX_STRENGTH:g}")
    return values


@contextmanager
def attach(
    pipe: Any,
    erasers: Eraser | Sequence[Eraser],
    strength: float | Sequence[float] = 1.0,
    *,
    detect_only: bool = False,
    batch: int = 0,
) -> Iterator[Trace]:
    """Context manager: erase while it is open; afterwards the pipeline gives the bits it gave before.

    `strength` (one, or one an eraser) is 0 for nothing, 1 as fitted, up to 2. `detect_only` changes nothing
    and only notes what would have fired. `batch` is the number of images in a call where it is known, so that
    the trace can tell guidance halves from images. Yields the `Trace`.

    Erasers commute: at a site all read the same x and their changes add up, in an order set by their content; of
    a feature that several scale only the largest change is made.

    Raises SettingsError for a strength out of range, DataError for an eraser whose parts do not fit, SiteError
    for a site that the pipeline has not or has in another width, NotApplied before an image is returned if an
    eraser did not run.
    """
    many = [erasers] if isinstance(erasers, Eraser) else list(erasers)
    values = _strengths(many, strength)
    for e in many:
        problem = e.problem()
        if problem:
            raise DataError(f"the eraser of {e.name!r} cannot be attached ({problem}): make it again")
    trace = Trace(many, batch)
    device = pipe._execution_device  # where offloaded parts will run, too
    placed = [_to(e, device) for e in many]
    gates: dict[Site, list[int]] = {}
    edits: dict[Site, list[tuple[int, Correction]]] = {}
    # An order set by content, so that sums have the same bits in whatever order erasers are given.
    for i in sorted(range(len(many)), key=lambda i: (many[i].key, values[i])):
        gates.setdefault(placed[i].gate.site, []).append(i)
        for c in placed[i].corrections if not detect_only else ():
            edits.setdefault(c.site, []).append((i, c))

    def at(site: Site) -> Callable[[Tensor, Call], Tensor | None]:
        here, work = gates.get(site, []), edits.get(site, [])
        shared = [(i, c) for i, c in work if c.mode == "scale"]
        shared = shared if len(shared) > 1 else []
        scaled = _once([c for _, c in shared]) if shared else None
        adding = [(i, c) for i, c in work if not shared or c.mode != "scale"]

        def change(x: Tensor, call: Call) -> Tensor | None:
            amounts: dict[int, Tensor | None] = call.memo.setdefault("amounts", {})
            for i in here:
                gate = placed[i].gate
                _check_width(placed[i], site, gate.rows.shape[1], x)
                index = nearest(gate.times, call.timestep)
                opening = gate.at(x, index)
                trace.note(i, index, opening)
                # Whether it opened at all: asking costs nothing on a CPU, and would stall a GPU.
                ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
                idle = values[i] == 0 or (ask and not bool(opening.any()))
                amounts[i] = None if idle else values[i] * opening
            for i, c in work:
                _check_width(placed[i], site, c.width, x)
                if i not in amounts:
                    raise NotApplied(
                        f"{site} ran before {placed[i].gate.site}, whose gate it waits for: swap the sites"
                    )
            parts = []
            for i, c in adding:
                amount = amounts[i]
                if amount is not None:
                    parts.append(c.delta(x, call.timestep) * amount.view(-1, 1, 1))
            if scaled and any(amounts[i] is not None for i, _ in shared):
                parts.append(scaled(x, call.timestep, [amounts[i] for i, _ in shared]))
            return sum(parts[1:], parts[0]) if parts else None

        return change

    with edit(pipe, {site: at(site) for site in {**gates, **edits}}):
        yield trace
    trace.finish()


def _check_width(eraser: Eraser, site: Site, width: int, x: Tensor) -> None:
    if x.shape[-1] != width:
        raise SiteError(
            f"{site} is {x.shape[-1]} wide, and the eraser of {eraser.name!r} expects {width}: "
            "use it with the pipeline it was made for"
        )


def _once(corrections: Sequence[Correction]) -> Callable[[Tensor, Tensor, Sequence[Tensor | None]], Tensor]:
    """A function (x [B, P, d], timestep [B], how much of each correction [B]) -> delta [B, P, d] of all of these,
    which scale. A feature that several share is changed once, by the largest change (law 11).

    A feature is told by its encoder row and bias, in the half precision of files: a number in an SAE would not
    tell two SAEs apart.
    """
    numbers: dict[bytes, int] = {}
    decoder: list[Tensor] = []
    index: list[Tensor] = []
    for c in corrections:
        t, mine = c.tensors, []
        told = torch.cat([t["rows"], t["bias"].unsqueeze(1)], 1).detach().half().cpu().numpy()
        for row, out in zip(told, t["decoder"], strict=True):
            feature = row.tobytes()
            if feature not in numbers:
                numbers[feature] = len(numbers)
                decoder.append(out)
            mine.append(numbers[feature])
        index.append(torch.tensor(mine, device=t["rows"].device))
    back = torch.stack(decoder)

    def delta(x: Tensor, timestep: Tensor, amounts: Sequence[Tensor | None]) -> Tensor:
        changes = []
        for c, features, amount in zip(corrections, index, amounts, strict=True):
            if amount is not None:
                z = c.change(x, timestep) * amount.view(-1, 1, 1)
                changes.append(z.new_zeros(*z.shape[:2], len(back)).index_copy(-1, features.to(z.device), z))
        every = torch.stack(changes)
        largest = every.gather(0, every.abs().argmax(0, keepdim=True))[0]
        return largest @ back.to(largest)

    return delta


def _to(eraser: Eraser, device: torch.device) -> Eraser:
    """The eraser with its tensors on `device`."""
    gate = replace(eraser.gate, **{k: v.to(device) for k, v in vars(eraser.gate).items() if isinstance(v, Tensor)})
    edits = tuple(
        Correction(c.site, c.mode, c.times.to(device), {k: v.to(device) for k, v in c.tensors.items()})
        for c in eraser.corrections
    )
    return Eraser(gate, edits, eraser.header)
