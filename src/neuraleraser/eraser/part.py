"""Parts of an eraser: the prompt's, and the picture's where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neuraleraser.eraser.corrections import Correction
from neuraleraser.eraser.gate import Gate
from neuraleraser.eraser.guided import Guided


@dataclass(frozen=True)
class Part:
    """Part of the eraser called `name`: a gate, and what acts while it is open."""

    name: str
    gate: Gate
    corrections: tuple[Correction, ...]
    guided: Guided | None = None

    def to(self, device: torch.device) -> Part:
        """Return the part with its tensors on another device."""
        moved = tuple(
            type(c).from_tensors(c.site, {name: x.to(device) for name, x in c.tensors().items()}, c.also)
            for c in self.corrections
        )
        return Part(self.name, self.gate.to(device), moved, self.guided and self.guided.to(device))
