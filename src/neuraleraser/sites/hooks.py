"""Hook of one module: what an attachment reads and edits there. As in `forwards`, only what torch.compile can trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.families import known_names
from neuraleraser.site import Site
from neuraleraser.sites.edit import Change, Edit, EditContext
from neuraleraser.sites.forwards import ComponentHooks, Forward, argument_of
from neuraleraser.sites.layout import add_keeping_bits, replace_tensor, to_positions
from neuraleraser.sites.modules import forward_arguments, is_text_first


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
        component.sites.append(self.name)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with the edits' deltas, or None (leave it) where no edit adds one."""
        if not self.component.active or self.component.thread.get().paused:
            return None
        forward = self.component.forward_now(self.name)

        def read_chunks(site: Site, tokens: int) -> list[Tensor]:
            parts = self._outputs_by_chunk(site, module, args, kwargs, tokens)
            return [self._read_tap(site, forward, args, kwargs, part) for part in parts]

        changes = self._run_edits(
            forward, lambda site: self._read_tap(site, forward, args, kwargs, output), read_chunks
        )
        if not changes:
            return None
        for stream, change in changes:
            old = self._stream(output, stream)
            output = replace_tensor(output, old, self._add(forward, old, change))
        return output

    def edit_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the arguments with the edits' deltas in the text that the module reads, or None (leave them)."""
        if not self.component.active or self.component.thread.get().paused:
            return None
        forward = self.component.forward_now(self.name)
        if all(edit.can_skip(forward.state) for _, edit in self.edits):  # most often: the text need not be found
            forward.ran[self.number] = True
            return None
        given = argument_of(args, kwargs, "encoder_hidden_states", self.text_index)
        text = given[0] if isinstance(given, (tuple, list)) and given else given  # beside it an IP-Adapter's images
        if not isinstance(text, Tensor):
            raise SiteError(f"{self.name}: {self.kind} was given no text to read, but {type(given).__name__}.")
        new = self._edited_text(forward, text)
        if new is None:
            return None
        new = replace_tensor(tuple(given), text, new) if given is not text else new
        if "encoder_hidden_states" in kwargs:
            return args, kwargs | {"encoder_hidden_states": new}
        assert self.text_index is not None
        return (*args[: self.text_index], new, *args[self.text_index + 1 :]), kwargs

    def _edited_text(self, forward: Forward, text: Tensor) -> Tensor | None:
        """Return the text with the deltas, summed once for all blocks that add the same to the same; None: no delta."""
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
                self._grid(forward, x) if site.stream == "image" else None,
            )
            change = edit(x, context)
            if change is None:
                self._probe_nonfinite(forward, x)
            elif change.delta is None:
                self._probe_nonfinite(forward, x if change.nonfinite_probe is None else change.nonfinite_probe)
            elif change.delta.shape != x.shape:
                raise EraserNotAppliedError(
                    f"{site}: the edit returned {list(change.delta.shape)}, expected {list(x.shape)}."
                )
            else:
                changes.append((site.stream, change))
        return changes

    def _grid(self, forward: Forward, x: Tensor) -> tuple[int, int] | None:
        """Return height and width of the image's positions [B, positions, d]; None where they are not known."""
        if forward.latent_size is None:
            return None
        height, width = forward.latent_size
        while height * width > x.shape[1]:  # a UNet's deeper blocks hold half of each side, rounded up
            height, width = (height + 1) // 2, (width + 1) // 2
        return (height, width) if height * width == x.shape[1] else None

    def _timestep(self, forward: Forward, x: Tensor, site: Site) -> Tensor:
        """Return the forward's timestep as [B], on the device of x [B, positions, d]."""
        rows, known, given = x.shape[0], forward.timestep_per_row, forward.timestep
        if known is not None and known.shape[0] == rows and known.device == x.device:
            return known
        if given is None:
            new = torch.zeros(rows, device=x.device)
        elif given.ndim > 1 or (given.ndim == 1 and rows % given.shape[0]):
            raise EraserNotAppliedError(
                f"{site}: the timesteps have shape {list(given.shape)}, expected one or {rows}, one per row."
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
        self._probe_nonfinite(forward, new if change.nonfinite_probe is None else change.nonfinite_probe)
        return new

    def _probe_nonfinite(self, forward: Forward, x: Tensor) -> None:
        # 0 * sum is 0, or NaN once a value is NaN or infinite: one reduction, and no answer is waited for
        found, before = x.detach().sum(dtype=torch.float32) * 0, forward.probes[self.number]
        forward.probes[self.number] = found if before is None else before.to(found.device) + found

    def _read_tap(
        self, site: Site, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor:
        """Return the tap's value, [B, positions, d]."""
        after = self._stream(output, site.stream)
        if site.tap == "output":
            x = to_positions(after)
        else:
            if site.stream == "text":
                before = argument_of(args, kwargs, "encoder_hidden_states", self.text_index)
            else:
                before = argument_of(args, kwargs, self.image_name, 0)
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
        """Return the image's or the text's part of a block's output."""
        if self.text_first:
            part = output[0 if stream == "text" else 1]
        elif isinstance(output, dict):
            part = next(iter(output.values()))
        elif isinstance(output, tuple):
            part = output[0]
            if self.text_index is not None and len(output) == 2 and _two_sequences_of_one_width(part, output[1]):
                known = sorted(known_names(lambda family: family.blocks.text_first))
                raise SiteError(
                    f"{self.name}: {self.kind} returns two sequences, and which is the text is not "
                    f"known; blocks with known streams are {', '.join(known)}."
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
