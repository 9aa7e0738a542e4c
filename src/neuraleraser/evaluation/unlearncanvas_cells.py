"""Cells of the UnlearnCanvas benchmark (arXiv 2402.11846): its own answer set, and the one that SAeUron's code draws.

They are for the benchmark's fine-tuned Stable Diffusion 1.5 and its two classifiers (`judges.UnlearnCanvasJudge`),
which its authors publish and nothing here downloads.

| | `official` | `saeuron` |
|---|---|---|
| prompt | "A Cats image in Van Gogh style." | "An image of Cats in Van Gogh style." |
| without a style | none | "An image of Cats." |
| styles | 51, photographs (`Seed_Images`) among them | 50 |
| images of a target | 51 x 20 x 5 = 5100 | 50 x 20 x 5 + 20 x 5 = 5100 |

Sources: `machine_unlearning/evaluation/sampling_unlearned_models/uce.py` and `quantitative/accuracy.py` in the
benchmark's repository (prompt, seeds, 512 px, 100 steps, guidance 9), and SAeUron's `scripts/` (arXiv 2501.18052).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.evaluation.protocol import GRID, Cell, EvaluationProtocol
from neuraleraser.judges import UNLEARNCANVAS_OBJECTS, UNLEARNCANVAS_STYLES
from neuraleraser.settings import Sampling, check_seed

Variant = Literal["official", "saeuron"]
UNLEARNCANVAS_SEEDS: tuple[int, ...] = (188, 288, 588, 688, 888)
"""Seeds of the answer set, the same for every prompt (`accuracy.py` of the benchmark; SAeUron's scripts)."""
UNLEARNCANVAS_SAMPLING = Sampling(num_inference_steps=100, guidance_scale=9.0, batch_size=4, height=512, width=512)
"""512 x 512 px, 100 steps, guidance 9 (the benchmark's `uce.py`; SAeUron's code, too). The batch is ours."""
_PHOTOS = "Seed_Images"
_NAMES = {"official": "UnlearnCanvas, official", "saeuron": "UnlearnCanvas, SAeUron's variant"}
_COMMON = "images are judged as they are; the published figures are of JPEG files"
_NOTES = {
    "official": (
        "UnlearnCanvas names no single sampler (its scripts use LMS or DDIM): see the pipeline's under the versions",
        "figures named saeuron are of UnlearnCanvas's prompts here, so they compare with no figure of SAeUron's",
    ),
    "saeuron": (
        "SAeUron samples with DDIM in float16: see the pipeline's sampler under the versions",
        "each image has its own generator; SAeUron's code shares one among all prompts of a run",
        "images without a style are drawn and counted once; SAeUron's code draws them again for each style",
        "figures named unlearncanvas are of SAeUron's prompts here, so they compare with no figure of UnlearnCanvas's",
    ),
}


def unlearncanvas_protocol(
    concepts: str | Sequence[str],
    variant: Variant = "official",
    *,
    styles: Sequence[str] = (),
    objects: Sequence[str] = (),
    seeds: Sequence[int] = UNLEARNCANVAS_SEEDS,
) -> EvaluationProtocol:
    """Return UnlearnCanvas's answer set, with prompts, seeds, resolution and steps as published.

    Pass it to `evaluate` with `UnlearnCanvasJudge` and the benchmark's fine-tuned pipeline. Every concept has the same
    cells, so the base model's images are drawn once for all. The report's figures `unlearncanvas_UA` and its neighbours
    are the benchmark's, `saeuron_UA` and its neighbours SAeUron's; each is comparable on its own variant alone.

    Args:
        concepts: What is erased, by the benchmark's names: a style, an object, or several.
        variant: "official" (arXiv 2402.11846) or "saeuron" (arXiv 2501.18052): prompts, and images without a style.
        styles: Only these styles, for a part of the answer set; none named: all.
        objects: Only these objects; none named: all.
        seeds: Seeds of every prompt; those of the benchmark unless given.

    Returns:
        The protocol, with `sampling` as published: 512 x 512 px, 100 steps, guidance 9.

    Raises:
        ConceptError: A concept is none of the benchmark's 50 styles and 20 objects, or not among those chosen.
        SettingsError: The variant, a style, an object or a seed is none, or stands there twice.

    Examples:
        >>> protocol = unlearncanvas_protocol("Van_Gogh")
        >>> len(protocol.cells["Van_Gogh"]), protocol.cells["Van_Gogh"][0].prompt
        (5100, 'A Architectures image in Abstractionism style.')
        >>> unlearncanvas_protocol("Cats", "saeuron").cells["Cats"][-1].prompt
        'An image of Waterfalls.'
    """
    if variant not in get_args(Variant):
        raise SettingsError(f"variant is {variant!r}: pass one of {', '.join(get_args(Variant))}")
    every = [s for s in UNLEARNCANVAS_STYLES if variant == "official" or s != _PHOTOS]
    some_styles = _chosen("styles", styles, every)
    some_objects = _chosen("objects", objects, UNLEARNCANVAS_OBJECTS)
    if isinstance(seeds, str) or not seeds or len(set(seeds)) < len(seeds):
        raise SettingsError(f"seeds is {seeds!r}: pass at least one whole number, each once")
    for seed in seeds:
        check_seed(seed)
    named = [concepts] if isinstance(concepts, str) else list(dict.fromkeys(concepts))
    if not named:
        raise ConceptError("no concept was named: pass a style or an object of UnlearnCanvas, such as 'Van_Gogh'")
    for name in named:
        if name == _PHOTOS or name not in (*UNLEARNCANVAS_STYLES, *UNLEARNCANVAS_OBJECTS):
            known = ", ".join(s for s in (*UNLEARNCANVAS_STYLES, *UNLEARNCANVAS_OBJECTS) if s != _PHOTOS)
            raise ConceptError(f"UnlearnCanvas has nothing to erase that is named {name!r}: pass one of {known}")
        if name not in (*some_styles, *some_objects):
            raise ConceptError(f"{name} is not among the styles and objects that were chosen: name it there, too")
    cells = [
        Cell(_prompt(variant, style, obj), seed, style, (obj,), GRID)
        for style in (*some_styles, *(("",) if variant == "saeuron" else ()))
        for obj in some_objects
        for seed in seeds
    ]
    name, notes = _NAMES[variant], (*_NOTES[variant], _COMMON)
    if (len(some_styles), len(some_objects), tuple(seeds)) != (len(every), 20, UNLEARNCANVAS_SEEDS):
        part = f"{len(some_styles)} of {len(every)} styles, {len(some_objects)} of 20 objects, seeds {_listed(seeds)}"
        notes = (f"only a part of the answer set was drawn: {part}", *notes)
    return EvaluationProtocol(dict.fromkeys(named, cells), name=name, sampling=UNLEARNCANVAS_SAMPLING, notes=notes)


def _prompt(variant: str, style: str, obj: str) -> str:
    """Return the published prompt: the names as they are, but for blanks in a style's."""
    how = style.replace("_", " ")
    if variant == "official":
        return f"A {obj} image in {how} style."
    return f"An image of {obj} in {how} style." if style else f"An image of {obj}."


def _chosen(what: str, some: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return those of `every` that are named, in its order; all if none is. Raises SettingsError for other names."""
    named = [some] if isinstance(some, str) else list(some)
    unknown = [name for name in named if name not in every]
    if unknown or len(set(named)) < len(named):
        raise SettingsError(f"{what} is {', '.join(map(str, named))}: pass some of {', '.join(every)}, each once")
    return [name for name in every if name in named] if named else list(every)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
