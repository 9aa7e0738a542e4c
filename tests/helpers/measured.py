"""A short evaluation, and the results that it leaves on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from helpers.stamp_judge import OBJECTS, STYLES, StampJudge
from neuraleraser.evaluation.results import BASE, UNHOOKED, Results, concat
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.judges import JudgeSpec
from neuraleraser.settings import EvaluateSettings, Sampling

S = EvaluateSettings(
    grid_rounds=1,
    target_rounds=1,
    two_object_rounds=1,
    held_out_rounds=1,
    start_image_rounds=0,
    fragment_prompts=4,
    held_out_grid_rounds=1,
    unhooked_checks=5,
    idle_checks=2,
    timings=1,
    timed_images=2,
    sampling=Sampling(num_inference_steps=2, batch_size=8),
    styles=STYLES,
    objects=OBJECTS,
)


def everything(folder: Path) -> Results:
    """All rows on disk."""
    spec = JudgeSpec.of(StampJudge())
    run = RunFolder(folder, spec)
    methods = json.loads((folder / "run.json").read_text())["methods"]
    places = [(BASE, ""), (UNHOOKED, ""), *((name, concept) for name, some in methods.items() for concept in some)]
    return concat([run.results(*place) for place in places])


def of(results: Results, method: str, concept: str = "") -> Results:
    return results.where((results.method == method) & (results.concept == concept))


def same(a: Results, b: Results) -> bool:
    """Equal but for the order of rows and the time they took."""
    a, b = (r.where(np.array(sorted(range(len(r)), key=r.keys().__getitem__))) for r in (a, b))
    return a.table.drop_columns(["seconds"]).equals(b.table.drop_columns(["seconds"]))
