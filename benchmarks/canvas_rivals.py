"""How are other methods set on the canvas? Each in at most four ways, on development concepts.

    python benchmarks/canvas_rivals.py [--rivals sld uce]

Each setting erases Rust and Dogs from prompts in the phrasings that erasers are made with, on seeds of selection; the
judge that erasers may see (the first) reads them, and the second their artefacts, which the first does not measure. A
row is a setting on one concept:

    {"method", "numbers", "concept", "n", "erased", "kept", "others", "artefacts", "artefacts_own", "score", "seconds"}

erased: of the concept's own images that show it on the base model, the share that no longer does; kept: of those right
in the other domain, the share that still is; others: of images of other things that are right in style and object, the
share that still is; artefacts: of other images, and artefacts_own: of the concept's own, the share farther from real
pictures than 99 % of them are; score: the mean of erased, kept, others and 1 less each share of artefacts; seconds: to
make the method. The setting with the highest mean score over both concepts is the one that
`benchmarks/canvas_official.py` takes. SAeUron's was chosen before, alike (docs/LOG.md). Our defaults were chosen on
more development concepts, over the whole project: a rival's budget is smaller, and its author has not tuned it.

Finished rows are kept in the results file, and not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.concepts import canvas_concept
from neuraleraser.evaluation.method import Method
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting import fit_saeuron
from neuraleraser.io.atomic import write_bytes
from neuraleraser.methods import (
    CASteer,
    ConceptPinpointEraser,
    ConceptRemovalGuidance,
    ConceptSteerers,
    CPESettings,
    DynamicNegativeGuidance,
    ErasedStableDiffusion,
    ESDSettings,
    GLoCE,
    NegativePrompt,
    SAEmnesia,
    SafeLatentDiffusion,
    SalUn,
    SalUnSettings,
    Stereo,
    StereoSettings,
    UnifiedConceptEditing,
)
from neuraleraser.sae import SAE
from neuraleraser.sampling import generate
from neuraleraser.sites import default_block_site
from neuraleraser.vocabulary import PHRASINGS, SEEN, labelled_prompts

RESULTS = Path("benchmarks/results/canvas-tuning.json")
SAES = Path("runs/saeuron")
"""Folder in which SAeUron's SAE is made and kept, and what SAEmnesia makes of it."""
CONCEPTS = ("Rust", "Dogs")
FIRST_SEED = 700
"""Of the selection seeds; what is trained takes those from 0 on."""
OWN, OTHERS = 14, 20
"""Images of the concept, and of other things, for each setting."""

Numbers = dict[str, Any]


def _phrases(name: str) -> tuple[str, str]:
    """The two phrasings that methods may be made with, each with nothing else."""
    seen = V.phrases_of(name)[:2]
    return (f"a picture {seen[0]}", f"a picture {seen[1]}") if name in V.styles else (seen[0], seen[1])


def _kind(name: str) -> Any:
    return "style" if name in V.styles else "object"


def _pairs(name: str, contexts: int) -> tuple[tuple[str, str], ...]:
    """Prompts of the concept, each with its match without it: phrases alone, or so many prompts with other things."""
    if not contexts:
        plain = V.phrases_of(V.plain) if name in V.styles else V.empty_phrases
        return tuple(zip(V.phrases_of(name)[:2], plain[:2], strict=True))
    pairs = canvas_concept(name).pairs
    step = max(1, len(pairs) // contexts)
    return tuple((pair.positive, pair.negative) for pair in pairs[::step][:contexts])


def _preserved(name: str) -> tuple[str, ...]:
    """Phrases of everything else that is not sealed."""
    names = [n for n in (*V.open_styles, *V.open_objects) if n not in (name, V.plain)]
    return tuple(phrase for n in names for phrase in V.phrases_of(n)[:2])


def _guided(kind: type[Any]) -> Callable[[Any, str, Numbers], Method]:
    return lambda pipe, name, numbers: kind(name, _kind(name), _phrases(name)[0], **numbers)


def _uce(pipe: Any, name: str, numbers: Numbers) -> Method:
    numbers = dict(numbers)
    pairs = _pairs(name, numbers.pop("contexts"))
    return UnifiedConceptEditing(name, _kind(name), pairs, _preserved(name), **numbers)


def _casteer(pipe: Any, name: str, numbers: Numbers) -> Method:
    pairs = canvas_concept(name).pairs[: numbers["pairs"]]
    seeds = range(len(pairs))
    return CASteer.measure(pipe, name, _kind(name), pairs, seeds, default_sampling(pipe), numbers["strength"])


def _esd(pipe: Any, name: str, numbers: Numbers) -> Method:
    phrases, settings = _phrases(name), ESDSettings(**numbers)
    return ErasedStableDiffusion.train(pipe, name, _kind(name), phrases, default_sampling(pipe), settings)


def _whole_prompts(names: Sequence[str], count: int) -> list[str]:
    """Prompts of styles and objects by turns."""
    styles, objects = ([n for n in of if n in names] for of in (V.open_styles, V.open_objects))
    return [V.prompt((objects[i % len(objects)],), styles[7 * i % len(styles)], i % 2) for i in range(count)]


def _salun(pipe: Any, name: str, numbers: Numbers) -> Method:
    pairs, others = _pairs(name, 40), [n for n in (*V.open_styles, *V.open_objects) if n != name]
    forget, anchors = zip(*pairs, strict=True)
    settings, sampling = SalUnSettings(**numbers), default_sampling(pipe)
    return SalUn.train(pipe, name, _kind(name), forget, anchors, _whole_prompts(others, 40), sampling, settings)


def _stereo(pipe: Any, name: str, numbers: Numbers) -> Method:
    anchors = [prompt for prompt, _ in _pairs(name, 12)]
    settings, sampling = StereoSettings(**numbers), default_sampling(pipe)
    return Stereo.train(pipe, name, _kind(name), _phrases(name), anchors, sampling, settings)


@cache
def _text_sae(pipe: Any) -> SAE:
    """The SAE of the text encoder, trained once, on prompts in the phrasings that methods are made with."""
    prompts = [V.prompt((o,), s, i) for s in V.open_styles for o in V.open_objects for i in (0, 1)]
    return ConceptSteerers.train_sae(pipe, prompts, phrasings=(0, 1))


def _steerers(pipe: Any, name: str, numbers: Numbers) -> Method:
    return ConceptSteerers.fit(pipe, name, _kind(name), _phrases(name), _text_sae(pipe), **numbers)


def _gloce(pipe: Any, name: str, numbers: Numbers) -> Method:
    pairs, others = canvas_concept(name).pairs[::4][:16], [n for n in (*V.open_styles, *V.open_objects) if n != name]
    stays = _whole_prompts(others, 24)
    return GLoCE.measure(pipe, name, _kind(name), pairs, stays, range(24), default_sampling(pipe), **numbers)


def _cpe(pipe: Any, name: str, numbers: Numbers) -> Method:
    pairs, others = _pairs(name, 0) + _pairs(name, 40), [n for n in (*V.open_styles, *V.open_objects) if n != name]
    stays = [*_preserved(name), *_whole_prompts(others, 60)]
    return ConceptPinpointEraser.train(pipe, name, _kind(name), pairs, stays, CPESettings(**numbers))


def _labelled_sae(pipe: Any) -> SAE:
    """SAEmnesia's SAE, trained once, from SAeUron's, on 160 images of everything that is not sealed."""
    path, site = SAES / "saemnesia.safetensors", default_block_site(pipe, "style")
    if not path.exists():
        start = SAES / f"canvas-{site.path}.safetensors"
        if not start.exists():
            fit_saeuron(pipe, canvas_concept(CONCEPTS[0]), folder=SAES, announce=print)
        drawn = [(prompt, shown) for prompt, shown in labelled_prompts(V, 320, 2) if not shown & V.sealed][:160]
        prompts, shown = zip(*drawn, strict=True)
        groups, sampling = (V.open_objects, V.open_styles), default_sampling(pipe)
        phrasings = tuple(PHRASINGS[SEEN])
        SAEmnesia.train_sae(
            pipe, SAE.load(start), prompts, shown, groups, range(160), sampling, phrasings=phrasings
        ).save(path)
    return SAE.load(path)


def _saemnesia(pipe: Any, name: str, numbers: Numbers) -> Method:
    return SAEmnesia.fit(pipe, name, _kind(name), _labelled_sae(pipe), **numbers)


@dataclass(frozen=True)
class Rival:
    """A method and the settings that are tried."""

    make: Callable[[Any, str, Numbers], Method]
    grid: Sequence[Numbers]


def _sld(strength: float, threshold: float, warm_up: int, momentum_scale: float, momentum: float) -> Numbers:
    return {
        **{"strength": strength, "threshold": threshold, "warm_up": warm_up},
        **{"momentum_scale": momentum_scale, "momentum": momentum},
    }


RIVALS: dict[str, Rival] = {
    "negative-prompt": Rival(_guided(NegativePrompt), ({},)),
    "sld": Rival(
        _guided(SafeLatentDiffusion),
        (  # the paper's weak, medium, strong and max, of half as many steps
            *(_sld(20, 0, 8, 0, 0), _sld(1000, 0.01, 5, 0.3, 0.4)),
            *(_sld(2000, 0.025, 3, 0.5, 0.7), _sld(5000, 1, 0, 0.5, 0.7)),
        ),
    ),
    "crg": Rival(
        _guided(ConceptRemovalGuidance),
        ({"strength": 2.0}, {"strength": 6.0}),
    ),
    "dng": Rival(
        _guided(DynamicNegativeGuidance),
        ({"strength": 40.0, "prior": 0.01}, {"strength": 120.0, "prior": 0.1}),
    ),
    "casteer": Rival(_casteer, tuple({"strength": s, "pairs": 24} for s in (1.0, 2.0, 4.0))),
    "uce": Rival(
        _uce,
        tuple(
            {"tokens": tokens, "erase_scale": 1.0, "contexts": contexts}
            for contexts in (0, 40)
            for tokens in ("last", "rest")
        ),
    ),
    "esd-x": Rival(
        _esd,
        (
            *({"steps": 100, "learning_rate": 1e-4}, {"steps": 100, "learning_rate": 3e-4}),
            *({"steps": 100, "learning_rate": 2e-4}, {"steps": 100, "learning_rate": 3e-4, "strength": 3.0}),
        ),
    ),
    "concept-steerers": Rival(_steerers, tuple({"strength": s} for s in (-0.25, -0.5, -1.0, -2.0))),
    "gloce": Rival(
        _gloce,
        tuple(
            {"rank": r, "gate_rank": g, "threshold": t, "untouched": u}
            for r, g, t, u in ((1, 1, 2.5, 0.2), (8, 1, 1.5, 0.2), (4, 4, 1.5, 0.0), (1, 1, 1.5, 0.0))
        ),
    ),
    "cpe": Rival(
        _cpe,
        (
            *({"anchor_weight": 1e4, "stages": 0}, {"anchor_weight": 1e4, "stages": 5}),
            *({"anchor_weight": 1e5, "stages": 5}, {"anchor_weight": 1e4, "stages": 5, "beyond": 1.0}),
        ),
    ),
    "saemnesia": Rival(_saemnesia, tuple({"multiplier": m} for m in (-1.0, -5.0, -15.0, -30.0))),
    "salun": Rival(_salun, tuple({"steps": 100, "learning_rate": rate} for rate in (5e-5, 2e-4))),
    "stereo": Rival(
        _stereo, ({"rounds": 2, "erase_steps": 40, "attack_steps": 60, "steps": 80, "learning_rate": 3e-4},)
    ),
}


@dataclass(frozen=True)
class Settings:
    """Try settings of other methods on development concepts."""

    rivals: tuple[str, ...] = tuple(RIVALS)
    concepts: tuple[str, ...] = CONCEPTS
    out: Path = RESULTS


def cells(name: str) -> list[tuple[str, str]]:
    """The styles and objects that are drawn: those of the concept first."""
    objects, styles = ([n for n in names if n != name] for names in (V.open_objects, V.open_styles))
    own = [(name, objects[i % len(objects)]) for i in range(OWN)]
    if name in V.objects:
        own = [(styles[i % len(styles)], name) for i in range(OWN)]
    return own + [(styles[7 * i % len(styles)], objects[5 * i % len(objects)]) for i in range(OTHERS)]


@dataclass(frozen=True)
class Seen:
    """What the judge sees in the images of some cells."""

    style: np.ndarray
    """Right in style, [n] bool."""
    object: np.ndarray
    concept: np.ndarray
    """Shows the concept."""
    artefact: np.ndarray

    @classmethod
    def of(cls, judge: CanvasJudge, second: CanvasJudge, name: str, images: np.ndarray) -> Seen:
        """Read the images of `cells(name)`."""
        seen = judge(images)
        p = np.concatenate([np.asarray(seen.p_style), np.asarray(seen.p_object)], 1)
        names = (*judge.styles, *judge.objects)
        shown = p > np.array([judge.thresholds[n] for n in names])
        split = len(judge.styles)
        leads = (p[:, :split].argmax(1), split + p[:, split:].argmax(1))
        right = [
            np.array([lead[i] == names.index(asked) and shown[i, lead[i]] for i, asked in enumerate(column)])
            for lead, column in zip(leads, zip(*cells(name), strict=True), strict=True)
        ]
        artefact = np.asarray(second(images).artefact) > second.artefact_threshold
        return cls(right[0], right[1], shown[:, names.index(name)], artefact)


def main(s: Settings) -> None:
    """Draw, judge, and write the rows."""
    pipe, judge, second = open_pipeline("canvas"), CanvasJudge.load("first"), CanvasJudge.load("second")
    pipe.set_progress_bar_config(disable=True)
    rows = json.loads(s.out.read_text()) if s.out.exists() else []
    done = {_key(row) for row in rows}

    def draw(name: str, context: Any) -> Seen:
        prompts = [V.prompt((obj,), style, i % 2) for i, (style, obj) in enumerate(cells(name))]
        with context:
            images = generate(pipe, prompts, range(FIRST_SEED, FIRST_SEED + len(prompts)), default_sampling(pipe))
        return Seen.of(judge, second, name, images)

    base: dict[str, Seen] = {}
    for label in s.rivals:
        for numbers in RIVALS[label].grid:
            for name in s.concepts:
                row: dict[str, Any] = {"method": label, "numbers": numbers, "concept": name, "n": OWN + OTHERS}
                if _key(row) in done:
                    continue
                if name not in base:
                    base[name] = draw(name, nullcontext())
                clock = time.monotonic()
                method = RIVALS[label].make(pipe, name, numbers)
                seconds = time.monotonic() - clock
                rows.append({**row, **figures(name, base[name], draw(name, method.applied(pipe))), "seconds": seconds})
                print(*(f"{value}" for value in rows[-1].values()), flush=True)
                write_bytes(s.out, json.dumps(rows, indent=1).encode())


def figures(name: str, base: Seen, after: Seen) -> dict[str, float]:
    """Return the figures of a row."""
    own = np.arange(OWN + OTHERS) < OWN
    whole, still = base.style & base.object & ~own, after.style & after.object
    beside, still_beside = (base.object, after.object) if name in V.styles else (base.style, after.style)
    found = {
        "erased": np.mean(~after.concept[own & base.concept]),
        "kept": np.mean(still_beside[own & beside]),
        "others": np.mean(still[whole]),
        "artefacts": np.mean(after.artefact[~own]),
        "artefacts_own": np.mean(after.artefact[own]),
    }
    good = [found[key] for key in ("erased", "kept", "others")]
    good += [1 - found[key] for key in ("artefacts", "artefacts_own")]
    return {key: round(float(value), 4) for key, value in {**found, "score": np.mean(good)}.items()}


def chosen(label: str, rows: Sequence[dict[str, Any]]) -> Numbers:
    """Return the setting with the highest mean score, of those that were tried on every concept."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == label:
            scores.setdefault(json.dumps(row["numbers"]), []).append(row["score"])
    whole = {text: sum(found) for text, found in scores.items() if len(found) == len(CONCEPTS)}
    return json.loads(max(whole, key=lambda text: whole[text]))


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in ("method", "numbers", "concept")])


if __name__ == "__main__":
    main(tyro.cli(Settings))
