"""Record of what fired: in which image, by which eraser, at which timesteps, how far, and where in the picture."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuraleraser.eraser.eraser import Eraser
from neuraleraser.sites import Call, Rows

MAX_IMAGES = 10_000
"""Images that a trace remembers; of more, the first are forgotten."""
_FLUSH_EVERY = 512  # openings that are held before they are folded together
_lock = threading.RLock()  # of all traces: a lock of their own could be neither copied nor pickled


@dataclass(frozen=True)
class Opening:
    """Gates of some parts of erasers, by their numbers, in one forward.

    opening [rows, erasers] at timestep [rows] or [1]; and, where it was asked for, their evidence by position
    [rows, P, erasers] while open.
    """

    erasers: tuple[int, ...]
    timestep: Tensor
    opening: Tensor
    evidence: Tensor | None = None


@dataclass(frozen=True)
class TracedCall:
    """Images of one call in a trace: numbered from `first`; `real` of them are no padding."""

    first: int
    real: int


class Trace:
    """Record of what fired while erasers were attached: for each image, the timesteps at which each gate opened.

    Images are counted from 0 in the order they are generated. Images of one call of `generate` follow one another in
    the order of its prompts. Timesteps are those that the denoiser was given. What is kept is bounded: openings per
    timestep, and the last 10,000 images.

    Attributes:
        names: The erasers' names, made unique ("Cats", "Cats (2)").
        heat: Set it to True, and the record of an image also says where its evidence lay.

    Examples:
        >>> with attach(pipe, eraser) as trace:
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> trace.fired  # image -> eraser -> timesteps
        {0: {'Van_Gogh': [999.0, 499.0]}}
        >>> trace.records()[1], np.array_equal(erased[1], images[1])  # nothing fired: the same bits
        ({'image': 1, 'fired': []}, True)
    """

    def __init__(self, erasers: Sequence[Eraser], actions: Sequence[str] = (), *, heat: bool = False) -> None:
        self.names = unique_names([e.name for e in erasers])
        self.actions = list(actions) or ["erase"] * len(erasers)
        self.heat = heat
        self._parts = [(i, str(part.gate.site)) for i, e in enumerate(erasers) for part in e.parts]
        self._pending: list[tuple[TracedCall, Rows, Opening]] = []
        self._images: dict[int, dict[int, _Fired]] = {}
        self._next = 0

    @property
    def fired(self) -> dict[int, dict[str, list[float]]]:
        """Image -> name of the eraser -> the timesteps, descending, at which its gate opened (start images, too)."""
        with _lock:
            self._fold()
            fired: dict[int, dict[str, list[float]]] = {}
            for image, found in self._images.items():
                for part, f in sorted(found.items()):
                    times = fired.setdefault(image, {}).setdefault(self._name(part), [])
                    times[:] = sorted({*times, *f.opened}, reverse=True)
            return fired

    def records(self) -> list[dict[str, Any]]:
        """Return one record per image, in the order generated, as plain values for JSON.

        {"image": 3, "fired": [{"eraser": "Van_Gogh", "action": "erase", "site": the gate's, "timesteps": [958.0, ...],
        "openings": [1.0, ...] (how far the gate was open at each, 0 to 1), "heat": [...]}]}

        `fired` is empty if nothing fired. "heat", if it was asked for, is the strongest evidence at each of the site's
        positions while the gate was open, row by row.

        Returns:
            The records.
        """
        with _lock:
            self._fold()
            return [
                {"image": image, "fired": [self._line(i, f) for i, f in sorted(found.items())]}
                for image, found in sorted(self._images.items())
            ]

    def jsonl(self) -> str:
        """Return the records as JSON Lines, one line per image."""
        return "".join(json.dumps(record) + "\n" for record in self.records())

    def clear(self) -> None:
        """Forget all images, and go on counting.

        Call it if a trace is kept for days, after taking `records`.
        """
        with _lock:
            self._pending, self._images = [], {}

    def start_call(self, call: Call) -> TracedCall:
        """Number the images of a call that begins."""
        with _lock:
            batch = call.batch
            if batch is None:
                traced = TracedCall(self._next, call.images)
                self._next += call.images
            else:
                base = batch.series.numbering.get(id(self))
                if base is None:
                    base = batch.series.numbering[id(self)] = self._next
                    self._next += batch.series.total
                traced = TracedCall(base + batch.first, batch.real)
            for image in range(traced.first, traced.first + traced.real):
                self._images.setdefault(image, {})
            while len(self._images) > MAX_IMAGES:
                del self._images[next(iter(self._images))]
            return traced

    def add(self, call: TracedCall, rows: Rows, openings: Sequence[Opening]) -> None:
        """Note the openings of one forward of a call."""
        with _lock:
            self._pending += [(call, rows, opening) for opening in openings]
            if len(self._pending) >= _FLUSH_EVERY:
                self._fold()

    def continue_from(self, other: Trace) -> None:
        """Go on with the images of `other`: what erasers of the same names did in them."""
        with _lock:
            other._fold()
            mine = {(self.names[i], site): part for part, (i, site) in enumerate(self._parts)}
            theirs = enumerate((other.names[i], site) for i, site in other._parts)
            at = {part: mine[known] for part, known in theirs if known in mine}
            self._images = {
                image: {at[i]: fired for i, fired in found.items() if i in at} for image, found in other._images.items()
            }
            self._next, self.heat = other._next, other.heat

    def _name(self, part: int) -> str:
        """Return the name of the eraser that a part is of."""
        return self.names[self._parts[part][0]]

    def _line(self, part: int, f: _Fired) -> dict[str, Any]:
        eraser, site = self._parts[part]
        times = sorted(f.opened, reverse=True)
        line: dict[str, Any] = {
            "eraser": self.names[eraser],
            "action": self.actions[eraser],
            "site": site,
            "timesteps": times,
            "openings": [round(f.opened[t], 4) for t in times],
        }
        if f.heat is not None:
            line["heat"] = [round(float(v), 4) for v in f.heat]
        return line

    def _fold(self) -> None:
        """Bring what was noted from the device, at once, and keep the widest opening at each timestep."""
        groups: dict[Any, list[tuple[TracedCall, Rows, Opening]]] = {}
        for entry in self._pending:
            groups.setdefault((entry[2].erasers, entry[2].opening.shape, entry[2].opening.device), []).append(entry)
        self._pending = []
        for (erasers, shape, _), entries in groups.items():
            times = torch.stack([o.timestep.expand(shape[0]) for _, _, o in entries]).float().cpu().numpy()
            openings = torch.stack([o.opening.detach().float() for _, _, o in entries]).cpu().numpy()
            for n, (call, rows, opening) in enumerate(entries):
                evidence = None if opening.evidence is None else opening.evidence.detach().float().cpu().numpy()
                image_of = rows.image_of(shape[0])
                for row, column in np.argwhere(openings[n]).tolist():
                    image = image_of[row]
                    if image < call.real:  # padding belongs to no image
                        found = self._images.setdefault(call.first + image, {})
                        fired = found.setdefault(erasers[column], _Fired())
                        fired.open(float(times[n, row]), float(openings[n, row, column]))
                        if evidence is not None:
                            fired.warm(evidence[row, :, column])


def unique_names(names: Sequence[str]) -> list[str]:
    """Return the names, repeated ones with a number: "Cats", "Cats (2)"."""
    out: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in out:
            number += 1
            unique = f"{name} ({number})"
        out.append(unique)
    return out


class _Fired:
    """One eraser in one image: how far it opened at each timestep, and where its evidence lay."""

    def __init__(self) -> None:
        self.opened: dict[float, float] = {}
        self.heat: NDArray[np.float16] | None = None

    def open(self, time: float, opening: float) -> None:
        """Note that at a timestep the gate was open this far, in one of the image's rows."""
        self.opened[time] = max(self.opened.get(time, 0.0), opening)

    def warm(self, evidence: NDArray[Any]) -> None:
        """Keep the stronger of what is known and evidence [P]."""
        now = evidence.astype(np.float16)
        same = self.heat is not None and self.heat.shape == now.shape
        self.heat = np.maximum(self.heat, now) if same and self.heat is not None else now
