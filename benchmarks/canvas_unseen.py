"""Can a concept be erased that the SAE never saw? Three styles and three objects that its images, labels and background
leave out.

    python benchmarks/canvas_unseen.py [--development]

A reference is trained as the one that ships (`neuraleraser canvas reference`), of a vocabulary without the six; each
of them is erased with it, by the gate of the prompt alone, as that of the image reads no SAE. Prompts name the concept
beside every open style or object, in the phrasing of the fit and in two held-out ones; others name everything else,
once each. Test seeds, second judge. Without --development these are the first three styles and objects of
`benchmarks/canvas_official.py`. A row:

    {"concept", "kind", "features", "ua", "ua_held_out", "kept", "unchanged", "n", "ci"}

features: of the gate; ua, ua_held_out: of the concept's images that show it on the base model, the share that no longer
does, with the 95 % interval (Wilson) of ua in ci; kept: of the other images that the judge reads right on the base
model (style and object), the share that it still does; unchanged: of the other images, the share with the base's bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from canvas_official import OBJECTS, STYLES
from canvas_routes import wilson
from machine import facts

from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.eraser import attach
from neuraleraser.families.canvas import GATE
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting.from_phrase import erase
from neuraleraser.fitting.reference import Reference, train_reference
from neuraleraser.io.atomic import write_bytes
from neuraleraser.judges.judgement import Judgement
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import FitSettings
from neuraleraser.vocabulary import HELD_OUT, PHRASINGS, Vocabulary

DEVELOPMENT = ("Rust", "Mosaic", "Winter"), ("Dogs", "Fishes", "Trees")
FIRST_SEED, FIRST_DEVELOPMENT_SEED = 140_000, 6_000


@dataclass(frozen=True)
class Settings:
    """Erase concepts that the reference never saw."""

    development: bool = False
    """Of development concepts, on development seeds."""
    folder: Path = Path("runs/unseen")
    """Folder in which references are kept."""
    out: Path = Path("benchmarks/results/canvas-unseen.json")


def without(names: Sequence[str]) -> Vocabulary:
    """Return the canvas's vocabulary without these names."""
    return replace(
        V,
        object_phrases={name: phrases for name, phrases in V.object_phrases.items() if name not in names},
        style_phrases={name: phrases for name, phrases in V.style_phrases.items() if name not in names},
    )


def named(name: str, phrasing: int) -> list[str]:
    """Return prompts of a concept, beside every open style or object."""
    if name in V.objects:
        return [V.fresh_prompt((name,), style, phrasing) for style in V.open_styles]
    return [V.fresh_prompt((obj,), name, phrasing) for obj in V.open_objects]


def main(s: Settings) -> None:
    """Train, erase, draw, judge, and write the rows."""
    styles, objects = DEVELOPMENT if s.development else (STYLES[:3], OBJECTS[:3])
    pipe, judge = open_pipeline("canvas"), CanvasJudge.load("second")
    pipe.set_progress_bar_config(disable=True)
    folder = s.folder / ("development" if s.development else "test")
    if (folder / "background.safetensors").exists():
        known = Reference.load(folder)
    else:
        known = train_reference(pipe, without((*styles, *objects)), GATE, folder)
    first = FIRST_DEVELOPMENT_SEED if s.development else FIRST_SEED

    def draw(prompts: Sequence[str], turn: int) -> tuple[Images, Judgement]:
        seeds = range(first + 1000 * turn, first + 1000 * turn + len(prompts))
        images = generate(pipe, prompts, seeds, default_sampling(pipe))
        return images, judge(images)

    def shows(seen: Judgement, name: str) -> np.ndarray:
        p, names = (seen.p_object, judge.objects) if name in V.objects else (seen.p_style, judge.styles)
        return np.asarray(p)[:, list(names).index(name)] > judge.thresholds[name]

    rest = [
        (style, obj)
        for i, style in enumerate(V.open_styles)
        for j, obj in enumerate(V.open_objects)
        if (i + j) % 3 == 0
    ]
    rest_prompts = [V.fresh_prompt((obj,), style) for style, obj in rest]
    asked = np.array([[list(judge.styles).index(style), list(judge.objects).index(obj)] for style, obj in rest])

    def right(seen: Judgement) -> np.ndarray:
        return (np.asarray(seen.p_style).argmax(1) == asked[:, 0]) & (
            np.asarray(seen.p_object).argmax(1) == asked[:, 1]
        )

    plain = draw(rest_prompts, 0)
    rows: list[dict[str, Any]] = []
    for name in (*styles, *objects):
        eraser = erase(pipe, name, reference=known, settings=FitSettings(num_pictures=0))
        phrasings = (0, *PHRASINGS[HELD_OUT])
        base = {k: shows(draw(named(name, k), 1 + k)[1], name) for k in phrasings}
        with attach(pipe, eraser):
            after = {k: shows(draw(named(name, k), 1 + k)[1], name) for k in phrasings}
            images, seen = draw(rest_prompts, 0)
        others = np.array([name not in cell for cell in rest])
        kept = right(plain[1]) & others
        same = np.array([np.array_equal(a, b) for a, b in zip(images, plain[0], strict=True)])
        gone, there = int((base[0] & ~after[0]).sum()), int(base[0].sum())
        held = {k: (int((base[k] & ~after[k]).sum()), int(base[k].sum())) for k in PHRASINGS[HELD_OUT]}
        held_gone, held_there = (sum(part) for part in zip(*held.values(), strict=True))
        rows.append(
            {
                **{"concept": name, "kind": "object" if name in V.objects else "style"},
                "features": len(eraser.gate.features),
                "ua": round(gone / there, 4),
                "ua_held_out": round(held_gone / held_there, 4),
                "kept": round(float(right(seen)[kept].mean()), 4),
                "unchanged": round(float(same[others].mean()), 4),
                "n": {"ua": there, "ua_held_out": held_there, "kept": int(kept.sum()), "images": int(others.sum())},
                "ci": [round(x, 4) for x in wilson(gone, there)],
            }
        )
        print(*(f"{value}" for value in rows[-1].values()), flush=True)
        write_bytes(s.out, (json.dumps({"rows": rows, **facts()}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Settings))
