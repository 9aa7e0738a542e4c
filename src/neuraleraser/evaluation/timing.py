"""Timing a method against plain sampling."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from neuraleraser.evaluation.figures import spaced_sample
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import MAIN_GROUPS, Cell
from neuraleraser.families.defaults import evaluation_sampling
from neuraleraser.sampling import generate
from neuraleraser.settings import EvaluateSettings


def overhead(pipe: Any, method: Method, cells: Sequence[Cell], s: EvaluateSettings) -> dict[str, float]:
    """Return sampling time with the method applied over plain sampling: "overhead" on cells that ask for its concept,
    "overhead_idle" on others (of the same cells if there are none).

    Medians over `s.timings` rounds; in each the three are timed right after one another on equal batches, in
    alternating order, so that other load on the machine falls on all of them.
    """
    n = s.timed_images
    sampling = replace(evaluation_sampling(pipe, s), batch_size=n)
    main = [c for c in cells if c.group in MAIN_GROUPS]
    target = [c for c in main if c.asks_for(method.concept)]
    others = [c for c in main if not c.asks_for(method.concept)]
    acting, idle = spaced_sample(target, n), spaced_sample(others or target, n)

    def seconds(some: Sequence[Cell], applied: bool) -> float:
        with method.applied(pipe) if applied else nullcontext():
            started = time.perf_counter()
            generate(pipe, [c.prompt for c in some], [c.seed for c in some], sampling)
            return time.perf_counter() - started

    seconds(acting, True)  # warm
    ratios = []
    jobs: list[tuple[Sequence[Cell], bool]] = [(acting, False), (acting, True), (idle, True)]
    for k in range(s.timings):
        order = range(3) if k % 2 == 0 else range(2, -1, -1)
        took = {i: seconds(*jobs[i]) for i in order}
        ratios.append((took[1] / took[0], took[2] / took[0]))
    middle = np.median(np.array(ratios), 0)
    return {"overhead": float(middle[0]), "overhead_idle": float(middle[1])}
