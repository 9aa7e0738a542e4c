"""The guided correction: the denoiser's prediction moves from the concept's prompt to one without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neuraleraser.sites import TEXT_ARGUMENTS, FinishedForward, Text

HELD = 0.25
"""Share of the weight that is left for an image whose gate is shut again (docs/LOG.md)."""
MAX_WEIGHT = 100.0
"""The largest weight that a file may hold."""


@dataclass(frozen=True)
class Guided:
    """While the gate is open, the prediction v(x) moves by weight (v(x, without) - v(x, shown)).

    Both are the base model's own predictions, so it costs two more forwards for the images that are or were open, and
    nothing while none is. Once the gate is shut again, `HELD` of the weight is left. It moves all guidance branches
    alike, so the guided prediction, too: the weights of the branches add up to 1.

    without, shown: the text arguments of a prompt without the concept and of one that shows it, one row each
    (`sites.TEXT_ARGUMENTS`). prompts: their words, for a reader.
    """

    weight: float
    without: Text
    shown: Text
    prompts: tuple[str, str] = ("", "")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name: "without/..." and "shown/..."."""
        return {
            f"{part}/{name}": x
            for part, text in (("without", self.without), ("shown", self.shown))
            for name, x in text.items()
        }

    @classmethod
    def from_tensors(cls, weight: float, prompts: tuple[str, str], tensors: Mapping[str, Tensor]) -> Guided:
        """Return the correction made of what `tensors` returned."""
        parts: dict[str, dict[str, Tensor]] = {"without": {}, "shown": {}}
        for name, x in tensors.items():
            part, _, rest = name.partition("/")
            parts[part][rest] = x
        return cls(weight, parts["without"], parts["shown"], prompts)

    def to(self, device: torch.device) -> Guided:
        """Return the correction with its tensors on `device`."""
        moved = ({name: x.to(device) for name, x in text.items()} for text in (self.without, self.shown))
        without, shown = moved
        return replace(self, without=without, shown=shown)

    def delta(self, finished: FinishedForward, rows: list[int]) -> Tensor:
        """Return the change of the prediction [rows, ...] of some rows of a forward."""
        without, shown = finished.predict(rows, [self.without, self.shown])
        return self.weight * (without - shown)

    def validation_error(self) -> str | None:
        """Return a reason why it cannot be used, or None."""
        if not (math.isfinite(self.weight) and 0 < self.weight <= MAX_WEIGHT):
            return f"its weight is {self.weight:g}, expected a number above 0, up to {MAX_WEIGHT:g}"
        if not self.without or self.without.keys() != self.shown.keys() or not self.without.keys() <= {*TEXT_ARGUMENTS}:
            return "its two prompts do not have the same text arguments"
        for name, x in self.without.items():
            if x.shape != self.shown[name].shape or not x.numel() or (len(x) != 1 and name != "txt_ids"):
                return f"{name} is {list(x.shape)} and {list(self.shown[name].shape)}, expected one row each, alike"
        if not all(bool(torch.isfinite(x).all()) for x in self.tensors().values() if x.is_floating_point()):
            return "it holds NaN or infinity"
        return None
