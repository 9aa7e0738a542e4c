"""What fired, by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neuraleraser.eraser.file import Eraser


class Trace:
    """What fired while erasers were attached: for each image, the times at which each eraser's gate opened.

    A row of a denoiser call is an image; with guidance in one batch the call has twice as many rows, and image i
    of B owns rows i and i + B. `batch` is B; where it is 0, B is the size of the largest batch that `begin`
    announced, or without `begin` every row counts as an image.

    Bounded: openings are kept by the gate's own time bins, not by call. So an eraser may stay attached for days,
    and a compiled denoiser, whose graph can append to no list, is traced all the same.
    """

    def __init__(self, erasers: Sequence[Eraser], batch: int = 0) -> None:
        self.names = [e.name for e in erasers]
        self.batch = batch
        self._times = [e.gate.times.tolist() for e in erasers]
        self._opened: dict[tuple[int, int], Tensor] = {}  # (eraser, rows) -> the widest opening, [T, rows]
        self._fired: dict[int, dict[str, list[float]]] = {}
        self._first = self._real = self._largest = 0

    @property
    def fired(self) -> dict[int, dict[str, list[float]]]:
        """Image -> eraser -> the times of its gate, descending, at which (or nearest to which) it opened."""
        self.finish()
        return self._fired

    def begin(self, first: int, real: int) -> None:
        """A batch starts: images `first` ... `first + real - 1` (pass as `generate(on_batch=...)`)."""
        self.finish()
        self._first, self._real, self._largest = first, real, max(self._largest, real)

    def note(self, eraser: int, index: Tensor, opening: Tensor) -> None:
        """The gate of `eraser` opened this far, opening [rows], in its time bins index [rows]."""
        key = eraser, opening.shape[0]
        before = self._opened.get(key)
        if before is None:
            before = torch.zeros(len(self._times[eraser]), opening.shape[0], device=opening.device)
        self._opened[key] = before.scatter_reduce(0, index.unsqueeze(0), opening.detach().float().unsqueeze(0), "amax")

    def finish(self) -> None:
        """Turn what was noted since the batch began into `fired`."""
        for (eraser, rows), opened in self._opened.items():
            images = self.batch or self._largest or rows
            if rows % images:
                images = rows  # no whole guidance halves: every row is an image
            for t, row in opened.gt(0).nonzero().tolist():
                image = row % images
                if image < (self._real or images):  # padding belongs to no image
                    times = self._fired.setdefault(self._first + image, {}).setdefault(self.names[eraser], [])
                    if self._times[eraser][t] not in times:  # both guidance halves may fire
                        times.append(self._times[eraser][t])
                        times.sort(reverse=True)
        self._opened = {}
