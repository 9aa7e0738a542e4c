"""The contract between hooks and what edits activations."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from neuraleraser.sites.rows import Rows

F = TypeVar("F")
"""State of one forward of a component; made anew for each, typed by its owner."""


@dataclass
class EditContext(Generic[F]):
    """Facts about the forward that an edit runs in.

    timestep: [B] float32 on the activation's device, as the denoiser was given it; zeros outside a denoiser. Where one
    number stands for all rows it is expanded, with stride 0.
    rows: the image and guidance branch of each row.
    forward: state shared by all sites of one attachment in this forward.
    grid: height and width of x's positions, row by row; None where that is not known.
    text_tokens: tokens of the text that the denoiser was given; None where it has none.
    read_chunks: given a number of tokens, returns x as it would be if the block read that many at a time, one for each
    part of the text. Raises EraserNotAppliedError for a block that does not read the text itself.
    """

    timestep: Tensor
    rows: Rows
    forward: F
    text_tokens: int | None
    read_chunks: Callable[[int], list[Tensor]]
    grid: tuple[int, int] | None = None


@dataclass
class Change:
    """Result of an edit.

    delta: [B, P, d] to add, or None to leave the activations alone.
    nonfinite_probe: a small tensor that is NaN or infinite wherever x or the delta is; None: all of the result is
    looked through.
    owned: True if the delta's memory may be overwritten.
    """

    delta: Tensor | None
    nonfinite_probe: Tensor | None = None
    owned: bool = False


class Edit(Protocol[F]):
    """Edit of one site: x [B, P, d] -> change, or None to leave x alone."""

    def can_skip(self, forward: F) -> bool:
        """Return True if the edit is known to change nothing in this forward, so that x need not be read."""
        ...

    def shared_key(self) -> Hashable | None:
        """Return a key that is equal for sites whose edits add the same delta to the same text; None if unique."""
        ...

    def __call__(self, x: Tensor, context: EditContext[F], /) -> Change | None: ...


EditFunction = Callable[[Tensor, EditContext[F]], Tensor | None]
"""x [B, P, d] and its context -> delta [B, P, d], or None: an edit as a plain function."""


@dataclass
class FunctionEdit(Generic[F]):
    """Edit made of a plain function; never skipped, never shared."""

    function: EditFunction[F]

    def can_skip(self, forward: F) -> bool:
        """Return False."""
        return False

    def shared_key(self) -> None:
        """Return None."""

    def __call__(self, x: Tensor, context: EditContext[F], /) -> Change | None:
        delta = self.function(x, context)
        return None if delta is None else Change(delta)
