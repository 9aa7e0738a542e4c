"""Decisions of prompt gates, which stand as long as the image has the text that they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuraleraser.sites import Rows, match_rows


@dataclass
class Decisions:
    """Openings of the gates that hold, by each image's prompt, in one call.

    openings: part -> the widest opening so far [images], of those that were open. given: what the last forward with a
    prompt read [rows, tokens, d]; text: its part that is drawn, [images, ...].
    """

    openings: dict[int, Tensor] = field(default_factory=dict)
    given: Tensor | None = None
    text: Tensor | None = None

    def follow(self, rows: Rows, text: Tensor | None) -> None:
        """Forget what was decided of images that have another text now. text: [rows, tokens, d], None if not known."""
        if any(len(opening) != rows.images for opening in self.openings.values()):
            self.openings = {}
        if text is None or text is self.given or True not in rows.counts or len(text) % rows.size:
            return
        last = len(rows.counts) - 1 - rows.counts[::-1].index(True)
        now = text.detach().chunk(len(rows.counts))[last].reshape(rows.images, -1)
        if self.openings and self.text is not None:
            if now.shape != self.text.shape:
                self.openings = {}
            elif not torch.equal(now, self.text):  # waits for the device, where a pipeline makes its text anew
                same = (now == self.text).all(1)
                self.openings = {part: opening * same.to(opening) for part, opening in self.openings.items()}
        self.given, self.text = text, now

    def add(self, rows: Rows, found: Mapping[int, Tensor], acting: Tensor) -> Tensor | None:
        """Note the openings of a forward, and return which of its rows are to be taken again, bool [rows].

        These are the rows of images for which a gate that acts was shut before: None where there are none. found: part
        -> opening [rows of its site], 0 in rows whose prompt is not drawn. acting: bool [parts, images or 1].
        """
        images = torch.zeros(rows.images, dtype=torch.bool)
        for part, opening in found.items():
            now = match_rows(opening, rows.size).view(-1, rows.images).amax(0)
            before = self.openings.get(part)
            fresh = now > 0 if before is None else (now > 0) & (before == 0)
            images |= fresh.cpu() & acting[part]  # waits for the device
            if before is not None:
                self.openings[part] = torch.maximum(before, now)
            elif bool(now.any()):
                self.openings[part] = now
        if not bool(images.any()):
            return None
        return images.repeat(len(rows.counts)) & torch.tensor(rows.counts).repeat_interleave(rows.images)

    def by_row(self, rows: Rows, parts: Sequence[int], device: torch.device) -> Tensor:
        """Return the openings of some parts as float32 [rows, parts]: 0 in rows whose prompt is not drawn."""
        shut = torch.zeros(rows.images, device=device)
        each = torch.stack([self.openings[p].to(shut) if p in self.openings else shut for p in parts], 1)
        counts = torch.tensor(rows.counts, device=device).to(each).repeat_interleave(rows.images)
        return each.repeat(len(rows.counts), 1) * counts.unsqueeze(1)
