"""Can one style of one object be erased, and every other object in that style and that object in every other stay?

    python benchmarks/canvas_joint.py [--development]

UnlearnCanvas's joint task on the canvas, of three pairs: "a cat in Van Gogh style" goes, cats and Van Gogh stay.
Each eraser is fitted to a concept whose prompts name both (prompt gate alone: pictures of a pair are few), with what
ships. Test seeds, second judge. Without --development these are the first three styles and objects of
`benchmarks/canvas_official.py`. A row:

    {"style", "object", "features", "ua", "ua_both", "ua_held_out", "sc", "oc", "up", "unchanged", "n", "ci"}

ua: of the pair's images that show both on the base model, the share that no longer shows both, with its 95 % interval
(Wilson) in ci; ua_both: the share that shows neither; ua_held_out: as ua, in phrasings that no fit saw; sc: of other
objects in that style whose style is right on the base model, the share whose style still is; oc: of the object in other
styles, the same of the object; up: of all else, the same of style and object together; unchanged: of these three kinds
of images, the share with the base's bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from canvas_official import OBJECTS, STYLES
from canvas_routes import wilson
from canvas_unseen import DEVELOPMENT
from machine import facts

from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import attach
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting import fit
from neuraleraser.io.atomic import write_bytes
from neuraleraser.judges.judgement import Judgement
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import FitSettings
from neuraleraser.vocabulary import HELD_OUT, PHRASINGS, SEEN

FIRST_SEED, FIRST_DEVELOPMENT_SEED = 150_000, 9_000
ROUNDS = 6
"""Seeds of each phrasing of a pair."""


@dataclass(frozen=True)
class Settings:
    """Erase pairs of a style and an object."""

    development: bool = False
    """Of development concepts, on development seeds."""
    out: Path = Path("benchmarks/results/canvas-joint.json")


def pair_concept(style: str, obj: str) -> Concept:
    """Return the concept of an object in a style, in the phrasings of a fit: what names both becomes an empty scene;
    other objects in that style and that object in others are its hard negatives."""
    pairs = []
    for i in PHRASINGS[SEEN]:
        what, empty = V.object_phrases[obj][i], V.empty_phrases[i]
        for k in PHRASINGS[SEEN]:
            how = V.style_phrases[style][k]
            pairs += [Pair(f"{what} {how}", empty), Pair(f"{how}, {what}", empty)]
    others = [
        V.prompt((what,), how, i)
        for what, how in (*((o, style) for o in V.open_objects), *((obj, s) for s in V.open_styles))
        for i in PHRASINGS[SEEN]
        if (what, how) != (obj, style)
    ]
    return Concept(f"{obj} in {style}", "other", tuple(pairs), hard_negatives=tuple(others))


def main(s: Settings) -> None:
    """Fit, draw, judge, and write the rows."""
    styles, objects = DEVELOPMENT if s.development else (STYLES[:3], OBJECTS[:3])
    first = FIRST_DEVELOPMENT_SEED if s.development else FIRST_SEED
    pipe, judge = open_pipeline("canvas"), CanvasJudge.load("second")
    pipe.set_progress_bar_config(disable=True)
    rows: list[dict[str, Any]] = []

    def draw(cells: Sequence[tuple[str, str, int]]) -> tuple[Images, Judgement]:
        prompts = [V.fresh_prompt((obj,), style, phrasing) for style, obj, phrasing in cells]
        images = generate(pipe, prompts, range(first, first + len(cells)), default_sampling(pipe))
        return images, judge(images)

    def read(seen: Judgement, cells: Sequence[tuple[str, str, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Return where the style, and the object, that a cell asks for is the one that the judge sees most."""
        asked_styles = np.array([list(judge.styles).index(style) for style, _, _ in cells])
        asked_objects = np.array([list(judge.objects).index(obj) for _, obj, _ in cells])
        styles_seen, objects_seen = (np.asarray(p).argmax(1) for p in (seen.p_style, seen.p_object))
        return styles_seen == asked_styles, objects_seen == asked_objects

    for style, obj in zip(styles, objects, strict=True):
        eraser = fit(pipe, pair_concept(style, obj), FitSettings(num_pictures=0))
        own = [(style, obj, k) for k in PHRASINGS for _ in range(ROUNDS)]
        same_style = [(style, other, 0) for other in V.open_objects if other != obj]
        same_object = [(other, obj, 0) for other in V.open_styles if other != style]
        rest = [
            (other, what, 0)
            for i, other in enumerate(V.open_styles)
            for j, what in enumerate(V.open_objects)
            if other != style and what != obj and (i + j) % 8 == 0
        ]
        cells = [*own, *same_style, *same_object, *rest]
        before, was = draw(cells)
        with attach(pipe, eraser):
            after, seen = draw(cells)
        same = np.array([np.array_equal(a, b) for a, b in zip(after, before, strict=True)])
        (style_was, object_was), (style_is, object_is) = read(was, cells), read(seen, cells)
        kind = np.repeat(np.arange(4), [len(own), len(same_style), len(same_object), len(rest)])
        phrasing = np.array([cell[2] for cell in cells])
        there = (kind == 0) & style_was & object_was
        told, held = (there & np.isin(phrasing, list(PHRASINGS[which])) for which in (SEEN, HELD_OUT))
        gone = ~(style_is & object_is)

        def kept(k: int, was: np.ndarray, still: np.ndarray, kind: np.ndarray = kind) -> float:
            return round(float(still[(kind == k) & was].mean()), 4)

        rows.append(
            {
                **{"style": style, "object": obj, "features": len(eraser.gate.features)},
                "ua": round(float(gone[told].mean()), 4),
                "ua_both": round(float((~style_is & ~object_is)[told].mean()), 4),
                "ua_held_out": round(float(gone[held].mean()), 4),
                "sc": kept(1, style_was, style_is),
                "oc": kept(2, object_was, object_is),
                "up": kept(3, style_was & object_was, style_is & object_is),
                "unchanged": round(float(same[kind > 0].mean()), 4),
                "n": {
                    **{"ua": int(told.sum()), "ua_held_out": int(held.sum())},
                    "sc": int((style_was & (kind == 1)).sum()),
                    "oc": int((object_was & (kind == 2)).sum()),
                    "up": int((style_was & object_was & (kind == 3)).sum()),
                },
                "ci": [round(x, 4) for x in wilson(int(gone[told].sum()), int(told.sum()))],
            }
        )
        print(*(f"{value}" for value in rows[-1].values()), flush=True)
        write_bytes(s.out, (json.dumps({"rows": rows, **facts()}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Settings))
