"""Costs of a piece of work: its time, and the memory that it takes at most."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost(TypedDict):
    """Seconds, and bytes of memory at most; None where the system does not say."""

    seconds: float
    peak_bytes: int | None


class CostMeter:
    """Time and largest memory since this was made.

    Memory is, on a CUDA device, what torch allocated there, weights among it; else the process's resident set,
    libraries and weights among it. Where a resident set's peak cannot be reset (on systems other than Linux, in some
    containers), it is that since the process started. Making a second meter also resets the first one's peak.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device, self.started = torch.device(device), time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # no such file, or not ours to write
                _CLEAR.write_text("5")

    def read(self) -> Cost:
        """Return the cost so far."""
        return Cost(seconds=round(time.monotonic() - self.started, 1), peak_bytes=self._peak_bytes())

    def _peak_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError, StopIteration):
            line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        if sys.platform == "win32":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
