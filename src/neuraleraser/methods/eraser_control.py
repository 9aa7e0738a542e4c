"""Controls made of an eraser without its image gate: they change its gate or its corrections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from neuraleraser.eraser import Eraser, Trace, attach
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.sites import PROMPT_ROUTES


class EraserControl(ABC):
    """Method that is an eraser with one part replaced: what that part is good for."""

    eraser: Eraser

    @property
    @abstractmethod
    def control(self) -> Eraser:
        """The eraser with the part replaced."""

    @property
    def concept(self) -> str:
        """The concept's name."""
        return self.eraser.name

    @property
    def kind(self) -> str:
        """ "style", "object" or "other"."""
        return EraserMethod(self.eraser).kind

    def applied(self, pipe: Any) -> AbstractContextManager[Trace]:
        """Correct where the gate opens.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields the trace.
        """
        return attach(pipe, self.control)

    def watched(self, pipe: Any) -> AbstractContextManager[Trace]:
        """Note where the gate opens, and change nothing.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields the trace.
        """
        return attach(pipe, self.control, action="detect")


def prompt_part(eraser: Eraser) -> Eraser:
    """Return the eraser without its image gate and guided correction, and with the routes that are left."""
    header = eraser.header
    routes = tuple(route for route in header.routes if eraser.gate.picture or route in PROMPT_ROUTES)
    made = header.made_for and replace(header.made_for, shapes="")  # these are of the image gate's site, too
    header = replace(header, routes=routes, least_strength=None, image_separation=(), made_for=made)
    return replace(eraser, header=header, image_gate=None, guided=None)
