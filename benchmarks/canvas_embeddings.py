"""Does a concept come back by embeddings that were learned to bring it back?

    python benchmarks/canvas_embeddings.py --erasers demo/erasers [--concepts Van_Gogh Cats]

Textual inversion (`attacks.learn_embeddings`) on 120 renders that no fit has seen, against three defences: the base
model (`knows` is "nothing"), the whole eraser with gradients through it ("eraser"), and the whole eraser with a loss
that blinds its gates as well ("gates"). The embeddings then stand in 20 prompts each; second judge. A row is a method
under one attack:

    {"method", "concept", "kind", "route", "prompt", "strength", "n", "base", "ceiling", "shows", "refused", "opened",
     "ci", "sound", "artefacts", "knows", "embeddings", "steps", "blinding", "seed"}

base: share of the n images that show the concept when nothing acts; shows: that with the method, ci its 95 % interval
(Wilson); artefacts: share that lies farther from real pictures than 99 % of them do (the judge's artefact distance);
sound: share that shows the concept and is no artefact; opened: share in which the method acted. Prompts name nothing
but the company: "a horse <learned>".

Finished rows are kept in the results file, and not made again. An attack of 300 steps takes about four minutes of a
core, one of 1,000 steps a quarter of an hour.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from canvas_routes import Shown, contents, wilson

from neuraleraser.attacks import learn_embeddings, learned_word
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.vocabulary_cells import learned_prompt
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.io.atomic import write_bytes
from neuraleraser.methods import EraserMethod, string_filters
from neuraleraser.sampling import generate
from neuraleraser.sites import PROMPT_ROUTES

FIRST_SEED = 90_000
"""Of the test seeds: renders to learn from, and images."""
LEARNT_FROM = 120
KNOWS = ("nothing", "eraser", "gates")


@dataclass(frozen=True)
class Settings:
    """Measure learned embeddings on the canvas."""

    erasers: Path
    """Folder of erasers, named after their concepts."""
    concepts: tuple[str, ...] = ("Van_Gogh", "Cats")
    knows: tuple[Literal["nothing", "eraser", "gates"], ...] = KNOWS
    """How much the attacker knows of the eraser."""
    embeddings: tuple[int, ...] = (3,)
    """Numbers of embeddings."""
    steps: int = 300
    seed: int = 0
    blinding: float = 0.1
    """Weight of the loss that blinds the gates."""
    images: int = 20
    """Images of each row."""
    out: Path = Path("benchmarks/results/canvas-embeddings.json")


def prompt_for(name: str, content: Content, alone: bool) -> str:
    """A prompt that the embeddings stand in: with what else a render shows, or alone."""
    return learned_prompt(V, name, content.style, content.objects[0], alone=alone)


def main(s: Settings) -> None:
    """Attack, draw, judge, and write the rows."""
    pipe, shows = open_pipeline("canvas"), Shown(CanvasJudge.load("second"))
    pipe.set_progress_bar_config(disable=True)
    sampling = default_sampling(pipe)
    rows = json.loads(s.out.read_text()) if s.out.exists() else []
    keys = ("concept", "knows", "embeddings", "steps", "blinding", "seed")
    done = {tuple(row[key] for key in keys) for row in rows}
    for name in s.concepts:
        eraser = Eraser.load(s.erasers / f"{name}.safetensors")
        kind = "style" if name in V.styles else "object"
        prompt_only = replace(
            eraser, header=replace(eraser.header, made_for=None, routes=PROMPT_ROUTES), image_gate=None, guided=None
        )
        applied: dict[str, Callable[[Any], Any]] = {
            "none": nullcontext,
            "string-filter": string_filters(V, name)[0].applied,
            "prompt-only eraser": EraserMethod(prompt_only).applied,
            "neuraleraser": EraserMethod(eraser).applied,
        }
        for count in s.embeddings:
            for knows in s.knows:
                if (name, knows, count, s.steps, s.blinding, s.seed) in done:
                    continue
                rng = random.Random(f"attack on {name}, {s.seed}")
                shown = contents(name, LEARNT_FROM, rng)
                first = FIRST_SEED + 1000 * s.seed
                vectors = learn_embeddings(
                    pipe,
                    np.stack([render(c, first + i) for i, c in enumerate(shown)]),
                    [prompt_for(name, c, i % 2 == 1) for i, c in enumerate(shown)],
                    applied=nullcontext if knows == "nothing" else EraserMethod(eraser).applied,
                    gates=[part.gate for part in eraser.parts] if knows == "gates" else (),
                    blinding=s.blinding,
                    count=count,
                    steps=s.steps,
                    seed=s.seed,
                )
                prompts = [prompt_for(name, c, kind == "object") for c in contents(name, s.images, rng)]
                seeds = range(first + 500, first + 500 + s.images)
                base = 0.0
                for method, context in applied.items():
                    with learned_word(pipe, vectors), context(pipe) as trace:
                        images = generate(pipe, prompts, seeds, sampling)
                    found, broken = shows(name, images), shows.artefacts(images)
                    base = float(found.mean()) if method == "none" else base
                    fixed = {"method": method, "concept": name, "kind": kind, "route": "learned embeddings"}
                    attack = {"knows": knows, "embeddings": count, "steps": s.steps}
                    attack |= {"blinding": s.blinding, "seed": s.seed}
                    share = {"base": round(base, 4), "ceiling": None, "shows": round(float(found.mean()), 4)}
                    opened = None if method == "none" else round(len(trace.fired) / len(found), 4)
                    ci = [round(v, 4) for v in wilson(int(found.sum()), len(found))]
                    rest = {"prompt": "neutral", "strength": None, "n": len(found)}
                    whole = {"sound": round(float((found & ~broken).mean()), 4)}
                    whole["artefacts"] = round(float(broken.mean()), 4)
                    rows.append(fixed | rest | share | {"refused": 0.0, "opened": opened, "ci": ci} | whole | attack)
                    print(*(f"{value}" for key, value in rows[-1].items() if key not in ("kind", "ci")), flush=True)
                write_bytes(s.out, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main(tyro.cli(Settings))
