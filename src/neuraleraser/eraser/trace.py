"""What fired: in which image, by which eraser, at which timesteps, how far, and where in the picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuraleraser.eraser.file import Eraser
from neuraleraser.errors import SettingsError

KEPT = 10_000
"""Images that a trace remembers; of more, the first are forgotten."""
_NOTES = 512  # openings that are held before they are folded together
_FINE = 1000  # parts of the time scale that a compiled denoiser's openings are told apart by


class Trace:
    """What fired while erasers were attached: for each image, the timesteps at which each eraser's gate opened.

    Images are counted from 0 in the order they are drawn, or as `begin` says. A row of a denoiser call is an image;
    with guidance in one batch the call has twice as many rows, and image i of B owns rows i and i + B. B is what the
    pipeline tells of itself; where nothing but the denoiser is called, it is `batch`, or if that is 0 the size of the
    largest batch that `begin` announced, or without `begin` every row counts as an image.

    Timesteps are those that the denoiser was given; under `torch.compile`, whose graph can append to no list, to a
    thousandth of the time scale. What is kept is bounded: openings by timestep, and the last 10,000 images.

    heat: set it to True, and the record of an image says where its evidence lay, too.
    """

    def __init__(
        self, erasers: Sequence[Eraser], batch: int = 0, actions: Sequence[str] = (), *, heat: bool = False
    ) -> None:
        self.names = [e.name for e in erasers]
        self.actions = list(actions) or ["erase"] * len(erasers)
        self.batch, self.heat = batch, heat
        self._sites = [str(e.gate.site) for e in erasers]
        self._scales = [1.0 if float(e.gate.times.max()) <= 1 else 1000.0 for e in erasers]
        self._notes: list[tuple[tuple[int, ...], Tensor, Tensor]] = []
        self._table: dict[tuple[tuple[int, ...], int], Tensor] = {}  # of a compiled denoiser: [parts, rows, erasers]
        self._warm: dict[tuple[tuple[int, ...], int, int], Tensor] = {}  # strongest evidence [rows, P, erasers]
        self._opened: dict[tuple[int, int], dict[float, NDArray[np.float32]]] = {}  # (eraser, rows) -> time -> [rows]
        self._images: dict[int, dict[int, _Fired]] = {}
        self._first = self._largest = 0
        self._real: int | None = None  # images of the batch that are no padding, where `begin` was called

    @property
    def fired(self) -> dict[int, dict[str, list[float]]]:
        """Image -> eraser -> the timesteps, descending, at which its gate opened."""
        self.finish()
        return {
            image: {self.names[i]: sorted(f.opened, reverse=True) for i, f in found.items()}
            for image, found in self._images.items()
            if found
        }

    def records(self) -> list[dict[str, Any]]:
        """A record an image, in the order drawn, as plain values for JSON:

        {"image": 3, "fired": [{"eraser": "Van_Gogh", "action": "erase", "site": the gate's, "timesteps": [958.0, ...],
        "openings": [1.0, ...] (how far the gate was open at each, 0 to 1), "heat": [...]}]}

        `fired` is empty where nothing did. "heat", where it was asked for, is the strongest evidence at each of the
        site's positions while the gate was open, row by row.
        """
        self.finish()
        return [
            {"image": image, "fired": [self._line(i, f) for i, f in sorted(found.items())]}
            for image, found in sorted(self._images.items())
        ]

    def jsonl(self) -> str:
        """The records as JSON Lines, one image a line."""
        return "".join(json.dumps(record) + "\n" for record in self.records())

    def clear(self) -> None:
        """Forget all images; the next is counted on. Call it where a trace goes on for days, after taking `records`."""
        self.finish()
        self._images = {}

    def _line(self, eraser: int, f: _Fired) -> dict[str, Any]:
        times = sorted(f.opened, reverse=True)
        line: dict[str, Any] = {
            "eraser": self.names[eraser],
            "action": self.actions[eraser],
            "site": self._sites[eraser],
            "timesteps": times,
            "openings": [round(f.opened[t], 4) for t in times],
        }
        if f.heat is not None:
            line["heat"] = [round(float(v), 4) for v in f.heat]
        return line

    def begin(self, first: int, real: int) -> None:
        """A batch starts: images `first` ... `first + real - 1` (pass as `generate(on_batch=...)`)."""
        if first < 0 or real < 0:
            raise SettingsError(f"a batch of {real} images from {first} on: pass numbers of at least 0")
        self.finish()
        self._first, self._real, self._largest = first, real, max(self._largest, real)
        self._drawn(range(first, first + real))

    def note(self, erasers: tuple[int, ...], timestep: Tensor, opening: Tensor, evidence: Tensor | None = None) -> None:
        """The gates of `erasers` opened this far, opening [rows, erasers], at timestep [rows] or [1]; and their
        evidence by position [rows, P, erasers]."""
        if evidence is not None:
            self._keep_warm(erasers, torch.where(opening.unsqueeze(1) > 0, evidence, 0).detach().float())
        opening = opening.detach().float()
        if torch.compiler.is_compiling():
            self._tabulate(erasers, timestep, opening)
            return
        self._notes.append((erasers, timestep, opening))
        if len(self._notes) >= _NOTES:
            self._fold()

    def _keep_warm(self, erasers: tuple[int, ...], evidence: Tensor) -> None:
        rows, positions, _ = evidence.shape
        before = self._warm.get((erasers, rows, positions))
        now = evidence if before is None else torch.maximum(before, evidence)
        self._warm[erasers, rows, positions] = now

    def _tabulate(self, erasers: tuple[int, ...], timestep: Tensor, opening: Tensor) -> None:
        rows, count = opening.shape
        before = self._table.get((erasers, rows))
        if before is None:
            before = opening.new_zeros(_FINE + 1, rows, count)
        part = (timestep * (_FINE / self._scales[erasers[0]])).round().long().clamp(0, _FINE)
        index = part.view(1, -1, 1).expand(1, rows, count)
        self._table[erasers, rows] = before.scatter_reduce(0, index, opening.unsqueeze(0), "amax")

    def _fold(self) -> None:
        """Bring what was noted from the device, at once, and keep the widest opening at each timestep."""
        groups: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
        for erasers, timestep, opening in self._notes:
            groups.setdefault((erasers, opening.shape[0], opening.device), []).append((timestep, opening))
        self._notes = []
        for (erasers, rows, _), notes in groups.items():
            times = torch.stack([t.expand(rows) for t, _ in notes]).cpu().numpy()
            openings = torch.stack([o for _, o in notes]).cpu().numpy()
            for call, column in np.argwhere(openings.any(1)):
                opening = openings[call, :, column]
                for t in np.unique(times[call]):
                    self._widen(erasers[column], float(t), np.where(times[call] == t, opening, 0))
        for (erasers, _), table in self._table.items():
            for part in table.any(2).any(1).nonzero()[:, 0].tolist():
                t = part * self._scales[erasers[0]] / _FINE
                for column, i in enumerate(erasers):
                    self._widen(i, t, table[part, :, column].cpu().numpy())
        self._table = {key: torch.zeros_like(table) for key, table in self._table.items()}

    def _widen(self, eraser: int, time: float, opening: NDArray[np.float32]) -> None:
        if opening.any():
            seen = self._opened.setdefault((eraser, len(opening)), {})
            seen[time] = np.maximum(seen[time], opening) if time in seen else opening

    def finish(self, images: int | None = None) -> dict[int, list[int]]:
        """Turn what was noted since the batch began into `fired`, where the batch has so many images.

        -> image of the batch, from 0 -> the erasers (by number) that fired there, padding left out.
        """
        self._fold()
        now: dict[int, set[int]] = {}

        def share(rows: int) -> int:
            count = images or self.batch or self._largest or rows
            return rows if rows % count else count  # no whole guidance halves: every row is an image

        for (eraser, rows), seen in self._opened.items():
            count = share(rows)
            for time, opening in seen.items():
                for row in np.flatnonzero(opening).tolist():
                    image = row % count
                    if image < (count if self._real is None else self._real):  # padding belongs to no image
                        self._of(image, eraser).open(time, float(opening[row]))
                        now.setdefault(image, set()).add(eraser)
        for (erasers, rows, _), evidence in self._warm.items():
            strongest, count = evidence.cpu().numpy(), share(rows)
            for image, found in now.items():
                for column, i in enumerate(erasers):
                    own = strongest[image::count, :, column]
                    if i in found and own.any():
                        self._of(image, i).warm(own.max(0))
        self._opened = {}
        self._warm = {key: torch.zeros_like(table) for key, table in self._warm.items()}  # a graph looks at its keys
        return {image: sorted(found) for image, found in now.items()}

    def _of(self, image: int, eraser: int) -> _Fired:
        self._drawn(range(self._first + image, self._first + image + 1))
        return self._images[self._first + image].setdefault(eraser, _Fired())

    def called(self, images: int | None) -> dict[int, list[int]]:
        """A call of the pipeline for so many images is over -> as `finish`. 0: it failed, and drew none."""
        if images == 0:
            self._notes, self._opened = [], {}
            self._warm = {key: torch.zeros_like(table) for key, table in self._warm.items()}
            self._table = {key: torch.zeros_like(table) for key, table in self._table.items()}
            return {}
        found = self.finish(images)
        if self._real is None and images:
            self._drawn(range(self._first, self._first + images))
            self._first += images
        return found

    def _drawn(self, images: range) -> None:
        for image in images:
            self._images.setdefault(image, {})
        while len(self._images) > KEPT:
            del self._images[next(iter(self._images))]

    def follow(self, other: Trace) -> None:
        """Go on with the images of `other`, whose erasers are the first of these."""
        other.finish()
        self._images, self._first, self._real = other._images, other._first, other._real
        self._largest, self.heat = other._largest, other.heat


class _Fired:
    """One eraser in one image: how far it opened at each timestep, and where its evidence lay."""

    def __init__(self) -> None:
        self.opened: dict[float, float] = {}
        self.heat: NDArray[np.float16] | None = None

    def open(self, time: float, opening: float) -> None:
        """At a timestep the gate was open this far, or in another row of the image farther."""
        self.opened[time] = max(self.opened.get(time, 0.0), opening)

    def warm(self, evidence: NDArray[Any]) -> None:
        """evidence [P]; the stronger of what is known and this is kept."""
        now = evidence.astype(np.float16)
        same = self.heat is not None and self.heat.shape == now.shape
        self.heat = np.maximum(self.heat, now) if same and self.heat is not None else now
