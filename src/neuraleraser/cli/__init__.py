"""The command line. Reading it costs no torch: every verb loads what it needs when it runs."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

# isort: off
from neuraleraser.cli import demo, erase, generate, evaluate, audit, compare, certify  # each registers its verb,
from neuraleraser.cli import doctor, calibrate, sites, profile, reference  # in the help's order
from neuraleraser.cli import collect, train, inspect, convert, canvas

# isort: on
from neuraleraser.cli.verbs import app
from neuraleraser.errors import NeuralEraserError
from neuraleraser.io.names import printable

__all__ = [
    "audit",
    "calibrate",
    "canvas",
    "certify",
    "collect",
    "compare",
    "convert",
    "demo",
    "doctor",
    "erase",
    "evaluate",
    "generate",
    "inspect",
    "main",
    "profile",
    "reference",
    "sites",
    "train",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 1 from a doctor who found something, 2 for what was foreseen, 130 for
    Ctrl-C, 141 where nobody reads what is printed."""
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
        _say(str(error))
        return 2
    except BrokenPipeError:  # the reader of what is printed has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        return 141  # what a shell says of it
    except Exception as error:
        if reason := _of_the_machine(error):
            _say(reason)
            return 2
        raise  # a bug stays visible
    except KeyboardInterrupt:
        print(f"\nneuraleraser: stopped. {_GO_ON.get(name, 'Nothing half-written is left.')}", file=sys.stderr)
        return 130
    return code or 0


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    print(f"neuraleraser: {printable(text, 4000)}", file=sys.stderr)


def _of_the_machine(error: Exception) -> str:
    """Return the sentence for an error of the machine, whose memory or disk is full; "" for others, which are bugs."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return (
            f"the memory is not enough ({printable(error)}): pass a smaller --batch-size where the verb has one, "
            "--dtype bfloat16, or a smaller model"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return f"the disk does not take more ({printable(error)}): free some space, or write elsewhere"
    return ""


_GO_ON = {
    "demo": "Run `neuraleraser demo --resume` (with the same options) to go on.",
    "evaluate": "Run the same command again to go on.",
    "audit": "Run the same command again to go on.",
    "collect": "Run the same command again to go on.",
    "train": "Run the same command again to go on.",
    "canvas_train": "Run the same command again to go on.",
    "canvas_judge": "Run the same command again to go on.",
}
