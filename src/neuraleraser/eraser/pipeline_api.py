"""Erasers loaded to stay, by functions shaped as diffusers' are for LoRA.

    load_eraser(pipe, "owner/van-gogh", name="van-gogh")
    set_erasers(pipe, ["van-gogh"], [0.5])
    set_erasers(pipe, ["van-gogh"], [[1.0, 0.0]])  # by image of a batch of two
    eraser_trace(pipe).records()  # what fired in which image, when and how far
    disable_erasers(pipe)
    enable_erasers(pipe)  # at the strengths from before
    get_list_erasers(pipe), get_active_erasers(pipe)
    delete_erasers(pipe, "van-gogh")
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
from neuraleraser.io.names import name_error, printable
from neuraleraser.sites import components, denoiser, remove_copied_hooks, unwrap
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
    rested: Tensor | None = None  # the strengths that `disable_erasers` put to 0


def load_eraser(pipe: Any, source: str | Path | Eraser, name: str | None = None, action: str = "erase") -> str:
    """Load an eraser at strength 1, beside those that are loaded.

    An eraser that is loaded already, under the same name and with the same action, is left as it is. Compile the
    denoiser, load, and only then make the first call: what a compiled denoiser cannot see is raised as
    EraserNotAppliedError before there is an image.

    Args:
        pipe: The diffusers pipeline.
        source: A file, a folder, a Hub id, or an `Eraser`.
        name: Name under which the eraser is loaded; None: the name of its concept.
        action: What to do where its gate opens: "erase", "detect" or "refuse", as in `attach`.

    Returns:
        The name under which the eraser is loaded.

    Raises:
        SettingsError: The name is empty or cannot be printed, or it is taken by another eraser or action; or the eraser
            is loaded under another name, or the action is unknown. After any error, what was loaded stays as it was.
        FileError: There is no eraser at `source`.
        NeuralEraserError: As for `attach`.

    Examples:
        >>> eraser.save("van-gogh.safetensors")
        >>> load_eraser(pipe, "van-gogh.safetensors", name="van-gogh")
        'van-gogh'
        >>> image = pipe("a cat in Van Gogh style", num_inference_steps=2).images[0]
        >>> eraser_trace(pipe).fired
        {0: {'van-gogh': [999.0, 499.0]}}
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
    if error := name_error(name):
        raise SettingsError(f"the name is {printable(repr(name))}, and {error}: pass another")
    if before and name in before.erasers:
        raise SettingsError(
            f"another eraser named {name!r}, or with another action, is loaded already: take it off with "
            "delete_erasers, or pass another name"
        )
    for other, loaded in before.erasers.items() if before else ():
        if loaded.content_hash == eraser.content_hash:
            raise SettingsError(
                f"the eraser {name!r} is loaded already, as {other!r}, and acts once: set_erasers sets its strength, "
                "delete_erasers takes it off"
            )
    erasers = {**before.erasers, name: eraser} if before else {name: eraser}
    actions = [*(before.actions if before else ()), action]
    strengths = _with_one_more(before.strengths) if before else torch.ones(1, 1)
    rested = _with_one_more(before.rested) if before and before.rested is not None else None
    _attach(pipe, erasers, actions, strengths, rested, before)
    return name


def set_erasers(pipe: Any, names: str | Sequence[str], strengths: Strengths = 1.0) -> None:
    """Set the strengths of the named erasers, and those of all others to 0, from the next call on.

    A change compiles nothing again, except between strengths per image and strengths for all images.

    Args:
        pipe: The diffusers pipeline.
        names: One name, or several.
        strengths: One number for all of them, from 0 (nothing, bit for bit) to 2; or one entry per name: a number, or
            one number per image of the batch that is generated next.

    Raises:
        SettingsError: A name is not loaded or is given twice, or a strength is out of range. Raised later, before
            anything is generated: strengths per image that do not fit the batch.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> set_erasers(pipe, "Van_Gogh", 0.5)
        >>> set_erasers(pipe, ["Van_Gogh"], [[1.0, 0.0]])  # by image, for a batch of two
        >>> get_active_erasers(pipe)
        ['Van_Gogh']
    """
    loaded, rows = _find(pipe, names, "set")
    given = strength_table(len(rows), strengths)
    table = torch.zeros(len(loaded.erasers), given.shape[1])
    table[rows] = given
    _set_strengths(loaded, table)


def get_list_erasers(pipe: Any) -> list[str]:
    """Return the names of all loaded erasers, in the order they were loaded.

    Args:
        pipe: The diffusers pipeline.

    Returns:
        The names; [] if none is loaded.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> get_list_erasers(pipe)
        ['Van_Gogh']
    """
    loaded = _loaded(pipe)
    return list(loaded.erasers) if loaded else []


def get_active_erasers(pipe: Any) -> list[str]:
    """Return the names of the loaded erasers that act.

    Args:
        pipe: The diffusers pipeline.

    Returns:
        Names of the erasers whose strength is above 0, for at least one image of the batch; [] while disabled.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> set_erasers(pipe, "Van_Gogh", 0)
        >>> get_active_erasers(pipe)
        []
    """
    loaded = _loaded(pipe)
    acts = loaded.strengths.any(1).tolist() if loaded else []
    return [name for name, on in zip(get_list_erasers(pipe), acts, strict=True) if on]


def eraser_trace(pipe: Any) -> Trace:
    """Return the trace of what this pipeline has generated since erasers were loaded.

    Args:
        pipe: The diffusers pipeline.

    Returns:
        The trace, of the last 10,000 images, counted from 0.

    Raises:
        SettingsError: No eraser is loaded.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> erased = generate(pipe, prompts, [0, 1], quick)
        >>> eraser_trace(pipe).fired
        {0: {'Van_Gogh': [999.0, 499.0]}}
    """
    loaded = _loaded(pipe)
    if loaded is None:
        raise SettingsError("no eraser is loaded, so there is no trace: call load_eraser first")
    return loaded.traces.of(pipe)


def disable_erasers(pipe: Any) -> None:
    """Set all strengths to 0, until `enable_erasers` or `set_erasers`.

    The images are then the base model's, bit for bit. The erasers stay loaded.

    Args:
        pipe: The diffusers pipeline.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> disable_erasers(pipe)
        >>> np.array_equal(generate(pipe, prompts, [0, 1], quick), images)
        True
    """
    loaded = _loaded(pipe)
    if loaded and get_active_erasers(pipe):
        rested = loaded.strengths
        _set_strengths(loaded, torch.zeros(len(rested), 1))
        loaded.rested = rested


def enable_erasers(pipe: Any) -> None:
    """Restore the strengths that `disable_erasers` set to 0.

    After `set_erasers` there is nothing to restore.

    Args:
        pipe: The diffusers pipeline.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> disable_erasers(pipe)
        >>> enable_erasers(pipe)
        >>> get_active_erasers(pipe)
        ['Van_Gogh']
    """
    loaded = _loaded(pipe)
    if loaded and loaded.rested is not None:
        _set_strengths(loaded, loaded.rested)


def delete_erasers(pipe: Any, names: str | Sequence[str]) -> None:
    """Unload the named erasers and leave the others as they are.

    Their entries leave the trace with them. After the last one, no hook is left.

    Args:
        pipe: The diffusers pipeline.
        names: One name, or several.

    Raises:
        SettingsError: A name is not loaded or is given twice.

    Examples:
        >>> load_eraser(pipe, eraser, name="van-gogh")
        'van-gogh'
        >>> delete_erasers(pipe, "van-gogh")
        >>> get_list_erasers(pipe)
        []
    """
    loaded, rows = _find(pipe, names, "deleted")
    left = [i for i in range(len(loaded.erasers)) if i not in rows]
    if not left:
        unload_erasers(pipe)
    elif rows:
        erasers = {name: e for i, (name, e) in enumerate(loaded.erasers.items()) if i in left}
        actions = [loaded.actions[i] for i in left]
        rested = None if loaded.rested is None else loaded.rested[left]
        _attach(pipe, erasers, actions, loaded.strengths[left], rested, loaded)


def unload_erasers(pipe: Any) -> None:
    """Unload all erasers: no hook is left, and the pipeline gives the bits it gave before.

    Args:
        pipe: The diffusers pipeline.

    Examples:
        >>> load_eraser(pipe, eraser)
        'Van_Gogh'
        >>> unload_erasers(pipe)
        >>> np.array_equal(generate(pipe, prompts, [0, 1], quick), images)
        True
    """
    loaded = _loaded(pipe)
    if loaded:
        _take_off(pipe, loaded)
    remove_copied_hooks(pipe)


def _attach(
    pipe: Any,
    erasers: dict[str, Eraser],
    actions: list[str],
    strengths: Tensor,
    rested: Tensor | None,
    before: _Loaded | None,
) -> None:
    """Load these erasers in place of `before`. Where it raises, nothing has changed."""
    traces = TraceByPipeline(pipe, _EmptyTrace(tuple(erasers.values()), tuple(erasers), tuple(actions)))
    replaced = before.attachment if before else None
    attachment = Attachment(pipe, list(erasers.values()), strengths, actions, traces, replaced)
    if before:
        _take_off(pipe, before)
        traces.continue_from(before.traces)
    loaded = _Loaded(erasers, actions, strengths, traces, attachment, WeakReference(_root(pipe)), rested)
    setattr(_root(pipe), _STATE_ATTRIBUTE, loaded)
    vars(pipe)[_STATE_ATTRIBUTE] = loaded


def _take_off(pipe: Any, loaded: _Loaded) -> None:
    """Leave nothing of it in the pipeline, the one that loaded it, and the denoiser."""
    loaded.attachment.close()
    for owner in (pipe, loaded.attachment.edits.pipeline.get(), loaded.denoiser.get()):
        if owner is not None:
            vars(owner).pop(_STATE_ATTRIBUTE, None)


def _with_one_more(strengths: Tensor) -> Tensor:
    """Return the table with a row of ones for an eraser that is loaded beside the others."""
    return torch.cat([strengths, torch.ones(1, strengths.shape[1])])


def _set_strengths(loaded: _Loaded, table: Tensor) -> None:
    """Take these strengths from the next call on; what rested is forgotten."""
    loaded.strengths, loaded.rested = table, None
    loaded.attachment.set_strengths(table)


def _find(pipe: Any, names: str | Sequence[str], what: str) -> tuple[_Loaded, list[int]]:
    """Return what is loaded, and the rows of the named erasers in it. Raises SettingsError for a name that is none."""
    names = [names] if isinstance(names, str) else list(names)
    loaded = _loaded(pipe)
    there = list(loaded.erasers) if loaded else []
    if loaded is None or len(set(names)) < len(names) or not set(names) <= set(there):
        raise SettingsError(f"erasers {names} cannot be {what}: name each once, of those loaded, {there}")
    return loaded, [there.index(name) for name in names]


def _root(pipe: Any) -> nn.Module:
    return unwrap(denoiser(pipe))


def _loaded(pipe: Any) -> _Loaded | None:
    components(pipe)
    for owner in (_root(pipe), pipe):
        loaded = vars(owner).get(_STATE_ATTRIBUTE)
        if loaded is not None and loaded.attachment.is_open:
            return loaded
    return None
