"""Forwards of a component while an attachment is open: where one begins and ends, and what its hooks met in it.

Module-level classes that hold no module, so that a deep copy or a pickle of a hooked model carries its own. All that
changes during a forward belongs to the thread that runs it. Only tensor operations and plain values: torch.compile
traces them without a break.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites.denoiser_calls import DenoiserCall, call_of, predicted
from neuraleraser.sites.finished import FinishedForward
from neuraleraser.sites.layout import replace_tensor
from neuraleraser.sites.modules import forward_arguments
from neuraleraser.sites.rows import Rows
from neuraleraser.sites.threads import PerThread

Begin = Mapping[int, Tensor]
"""Tensors that the edits of a forward begin with, by numbers of their owner's."""


@dataclass
class Forward:
    """One forward of a component, in one thread.

    timestep: [] or [B] float32, None where the component has no time. state: the edits' own, one for all sites.
    ran: for each of the component's hooks, whether it has run. probes: for each, a zero that turns NaN once it meets
    NaN or infinity; a tensor, as asking at each step would stall a GPU. image_tokens: positions of the image in a
    transformer's sequence, None elsewhere. text_tokens: tokens of the text that it was given, None without.
    """

    timestep: Tensor | None
    rows: Rows
    state: Any
    ran: list[bool]
    probes: list[Tensor | None]
    image_tokens: int | None = None
    text_tokens: int | None = None
    latent_size: tuple[int, int] | None = None  # height and width of what the first block reads
    timestep_per_row: Tensor | None = None
    cached_sum: tuple[Tensor, Hashable, Tensor] | None = None  # a text, the key of what was added to it, the sum


@dataclass
class ComponentState:
    """State of one component in one thread."""

    rows: Rows | None = None  # of the forward in progress, decoded where Python runs
    begin: Begin = field(default_factory=dict)  # the same, what its edits begin with
    predicted: Tensor | None = None  # in this forward by the denoiser as it is edited, with nothing added
    forward: Forward | None = None  # in progress; of a compiled one, the last
    outside: Forward | None = None  # of hooks that run outside a forward, as in a VAE, of which decode is called
    guarded: bool = False  # a boundary outside the compiled graph is open
    unguarded: bool = False  # a compiled forward ran without one: what it met is not known
    paused: bool = False  # the component is asked for a prediction of its own: hooks do nothing
    pending: dict[int, Tensor] = field(default_factory=dict)  # probes by hook that nobody has looked at yet


class Boundary(Protocol):
    """Observer of a component's forwards, outside compiled graphs."""

    @property
    def repeats(self) -> bool:
        """True if the edits act in a forward that another attachment takes again, too."""
        ...

    def new_state(self, begin: Begin) -> Any:
        """Return the edits' state for a new forward."""
        ...

    def on_forward_start(
        self, hooks: ComponentHooks, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> tuple[Rows, Begin]:
        """Return the layout of the rows of a forward that begins, and what its edits begin with."""
        ...

    def on_repeat(self, rows: Rows, text: Tensor | None) -> Begin:
        """Return what the edits begin with in a forward that another attachment takes again."""
        ...

    def on_forward_end(self, rows: Rows, state: Any, finished: FinishedForward) -> Tensor | None:
        """Look at a denoiser's forward that is over; raise before its result is used, or return a change of it
        [rows, ...]."""
        ...


class ComponentHooks:
    """Hooks of one attachment inside one component (a denoiser, a text encoder)."""

    def __init__(self, name: str, component: nn.Module, guard: Boundary) -> None:
        arguments = forward_arguments(component)
        self.name, self.guard = name, guard
        self.arguments = arguments
        self.timestep_index = arguments.index("timestep") if "timestep" in arguments else None
        self.patch = _patch_size(component) if "transformer" in name else None
        self.sites: list[str] = []  # name of each hook, by its number
        self.active = True  # a compiled graph guards on this, so that it is not used once the hooks are gone
        self.ever_ran: set[int] = set()  # hooks, by number, that ran in any thread
        self.thread: PerThread[ComponentState] = PerThread(ComponentState)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an argument of the component's forward by name, None if it was not passed."""
        return argument_of(args, kwargs, name, self.arguments.index(name) if name in self.arguments else None)

    def first_argument(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the first argument of the component's forward: a denoiser's latents, a text encoder's tokens."""
        return args[0] if args else kwargs.get(self.arguments[0] if self.arguments else "")

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the component: bind timestep and rows."""
        if not self.active:
            return
        thread = self.thread.get()
        if not thread.guarded:
            if torch.compiler.is_compiling():
                thread.rows, thread.begin = None, {}
            else:
                thread.forward = thread.predicted = None
                thread.rows, thread.begin = self.guard.on_forward_start(self, module, args, kwargs, False)
        timestep = None
        if self.timestep_index is not None:
            timestep = argument_of(args, kwargs, "timestep", self.timestep_index)
            if timestep is None:
                raise EraserNotAppliedError(f"{self.name} was called without a timestep, which the sites in it need.")
            timestep = torch.as_tensor(timestep, dtype=torch.float32)
        first, rows = self.first_argument(args, kwargs), thread.rows
        if rows is None:  # a forward that was compiled with the hooks in it, and that nothing guards
            rows = Rows(len(first) if isinstance(first, Tensor) else 1)
        text = self.argument("encoder_hidden_states", args, kwargs)
        thread.forward = self._new_forward(first, timestep, text, rows, thread.begin)

    def _new_forward(self, first: Any, timestep: Tensor | None, text: Any, rows: Rows, begin: Begin) -> Forward:
        """Return a forward of which no hook has run yet, from the component's first argument and its text."""
        return Forward(
            timestep,
            rows,
            self.guard.new_state(begin),
            [False] * len(self.sites),
            [None] * len(self.sites),
            self._image_tokens(first),
            text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None,
            self._latent_size(first),
        )

    def end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the component: everything in it must have run. Returns the output, if that is changed."""
        thread = self.thread.get()
        if not self.active or thread.guarded:
            return None
        if torch.compiler.is_compiling():
            thread.unguarded = True
            return None
        return self.finish(module, args, kwargs, output)

    def open_boundary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a compiled forward, outside its graph."""
        thread = self.thread.get()
        thread.forward = thread.predicted = None
        thread.rows, thread.begin = self.guard.on_forward_start(self, module, args, kwargs, True)
        thread.guarded = True

    def close_boundary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """End a compiled forward, outside its graph, as `finish` does."""
        self.thread.get().guarded = False
        return self.finish(module, args, kwargs, output)

    def drop_boundary(self) -> None:
        """End a compiled forward that failed by itself."""
        self.thread.get().guarded = False

    def finish(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Check the forward that is over, and return its output, if that is changed, else None.

        Raises EraserNotAppliedError for a hook that did not run, or NaN or infinity.
        """
        thread = self.thread.get()
        forward, thread.forward = thread.forward, None
        rows, thread.rows = thread.rows, None
        self._check_ran(forward)
        if self.timestep_index is None or rows is None:
            return None
        old = predicted(output)
        first = next((hooks for hooks in _attached(module) if hooks.active), self).thread.get()
        if first.predicted is None:  # whichever attachment ends first
            first.predicted = old
        # Without sites nothing need run inside, so a forward that was compiled before is seen from outside alone.
        state = forward.state if forward is not None else self.guard.new_state({})
        call = call_of(module, args, kwargs, output)
        finished = FinishedForward(
            call,
            partial(_run_without_hooks, module),
            partial(self._look, module),
            partial(self._take_again, module, call, rows, first),
        )
        delta = self.guard.on_forward_end(rows, state, finished)
        if delta is None:
            return None
        # As in `add_keeping_bits`: rows whose change is 0 keep their bits.
        return replace_tensor(output, old, (old - (0 - delta)).to(old.dtype))

    def _check_ran(self, forward: Forward | None) -> None:
        """Raise EraserNotAppliedError where a hook did not run in a forward, or met NaN or infinity."""
        thread = self.thread.get()
        ran = forward.ran if forward is not None else [False] * len(self.sites)
        self.ever_ran |= {number for number, did in enumerate(ran) if did}
        self.raise_missed([name for name, did in zip(self.sites, ran, strict=True) if not did])
        for number, probe in enumerate(forward.probes if forward is not None else []):
            if probe is not None:
                thread.pending[number] = thread.pending[number] + probe if number in thread.pending else probe
        self.check_finite(on="cpu")

    def _look(
        self, module: nn.Module, state: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], rows: Rows
    ) -> Any:
        """Run the denoiser on a state of its own, with no other attachment's hooks; return the edits' state."""
        thread, text = self.thread.get(), conditioning.get("encoder_hidden_states")
        thread.forward = self._new_forward(state, timestep.float(), text, rows, {})
        try:
            _run_without_hooks(module, state, timestep, conditioning, but=(self,))
            return thread.forward.state
        finally:
            thread.forward = None

    def _take_again(
        self, module: nn.Module, call: DenoiserCall, rows: Rows, first: ComponentState, begin: Begin, again: Tensor
    ) -> tuple[Any, Tensor]:
        """Take a forward again, in which the edits begin with `begin`, and those of other attachments act as well.

        first: knows what was predicted before. again: the rows that are wanted, bool [rows].

        Returns the edits' state, and the change of what was predicted in these rows, 0 in others.
        """
        text = call.conditioning.get("encoder_hidden_states")
        read = text if isinstance(text, Tensor) and text.ndim == 3 else None
        acting = [hooks for hooks in _attached(module) if hooks is self or (hooks.active and hooks.guard.repeats)]
        kept = [(thread, thread.forward) for thread in (hooks.thread.get() for hooks in acting)]
        try:
            for hooks in acting:
                own = begin if hooks is self else hooks.guard.on_repeat(rows, read)
                time = call.timestep.float()
                hooks.thread.get().forward = hooks._new_forward(call.state, time, text, rows, own)
            prediction = _run_without_hooks(module, call.state, call.timestep, call.conditioning, but=acting)
            forward = self.thread.get().forward
            assert forward is not None
            self._check_ran(forward)
            before = first.predicted
            assert before is not None
            wide = torch.promote_types(prediction.dtype, torch.float32)
            wanted = again.to(prediction.device).view(-1, *[1] * (prediction.ndim - 1))
            change = torch.where(wanted, prediction.to(wide) - before.to(wide), 0)
            first.predicted = before + change.to(before.dtype)
            return forward.state, change
        finally:
            for thread, before in kept:
                thread.forward = before

    def raise_missed(self, names: list[str], where: str = "a forward of {name}") -> None:
        """EraserNotAppliedError if there are names of hooks that did not run."""
        if names:
            raise EraserNotAppliedError(
                f"{', '.join(names)} did not run in {where.format(name=self.name)}: its module was compiled "
                "and called before (compile, attach, and only then call it; or call torch._dynamo.reset()), was "
                "replaced, was skipped, or was not needed because "
                "its result was passed in (prompt_embeds)."
            )

    def check_finite(self, on: str | None = None) -> None:
        """EraserNotAppliedError for NaN or infinity met so far in this thread. Waits for the device; `on` limits to one
        kind."""
        thread = self.thread.get()
        for number, probe in list(thread.pending.items()):
            if on in (None, probe.device.type):
                del thread.pending[number]
                if not math.isfinite(probe.item()):
                    thread.pending.clear()
                    raise EraserNotAppliedError(
                        f"{self.sites[number]}: NaN or infinity in the activations or in the edit; "
                        "look at the model's dtype (fp16 overflows), its input and the edit's strength."
                    )

    def check_outside(self) -> None:
        """EraserNotAppliedError for NaN or infinity that hooks met outside a forward of the component."""
        thread = self.thread.get()
        if thread.outside is not None:
            found, thread.outside = thread.outside, None
            self.ever_ran |= {number for number, did in enumerate(found.ran) if did}
            thread.pending |= {number: probe for number, probe in enumerate(found.probes) if probe is not None}
            self.check_finite()

    def check_guarded(self) -> None:
        """EraserNotAppliedError if a compiled forward ran in this thread that nothing could look at."""
        thread = self.thread.get()
        if thread.unguarded:
            thread.unguarded = False
            raise EraserNotAppliedError(
                f"{self.name} was compiled after its hooks were attached, and ran outside its pipeline: what fired "
                "there is not known. Compile, attach, and only then call it."
            )

    def forward_now(self, site: str) -> Forward:
        """Return this thread's forward; EraserNotAppliedError for a site of a denoiser whose block runs outside any."""
        thread = self.thread.get()
        if thread.forward is not None:
            return thread.forward
        if self.timestep_index is not None:
            raise EraserNotAppliedError(
                f"{site}: no timestep is bound, as the block ran outside a forward of {self.name}. Gradient "
                "checkpointing does that in the backward pass: turn it off."
            )
        if thread.outside is None:
            count = len(self.sites)
            thread.outside = Forward(None, Rows(1), self.guard.new_state({}), [False] * count, [None] * count)
        return thread.outside

    def _latent_size(self, latents: Any) -> tuple[int, int] | None:
        """Return height and width of the latents [B, channels, height, width] in patches; None of others."""
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            return None
        _, height, width = self.patch or (1, 1, 1)
        return latents.shape[-2] // height, latents.shape[-1] // width

    def _image_tokens(self, latents: Any) -> int | None:
        """Return how many positions the latents have in the blocks; None if that is not known."""
        if self.patch is None or not isinstance(latents, Tensor):
            return None
        if latents.ndim == 3:
            return latents.shape[1]
        frames, height, width = self.patch
        tokens = (latents.shape[-2] // height) * (latents.shape[-1] // width)
        return tokens * (latents.shape[2] // frames) if latents.ndim == 5 else tokens


def _attached(module: nn.Module) -> list[ComponentHooks]:
    """Return the hooks of all attachments to a component, in the order in which they end a forward."""
    found = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return [hooks for hooks in found if isinstance(hooks, ComponentHooks)]


def _run_without_hooks(
    module: nn.Module,
    state: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Any],
    but: Sequence[ComponentHooks] = (),
) -> Tensor:
    """Return the denoiser's prediction, in which no attachment but some reads or edits anything."""
    threads = [hooks.thread.get() for hooks in _attached(module) if hooks not in but]
    given = {forward_arguments(module)[0]: state, "timestep": timestep}
    for thread in threads:
        thread.paused = True
    try:  # of `forward`, so that the module's own hooks are left out, too
        return module.forward(**given, **conditioning, return_dict=False)[0]
    finally:
        for thread in threads:
            thread.paused = False


def argument_of(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, index: int | None) -> Any:
    """Return an argument of a call by its name or its position, None if it was not passed."""
    if name in kwargs:
        return kwargs[name]
    return args[index] if index is not None and index < len(args) else None


def _patch_size(component: nn.Module) -> tuple[int, int, int] | None:
    """Return a transformer's patch (frames, height, width), None where its configuration does not say."""
    config: Any = getattr(component, "config", {})
    patch = config.get("patch_size")
    if isinstance(patch, int):
        return config.get("patch_size_t") or 1, patch, patch
    return tuple(patch) if isinstance(patch, (tuple, list)) and len(patch) == 3 else None  # type: ignore[return-value]
