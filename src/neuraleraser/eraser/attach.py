"""`attach`, and the `Attachment` that it shares with the calls that load erasers to stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser.acting import Acting
from neuraleraser.eraser.file import Eraser
from neuraleraser.eraser.trace import Trace
from neuraleraser.errors import DataError, Refused, SettingsError, SiteError
from neuraleraser.sites import Edits, differs

MAX_STRENGTH = 2.0
ACTIONS = ("erase", "detect", "refuse")
"""What an eraser may do where its gate opens: its edit; nothing, but note it; or raise `Refused`."""

Strengths = float | Tensor | Sequence[float | Tensor | Sequence[float]]
"""One number for all erasers, or one entry an eraser: a number, or one number an image of the batch."""


def strength_table(count: int, strength: Strengths) -> Tensor:
    """-> float32 [count, images] on the CPU, [count, 1] where no entry goes by image.

    Raises SettingsError for anything but one entry an eraser, from 0 to 2, for equally many images.
    """
    try:
        one = isinstance(strength, (int, float)) or (isinstance(strength, Tensor) and strength.ndim == 0)
        given = [strength] * count if one else list(strength)  # type: ignore[arg-type]
        rows = [torch.as_tensor(s, dtype=torch.float32).detach().cpu() for s in given]
    except (TypeError, ValueError, RuntimeError):
        rows = []
    fit = len(rows) == count and all(r.ndim <= 1 and r.numel() and bool((r >= 0).all()) for r in rows)
    images = {r.numel() for r in rows if r.numel() > 1}
    if not fit or len(images) > 1 or any(bool((r > MAX_STRENGTH).any()) for r in rows):
        raise SettingsError(
            f"strengths {_short(strength)} for {count} erasers: pass one each, from 0 to {MAX_STRENGTH:g}, "
            "or one each for every image of the batch"
        )
    width = max(images, default=1)
    return torch.stack([r.expand(width) for r in rows]) if rows else torch.zeros(0, 1)


def action_list(count: int, action: str | Sequence[str]) -> list[str]:
    """One action an eraser. Raises SettingsError for others than `ACTIONS`, or for another number of them."""
    actions = [action] * count if isinstance(action, str) else list(action)
    if len(actions) != count or not set(actions) <= set(ACTIONS):
        raise SettingsError(
            f"action {_short(action)} for {count} erasers: pass one of {', '.join(ACTIONS)}, or one for each"
        )
    return actions


def _short(strength: Any) -> str:
    text = str(strength.tolist() if isinstance(strength, Tensor) else strength)
    return text if len(text) <= 100 else text[:97] + "..."


def _check_model(pipe: Any, e: Eraser) -> None:
    """SiteError for an eraser of another architecture than the pipeline's, a warning for one of other weights."""
    made = e.header.get("made_for")
    if not isinstance(made, Mapping):
        return
    what, how = differs(pipe, [e.gate.site, *(s for c in e.corrections for s in c.sites)], made)
    if what == "architecture":
        raise SiteError(
            f"the eraser of {e.name!r} is for another architecture ({how}): use it with the pipeline it was made for"
        )
    if what:
        warnings.warn(
            f"the eraser of {e.name!r} was made for other weights of this architecture ({how}), and nobody has "
            "measured what it does here: calibrate(pipe, eraser, concept) or --calibrate fits its gate to them",
            stacklevel=4,
        )


class Attachment:
    """Erasers hung in a pipeline until `close`. Raises as `attach` does.

    Plain fields only, so that a deep copy of a pipeline that keeps one has its own.
    """

    def __init__(
        self, pipe: Any, erasers: Sequence[Eraser], strengths: Tensor, actions: Sequence[str], trace: Trace
    ) -> None:
        for e in erasers:
            problem = e.problem()
            if problem:
                raise DataError(f"the eraser of {e.name!r} cannot be attached ({problem}): make it again")
            _check_model(pipe, e)
        self.pipe = pipe
        self.trace = trace
        # On the device where offloaded parts will run, too.
        self.acting = Acting(erasers, strengths, pipe._execution_device, trace, actions)
        self.edits = Edits(pipe, self.acting.at, self._after)

    def _after(self, images: int | None) -> None:
        fired = self.trace.called(images)
        if images == 0:  # the call failed by itself
            return
        self.acting.check_images(images)
        refused = self.acting.refused(fired)
        if refused:
            which = "; ".join(f"image {image}: {', '.join(names)}" for image, names in list(refused.items())[:8])
            raise Refused(
                f"refused, as an erased concept fired ({which}), and no image is returned: pass another prompt, or "
                "draw the other images again without it",
                refused,
            )

    def set(self, strengths: Tensor) -> None:
        """Strengths [erasers, images] or [erasers, 1] from the next call on."""
        self.acting.set(strengths)

    def check(self) -> None:
        """NotApplied for what a compiled denoiser could not raise itself."""
        self.edits.check()

    def close(self) -> None:
        """Take the erasers off: the pipeline gives the bits it gave before."""
        self.edits.close()


@contextmanager
def attach(
    pipe: Any,
    erasers: Eraser | Sequence[Eraser],
    strength: Strengths = 1.0,
    *,
    action: str | Sequence[str] = "erase",
    heat: bool = False,
    batch: int = 0,
) -> Iterator[Trace]:
    """Context manager: erase while it is open; afterwards the pipeline gives the bits it gave before.

    `strength` (one, or one an eraser, which may be one an image of the batch) is 0 for nothing, 1 as fitted, up
    to 2. Yields the `Trace`, which notes what fired in each image; with `heat` it notes where, too.

    `action` (one, or one an eraser) says what is done where a gate opens: "erase" edits; "detect" changes nothing;
    "refuse" changes nothing either, and raises `Refused` when the steps of a call are done, so that it returns no
    image. (Where the other images of a batch are to be kept, "detect", and withhold those in `trace.fired`.)

    `batch` is the number of images where the denoiser is called without its pipeline, which otherwise tells it.

    Erasers commute: at a site all read the same x and their changes add up, in an order set by their content; of
    a feature that several scale only the largest change is made.

    Raises SettingsError for an unknown action, a strength out of range or for another number of images than are
    drawn, DataError for an eraser whose parts do not fit, SiteError for a site that the pipeline has not or has in
    another width, NotApplied before an image is returned if an eraser did not run.
    """
    many = [erasers] if isinstance(erasers, Eraser) else list(erasers)
    actions = action_list(len(many), action)
    trace = Trace(many, batch, actions, heat=heat)
    attachment = Attachment(pipe, many, strength_table(len(many), strength), actions, trace)
    try:
        yield trace
        attachment.check()
    finally:
        attachment.close()
    trace.finish()
