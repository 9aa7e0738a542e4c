"""`neuraleraser demo`."""

from __future__ import annotations

from typing import Annotated

from tyro.conf import AvoidSubcommands

from neuraleraser.cli.verbs import Flat, app, verb
from neuraleraser.settings import DemoSettings


@verb(app, "demo")
def demo(settings: Annotated[DemoSettings, Flat, AvoidSubcommands]) -> None:
    """Erase two concepts from the canvas, one at a time, from phrases; measure and show it."""
    from neuraleraser.demo import demo as run

    run(settings)
