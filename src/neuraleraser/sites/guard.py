"""The call guard: where a drawing begins, what its rows are, and where its latents become pictures.

It lies at the modules, which a pipeline shares with others made of them, with copies, with loops of one's own and with
other threads. All that is known of a call belongs to the thread that runs it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import compiled
from neuraleraser.sites.caches import check_caches
from neuraleraser.sites.caller import Caller, CallIdentity, find_caller
from neuraleraser.sites.edit import F
from neuraleraser.sites.finished import FinishedForward
from neuraleraser.sites.forwards import Begin, ComponentHooks
from neuraleraser.sites.modules import components, is_text_encoder, unwrap
from neuraleraser.sites.routes import INPAINTING, START_IMAGE, routes_of
from neuraleraser.sites.rows import Batch, CallFacts, Rows, decode_rows
from neuraleraser.sites.start_images import kinds_encoded, last_of_encoder, latents_given, start_latents, strength_of
from neuraleraser.sites.threads import PerThread, WeakReference

C = TypeVar("C")
"""State of one call, made by an observer."""


@dataclass(frozen=True)
class Call:
    """One drawing: a call of a pipeline, or a loop over its modules.

    pipeline: the one that runs it; None where modules are called outside any. images: how many it draws, padding
    included. batch: the batch of `generate` that it is, None where it is none. routes: those besides the prompt by
    which a concept may enter it. guidance: its scale of classifier-free guidance, 1 without. strength: of its start
    image, the share of the way back to noise that it is taken; None without one. start: the start images as latents
    [images, C, h, w], without noise; None where there are none or they are not known.
    """

    pipeline: Any
    images: int
    batch: Batch | None
    routes: frozenset[str] = frozenset()
    guidance: float = 1.0
    strength: float | None = None
    start: Tensor | None = None


class Observer(Protocol[F, C]):
    """Owner of an attachment's edits, which learns of the calls that run them. May raise in each method."""

    @property
    def repeats(self) -> bool:
        """True if its edits act in a forward that another attachment takes again, too."""
        ...

    def new_state(self, begin: Begin) -> F:
        """Return the edits' state for a new forward, which begins with what `on_forward_start` returned."""
        ...

    def on_call_start(self, call: Call) -> C:
        """Return the state of a new call."""
        ...

    def on_forward_start(self, call: C, rows: Rows, text: Tensor | None, compiled: bool) -> Begin:
        """Look at a denoiser's forward before it runs, and return what its edits begin with.

        text: what it reads [rows, tokens, d], None where that is not known. compiled: the same tensors must be there
        in each forward, as the edits are in a graph.
        """
        ...

    def on_forward_end(self, call: C, rows: Rows, state: F, finished: FinishedForward) -> Tensor | None:
        """Look at a denoiser's forward once all its edits have run; return a change of its prediction [rows, ...]."""
        ...

    def on_decode(self, call: C) -> None:
        """Look at a call whose latents become pictures."""
        ...


@dataclass
class Unobserved(Generic[F]):
    """Observer that looks at nothing."""

    make_state: Callable[[], F]
    repeats: bool = True

    def new_state(self, begin: Begin) -> F:
        """Return the state of a new forward."""
        return self.make_state()

    def on_call_start(self, call: Call) -> None:
        """Do nothing."""

    def on_forward_start(self, call: None, rows: Rows, text: Tensor | None, compiled: bool) -> Begin:
        """Return nothing."""
        return {}

    def on_forward_end(self, call: None, rows: Rows, state: F, finished: FinishedForward) -> None:
        """Do nothing."""

    def on_decode(self, call: None) -> None:
        """Do nothing."""


@dataclass
class _ThreadCall:
    """The call of one thread."""

    identity: CallIdentity | None = None
    state: Any = None
    decoded: bool = False
    encoders: set[str] = field(default_factory=set)  # text encoders that ran since the last call began
    encoded: list[tuple[CallIdentity, Tensor]] = field(default_factory=list)  # what the autoencoder's encoder gave
    checked: set[str] = field(default_factory=set)  # components without caches in this call
    known: tuple[Any, ...] = ()  # what the last rows were decoded from
    rows: Rows | None = None


class CallGuard(Generic[F, C]):
    """Guard of one attachment: the boundary of its components' forwards, and of the calls that they make up."""

    def __init__(self, pipe: Any, observer: Observer[F, C]) -> None:
        self.pipeline = WeakReference(pipe)
        self.observer = observer
        self.components: Mapping[str, ComponentHooks] = {}
        self.called = False  # whether any call ran
        self.thread: PerThread[_ThreadCall] = PerThread(_ThreadCall)

    def watch(self, components: Mapping[str, ComponentHooks]) -> None:
        """Guard these components."""
        self.components = components

    @property
    def repeats(self) -> bool:
        """True if the edits act in a forward that another attachment takes again, too."""
        return self.observer.repeats

    def new_state(self, begin: Begin) -> F:
        """Return the edits' state for a new forward."""
        return self.observer.new_state(begin)

    def on_forward_start(
        self, hooks: ComponentHooks, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
    ) -> tuple[Rows, Begin]:
        """Begin a call or go on with it; return the layout of the forward's rows, and what its edits begin with."""
        thread, first = self.thread.get(), hooks.first_argument(args, kwargs)
        size = len(first) if isinstance(first, Tensor) and first.ndim else 1
        caller = find_caller()
        if hooks.timestep_index is None:  # a text encoder, before its call's first step
            thread.encoders.add(hooks.name)
            self._check_modules(caller)
            return Rows(size), {}
        schedule = getattr(caller.pipeline if caller else self.pipeline.get(), "scheduler", None)
        text = hooks.argument("encoder_hidden_states", args, kwargs)
        text = text if isinstance(text, Tensor) and text.ndim == 3 else None
        rows = self._rows(thread, caller, size, text)
        self._begin_if_new(thread, caller, getattr(schedule, "timesteps", None), rows)
        if hooks.name not in thread.checked:
            check_caches(hooks.name, module)
            thread.checked.add(hooks.name)
        return rows, self.observer.on_forward_start(thread.state, rows, text, compiled)

    def on_repeat(self, rows: Rows, text: Tensor | None) -> Begin:
        """Return what the edits begin with in a forward of this thread's call that another attachment takes again."""
        thread = self.thread.get()
        return {} if thread.identity is None else self.observer.on_forward_start(thread.state, rows, text, False)

    def _begin_if_new(self, thread: _ThreadCall, caller: Caller | None, schedule: Any, rows: Rows) -> None:
        """Begin a new call where this forward belongs to none that is known."""
        pipeline, last = caller.pipeline if caller else None, thread.identity
        over = thread.decoded and pipeline is None
        if last is not None and not over and last.matches(pipeline, schedule):
            return
        self.called = True
        encoders, thread.encoders, thread.checked = thread.encoders, set(), set()
        thread.identity, thread.decoded = None, False
        for name, hooks in self.components.items():
            hooks.check_finite()  # of the call before, on a GPU
            if pipeline is not None and hooks.sites and is_text_encoder(name) and name not in encoders:
                hooks.raise_missed(hooks.sites, "this call of the pipeline")
        identity = CallIdentity(pipeline, schedule)
        routes = routes_of(pipeline, caller.variables) if caller else frozenset()
        guidance = max(caller.facts.guidance or 1.0, 1.0) if caller else 1.0
        strength = start = None
        if caller and routes & {START_IMAGE, INPAINTING}:
            strength = strength_of(caller.variables, schedule)
        if caller and strength is not None:
            encoded = [x for made_in, x in thread.encoded if made_in.matches(pipeline, schedule)]
            vae, kinds = getattr(pipeline, "vae", None), kinds_encoded(pipeline, INPAINTING in routes, strength)
            start = start_latents(vae, encoded, rows.images, kinds)
            if not encoded:
                start = latents_given(vae, caller.variables.get("image"), rows.images)
        thread.encoded = []
        call = Call(pipeline, rows.images, identity.batch, routes, guidance, strength, start)
        thread.state = self.observer.on_call_start(call)
        thread.identity = identity

    def _rows(self, thread: _ThreadCall, caller: Caller | None, size: int, text: Tensor | None) -> Rows:
        """Return the rows of this forward, decoded once for each text."""
        facts = caller.facts if caller else CallFacts()
        tensors = (text, facts.prompt_text, facts.negative_text)
        known = (size, facts.images, facts.guidance)
        if thread.known and thread.rows and known == thread.known[:3]:
            same = zip(tensors, thread.known[3:], strict=True)
            if all(tensor is (ref() if ref else None) for tensor, ref in same):
                return thread.rows
        # Compared once for a text, not at each step: on a GPU the answer has to be waited for.
        thread.rows = decode_rows(size, text, facts)
        thread.known = (*known, *(None if tensor is None else weakref.ref(tensor) for tensor in tensors))
        return thread.rows

    def on_forward_end(self, rows: Rows, state: F, finished: FinishedForward) -> Tensor | None:
        """Hand a denoiser's forward to the observer."""
        return self.observer.on_forward_end(self.thread.get().state, rows, state, finished)

    def hook_autoencoders(self, pipe: Any) -> list[RemovableHandle]:
        """Watch the encoders and decoders of the pipeline's autoencoders."""
        handles = []
        encoder = last_of_encoder(getattr(pipe, "vae", None))
        if encoder is not None:
            handles.append(encoder.register_forward_hook(self.on_encoded))
        for part in components(pipe).values():
            root = unwrap(part)
            if callable(getattr(root, "decode", None)):
                inner = [child for name, child in root.named_children() if "decoder" in name]
                for child in inner or [root]:
                    handles.append(child.register_forward_pre_hook(self.on_decode))
                    handles.append(child.register_forward_hook(self.on_decoded))
        return handles

    def on_encoded(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of an encoder: keep what a pipeline starts from."""
        caller = None if torch.compiler.is_compiling() else find_caller()
        if isinstance(output, Tensor) and caller is not None:
            thread = self.thread.get()
            schedule = getattr(getattr(caller.pipeline, "scheduler", None), "timesteps", None)
            # Of other calls' nothing is kept, and a call that ended early has left some.
            kept = [(made_in, x) for made_in, x in thread.encoded if made_in.matches(caller.pipeline, schedule)]
            thread.encoded = [*kept, (CallIdentity(caller.pipeline, schedule), output.detach())]

    def on_decode(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of a decoder: raise before latents become a picture."""
        if torch.compiler.is_compiling():
            return
        thread, caller = self.thread.get(), find_caller()
        self._check_modules(caller)
        for hooks in self.components.values():
            hooks.check_guarded()
            hooks.check_finite()
        if any(isinstance(x, Tensor) and not bool(x.isfinite().all()) for x in args):  # after the last forward, too
            raise EraserNotAppliedError(
                "NaN or infinity in the latents that are to be decoded; look at the start image, the mask, the model's "
                "dtype (fp16 overflows) and the edit's strength."
            )
        self._decode(thread, caller)

    def on_decoded(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a decoder: look at the sites inside it."""
        if not torch.compiler.is_compiling():
            for hooks in self.components.values():
                hooks.check_outside()

    def _decode(self, thread: _ThreadCall, caller: Caller | None) -> None:
        """Hand this thread's call to the observer, if it is the one whose latents are decoded."""
        if thread.identity is None:
            return
        pipeline = caller.pipeline if caller else None
        drawn_by = thread.identity.pipeline() if thread.identity.pipeline else None
        if drawn_by is None or drawn_by is pipeline:
            thread.decoded = True
            self.observer.on_decode(thread.state)

    def _check_modules(self, caller: Caller | None) -> None:
        """Check the modules of the pipeline that was attached to, if it is the one that runs."""
        pipe = self.pipeline.get()
        if caller is not None and caller.pipeline is pipe:
            self.check_modules(pipe)

    def check_modules(self, pipe: Any) -> None:
        """EraserNotAppliedError if a module of the pipeline was replaced by one without hooks; guard those that are
        compiled."""
        held = components(pipe)
        for name, hooks in self.components.items():
            module = held.get(name)
            if module is None or not _has_hooks(unwrap(module), hooks):
                if hooks.sites or hooks.timestep_index is not None:
                    sites = ", ".join(hooks.sites)
                    raise EraserNotAppliedError(
                        f"{sites or name} did not run in this call of the pipeline: its {name} was replaced. Attach "
                        "again."
                    )
                continue
            compiled.add_guard(module, hooks)

    def check(self, pipe: Any) -> None:
        """Raise what could not be raised earlier, at the end of an attachment."""
        self.check_modules(pipe)
        for hooks in self.components.values():
            hooks.check_guarded()
            hooks.check_finite()
            hooks.check_outside()
            never = [name for number, name in enumerate(hooks.sites) if number not in hooks.ever_ran]
            if self.called and hooks.timestep_index is None and not is_text_encoder(hooks.name):
                hooks.raise_missed(never, "any call of the pipeline")
        thread = self.thread.get()
        if thread.identity is not None and thread.identity.pipeline is None and not thread.decoded:
            self._decode(thread, None)


def _has_hooks(module: nn.Module, hooks: ComponentHooks) -> bool:
    """Return True if the module has these hooks."""
    return any(getattr(hook, "__self__", None) is hooks for hook in module._forward_pre_hooks.values())


class PipelineGuard:
    """Guard of a pipeline object itself: at the start of its calls, its modules are those that were attached to.

    A module that was replaced has no hooks that could say so. diffusers calls `progress_bar` before it denoises; it is
    shadowed on the instance.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.plain = pipe.progress_bar
        self.own = "progress_bar" in vars(pipe)  # shadowed by the user
        self.guards: list[CallGuard[Any, Any]] = []

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        """Check the pipeline's modules, then do what the pipeline's own method does."""
        for guard in self.guards:
            guard.check_modules(self.pipe)
        return self.plain(*args, **kwargs)


def join_pipeline(pipe: Any, guard: CallGuard[Any, Any]) -> None:
    """Add a guard to those of the pipeline object."""
    shadow = _pipeline_guard(pipe)
    if shadow is None:
        shadow = PipelineGuard(pipe)
        vars(pipe)["progress_bar"] = shadow.progress_bar
    shadow.guards.append(guard)
    guard.check_modules(pipe)


def leave_pipeline(pipe: Any, guard: CallGuard[Any, Any]) -> None:
    """Take a guard off the pipeline object; with the last one, its own method is back."""
    shadow = _pipeline_guard(pipe)
    if shadow is not None and guard in shadow.guards:
        shadow.guards.remove(guard)
        if not shadow.guards:
            del vars(pipe)["progress_bar"]
            if shadow.own:
                vars(pipe)["progress_bar"] = shadow.plain


def _pipeline_guard(pipe: Any) -> PipelineGuard | None:
    """Return the guard of this pipeline, None if it has none."""
    owner = getattr(vars(pipe).get("progress_bar"), "__self__", None)
    return owner if isinstance(owner, PipelineGuard) else None
