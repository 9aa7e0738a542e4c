"""The hooks: what runs inside a model's forward while a context is open.

Module-level classes that hold no module, so that a deep copy or a pickle of a hooked model carries its own.
Only tensor operations and plain flags: torch.compile traces them without a break.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuraleraser.errors import NotApplied, SiteError
from neuraleraser.sites.layout import added, swapped, to_positions
from neuraleraser.sites.place import TEXT_FIRST, Site, forward_arguments, is_text_first


@dataclass
class Call:
    """What an edit knows of the forward it runs in.

    timestep: [B] float32 on the activation's device, as the denoiser got it; zeros outside the denoiser. Where one
    number stood for all rows it is expanded, with stride 0.
    memo: one dict for one forward of the denoiser (or text encoder), shared by this context's sites.
    finite: a tensor, smaller than x, in which the edit says that NaN or infinity of x or of its delta show, too; None:
    all of what the edit left or made is looked through.
    spare: whether the delta that the edit returns is nobody else's, so that its memory may be written into.
    """

    timestep: Tensor
    memo: dict[Any, Any]
    finite: Tensor | None = None
    spare: bool = False


Edit = Callable[[Tensor, Call], Tensor | None]
"""x [B, positions, d] and its `Call` -> delta, or None. An edit may have a method `rests(memo) -> bool`: whether it is
known to return None in this forward, so that x need not be read; and `adds`: names of the changes it adds, where
these are the same at all sites of the same names, and it adds nothing else."""


@dataclass
class _Forward:
    timestep: Tensor | None  # [] or [B] float32
    memo: dict[Any, Any] = field(default_factory=dict)
    by_row: Tensor | None = None  # the timestep as the last site was told it: [B]
    summed: tuple[Tensor, tuple[str, ...], Tensor] | None = None  # a text, what was added to it, and the sum


class State:
    """What one context's hooks inside one component (a denoiser, a text encoder) share."""

    def __init__(self, name: str, timestep_index: int | None) -> None:
        self.name = name
        self.timestep_index = timestep_index  # among forward's arguments; None: this component has no time
        self.forward: _Forward | None = None
        self.taps: list[Tap] = []
        self.missed: list[str] = []  # sites that a compiled forward passed over: a graph cannot raise itself

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the component: binds the timestep."""
        timestep = None
        if self.timestep_index is not None:
            timestep = _argument(args, kwargs, "timestep", self.timestep_index)
            if timestep is None:
                raise NotApplied(f"{self.name} was called without a timestep, which the sites in it need.")
            timestep = torch.as_tensor(timestep, dtype=torch.float32)
        for tap in self.taps:
            tap.visited = False
        self.forward = _Forward(timestep)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the component: everything in it must have run."""
        self.forward = None
        missed = [tap.name for tap in self.taps if not tap.visited]
        if missed:
            self.missed = missed
        if not torch.compiler.is_compiling():
            self.check_missed(f"a forward of {self.name}")
            self.check_finite(on="cpu")

    def check_visited(self) -> None:
        """NotApplied for a tap that nothing ran through since the call began, or that a forward left out."""
        self.missed = [tap.name for tap in self.taps if not tap.visited] or self.missed
        self.check_missed("this call of the pipeline")

    def check_missed(self, where: str) -> None:
        if self.missed:
            missed, self.missed = self.missed, []
            raise NotApplied(
                f"{', '.join(missed)} did not run in {where}: its module was compiled before (attach first, "
                "or call torch._dynamo.reset()), was replaced, was skipped, or was not needed because its "
                "result was passed in (prompt_embeds)."
            )

    def check_finite(self, on: str | None = None) -> None:
        """NotApplied for NaN or infinity met so far. Waits for the device; `on` limits to one kind."""
        for tap in self.taps:
            if on in (None, tap.poison.device.type) and tap.noted and not math.isfinite(tap.poison.item()):
                tap.clear()
                raise NotApplied(
                    f"{tap.name}: NaN or infinity in the activations or in the edit; "
                    "look at the model's dtype (fp16 overflows), its input and the edit's strength."
                )

    def forget(self) -> None:
        """Start a new call of the pipeline."""
        self.missed = []
        for tap in self.taps:
            tap.visited = False
            tap.clear()


class Tap:
    """Hook of one module: all that one context reads and edits there, of what it returns, or of the text it is given.

    A forward hook, but for the tap "input", whose forward pre-hook is `before`.
    """

    def __init__(self, state: State, module: nn.Module, edits: list[tuple[Site, Edit]]) -> None:
        names = forward_arguments(module)
        self.state = state
        self.edits = edits
        self.name = ", ".join(str(site) for site, _ in edits)
        self.kind = type(module).__name__
        self.text_first = is_text_first(module)
        self.image_name = names[0] if names else ""
        self.text_index = names.index("encoder_hidden_states") if "encoder_hidden_states" in names else None
        self.live = True  # a compiled graph guards on this, so that it is not used once the hook is gone
        self.visited = False
        # 0 while all is finite, NaN from then on. A tensor: asking at each step would stall a GPU.
        parameter = next(module.parameters(), None)
        self.poison = torch.zeros((), device=None if parameter is None else parameter.device)
        self.noted = False  # whether anything has been added to it

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output with the edits' deltas, or None (leave it) where no edit returned one."""
        changes = self._changes(lambda site: self._read(site, args, kwargs, output))
        if not changes:
            return None
        for stream, delta, call in changes:
            old = self._stream(output, stream)
            output = swapped(output, old, self._added(old, delta, call))
        return output

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with the edits' deltas in the text that the module reads, or None (leave them)."""
        given = _argument(args, kwargs, "encoder_hidden_states", self.text_index)
        text = given[0] if isinstance(given, (tuple, list)) and given else given  # beside it an IP-Adapter's images
        if not isinstance(text, Tensor):
            raise SiteError(f"{self.name}: {self.kind} was given no text to read, but {type(given).__name__}.")
        new = self._read_instead(text)
        if new is None:
            return None
        new = swapped(tuple(given), text, new) if given is not text else new
        if "encoder_hidden_states" in kwargs:
            return args, kwargs | {"encoder_hidden_states": new}
        assert self.text_index is not None
        return (*args[: self.text_index], new, *args[self.text_index + 1 :]), kwargs

    def _read_instead(self, text: Tensor) -> Tensor | None:
        """The text with the edits' deltas; made once for all blocks that add the same to the same. None: none add."""
        forward, adds = self.state.forward, None
        if len(self.edits) == 1:
            adds = getattr(self.edits[0][1], "adds", None)
        if forward is not None and forward.summed is not None and self.live:
            of, names, new = forward.summed
            if of is text and names == adds:
                self.visited = True
                return new
        changes = self._changes(lambda site: to_positions(text))
        if not changes:
            return None
        new = text
        for _, delta, call in changes:
            new = self._added(new, delta, call)
        if forward is not None and adds is not None:
            forward.summed = text, adds, new
        return new

    def _changes(self, read: Callable[[Site], Tensor]) -> list[tuple[str, Tensor, Call]]:
        """Ask the edits -> the streams that change, by how much, and what the edits knew."""
        changes: list[tuple[str, Tensor, Call]] = []
        if not self.live:
            return changes
        forward = self.state.forward
        if forward is None:
            if self.state.timestep_index is not None:
                raise NotApplied(
                    f"{self.name}: no timestep is bound, as the block ran outside a forward of "
                    f"{self.state.name}. Gradient checkpointing does that in the backward pass: turn it off."
                )
            forward = _Forward(None)  # such as a VAE, of which pipelines call encode and decode
        self.visited = True
        for site, change in self.edits:  # all see the same activations
            rests = getattr(change, "rests", None)
            if rests is not None and rests(forward.memo):
                continue
            x = read(site)
            call = Call(self._timestep(forward, x, site), forward.memo)
            delta = change(x, call)
            if delta is None:
                self._note(x if call.finite is None else call.finite)
            elif delta.shape != x.shape:
                raise NotApplied(f"{site}: the edit returned {list(delta.shape)}, expected {list(x.shape)}.")
            else:
                changes.append((site.stream, delta, call))
        return changes

    def _timestep(self, forward: _Forward, x: Tensor, site: Site) -> Tensor:
        """The forward's timestep as [B], on the device of x [B, positions, d]."""
        rows, known, given = x.shape[0], forward.by_row, forward.timestep
        if known is not None and known.shape[0] == rows and known.device == x.device:
            return known
        if given is None:
            new = torch.zeros(rows, device=x.device)
        elif given.ndim > 1 or (given.ndim == 1 and given.shape[0] not in (1, rows)):
            raise NotApplied(
                f"{site}: the timesteps have shape {list(given.shape)}, expected one or {rows}, one a row."
            )
        else:
            new = given.to(x.device).expand(rows)
        forward.by_row = new
        return new

    def _added(self, old: Tensor, delta: Tensor, call: Call) -> Tensor:
        new = added(old, delta, call.spare)
        self._note(new if call.finite is None else call.finite)  # NaN read or added ends in new
        return new

    def _read(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """The tap's value, [B, positions, d]."""
        after = self._stream(output, site.stream)
        if site.tap == "output":
            return to_positions(after)
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
        return to_positions(after) - to_positions(before)

    def _stream(self, output: Any, stream: str) -> Tensor:
        if self.text_first:
            part = output[0 if stream == "text" else 1]
        elif isinstance(output, dict):
            part = next(iter(output.values()))
        elif isinstance(output, tuple):
            part = output[0]
            if self.text_index is not None and len(output) == 2 and _alike(part, output[1]):
                raise SiteError(
                    f"{self.name}: {self.kind} returns two sequences, and which is the text is not "
                    f"known; blocks with known streams are {', '.join(sorted(TEXT_FIRST))}."
                )
        else:
            part = output
        if not isinstance(part, Tensor):
            raise SiteError(f"{self.name}: {self.kind} returns {type(part).__name__} there, no tensor.")
        return part

    def clear(self) -> None:
        """Forget what was met so far."""
        if self.noted:
            self.noted, self.poison = False, torch.zeros_like(self.poison)

    def _note(self, x: Tensor) -> None:
        # 0 * sum is 0, or NaN once a value is NaN or infinite: one reduction, and no answer is waited for
        if self.poison.device != x.device:
            self.poison = torch.zeros((), device=x.device)
        self.noted = True
        self.poison = self.poison + x.detach().sum(dtype=torch.float32) * 0


def _alike(one: Any, other: Any) -> bool:
    """Two sequences [B, N, d] of one width: two streams, not a sequence and its attention bias."""
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
