"""Rows of a denoiser forward: the image and the guidance branch that each belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuraleraser.errors import EraserNotAppliedError


@dataclass(frozen=True)
class Rows:
    """Layout of a forward's rows: blocks of `images` rows, one block a guidance branch, in the order of the batch.

    negative: for each block, whether its text is the call's negative prompt.
    counts: for each block, whether what its prompt asks for is drawn. False for a negative block while guidance is
    above 1: it pushes away from its prompt.

    A site may hold several rows for each of these (frames of a video); they stand side by side.
    """

    images: int
    negative: tuple[bool, ...] = (False,)
    counts: tuple[bool, ...] = (True,)

    @property
    def size(self) -> int:
        """Rows of the forward."""
        return self.images * len(self.counts)

    def frames(self, rows: int) -> int:
        """Return the rows that a site with `rows` rows holds for each row of the forward.

        Raises EraserNotAppliedError where they do not divide evenly.
        """
        if rows % self.size:
            raise EraserNotAppliedError(
                f"a site has {rows} rows where the denoiser was given {self.size}: rows cannot be assigned to images"
            )
        return rows // self.size

    def image_of(self, rows: int) -> list[int]:
        """Return the number of the image of each of a site's `rows` rows, counted from 0."""
        each = self.frames(rows)
        return [image for _ in self.counts for image in range(self.images) for _ in range(each)]

    def rows_with_prompt(self, rows: int) -> list[bool] | None:
        """Return for each of a site's `rows` rows whether its prompt is drawn; None if all are."""
        if all(self.counts):
            return None
        each = self.frames(rows) * self.images
        return [block for block in self.counts for _ in range(each)]

    def first_conditional(self) -> list[int] | None:
        """Return the rows of the forward's first block that is not negative, by image; None if there is none."""
        for block, negative in enumerate(self.negative):
            if not negative:
                return list(range(block * self.images, (block + 1) * self.images))
        return None

    def prompt_blocks(self) -> list[int]:
        """Return the blocks that the prompt is asked of: those that are not negative.

        Where no text tells them apart, as the prompt is the negative prompt, all but the first: diffusers' pipelines
        put the negative block before the others.
        """
        found = [block for block, negative in enumerate(self.negative) if not negative]
        return found[1:] if len(found) == len(self.negative) > 1 else found

    def branches(self, x: Tensor) -> list[tuple[bool, Tensor]]:
        """Return (is negative, rows [images * frames, ...]) for each block of x [rows, ...]."""
        return list(zip(self.negative, x.chunk(len(self.counts)), strict=True))


def match_rows(values: Tensor, rows: int) -> Tensor:
    """Return values [n] for a site with another number of rows: the largest of its frames, or repeated for frames.

    Raises EraserNotAppliedError where neither number divides the other.
    """
    n = len(values)
    if n == rows:
        return values
    if n % rows == 0:
        return values.view(rows, -1).amax(1)
    if rows % n == 0:
        return values.repeat_interleave(rows // n)
    raise EraserNotAppliedError(
        f"a gate has {n} rows and the site it acts at {rows}: rows cannot be assigned to each other"
    )


@dataclass(eq=False)
class Series:
    """One call of `generate`: `total` images in batches. `numbering` is for observers: what each counts them from."""

    total: int
    numbering: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One batch of a series: images `first` ... `first + real - 1`, filled up with padding to `size`."""

    series: Series
    first: int
    real: int
    size: int


@dataclass(frozen=True)
class CallFacts:
    """Facts that a pipeline's call states about its rows; each None where it does not.

    images: images that it draws. prompt_text, negative_text: embeddings [images, tokens, d] of the prompt and of the
    negative prompt. guidance: its guidance scale.
    """

    images: int | None = None
    prompt_text: Tensor | None = None
    negative_text: Tensor | None = None
    guidance: float | None = None


_batch: ContextVar[Batch | None] = ContextVar("batch", default=None)


@contextmanager
def generating_batch(batch: Batch) -> Iterator[None]:
    """Context manager: what this thread draws while it is open is `batch`."""
    token = _batch.set(batch)
    try:
        yield
    finally:
        _batch.reset(token)


def current_batch() -> Batch | None:
    """Return the batch that this thread draws, or None outside `generating_batch`."""
    return _batch.get()


def decode_rows(size: int, text: Tensor | None, said: CallFacts) -> Rows:
    """Return the layout of a forward with `size` rows, which reads `text` [rows, tokens, d], from what its call says.

    A block of rows is negative if its text is the call's negative prompt, bit for bit. It is not where the prompt that
    is drawn is the same.
    """
    images = said.images
    if not images or size % images:
        return Rows(size)
    blocks = size // images
    negative = [False] * blocks
    if text is not None and said.negative_text is not None and text.ndim == 3 and len(text) % size == 0:
        frames = len(text) // size
        with torch.no_grad():
            negative = [
                _same_text(block, said.negative_text, images, frames)
                and not _same_text(block, said.prompt_text, images, frames)
                for block in text.chunk(blocks)
            ]
    if blocks > 1 and all(negative):  # which block is drawn cannot be seen, and need not
        negative = [False] * blocks
    pushes_away = said.guidance is not None and said.guidance > 1
    return Rows(images, tuple(negative), tuple(not (is_negative and pushes_away) for is_negative in negative))


def _same_text(block: Tensor, other: Tensor | None, images: int, frames: int) -> bool:
    """Return True if a block [images * frames, tokens, d] is the text [images or 1, tokens, d]."""
    if (
        other is None
        or other.ndim != 3
        or other.shape[1:] != block.shape[1:]
        or len(other) not in (1, images, len(block))
    ):
        return False
    if len(other) == images != len(block):
        other = other.repeat_interleave(frames, 0)
    return torch.equal(block, other.to(block).expand_as(block))
