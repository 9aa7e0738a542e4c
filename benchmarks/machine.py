"""On what a benchmark ran: every file of results says it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def facts(packages: Sequence[str] = ("torch", "diffusers")) -> dict[str, str]:
    """Device, versions of `packages` (of those that are installed), and the commit, "-dirty" where files differ."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "device": f"{cpu}, {torch.get_num_threads()} threads{gpu}",
        "versions": ", ".join(f"{p} {v}" for p in packages if (v := installed(p))),
        "commit": git.stdout.strip() or "unknown",
    }


def installed(package: str) -> str | None:
    """The package's version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
