"""Versions of what makes figures."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any


def versions(pipe: Any) -> dict[str, str]:
    """Return what made these figures: packages, Python, machine, threads, and the pipeline's parts."""
    import torch

    names = ("neuraleraser", "torch", "diffusers", "transformers", "numpy")
    out = {}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    device = next(pipe.unet.parameters()).device if getattr(pipe, "unet", None) is not None else pipe.device
    return out | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "device": str(device),
        "pipeline": f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}",
    }
