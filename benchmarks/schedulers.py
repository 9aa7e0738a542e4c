"""Does an eraser that was made at 50 DDIM steps erase under other schedulers and step counts?

    python benchmarks/schedulers.py [--concepts Van_Gogh Cats]

The canvas, second judge, test prompts (crossed phrasings) and test seeds. Of each setting: how often the base draws
what the prompts ask for, as a share of what it does at 50 DDIM steps; and ua, the share of images showing the concept
that no longer do. Settings at which the base keeps less than 90 % are reported and do not count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import tyro
from machine import facts

from neuraleraser import attach
from neuraleraser.bench.cells import erasure_cells
from neuraleraser.concepts import canvas_concept
from neuraleraser.fit import fit
from neuraleraser.judges import CanvasJudge
from neuraleraser.models import open_pipeline
from neuraleraser.sampling import generate
from neuraleraser.settings import EvaluateSettings, Sampling

SETTINGS = (
    ("DDIM", 50), ("DDIM", 25), ("DDIM", 12), ("EulerDiscrete", 25), ("EulerAncestralDiscrete", 25),
    ("DPMSolverMultistep", 20), ("DPMSolverMultistep", 10), ("UniPCMultistep", 15), ("HeunDiscrete", 15),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Measure erasers under other schedulers than their own."""

    concepts: tuple[str, ...] = ("Van_Gogh", "Cats")
    """Concepts of the canvas."""
    out: Path = Path("benchmarks/results/schedulers.json")
    """Where the figures go."""


def main(s: Settings) -> None:
    pipe, judge = open_pipeline("canvas", torch.bfloat16), CanvasJudge.load("second")
    names, own_scheduler = [*judge.styles, *judge.objects], pipe.scheduler
    erasers = {name: fit(pipe, canvas_concept(name), sampling=Sampling(steps=50)) for name in s.concepts}
    rows: list[dict[str, Any]] = []
    for name, eraser in erasers.items():
        cells = erasure_cells(name, EvaluateSettings(own=2, two_objects=0, held_out=0, image_to_image=0))
        prompts, seeds, own = [c.prompt for c in cells], [c.seed for c in cells], names.index(name)
        asked = np.array([[n in (c.style, *c.objects) for n in names] for c in cells])
        whole = 0.0
        for kind, steps in SETTINGS:
            pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(own_scheduler.config)
            sampling = Sampling(steps=steps, batch=40)

            def read(
                prompts: list[str] = prompts, seeds: list[int] = seeds, sampling: Sampling = sampling
            ) -> np.ndarray:
                seen = judge(generate(pipe, prompts, seeds, sampling))
                style = seen.p_style.argmax(1)[:, None] == np.arange(len(judge.styles))
                return np.concatenate([style, seen.p_object > judge.object_thresholds], 1)

            base = read()
            with attach(pipe, eraser):
                after = read()
            accuracy = float((base | ~asked).all(1).mean())
            whole = whole or accuracy
            shown = base[:, own]
            ua = float((~after[shown, own]).mean()) if shown.any() else None
            row = {"concept": name, "scheduler": kind, "steps": steps, "n": int(shown.sum())}
            rows.append(row | {"base": round(accuracy / whole, 3), "ua": ua})
            print(rows[-1], flush=True)
    s.out.parent.mkdir(parents=True, exist_ok=True)
    s.out.write_text(json.dumps({"rows": rows, **facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
