"""Do erasers hold when many act at once? Objects and styles of the canvas, one more after the other.

    python benchmarks/canvas_many.py --erasers runs/erasers

Erasers are attached together, three more at a time; each is made alone and knows of no other. Every open object is
drawn in six styles, or every open style with four objects, from prompts that name them (test seeds, second judge). A
row:

    {"kind", "erased", "n_erased", "ua", "retained", "artefacts", "unchanged", "n", "ci"}

ua: of the images of what is erased that show it on the base model, the share that no longer does, with its 95 %
interval (Wilson) in ci; retained: of the images of everything else that the judge reads right on the base model, in
that kind, the share that it still does; artefacts: share of all images farther from real pictures than 99 % of them
are; unchanged: of the images of everything else, the share with the base's bits. Dogs, Fishes and Trees are development
concepts.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from canvas_official import OBJECTS, STYLES
from canvas_routes import wilson

from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.eraser import Eraser, attach
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.io.atomic import write_bytes
from neuraleraser.sampling import generate

FIRST_SEED = 130_000
NINE = (*OBJECTS, "Dogs", "Fishes", "Trees")


@dataclass(frozen=True)
class Settings:
    """Attach many erasers at once."""

    erasers: Path
    """Folder of erasers, named after their concepts."""
    out: Path = Path("benchmarks/results/canvas-many.json")


def main(s: Settings) -> None:
    """Draw, judge, and write the rows."""
    pipe, judge = open_pipeline("canvas"), CanvasJudge.load("second")
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []
    for kind, order in (("object", NINE), ("style", STYLES)):
        if kind == "object":
            cells = [(style, obj) for obj in V.open_objects for style in ("Seed_Images", *STYLES[:5])]
        else:
            cells = [(style, obj) for style in V.open_styles for obj in ("Architectures", "Human", "Sea", "Towers")]
        names = list(judge.objects if kind == "object" else judge.styles)
        asked = np.array([names.index(obj if kind == "object" else style) for style, obj in cells])
        limits = np.array([judge.thresholds[name] for name in names])
        prompts = [V.fresh_prompt((obj,), style) for style, obj in cells]
        base = None
        for count in range(0, len(order) + 1, 3):
            erased = order[:count]
            erasers = [Eraser.load(s.erasers / f"{name}.safetensors") for name in erased]
            with attach(pipe, erasers) if erasers else nullcontext():
                images = generate(pipe, prompts, range(FIRST_SEED, FIRST_SEED + len(cells)), default_sampling(pipe))
            seen = judge(images)
            p = np.asarray(seen.p_object if kind == "object" else seen.p_style)
            shown = p[np.arange(len(p)), asked] > limits[asked]
            right = shown & (p.argmax(1) == asked)
            base = base or (images, shown, right)
            own = np.isin(asked, [names.index(name) for name in erased])
            there, others = base[1] & own, base[2] & ~own
            same = np.array([np.array_equal(a, b) for a, b in zip(images, base[0], strict=True)])
            gone = int((~shown & there).sum())
            rows.append(
                {
                    **{"kind": kind, "erased": list(erased), "n_erased": count},
                    "ua": round(gone / int(there.sum()), 4) if count else None,
                    "retained": round(float(right[others].mean()), 4),
                    "artefacts": round(float((np.asarray(seen.artefact) > judge.artefact_threshold).mean()), 4),
                    "unchanged": round(float(same[~own].mean()), 4),
                    "n": {"ua": int(there.sum()), "retained": int(others.sum()), "images": len(cells)},
                    "ci": [round(x, 4) for x in wilson(gone, int(there.sum()))] if count else None,
                }
            )
            print(*(f"{value}" for value in rows[-1].values()), flush=True)
            write_bytes(s.out, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Settings))
