"""The contract of a correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol, Self

from torch import Tensor

from neuraleraser.sites import Site


class BatchedCorrection(Protocol):
    """Corrections of several erasers at one site, computed together."""

    def __call__(self, x: Tensor, timestep: Tensor, scales: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """x [B, P, d], timestep [B] or [1], scales [B, E] (strength times opening) -> delta [B, P, d], exactly 0 where
        all scales are; and a small tensor that is not finite wherever x is not, None if there is none."""
        ...


class Correction(Protocol):
    """A change of the activations at `site`, which is added there and at all sites of `also`.

    Those come later and hold the same x: blocks that read the same prompt.
    """

    KIND: ClassVar[str]
    """Name in files."""
    AXES: ClassVar[Mapping[str, str]]
    """Axes of each tensor in files, one letter each; equal letters are equal lengths."""

    @property
    def site(self) -> Site: ...
    @property
    def also(self) -> tuple[Site, ...]: ...
    @property
    def width(self) -> int:
        """Width d of the site's activations."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that `from_tensors` takes."""
        ...

    @classmethod
    def from_tensors(cls, site: Site, tensors: Mapping[str, Tensor], also: tuple[Site, ...] = ()) -> Self:
        """Return the correction made of tensors whose axes are `AXES`."""
        ...

    def validation_error(self) -> str | None:
        """Return a reason why the values cannot be used, beside shapes and NaN; None if there is none."""
        ...

    def delta(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [B, P, d], timestep [B] -> delta [B, P, d]. Reads no other row and copies no other position."""
        ...

    @classmethod
    def batched(cls, corrections: Sequence[Self], separate: bool) -> list[tuple[list[int], BatchedCorrection]]:
        """Return corrections of this kind at one site as groups that are computed together: their indices, and how.

        `separate`: whether it pays to leave out those whose gates are shut, as on a CPU, where this is known.
        """
        ...


def sites_of(correction: Correction) -> tuple[Site, ...]:
    """Return all sites that a correction changes."""
    return correction.site, *correction.also


def group_equal(keys: Sequence[Tensor]) -> list[list[int]]:
    """Return the indices of equal tensors, in lists."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(tuple(key.tolist()), []).append(i)
    return list(groups.values())
