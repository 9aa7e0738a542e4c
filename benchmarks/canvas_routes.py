"""Does a concept come back by a picture, when no prompt names it?

    python benchmarks/canvas_routes.py --erasers demo/erasers [--concepts Van_Gogh Cats] [--rivals]

For each concept, `images` renders of it that no fit has seen. Each is a start image at three strengths, with an empty
prompt, a neutral one (it says what else is to be seen) or one that names the concept. Of each, half is drawn anew, too
(route "inpainting", strength 1, the left half and the right by turns), with an empty prompt or a neutral one. Each is
run backwards to noise, too, and drawn from there with an empty prompt (route "inverted latents"). Second judge. A row
of the results is a method on one of these:

    {"method", "concept", "kind", "route", "prompt", "strength", "n", "base", "ceiling", "shows", "refused", "left",
     "opened", "ci", "unchanged", "artefacts"}

base: share of the n images that show the concept when nothing acts; ceiling: that when the base model is asked for the
same without the concept ("as a plain picture", "an empty scene"), with guidance, and of inverted latents the share that
a denoiser of random weights brings back; shows: that with the method, ci its 95 % interval (Wilson); opened: share in
which the method acted; refused: share that was refused, for erasers with the action "erase_or_refuse", and left: share
that shows the concept and was not refused; unchanged: share with the bits of the base image; artefacts: share that lies
farther from real pictures than 99 % of them do, by the judge.

Rows with the route "named" are plain prompts that name the concept, without a start image.
Rows with the route "other" are plain prompts of other concepts: opened is the share of false openings. "control" rows
are start images of other concepts, with an empty prompt at each strength.

SAeUron's settings are those that docs/how-to/saeuron.md names for the canvas, chosen on other concepts.

Finished rows are kept in the results file, and not made again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from neuraleraser.attacks import inverted_latents, random_denoiser
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.concepts import canvas_concept
from neuraleraser.eraser import Eraser, attach
from neuraleraser.errors import ConceptRefusedError
from neuraleraser.evaluation.method import Method
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import image_to_image, inpainting, open_pipeline
from neuraleraser.fitting import fit_saeuron
from neuraleraser.io.atomic import write_bytes
from neuraleraser.methods import (
    ConceptRemovalGuidance,
    DynamicNegativeGuidance,
    EraserMethod,
    SAeUronAsPublished,
    string_filters,
)
from neuraleraser.sae import SAE
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import SAeUronSettings
from neuraleraser.sites import PROMPT_ROUTES

STRENGTHS = (0.3, 0.5, 0.7)
FIRST_SEED = 70_000
"""Of the test seeds; the renders have the same."""


@dataclass(frozen=True)
class Settings:
    """Measure routes on the canvas."""

    erasers: Path
    """Folder of erasers, named after their concepts."""
    concepts: tuple[str, ...] = ("Van_Gogh", "Superstring", "On_Fire", "Cats")
    images: int = 20
    """Images of each row."""
    prompts: tuple[str, ...] = ("empty", "neutral", "naming")
    """Prompts of start images: empty, neutral, naming; of inpainting the first two."""
    strengths: tuple[float, ...] = STRENGTHS
    routes: tuple[str, ...] = ("start image", "inpainting", "inverted latents", "named", "control", "other")
    rivals: bool = False
    """Measure CRG, DNG and SAeUron, too."""
    saeuron: Path = Path("runs/saeuron")
    """Folder in which SAeUron's SAE and its erasers are made and kept."""
    others: int = 40
    """Plain prompts of other concepts."""
    out: Path = Path("benchmarks/results/canvas-routes.json")


@dataclass(frozen=True)
class Drawing:
    """One row's images: how they are generated from prompts, start images and seeds."""

    route: str
    prompt: str
    strength: float | None
    prompts: Sequence[str]
    without: Sequence[str]
    seeds: Sequence[int]
    image: Images | None
    mask: NDArray[np.bool_] | None = None
    asks: bool = True
    inverted: bool = False

    def batches(self, size: int) -> Iterator[tuple[slice, Drawing]]:
        """The same in parts of at most `size` images, with their places."""
        for first in range(0, len(self.seeds), size):
            at = slice(first, first + size)
            image, mask = (None if x is None else x[at] for x in (self.image, self.mask))
            yield at, replace(self, seeds=self.seeds[at], image=image, mask=mask)


def contents(name: str, count: int, rng: random.Random) -> list[Content]:
    """Contents of renders that show a concept."""
    objects, styles = ([n for n in names if n != name] for names in (V.open_objects, V.open_styles))
    if name in V.styles:
        return [Content((rng.choice(objects),), name) for _ in range(count)]
    return [Content((name,), rng.choice(styles)) for _ in range(count)]


def neutral(name: str, content: Content) -> str:
    """A prompt of what else a render shows."""
    if name in V.styles:
        return f"a picture of {V.object_phrases[content.objects[0]][0]}"
    return V.prompt((), content.style)


def drawings(s: Settings, name: str) -> list[Drawing]:
    """Everything that is drawn for a concept."""
    rng = random.Random(f"routes of {name}")
    shown, n = contents(name, s.images, rng), s.images
    seeds = range(FIRST_SEED, FIRST_SEED + n)
    images = np.stack([render(c, seed) for c, seed in zip(shown, seeds, strict=True)])
    plain = "as a plain picture" if name in V.styles else "an empty scene"
    texts = {
        "empty": [""] * n,
        "neutral": [neutral(name, c) for c in shown],
        "naming": [V.fresh_prompt(c.objects, c.style) for c in shown],
    }
    found = [
        Drawing("start image", kind, strength, texts[kind], [plain] * n, seeds, images)
        for kind in s.prompts
        for strength in s.strengths
    ]
    left = np.broadcast_to(np.arange(images.shape[2]) < images.shape[2] // 2, images.shape[1:3])
    halves = np.stack([~left if i % 2 else left for i in range(n)])
    found += [
        Drawing("inpainting", kind, 1.0, texts[kind], [plain] * n, seeds, images, halves)
        for kind in s.prompts
        if kind != "naming"
    ]
    found.append(Drawing("inverted latents", "empty", None, [""] * n, [""] * n, seeds, images, inverted=True))
    found.append(Drawing("named", "naming", None, texts["naming"], [plain] * n, seeds, None))
    others = [n for n in V.open_styles if n != name], [n for n in V.open_objects if n != name]
    different = [Content((rng.choice(others[1]),), rng.choice(others[0])) for _ in range(n)]
    starts = np.stack([render(c, 10_000 + seed) for c, seed in zip(different, seeds, strict=True)])
    for strength in s.strengths:
        found.append(Drawing("control", "empty", strength, [""] * n, [""] * n, seeds, starts, asks=False))
    prompts = [V.fresh_prompt((rng.choice(others[1]),), rng.choice(others[0])) for _ in range(s.others)]
    more = range(FIRST_SEED + 1000, FIRST_SEED + 1000 + s.others)
    found.append(Drawing("other", "neutral", None, prompts, prompts, more, None, asks=False))
    return [d for d in found if d.route in s.routes]


def saeuron(s: Settings, pipe: Any, name: str) -> dict[str, Method]:
    """SAeUron as its public code has it, and with that put right; made where it is not kept."""
    path = s.saeuron / f"{name}.safetensors"
    if not path.exists():
        # Chosen on start images of Rust and Dogs (docs/LOG.md): of a style, the published -1 leaves every one as it is.
        of_style = SAeUronSettings(num_features=3, multiplier=-3.0)
        settings = of_style if name in V.styles else SAeUronSettings(multiplier=-5.0)
        fit_saeuron(pipe, canvas_concept(name), settings=settings, folder=s.saeuron, announce=print).save(path)
    eraser = Eraser.load(path)
    sae = SAE.load(s.saeuron / f"canvas-{eraser.gate.site.path}.safetensors")
    return {"SAeUron (published)": SAeUronAsPublished(eraser, sae), "SAeUron (corrected)": EraserMethod(eraser)}


def methods(s: Settings, pipe: Any, name: str, eraser: Eraser) -> dict[str, Method]:
    """The methods of the table, ours last."""
    kind: Any = "style" if name in V.styles else "object"
    alone = replace(eraser.header, made_for=None, routes=PROMPT_ROUTES)  # made_for is of all its sites
    found: dict[str, Method] = {
        "string-filter": string_filters(V, name)[0],
        "prompt-only eraser": EraserMethod(replace(eraser, header=alone, image_gate=None, guided=None)),
    }
    if s.rivals:
        phrase = V.phrases_of(name)[0]
        found["CRG"] = ConceptRemovalGuidance(name, kind, phrase)
        found["DNG"] = DynamicNegativeGuidance(name, kind, phrase)
        found |= saeuron(s, pipe, name)
    return {**found, "neuraleraser": EraserMethod(eraser)}


@contextmanager
def all_watching(methods: dict[str, Method], using: Any) -> Iterator[dict[str, Any]]:
    """Context in which all methods watch and none acts; yields their traces, None of those that cannot tell."""
    with ExitStack() as stack:
        yield {
            label: stack.enter_context(method.watched(using))
            for label, method in methods.items()
            if label not in ("CRG", "DNG")  # which change every image
        }


@dataclass(frozen=True)
class Shown:
    """Tells which images show a concept."""

    judge: CanvasJudge

    def __call__(self, name: str, images: Images) -> NDArray[np.bool_]:
        """Return True for each image that shows it [N]."""
        judge, seen = self.judge, self.judge(images)
        names, p = (judge.styles, seen.p_style) if name in V.styles else (judge.objects, seen.p_object)
        return np.asarray(p)[:, list(names).index(name)] > judge.thresholds[name]

    def artefacts(self, images: Images) -> NDArray[np.bool_]:
        """Return True for each image that is an artefact [N]."""
        return np.asarray(self.judge(images).artefact) > self.judge.artefact_threshold


def main(s: Settings) -> None:
    """Draw, judge, and write the rows."""
    pipe, shows = open_pipeline("canvas"), Shown(CanvasJudge.load("second"))
    pipe.set_progress_bar_config(disable=True)
    rows = json.loads(s.out.read_text()) if s.out.exists() else []
    done = {_key(row) for row in rows}
    sampling = default_sampling(pipe)

    def draw(
        d: Drawing, prompts: Sequence[str], context: Callable[[Any], AbstractContextManager[Any]], model: Any = pipe
    ) -> Any:
        """The images, and what the context yields for each batch, with the batch's images: SAeUron's code counts the
        steps of one batch."""
        form = image_to_image if d.mask is None else inpainting
        using = model if d.image is None or d.inverted else form(model)
        chosen = sampling if d.strength is None else replace(sampling, strength=d.strength)
        images, traces = [], []
        for at, part in d.batches(sampling.batch_size):
            start: dict[str, Any] = {"image": part.image, "mask_image": part.mask}
            if d.inverted and part.image is not None:
                start = {"latents": inverted_latents(model, part.image, chosen)}
            with context(using) as trace:
                images.append(generate(using, prompts[at], part.seeds, chosen, **start))
            traces.append((trace, len(part.seeds)))
        return np.concatenate(images), traces

    for name in s.concepts:
        eraser = Eraser.load(s.erasers / f"{name}.safetensors")
        ceilings: dict[Any, np.ndarray] = {}
        every = methods(s, pipe, name, eraser)
        for d in drawings(s, name):
            fixed = {
                "concept": name,
                "kind": eraser.header.kind,
                "route": d.route,
                "prompt": d.prompt,
                "strength": d.strength,
                "n": len(d.seeds),
            }
            missing = [label for label in ("none", *every) if _key({"method": label, **fixed}) not in done]
            if not missing:
                continue
            base, watched = draw(d, d.prompts, partial(all_watching, every))
            at = (d.route, d.strength)
            if d.asks and at not in ceilings:  # the same for every prompt
                asked = random_denoiser(pipe) if d.inverted else pipe
                ceilings[at] = shows(name, draw(d, d.without, lambda using: nullcontext(), asked)[0])
            ceiling = ceilings[at] if d.asks else None
            for label in missing:
                # A method that would act nowhere leaves the base's images, bit for bit.
                images, opened = base, _opened([(traces.get(label), count) for traces, count in watched])
                if label in every and opened != 0:
                    images, traces = draw(d, d.prompts, every[label].applied)
                    opened = _opened(traces)
                found = shows(name, images)
                refused = np.zeros(len(found), bool)
                if label == "neuraleraser":
                    refused = _refused(draw, d, eraser, sampling.batch_size)
                low, high = wilson(int(found.sum()), len(found))
                rows.append(
                    {"method": label, **fixed}
                    | {
                        "base": round(float(shows(name, base).mean()), 4),
                        "ceiling": None if ceiling is None else round(float(ceiling.mean()), 4),
                        "shows": round(float(found.mean()), 4),
                        "refused": round(float(refused.mean()), 4),
                        "left": round(float((found & ~refused).mean()), 4),
                        "opened": None if opened is None else round(opened / len(found), 4),
                        "unchanged": round(
                            float(np.mean([np.array_equal(a, b) for a, b in zip(base, images, strict=True)])), 4
                        ),
                        "ci": [round(low, 4), round(high, 4)],
                        "artefacts": round(float(shows.artefacts(images).mean()), 4),
                    }
                )
                print(*(f"{value}" for key, value in rows[-1].items() if key not in ("kind", "n", "ci")), flush=True)
            write_bytes(s.out, json.dumps(rows, indent=1).encode())


def _opened(traces: Sequence[tuple[Any, int]]) -> int | None:
    """In how many images a method acted, by its traces, padding left out; None where it cannot tell."""
    if any(trace is None for trace, _ in traces):
        return None
    return sum(image < count for trace, count in traces for image in trace.fired)


def _refused(draw: Callable[..., Any], d: Drawing, eraser: Eraser, size: int) -> NDArray[np.bool_]:
    """Images that "erase_or_refuse" refuses [n]: those that the gate sees, at a strength that is too low."""
    least, refused = eraser.header.least_strength, np.zeros(len(d.seeds), bool)
    if least is None or d.strength is None or d.strength >= least:
        return refused
    for at, part in d.batches(size):
        try:
            draw(part, d.prompts[at], lambda using: attach(using, eraser, action="erase_or_refuse"))
        except ConceptRefusedError as error:
            refused[[at.start + image for image in error.images]] = True
    return refused


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of k in n (Wilson 1927)."""
    share, size = k / n, 1 + z * z / n
    middle, half = (share + z * z / (2 * n)) / size, z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5 / size
    return max(0.0, middle - half), min(1.0, middle + half)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "concept", "route", "prompt", "strength", "n"))


if __name__ == "__main__":
    main(tyro.cli(Settings))
