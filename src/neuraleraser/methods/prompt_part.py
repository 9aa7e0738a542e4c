"""An eraser without its image gate: what controls are made of that change its gate or its corrections."""

from __future__ import annotations

from dataclasses import replace

from neuraleraser.eraser import Eraser
from neuraleraser.sites import PROMPT_ROUTES


def prompt_part(eraser: Eraser) -> Eraser:
    """Return the eraser without its image gate and guided correction, and with the routes that are left."""
    header = eraser.header
    routes = tuple(route for route in header.routes if eraser.gate.picture or route in PROMPT_ROUTES)
    made = header.made_for and replace(header.made_for, shapes="")  # these are of the image gate's site, too
    header = replace(header, routes=routes, least_strength=None, image_separation=(), made_for=made)
    return replace(eraser, header=header, image_gate=None, guided=None)
