"""What each way of editing does: the modes of law 2, and learnt corrections elsewhere, on development concepts.

    python benchmarks/modes.py [--concepts Cartoon Dogs Towers] [--variants learnt outputs alone span scale replace]

All with the same gate, selection seeds, phrasings crossed as in tests (the object in one, the style in the other) and
the first judge. `learnt` corrects what later blocks read of the prompt; `outputs` what the last three cross-attentions
read out of it, from the same lessons; `alone` is `learnt` without lessons of what stands beside an object. ua, apart
for prompts of two objects, kept_still and bystander_still are those of `evaluation.metrics`; artefacts is the artefact
rate of the second judge (before -> after). `cost`, of the first concept, is the time of sampling with the eraser at
work over plain sampling.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from machine import facts
from reading import read

from neuraleraser import attach
from neuraleraser.concepts import canvas_concept
from neuraleraser.evaluation import metrics
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.protocol import target_cells
from neuraleraser.evaluation.results import concat
from neuraleraser.evaluation.timing import overhead
from neuraleraser.fit import fit
from neuraleraser.fit.dictionary import load_dictionary
from neuraleraser.judges import CanvasJudge
from neuraleraser.methods import EraserMethod
from neuraleraser.models import open_pipeline
from neuraleraser.sampling import generate
from neuraleraser.settings import SELECTION_SEEDS, EvaluateSettings, FitSettings, Sampling
from neuraleraser.sites import cross_attention_sites


@dataclass(frozen=True)
class Settings:
    """Compare ways of editing."""

    concepts: tuple[str, ...] = ("Cartoon", "Dogs", "Towers")
    """Development concepts."""
    variants: tuple[str, ...] = ("learnt", "outputs", "alone", "span", "scale", "replace")
    """Which ways."""
    pipeline: str = "canvas"
    """The pipeline."""
    dictionary: Path | None = None
    """Folder of its dictionary; None: the one that ships."""
    out: Path = Path("benchmarks/results/modes.json")
    """Where the figures go."""


def figure(estimate: Estimate | None) -> float | None:
    return None if estimate is None else round(estimate.value, 3)


def main(s: Settings) -> None:
    pipe = open_pipeline(s.pipeline, torch.bfloat16)
    known = load_dictionary(s.dictionary) if s.dictionary else load_dictionary()
    first, second = CanvasJudge.load("first"), CanvasJudge.load("second")
    sampling = Sampling(batch=40)
    rows: list[dict[str, Any]] = []
    for name in s.concepts:
        chosen = EvaluateSettings(
            target_rounds=2, two_object_rounds=1, held_out_rounds=0, image_to_image_rounds=0, fragment_prompts=0
        )
        cells = target_cells(name, chosen, seeds=SELECTION_SEEDS)
        prompts, seeds = [c.prompt for c in cells], [c.seed for c in cells]
        images = generate(pipe, prompts, seeds, sampling)
        base, flagged = read(first, cells, images), metrics.artefact_rate(read(second, cells, images))
        for variant in s.variants:
            concept = canvas_concept(name)
            if variant == "alone":
                concept = replace(concept, beside=())
            mode = "learnt" if variant in ("outputs", "alone") else variant
            started = time.monotonic()
            eraser = fit(
                pipe,
                concept,
                FitSettings(mode=mode),  # type: ignore[arg-type]
                known=known,
                sampling=Sampling(),
                edits=[(site,) for site in cross_attention_sites(pipe)[-3:]] if variant == "outputs" else None,
            )
            took = time.monotonic() - started
            with attach(pipe, eraser):
                images = generate(pipe, prompts, seeds, sampling)
            after = read(first, cells, images, name, concept.kind)
            then = metrics.artefact_rate(read(second, cells, images))
            pairs = metrics.pair_with_base(concat([base, after]), "neuraleraser", name)
            two = metrics.two_objects(pairs)
            cost = None
            if name == s.concepts[0]:
                timed = EvaluateSettings(timings=5, timed_images=8, sampling=sampling)
                cost = round(overhead(pipe, EraserMethod(eraser), cells[:8], timed)["overhead"], 3)
            row = {
                "concept": name,
                "variant": variant,
                "n": int(metrics.shows(pairs.base, concept.kind, name).sum()),
                "ua": figure(metrics.possible(metrics.ua, pairs.where(~two))),
                "ua_two_objects": figure(metrics.possible(metrics.ua, pairs.where(two))),
                "kept_still": figure(metrics.possible(metrics.kept_still, pairs)),
                "bystander_still": figure(metrics.possible(metrics.bystander_still, pairs)),
                "artefacts": [figure(flagged), figure(then)],
                "loss": eraser.header["loss"],
                "cost": cost,
                "seconds": round(took, 1),
                "bytes": sum(t.numel() * 4 for c in eraser.corrections for t in c.tensors.values()),
            }
            rows.append(row)
            print({k: v for k, v in row.items() if v is not None}, flush=True)
    s.out.parent.mkdir(parents=True, exist_ok=True)
    s.out.write_text(json.dumps({"rows": rows, "pipeline": s.pipeline, **facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
