"""The command line. Reading it costs no torch: every verb loads what it needs when it runs."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from neuraleraser.cli import canvas, erasing, inside, inspecting, operating, saes  # each registers its verbs
from neuraleraser.cli.verbs import app
from neuraleraser.errors import NeuralEraserError

__all__ = ["canvas", "erasing", "inside", "inspecting", "main", "operating", "saes"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 from a doctor who found something, 2 for what was foreseen, 130 for
    Ctrl-C."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it says at each start that torchvision is missing
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    name = ""
    try:
        job = app.cli(
            prog="neuraleraser",
            description="Take one concept out of a text-to-image diffusion model, and measure how well it stays out.",
            args=sys.argv[1:] if argv is None else list(argv),
        )
        name = job.func.__name__
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = job()
    except NeuralEraserError as error:
        print(f"neuraleraser: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nneuraleraser: stopped. {_GO_ON.get(name, 'Nothing half-written is left.')}", file=sys.stderr)
        return 130
    return code or 0


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"neuraleraser: warning: {' '.join(str(message).split())}", file=sys.stderr)


_GO_ON = {
    "demo": "Run `neuraleraser demo --resume` (with the same options) to go on.",
    "evaluate": "Run the same command again to go on.",
    "collect": "Run the same command again to go on.",
    "train": "Run the same command again to go on.",
    "canvas_train": "Run the same command again to go on.",
    "canvas_judge": "Run the same command again to go on.",
}
