"""Erasers loaded to stay, by calls shaped as diffusers' are for LoRA.

    load_eraser(pipe, "owner/van-gogh", name="van-gogh")
    set_erasers(pipe, ["van-gogh"], [0.5])
    set_erasers(pipe, ["van-gogh"], [[1.0, 0.0]])  # by image of a batch of two
    eraser_trace(pipe).records()  # what fired in which image, when and how far
    disable_erasers(pipe)
    unload_erasers(pipe)

What is loaded is kept on the pipeline itself: pipelines share nothing, and a deep copy of one has its own erasers.
A pipeline made by `from_pipe` has the same modules, so the erasers act in it too, and are set where they were loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser.attach import Attachment, Strengths, action_list, strength_table
from neuraleraser.eraser.file import Eraser
from neuraleraser.eraser.trace import Trace
from neuraleraser.errors import SettingsError

_KEPT = "_neuraleraser_loaded"  # an attribute of the pipeline


@dataclass
class _Loaded:
    erasers: dict[str, Eraser]
    actions: list[str]
    strengths: Tensor  # [erasers, images] or [erasers, 1]
    attachment: Attachment


def load_eraser(pipe: Any, source: str | Path | Eraser, name: str | None = None, action: str = "erase") -> str:
    """Load an eraser at strength 1, beside those that are loaded -> its name, by default its concept's.

    `source` is a file, a folder, a Hub id, or an `Eraser`; `action` is "erase", "detect" or "refuse", as in `attach`.
    Load before the denoiser is compiled, or at least before its first call: what a compiled denoiser cannot see is
    raised as NotApplied before an image is returned.

    Raises SettingsError for a name that is taken or an unknown action, FileError where there is no eraser, and as
    `attach` does. Where it raises, what was loaded stays as it was.
    """
    eraser = source if isinstance(source, Eraser) else Eraser.from_pretrained(source)
    name = eraser.name if name is None else name
    before = _loaded(pipe)
    if not name or (before and name in before.erasers):
        raise SettingsError(
            f"an eraser named {name!r} cannot be loaded (the name is taken, or empty): pass another name"
        )
    erasers = {**before.erasers, name: eraser} if before else {name: eraser}
    actions = [*(before.actions if before else ()), *action_list(1, action)]
    strengths = torch.ones(1, 1)
    if before:
        strengths = torch.cat([before.strengths, torch.ones(1, before.strengths.shape[1])])
    trace = Trace(list(erasers.values()), actions=actions)
    trace.names = list(erasers)
    attachment = Attachment(pipe, list(erasers.values()), strengths, actions, trace)
    if before:  # only now: what fails above changes nothing
        before.attachment.close()
        trace.follow(before.attachment.trace)
    vars(pipe)[_KEPT] = _Loaded(erasers, actions, strengths, attachment)
    return name


def set_erasers(pipe: Any, names: str | Sequence[str], strengths: Strengths = 1.0) -> None:
    """From the next call on the named erasers act with these strengths, and loaded ones that are not named with 0.

    `strengths`: one number, from 0 (nothing, bit for bit) to 2; or one entry a name, which is a number, or one number
    for each image of the batch that is drawn next. A change compiles nothing again, except between strengths by image
    and strengths for all.

    Raises SettingsError for a name that is not loaded or is given twice, and for strengths out of range; later, before
    images are returned, for strengths by image that do not fit the batch.
    """
    names = [names] if isinstance(names, str) else list(names)
    loaded = _loaded(pipe)
    there = list(loaded.erasers) if loaded else []
    if loaded is None or len(set(names)) < len(names) or not set(names) <= set(there):
        raise SettingsError(f"erasers {names} cannot be set: name each once, of those loaded, {there}")
    given = strength_table(len(names), strengths)
    table = torch.zeros(len(there), given.shape[1])
    table[[there.index(n) for n in names]] = given
    loaded.strengths = table
    loaded.attachment.set(table)


def eraser_trace(pipe: Any) -> Trace:
    """What the loaded erasers found in the images drawn since they were loaded (the last 10,000), counted from 0.

    Raises SettingsError where none is loaded.
    """
    loaded = _loaded(pipe)
    if loaded is None:
        raise SettingsError("no eraser is loaded, so there is no trace: call load_eraser first")
    return loaded.attachment.trace


def disable_erasers(pipe: Any) -> None:
    """All strengths to 0: the base model's images, bit for bit, until `set_erasers`. Nothing is taken off."""
    if _loaded(pipe):
        set_erasers(pipe, [])


def unload_erasers(pipe: Any) -> None:
    """Take all loaded erasers off: no hook is left, and the pipeline gives the bits it gave before."""
    loaded = _loaded(pipe)
    if loaded:
        loaded.attachment.close()
        del vars(pipe)[_KEPT]


def _loaded(pipe: Any) -> _Loaded | None:
    return vars(pipe).get(_KEPT)
