"""Does an eraser that was made at 50 DDIM steps erase under other schedulers and step counts?

    python benchmarks/schedulers.py [--concepts Van_Gogh Cats]

The canvas, second judge, test prompts (crossed phrasings) and test seeds. Of each setting: how often the base draws
what the prompts ask for, as a share of what it does at 50 DDIM steps; and ua, as `evaluation.metrics` defines it, with
its interval. Settings at which the base keeps less than 90 % are reported and do not count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro
from machine import facts
from reading import read

from neuraleraser import attach
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.concepts import canvas_concept
from neuraleraser.evaluation import metrics
from neuraleraser.evaluation.results import concat
from neuraleraser.evaluation.vocabulary_cells import VocabularyCells
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting import fit
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
    own_scheduler = pipe.scheduler
    erasers = {name: fit(pipe, canvas_concept(name), sampling=Sampling(num_inference_steps=50)) for name in s.concepts}
    rows: list[dict[str, Any]] = []
    only_target = EvaluateSettings(
        target_rounds=3, two_object_rounds=0, held_out_rounds=0, start_image_rounds=0, fragment_prompts=0
    )
    for name, eraser in erasers.items():
        cells, whole = VocabularyCells.of(VOCABULARY, only_target).target(name), 0.0
        prompts, seeds = [c.prompt for c in cells], [c.seed for c in cells]
        for kind, steps in SETTINGS:
            pipe.scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(own_scheduler.config)
            sampling = Sampling(num_inference_steps=steps, batch_size=40)
            base = read(judge, cells, generate(pipe, prompts, seeds, sampling))
            with attach(pipe, eraser):
                images = generate(pipe, prompts, seeds, sampling)
            after = read(judge, cells, images, name, str(eraser.header.kind))
            as_asked = metrics.all_classes_right(base, "style") & metrics.all_classes_right(base, "object")
            whole = whole or float(as_asked.mean())
            pairs = metrics.pair_with_base(concat([base, after]), "neuraleraser", name)
            ua = metrics.estimate_or_none(metrics.ua, pairs)
            row = {"concept": name, "scheduler": kind, "steps": steps, "base": round(float(as_asked.mean()) / whole, 3)}
            rows.append(row | ({"n": ua.n, "ua": ua.value, "ci": [ua.low, ua.high]} if ua else {"n": 0, "ua": None}))
            print(rows[-1], flush=True)
    s.out.parent.mkdir(parents=True, exist_ok=True)
    s.out.write_text(json.dumps({"rows": rows, **facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
