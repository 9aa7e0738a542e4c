"""Run by `test_together.py` as a process of its own: evaluates in one process, to FOLDER/alone; in two at once, to
FOLDER/shared; and in two of which one gets SIGKILL in its fifth batch, to FOLDER/killed.

    python -m helpers.together FOLDER

Each batch that a process judges is a line of FOLDER/{name}.judged, with its number. The parent computes nothing itself,
so that its children may start where it is. No process ends its first batch before each has begun one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from multiprocessing.synchronize import Barrier
from pathlib import Path

from helpers.killed import evaluate

KILLED_IN = 5


def start(folder: Path, number: int, barrier: Barrier, killed: bool) -> int:
    """Evaluate in a child; return its id."""
    judged = 0

    def tick() -> None:
        nonlocal judged
        judged += 1
        if judged == 1:
            barrier.wait(120)
        if killed and judged == KILLED_IN:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(folder.with_suffix(".judged"), "a") as file:
            file.write(f"{number}\n")

    child = os.fork()
    if child == 0:
        try:
            evaluate(folder, tick)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


if __name__ == "__main__":
    for name, count, killed in (("alone", 1, False), ("shared", 2, False), ("killed", 2, True)):
        barrier = multiprocessing.Barrier(count)
        children = [start(Path(sys.argv[1]) / name, i, barrier, killed and i == 0) for i in range(count)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if codes != [-signal.SIGKILL if killed and i == 0 else 0 for i in range(count)]:
            sys.exit(f"{name} ended with {codes}")
