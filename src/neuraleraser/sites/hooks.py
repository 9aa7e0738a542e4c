"""The hooks: code that runs inside a model's forward while an attachment is open.

Module-level classes that hold no module, so that a deep copy or a pickle of a hooked model carries its own. All that
changes during a forward belongs to the thread that runs it. Only tensor operations and plain values: torch.compile
traces them without a break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.sites.edit import Change, Edit, EditContext
from neuraleraser.sites.layout import add_keeping_bits, replace_tensor, to_positions
from neuraleraser.sites.rows import Rows
from neuraleraser.sites.site import TEXT_FIRST, Site, forward_arguments, is_text_first
from neuraleraser.sites.threads import PerThread


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
    timestep_per_row: Tensor | None = None
    cached_sum: tuple[Tensor, Hashable, Tensor] | None = None  # a text, the key of what was added to it, the sum


@dataclass
class ComponentState:
    """State of one component in one thread."""

    rows: Rows | None = None  # of the forward in progress, decoded where Python runs
    forward: Forward | None = None  # in progress; of a compiled one, the last
    outside: Forward | None = None  # of hooks that run outside a forward, as in a VAE, of which decode is called
    guarded: bool = False  # a boundary outside the compiled graph is open
    unguarded: bool = False  # a compiled forward ran without one: what it met is not known
    pending: dict[int, Tensor] = field(default_factory=dict)  # probes by hook that nobody has looked at yet


class Boundary(Protocol):
    """Observer of a component's forwards, outside compiled graphs."""

    def new_state(self) -> Any:
        """Return the edits' state for a new forward."""
        ...

    def on_forward_start(
        self, hooks: ComponentHooks, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Rows:
        """Return the layout of the rows of a forward that begins."""
        ...

    def on_forward_end(self, hooks: ComponentHooks, forward: Forward) -> None:
        """Look at a forward that is over; raise before its result is used."""
        ...


class ComponentHooks:
    """Hooks of one attachment inside one component (a denoiser, a text encoder)."""

    def __init__(self, name: str, component: nn.Module, boundary: Boundary) -> None:
        arguments = forward_arguments(component)
        self.name, self.boundary = name, boundary
        self.arguments = arguments
        self.timestep_index = arguments.index("timestep") if "timestep" in arguments else None
        self.patch = _patch_size(component) if "transformer" in name else None
        self.sites: list[SiteHook] = []
        self.active = True  # a compiled graph guards on this, so that it is not used once the hooks are gone
        self.ever_ran: set[int] = set()  # hooks, by number, that ran in any thread
        self.thread: PerThread[ComponentState] = PerThread(ComponentState)

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return an argument of the component's forward by name, None if it was not passed."""
        return _argument(args, kwargs, name, self.arguments.index(name) if name in self.arguments else None)

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
                thread.rows = None
            else:
                thread.forward = None
                thread.rows = self.boundary.on_forward_start(self, module, args, kwargs)
        timestep = None
        if self.timestep_index is not None:
            timestep = _argument(args, kwargs, "timestep", self.timestep_index)
            if timestep is None:
                raise EraserNotAppliedError(f"{self.name} was called without a timestep, which the sites in it need.")
            timestep = torch.as_tensor(timestep, dtype=torch.float32)
        first, rows = self.first_argument(args, kwargs), thread.rows
        if rows is None:  # a forward that was compiled with the hooks in it, and that nothing guards
            rows = Rows(len(first) if isinstance(first, Tensor) else 1)
        text = self.argument("encoder_hidden_states", args, kwargs)
        thread.forward = Forward(
            timestep,
            rows,
            self.boundary.new_state(),
            [False] * len(self.sites),
            [None] * len(self.sites),
            self._image_tokens(first),
            text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None,
        )

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the component: everything in it must have run."""
        thread = self.thread.get()
        if not self.active or thread.guarded:
            return
        if torch.compiler.is_compiling():
            thread.unguarded = True
        else:
            self.finish()

    def open_boundary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a compiled forward, outside its graph."""
        thread = self.thread.get()
        thread.forward, thread.rows = None, self.boundary.on_forward_start(self, module, args, kwargs)
        thread.guarded = True

    def close_boundary(self, failed: bool) -> None:
        """End a compiled forward, outside its graph. Raises as `finish` does, unless it failed by itself."""
        self.thread.get().guarded = False
        if not failed:
            self.finish()

    def finish(self) -> None:
        """Check the forward that is over: EraserNotAppliedError for a hook that did not run, or NaN or infinity."""
        thread = self.thread.get()
        forward, thread.forward, thread.rows = thread.forward, None, None
        ran = forward.ran if forward is not None else [False] * len(self.sites)
        self.ever_ran |= {number for number, did in enumerate(ran) if did}
        self.raise_missed([hook.name for hook, did in zip(self.sites, ran, strict=True) if not did])
        if forward is None:
            return
        for number, probe in enumerate(forward.probes):
            if probe is not None:
                thread.pending[number] = thread.pending[number] + probe if number in thread.pending else probe
        self.check_finite(on="cpu")
        self.boundary.on_forward_end(self, forward)

    def raise_missed(self, names: list[str], where: str = "a forward of {name}") -> None:
        """EraserNotAppliedError if there are names of hooks that did not run."""
        if names:
            raise EraserNotAppliedError(
                f"{', '.join(names)} did not run in {where.format(name=self.name)}: its module was compiled before "
                "(attach first, or call torch._dynamo.reset()), was replaced, was skipped, or was not needed because "
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
                        f"{self.sites[number].name}: NaN or infinity in the activations or in the edit; "
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
                "there is not known. Attach after compiling."
            )

    def forward_now(self, hook: SiteHook) -> Forward:
        """Return this thread's forward. EraserNotAppliedError for a block of a denoiser that runs outside any."""
        thread = self.thread.get()
        if thread.forward is not None:
            return thread.forward
        if self.timestep_index is not None:
            raise EraserNotAppliedError(
                f"{hook.name}: no timestep is bound, as the block ran outside a forward of {self.name}. Gradient "
                "checkpointing does that in the backward pass: turn it off."
            )
        if thread.outside is None:
            count = len(self.sites)
            thread.outside = Forward(None, Rows(1), self.boundary.new_state(), [False] * count, [None] * count)
        return thread.outside

    def _image_tokens(self, latents: Any) -> int | None:
        if self.patch is None or not isinstance(latents, Tensor):
            return None
        if latents.ndim == 3:
            return latents.shape[1]
        frames, height, width = self.patch
        tokens = (latents.shape[-2] // height) * (latents.shape[-1] // width)
        return tokens * (latents.shape[2] // frames) if latents.ndim == 5 else tokens


class SiteHook:
    """Hook of one module: all that one attachment reads and edits there, of its output, or of the text it is given.

    A forward hook, but for the tap "input", whose forward pre-hook is `edit_input`.
    """

    def __init__(self, component: ComponentHooks, module: nn.Module, edits: list[tuple[Site, Edit[Any]]]) -> None:
        names = forward_arguments(module)
        self.component = component
        self.number = len(component.sites)
        self.edits = edits
        self.name = ", ".join(str(site) for site, _ in edits)
        self.kind = type(module).__name__
        self.text_first = is_text_first(module)
        self.image_name = names[0] if names else ""
        self.text_index = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else None
        component.sites.append(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the edits' deltas, or None (leave it) where no edit adds one."""
        if not self.component.active:
            return None
        forward = self.component.forward_now(self)

        def read_chunks(site: Site, tokens: int) -> list[Tensor]:
            parts = self._outputs_by_chunk(site, module, args, kwargs, tokens)
            return [self._read(site, forward, args, kwargs, part) for part in parts]

        changes = self._run_edits(forward, lambda site: self._read(site, forward, args, kwargs, output), read_chunks)
        if not changes:
            return None
        for stream, change in changes:
            old = self._stream(output, stream)
            output = replace_tensor(output, old, self._add(forward, old, change))
        return output

    def edit_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with the edits' deltas in the text that the module reads, or None (leave them)."""
        if not self.component.active:
            return None
        given = _argument(args, kwargs, "encoder_hidden_states", self.text_index)
        text = given[0] if isinstance(given, (tuple, list)) and given else given  # beside it an IP-Adapter's images
        if not isinstance(text, Tensor):
            raise SiteError(f"{self.name}: {self.kind} was given no text to read, but {type(given).__name__}.")
        new = self._edited_text(text)
        if new is None:
            return None
        new = replace_tensor(tuple(given), text, new) if given is not text else new
        if "encoder_hidden_states" in kwargs:
            return args, kwargs | {"encoder_hidden_states": new}
        assert self.text_index is not None
        return (*args[: self.text_index], new, *args[self.text_index + 1 :]), kwargs

    def _edited_text(self, text: Tensor) -> Tensor | None:
        """Return the text with the deltas, summed once for all blocks that add the same to the same; None: no delta."""
        forward = self.component.forward_now(self)
        key = self.edits[0][1].shared_key() if len(self.edits) == 1 else None
        if key is not None and forward.cached_sum is not None:
            of, known, new = forward.cached_sum
            if of is text and known == key:
                forward.ran[self.number] = True
                return new
        changes = self._run_edits(
            forward, lambda site: to_positions(text), lambda site, tokens: list(to_positions(text).split(tokens, 1))
        )
        if not changes:
            return None
        new = text
        for _, change in changes:
            new = self._add(forward, new, change)
        if key is not None:
            forward.cached_sum = text, key, new
        return new

    def _outputs_by_chunk(
        self, site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: int
    ) -> list[Any]:
        """Return what the module returns for each part of its text, of so many tokens."""
        text = kwargs.get("encoder_hidden_states")
        masks = [name for name in kwargs if "mask" in name and kwargs[name] is not None]
        if not isinstance(text, Tensor) or masks or self.text_first or site.tap != "output":
            raise EraserNotAppliedError(
                f"{site}: the text is longer than {tokens} tokens, and {self.kind} does not read it in a way that "
                "can be taken apart: pass a shorter prompt."
            )
        return [module.forward(*args, **(kwargs | {"encoder_hidden_states": part})) for part in text.split(tokens, 1)]

    def _run_edits(
        self,
        forward: Forward,
        read: Callable[[Site], Tensor],
        read_chunks: Callable[[Site, int], list[Tensor]],
    ) -> list[tuple[str, Change]]:
        """Return the changes that the edits ask for, each with its stream. All read the same activations."""
        changes: list[tuple[str, Change]] = []
        forward.ran[self.number] = True
        for site, edit in self.edits:
            if edit.can_skip(forward.state):
                continue
            x = read(site)
            context = EditContext(
                self._timestep(forward, x, site),
                forward.rows,
                forward.state,
                forward.text_tokens,
                partial(read_chunks, site),
            )
            change = edit(x, context)
            if change is None:
                self._probe(forward, x)
            elif change.delta is None:
                self._probe(forward, x if change.nonfinite_probe is None else change.nonfinite_probe)
            elif change.delta.shape != x.shape:
                raise EraserNotAppliedError(
                    f"{site}: the edit returned {list(change.delta.shape)}, expected {list(x.shape)}."
                )
            else:
                changes.append((site.stream, change))
        return changes

    def _timestep(self, forward: Forward, x: Tensor, site: Site) -> Tensor:
        """Return the forward's timestep as [B], on the device of x [B, positions, d]."""
        rows, known, given = x.shape[0], forward.timestep_per_row, forward.timestep
        if known is not None and known.shape[0] == rows and known.device == x.device:
            return known
        if given is None:
            new = torch.zeros(rows, device=x.device)
        elif given.ndim > 1 or (given.ndim == 1 and rows % given.shape[0]):
            raise EraserNotAppliedError(
                f"{site}: the timesteps have shape {list(given.shape)}, expected one or {rows}, one a row."
            )
        elif given.ndim == 1 and 1 < given.shape[0] < rows:  # frames of a video
            new = given.to(x.device).repeat_interleave(rows // given.shape[0])
        else:
            new = given.to(x.device).expand(rows)
        forward.timestep_per_row = new
        return new

    def _add(self, forward: Forward, old: Tensor, change: Change) -> Tensor:
        assert change.delta is not None
        new = add_keeping_bits(old, change.delta, change.owned)
        # NaN read or added ends in new
        self._probe(forward, new if change.nonfinite_probe is None else change.nonfinite_probe)
        return new

    def _probe(self, forward: Forward, x: Tensor) -> None:
        # 0 * sum is 0, or NaN once a value is NaN or infinite: one reduction, and no answer is waited for
        found, before = x.detach().sum(dtype=torch.float32) * 0, forward.probes[self.number]
        forward.probes[self.number] = found if before is None else before.to(found.device) + found

    def _read(self, site: Site, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Return the tap's value, [B, positions, d]."""
        after = self._stream(output, site.stream)
        if site.tap == "output":
            x = to_positions(after)
        else:
            if site.stream == "text":
                before = _argument(args, kwargs, "encoder_hidden_states", self.text_index)
            else:
                before = _argument(args, kwargs, self.image_name, 0)
            if not isinstance(before, Tensor) or before.shape != after.shape:
                shape = list(before.shape) if isinstance(before, Tensor) else type(before).__name__
                raise SiteError(
                    f"{site}: an update is output minus input, but {self.kind} takes {shape} and returns "
                    f"{list(after.shape)}; use the tap 'output'."
                )
            x = to_positions(after) - to_positions(before)
        if site.stream == "image" and forward.image_tokens is not None and x.shape[1] > forward.image_tokens:
            raise SiteError(
                f"{site}: {self.kind} holds {x.shape[1]} positions and the image has {forward.image_tokens}, as text "
                "and image are one sequence there: use a block in which they are apart."
            )
        return x

    def _stream(self, output: Any, stream: str) -> Tensor:
        if self.text_first:
            part = output[0 if stream == "text" else 1]
        elif isinstance(output, dict):
            part = next(iter(output.values()))
        elif isinstance(output, tuple):
            part = output[0]
            if self.text_index is not None and len(output) == 2 and _two_sequences_of_one_width(part, output[1]):
                raise SiteError(
                    f"{self.name}: {self.kind} returns two sequences, and which is the text is not "
                    f"known; blocks with known streams are {', '.join(sorted(TEXT_FIRST))}."
                )
        else:
            part = output
        if not isinstance(part, Tensor):
            raise SiteError(f"{self.name}: {self.kind} returns {type(part).__name__} there, no tensor.")
        return part


def _two_sequences_of_one_width(one: Any, other: Any) -> bool:
    """Return True for two sequences [B, N, d] of one width: two streams, not a sequence and its attention bias."""
    return (
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.ndim == other.ndim == 3
        and one.shape[2] == other.shape[2]
    )


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, index: int | None) -> Any:
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
