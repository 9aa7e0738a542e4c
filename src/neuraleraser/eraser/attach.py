"""`attach`, and the `Attachment` that it shares with the functions that load erasers to stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser.batched import gate_features
from neuraleraser.eraser.eraser import Eraser
from neuraleraser.eraser.runtime import ERASING, ErasureRuntime
from neuraleraser.eraser.trace import Trace
from neuraleraser.eraser.traces import OneTrace, Traces
from neuraleraser.errors import DataError, SettingsError, SiteError
from neuraleraser.sites import HookedEdits, components, denoisers, find_difference, is_denoiser

MAX_STRENGTH = 2.0
ACTIONS = ("erase", "erase_or_refuse", "detect", "refuse")
"""Actions of an eraser where its gate opens: correct; the same, but raise `ConceptRefusedError` for a start image that
holds too much of the concept to be corrected; do nothing, but note it; or raise that error at once."""

Strengths = float | Tensor | Sequence[float | Tensor | Sequence[float]]
"""One number for all erasers, or one entry per eraser: a number, or one number per image of the batch."""


def strength_table(count: int, strength: Strengths) -> Tensor:
    """-> float32 [count, images] on the CPU, [count, 1] where no entry goes by image.

    Raises SettingsError for anything but one entry per eraser, from 0 to 2, for equally many images.
    """
    try:
        one = isinstance(strength, Real) or (isinstance(strength, Tensor) and strength.ndim == 0)
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


def check_erasers(erasers: Any) -> list[Eraser]:
    """Return one eraser or several as a list. Raises SettingsError for anything else."""
    many = [erasers] if isinstance(erasers, Eraser) else erasers
    if isinstance(many, Iterable) and not isinstance(many, (str, bytes, Mapping)):
        many = list(many)
        wrong = [e for e in many if not isinstance(e, Eraser)]
        if not wrong:
            return many
        what = wrong[0]
    else:
        what = many
    passed = f"{what!r}, a str," if isinstance(what, str) else f"a {type(what).__name__}"
    raise SettingsError(
        f"{passed} was passed, expected an Eraser or a list of them: Eraser.load(path) reads one, and the pipeline "
        "comes first"
    )


def _check_model(pipe: Any, e: Eraser) -> None:
    """SiteError for an eraser of another architecture than the pipeline's, a warning for one of other weights."""
    if e.header.made_for is None:
        return
    what, how = find_difference(pipe, e.sites, e.header.made_for)
    if what == "architecture":
        raise SiteError(
            f"the eraser of {e.name!r} is for another architecture ({how}): use it with the pipeline it was made for"
        )
    if what:
        warnings.warn(
            f"the eraser of {e.name!r} was made for other weights of this architecture ({how}), and nobody has "
            "measured what it does here: calibrate(pipe, eraser) or --calibrate fits its gate to them",
            stacklevel=4,
        )


def _check_denoisers(pipe: Any, erasers: Sequence[Eraser]) -> None:
    """SiteError where the pipeline has a second denoiser, in which an eraser's concept would be drawn unseen."""
    for e in erasers:
        mine = e.gate.site.path.split(".")[0]
        covered = {other.gate.site.path.split(".")[0] for other in erasers if other.name == e.name}
        missing = [name for name in denoisers(pipe) if name not in covered]
        if is_denoiser(mine) and missing:
            raise SiteError(
                f"the eraser of {e.name!r} acts in {mine}, and this {type(pipe).__name__} denoises with "
                f"{' and '.join(missing)}, too: attach one for each together"
            )


def _check_twins(pipe: Any, erasers: Sequence[Eraser], actions: Sequence[str], replaces: Attachment | None) -> None:
    """SettingsError for an eraser that acts in these modules already."""
    hashes = {e.content_hash for e, action in zip(erasers, actions, strict=True) if action in ERASING}
    for other in _runtimes(pipe):
        if replaces is None or other is not replaces.runtime:
            acting = (e for e, action in zip(other.erasers, other.actions, strict=True) if action in ERASING)
            twin = next((e for e in acting if e.content_hash in hashes), None)
            if twin is not None:
                raise SettingsError(
                    f"the eraser of {twin.name!r} is attached to these modules already, by this pipeline or another "
                    "one made of them, and would act twice: use the one that is there, or take it off first"
                )


def _runtimes(pipe: Any) -> Iterator[ErasureRuntime]:
    """Yield what runs erasers in the pipeline's modules, once for each module that it hooks."""
    for module in components(pipe).values():
        for hook in module._forward_pre_hooks.values():
            observer = getattr(getattr(getattr(hook, "__self__", None), "guard", None), "observer", None)
            if isinstance(observer, ErasureRuntime):
                yield observer


def check_nothing_acts(pipe: Any, purpose: str) -> None:
    """Raise SettingsError where an eraser changes what `pipe` draws: `purpose` needs the base model's own images."""
    acting = {
        part.name
        for runtime in _runtimes(pipe)
        for part, action, rests in zip(runtime.parts, runtime.part_actions, runtime.zero_strength, strict=True)
        if action != "detect" and not rests
    }
    if acting:
        raise SettingsError(
            f"erasers of {', '.join(sorted(acting))} act on this pipeline, and {purpose} needs the base model's own "
            "images: leave `attach`, or call unload_erasers or disable_erasers first"
        )


def _warn_same_concept(erasers: Sequence[Eraser], actions: Sequence[str]) -> None:
    """Warn of two different erasers of one concept: where both gates open, both corrections are added."""
    seen: dict[str, Eraser] = {}
    for e in (e for e, action in zip(erasers, actions, strict=True) if action in ERASING):
        before = seen.setdefault(e.name, e)
        same_component = before.gate.site.path.split(".")[0] == e.gate.site.path.split(".")[0]
        if before is not e and same_component and gate_features(before.gate) != gate_features(e.gate):
            warnings.warn(
                f"two different erasers of {e.name!r} are attached, and where both gates open both corrections are "
                "added: keep the better one",
                stacklevel=4,
            )


class Attachment:
    """Erasers hooked into a pipeline's modules until `close`. Raises as `attach` does.

    It takes the place of `replaces`, which the caller closes. Plain fields only, so that a deep copy of a pipeline that
    keeps one has its own.
    """

    def __init__(
        self,
        pipe: Any,
        erasers: Sequence[Eraser],
        strengths: Tensor,
        actions: Sequence[str],
        traces: Traces,
        replaces: Attachment | None = None,
    ) -> None:
        components(pipe)
        for e in erasers:
            problem = e.validation_error()
            if problem:
                raise DataError(f"the eraser of {e.name!r} cannot be attached ({problem}): make it again")
            _check_model(pipe, e)
        _check_denoisers(pipe, erasers)
        _check_twins(pipe, erasers, actions, replaces)
        _warn_same_concept(erasers, actions)
        # On the device where offloaded parts will run, too.
        self.runtime = ErasureRuntime(erasers, strengths, pipe._execution_device, traces, actions)
        self.edits = HookedEdits(pipe, self.runtime.edits, self.runtime)

    def set_strengths(self, strengths: Tensor) -> None:
        """Take strengths [erasers, images] or [erasers, 1] from the next call on."""
        self.runtime.set_strengths(strengths)

    @property
    def is_open(self) -> bool:
        """True while its hooks are there."""
        return bool(self.edits.handles)

    def check(self) -> None:
        """Raise what could not be raised earlier: NaN on a GPU, a refused loop, modules without hooks."""
        self.edits.check()

    def close(self) -> None:
        """Take the erasers off: the pipeline gives the bits it gave before."""
        self.edits.close()


class attach:
    """Context manager that erases while it is open; afterwards the pipeline gives the bits it gave before.

    It yields the `Trace`, which notes what fired in each image. Erasers act in the pipeline's modules, whoever runs
    them, so they also act in another pipeline made of the same modules. A negative prompt opens no gate while guidance
    is above 1.

    Erasers commute: at a site all read the same x and their changes add up, in an order set by their content. If
    several erasers' gates read the same set of features, only the largest change is applied.

    Args:
        pipe: The diffusers pipeline.
        erasers: One eraser, or several.
        strengths: 0 changes nothing, 1 is as fitted; up to 2 corrects more than was fitted, where some of the concept
            is left, at the price of more artefacts. One number for all; or one entry per eraser: a number, or one
            number per image of the batch.
        action: What to do where a gate opens, for all erasers or one per eraser. "erase" corrects; "erase_or_refuse"
            does, too, but refuses a start image in which the image gate sees the concept at a strength below the one
            from which it can be erased (`EraserHeader.least_strength`), where "erase" warns; "detect" changes
            nothing; "refuse" changes nothing either, and raises `ConceptRefusedError` in the step in which a gate
            opens, so that the call ends without an image. (To keep the other images of a batch, use "detect" and
            withhold those in `trace.fired`.)
        heat: Note in the trace also where in each image it fired.

    Raises:
        SettingsError: The action is unknown, a strength is out of range or for another number of images than are
            generated, or an eraser is attached already.
        DataError: The parts of an eraser do not fit.
        SiteError: The pipeline lacks a site, has it in another width, or has a second denoiser without the eraser.
        EraserNotAppliedError: An eraser did not run; raised before there is an image.

    Warns:
        UserWarning: It is never entered.
        ConceptRemainsWarning: A start image holds the concept, and the call's strength is too low to erase it.

    Examples:
        >>> with attach(pipe, eraser) as trace:
        ...     image = pipe("a cat in Van Gogh style", num_inference_steps=2).images[0]
        >>> trace.fired  # image -> eraser -> timesteps
        {0: {'Van_Gogh': [999.0, 499.0]}}
    """

    def __init__(
        self,
        pipe: Any,
        erasers: Eraser | Sequence[Eraser],
        strengths: Strengths = 1.0,
        *,
        action: str | Sequence[str] = "erase",
        heat: bool = False,
    ) -> None:
        self._entered = True  # until all arguments are checked, there is nothing to warn of
        self._pipe, self._erasers = pipe, check_erasers(erasers)
        self._actions = action_list(len(self._erasers), action)
        self._strengths = strength_table(len(self._erasers), strengths)
        self._heat = heat
        self._attachment: Attachment | None = None
        self._entered = False

    def __enter__(self) -> Trace:
        self._entered = True
        trace = Trace(self._erasers, self._actions, heat=self._heat)
        self._attachment = Attachment(self._pipe, self._erasers, self._strengths, self._actions, OneTrace(trace))
        return trace

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        attachment, self._attachment = self._attachment, None
        assert attachment is not None
        try:
            if kind is None:
                attachment.check()
        finally:
            attachment.close()

    def __del__(self) -> None:
        if not getattr(self, "_entered", True):  # not there after a call with wrong arguments
            warnings.warn("attach(...) did nothing: write `with attach(pipe, eraser):`", stacklevel=2)
