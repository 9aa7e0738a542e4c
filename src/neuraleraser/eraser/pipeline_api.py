"""Erasers loaded to stay, by functions shaped as diffusers' are for LoRA.

    load_eraser(pipe, "owner/van-gogh", name="van-gogh")
    set_erasers(pipe, ["van-gogh"], [0.5])
    set_erasers(pipe, ["van-gogh"], [[1.0, 0.0]])  # by image of a batch of two
    eraser_trace(pipe).records()  # what fired in which image, when and how far
    disable_erasers(pipe)
    unload_erasers(pipe)

Loaded erasers belong to the denoiser. Pipelines that share it (made by `from_pipe`, or of the same components) share
them, too: each of these functions may be called with any of them. Each pipeline has a trace of its own. A deep copy
of a pipeline has a denoiser, and so erasers, of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neuraleraser.eraser.attach import Attachment, Strengths, action_list, strength_table
from neuraleraser.eraser.eraser import Eraser
from neuraleraser.eraser.trace import Trace
from neuraleraser.eraser.traces import TraceByPipeline
from neuraleraser.errors import SettingsError
from neuraleraser.sites import components, denoiser, unwrap
from neuraleraser.sites.threads import WeakReference

_STATE_ATTRIBUTE = "_neuraleraser_loaded"
"""Attribute of the denoiser, and of the pipeline that loaded: its denoiser may have been replaced since."""


@dataclass(frozen=True)
class _EmptyTrace:
    """Maker of empty traces. A class, so that a copied or pickled model can carry it."""

    erasers: tuple[Eraser, ...]
    names: tuple[str, ...]
    actions: tuple[str, ...]

    def __call__(self) -> Trace:
        trace = Trace(self.erasers, self.actions)
        trace.names = list(self.names)
        return trace


@dataclass
class _Loaded:
    erasers: dict[str, Eraser]
    actions: list[str]
    strengths: Tensor  # [erasers, images] or [erasers, 1]
    traces: TraceByPipeline
    attachment: Attachment
    denoiser: WeakReference


def load_eraser(pipe: Any, source: str | Path | Eraser, name: str | None = None, action: str = "erase") -> str:
    """Load an eraser at strength 1, beside those that are loaded; return its name, by default its concept's.

    `source` is a file, a folder, a Hub id, or an `Eraser`; `action` is "erase", "detect" or "refuse", as in `attach`.
    An eraser that is loaded already, under the same name and with the same action, is left as it is. Load before the
    denoiser is compiled, or at least before its first call: what a compiled denoiser cannot see is raised as
    EraserNotAppliedError before there is a picture.

    Raises SettingsError for a name that is taken by another eraser, an eraser that is loaded under another name, or an
    unknown action; FileError where there is no eraser; and as `attach` does. Where it raises, what was loaded stays as
    it was.
    """
    components(pipe)
    eraser = source if isinstance(source, Eraser) else Eraser.from_pretrained(source)
    name = eraser.name if name is None else name
    (action,) = action_list(1, action)
    before = _loaded(pipe)
    if before and name in before.erasers:
        same = before.erasers[name].content_hash == eraser.content_hash
        if same and before.actions[list(before.erasers).index(name)] == action:
            return name
    if not name or (before and name in before.erasers):
        raise SettingsError(
            f"an eraser named {name!r} cannot be loaded (the name is taken, or empty): pass another name"
        )
    for other, loaded in before.erasers.items() if before else ():
        if loaded.content_hash == eraser.content_hash:
            raise SettingsError(
                f"the eraser {name!r} is loaded already, as {other!r}, and acts once: set its strength with set_erasers"
            )
    erasers = {**before.erasers, name: eraser} if before else {name: eraser}
    actions = [*(before.actions if before else ()), action]
    strengths = torch.ones(1, 1)
    if before:
        strengths = torch.cat([before.strengths, torch.ones(1, before.strengths.shape[1])])
    make = _EmptyTrace(tuple(erasers.values()), tuple(erasers), tuple(actions))
    traces = TraceByPipeline(pipe, make)
    replaced = before.attachment if before else None
    attachment = Attachment(pipe, list(erasers.values()), strengths, actions, traces, replaced)
    if before:  # only now: what fails above changes nothing
        before.attachment.close()
        traces.continue_from(before.traces)
    loaded = _Loaded(erasers, actions, strengths, traces, attachment, WeakReference(_root(pipe)))
    setattr(_root(pipe), _STATE_ATTRIBUTE, loaded)
    vars(pipe)[_STATE_ATTRIBUTE] = loaded
    return name


def set_erasers(pipe: Any, names: str | Sequence[str], strengths: Strengths = 1.0) -> None:
    """Set the strengths of the named erasers from the next call on, and those of all others to 0.

    `strengths`: one number, from 0 (nothing, bit for bit) to 2; or one entry a name, which is a number, or one number
    for each image of the batch that is drawn next. A change compiles nothing again, except between strengths by image
    and strengths for all.

    Raises SettingsError for a name that is not loaded or is given twice, and for strengths out of range; later, before
    anything is drawn, for strengths by image that do not fit the batch.
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
    loaded.attachment.set_strengths(table)


def eraser_trace(pipe: Any) -> Trace:
    """Return the trace of what this pipeline has drawn since erasers were loaded (the last 10,000 images, from 0).

    Raises SettingsError where none is loaded.
    """
    loaded = _loaded(pipe)
    if loaded is None:
        raise SettingsError("no eraser is loaded, so there is no trace: call load_eraser first")
    return loaded.traces.of(pipe)


def disable_erasers(pipe: Any) -> None:
    """Set all strengths to 0: the base model's images, bit for bit, until `set_erasers`. Nothing is taken off."""
    if _loaded(pipe):
        set_erasers(pipe, [])


def unload_erasers(pipe: Any) -> None:
    """Take all loaded erasers off: no hook is left, and the pipeline gives the bits it gave before."""
    loaded = _loaded(pipe)
    if loaded:
        loaded.attachment.close()
        for owner in (pipe, loaded.attachment.edits.pipeline.get(), loaded.denoiser.get()):
            if owner is not None:
                vars(owner).pop(_STATE_ATTRIBUTE, None)


def _root(pipe: Any) -> nn.Module:
    return unwrap(denoiser(pipe))


def _loaded(pipe: Any) -> _Loaded | None:
    components(pipe)
    for owner in (_root(pipe), pipe):
        loaded = vars(owner).get(_STATE_ATTRIBUTE)
        if loaded is not None and loaded.attachment.is_open:
            return loaded
    return None
