"""`diagnose`: a look at a few images for whether erasers work on a pipeline.

A quick look before an eraser goes into service, and after the model or a library under it changed. It is no
measurement (`evaluate` is one): the prompts are those the concept is known by, and there are few of them.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuraleraser.concepts import Concept, named_concept, neighbours_of
from neuraleraser.eraser import Eraser, Trace, attach, check_nothing_acts
from neuraleraser.eraser.sight import GUIDED_COST
from neuraleraser.errors import DataError, EraserNotAppliedError, SettingsError, SiteError
from neuraleraser.families import family_of
from neuraleraser.families.defaults import sampling_for_eraser
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling

FIRES = 0.75
"""An eraser is well if it fires in this share of the images of its own prompts that show the concept."""
GONE = 0.9
"""... if the judge no longer sees the concept in this share of those in which it did."""
FALSE_ALARMS = 0.1
"""... if it fires in at most this share of the images of lookalike prompts."""
SLOW = 1.25
"""... and if an image takes at most this many times as long. Few images are timed, so the limit is wide."""
FIRST_SEED = 110_000
"""Between the blocks of seeds that erasers are tested with, of which none is made: no cell has it."""


@dataclass(frozen=True)
class Check:
    """One check of an eraser: its name, the check, the result (None: unknown), and what was found, in words.

    Examples:
        >>> from neuraleraser.diagnosis import Check
        >>> Check("Cats", "fits", True, "it attaches").well
        True
    """

    eraser: str
    what: str
    well: bool | None
    found: str


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and the verdict.

    Examples:
        >>> from neuraleraser.diagnosis import Check, Diagnosis
        >>> checks = Check("Cats", "fits", True, "it attaches"), Check("Cats", "gone", None, "no judge")
        >>> Diagnosis(checks).verdict
        'WELL (1 eraser, 1 checks, 1 that no one could read)'
    """

    checks: tuple[Check, ...]

    @property
    def well(self) -> bool:
        """True if no check failed; an unknown result is no failure."""
        return all(c.well is not False for c in self.checks)

    @property
    def verdict(self) -> str:
        """The verdict as one line of text."""
        count = len({c.eraser for c in self.checks})
        wrong = [f"{c.eraser}: {c.found}" for c in self.checks if c.well is False]
        unknown = sum(c.well is None for c in self.checks)
        what = f"{count} eraser{'s' if count > 1 else ''}"
        if wrong:
            return f"NOT WELL ({what}): {'; '.join(wrong)}"
        left = f", {unknown} that no one could read" if unknown else ""
        return f"WELL ({what}, {len(self.checks) - unknown} checks{left})"


@dataclass(frozen=True)
class _Drawn:
    images: Images
    seconds: float  # an image
    trace: Trace | None


def diagnose(
    pipe: Any,
    erasers: Sequence[Eraser],
    concepts: Sequence[Concept] = (),
    lookalikes: Sequence[Sequence[str]] = (),
    judges: Sequence[Any] = (),
    *,
    neighbours: Sequence[str | Concept] = (),
    num_images: int = 8,
    samplings: Sequence[Sampling] = (),
) -> Diagnosis:
    """Check each eraser alone on a pipeline.

    The checks: it fits, its hooks run, it fires on its concept's prompts, the concept is gone, it does not fire on
    lookalikes, and the time that it costs.

    Args:
        pipe: The diffusers pipeline.
        erasers: The erasers.
        concepts: One per eraser, whose prompts with it are used; none: by the names in their headers.
        lookalikes: Per eraser, prompts without its concept that it might be mistaken for; none: the prompts without it,
            and those of `neighbours`.
        judges: One per eraser, a callable such as `CanvasJudge` or `ClipJudge` that knows the concept by the eraser's
            name; none: the judge of the pipeline's family. With None, or a judge that does not know it, it is unknown
            whether the concept is gone.
        neighbours: Concepts for the lookalikes, as phrases or concepts; none: all others of its kind in the pipeline's
            vocabulary.
        num_images: Images of each kind; each is generated twice.
        samplings: One per eraser; none: each is sampled as it was fitted.

    Returns:
        All checks, and the verdict.

    Raises:
        SettingsError: An eraser acts on the pipeline already, there is no eraser to check, or not a concept, lookalikes
            and a judge for each one.

    Examples:
        >>> diagnosis = diagnose(pipe, [eraser], neighbours=["cartoon style"], num_images=2, samplings=[quick])
        >>> [check.what for check in diagnosis.checks if check.well]
        ['fits', 'hooks run', 'fires', ...]
    """
    check_nothing_acts(pipe, "a diagnosis")
    family = family_of(pipe)
    judges = judges or [family.judge() if family.judge else None] * len(erasers)
    concepts = concepts or [named_concept(pipe, e.name, e.header.kind) for e in erasers]
    lookalikes = lookalikes or [lookalike_prompts(c, neighbours_of(pipe, c, neighbours), num_images) for c in concepts]
    usual = [sampling_for_eraser(pipe, eraser.header.sampling) for eraser in erasers]
    samplings = samplings or [replace(s, batch_size=max(1, min(num_images, 8, s.batch_size))) for s in usual]
    if not erasers or num_images < 1 or {len(concepts), len(lookalikes), len(judges), len(samplings)} != {len(erasers)}:
        raise SettingsError(
            f"{len(erasers)} erasers with {len(concepts)} concepts, {len(lookalikes)} sets of lookalikes, "
            f"{len(judges)} judges and {len(samplings)} samplings, {num_images} images: pass at least one eraser "
            "and image, and one of all for each eraser"
        )
    checks: list[Check] = []
    for eraser, concept, others, judge, s in zip(erasers, concepts, lookalikes, judges, samplings, strict=True):
        generate(pipe, [concept.pairs[0].positive], [FIRST_SEED], s)  # warm, so that the first timing is fair
        checks += _one(pipe, eraser, concept, others, judge, num_images, s)
    return Diagnosis(tuple(checks))


def lookalike_prompts(concept: Concept, neighbours: Sequence[Concept], count: int) -> list[str]:
    """Return about `count` of the concept's prompts without it, evenly spread, and one prompt of each neighbour."""
    own = concept.pairs[:: max(1, len(concept.pairs) // max(1, count))]
    return [pair.negative for pair in own] + [neighbour.pairs[0].positive for neighbour in neighbours]


def _one(
    pipe: Any, eraser: Eraser, concept: Concept, others: Sequence[str], judge: Any, images: int, s: Sampling
) -> list[Check]:
    def check(what: str, well: bool | None, found: str) -> Check:
        return Check(eraser.name, what, well, found)

    own = [concept.pairs[i * len(concept.pairs) // images].positive for i in range(images)]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            after = _draw(pipe, own, s, eraser)
        except SiteError as error:
            return [check("fits", False, f"does not fit ({error})")]
        except EraserNotAppliedError as error:
            return [check("fits", True, "fits"), check("hooks run", False, f"did not run ({error})")]
    other = [str(w.message) for w in warned if "other weights" in str(w.message)]
    checks = [
        check("fits", None if other else True, "was made for other weights: calibrate it" if other else "fits"),
        check("hooks run", True, "its hooks ran at every step"),
    ]
    assert after.trace is not None
    base = _draw(pipe, own, s)
    fired = after.trace.fired
    showed = _shows(judge, base.images, eraser.name)
    rows = range(images) if showed is None else np.flatnonzero(showed).tolist()
    if not rows:
        checks.append(check("fires", None, f"the judge sees it in none of {images} plain images"))
    else:
        acted = sum(i in fired for i in rows)
        checks.append(check("fires", acted >= FIRES * len(rows), f"fired in {acted} of {len(rows)} images of it"))
    if eraser.image_gate is not None:
        site = str(eraser.image_gate.site)
        opened = sum(any(f["site"] == site for f in line["fired"]) for line in after.trace.records())
        checks.append(
            check(
                "start images",
                None,
                f"none was drawn; the image gate opened in {opened} of {images} images that a prompt asked for",
            )
        )
    still = _shows(judge, after.images, eraser.name)
    if showed is None or still is None:
        changed = sum(bool((after.images[i] != base.images[i]).any()) for i in range(images))
        checks.append(check("gone", None, f"no judge here knows it ({changed} of {images} images changed)"))
    elif rows:
        left = int((showed & ~still).sum())
        checks.append(check("gone", left >= GONE * len(rows), f"gone from {left} of {len(rows)} images that showed it"))
    if others:
        prompts = [others[i * len(others) // images] for i in range(images)]
        plain, with_it = _draw(pipe, prompts, s), _draw(pipe, prompts, s, eraser)
        assert with_it.trace is not None
        alarms = with_it.trace.fired
        share = len(alarms) / images
        checks.append(
            check("false alarms", share <= FALSE_ALARMS, f"fired in {len(alarms)} of {images} images of lookalikes")
        )
        touched = [i for i in range(images) if i not in alarms and (plain.images[i] != with_it.images[i]).any()]
        checks.append(check("leaves the rest", not touched, f"changed {len(touched)} images in which it did not fire"))
        slower = with_it.seconds / plain.seconds
    else:
        checks.append(check("false alarms", None, "no lookalike prompts are known"))
        slower = after.seconds / base.seconds
    cost = f"an image takes {after.seconds:.2f} s, {slower:.2f} times as long as without"
    if eraser.guided is not None and not others:  # only images of the concept were timed, for which more is run
        checks.append(check("cost", None, f"{cost}: {GUIDED_COST}"))
    else:
        checks.append(check("cost", slower <= SLOW, cost))
    return checks


def _draw(pipe: Any, prompts: Sequence[str], s: Sampling, eraser: Eraser | None = None) -> _Drawn:
    seeds = range(FIRST_SEED, FIRST_SEED + len(prompts))
    with attach(pipe, [eraser] if eraser else []) as trace:
        started = time.perf_counter()
        images = generate(pipe, prompts, seeds, s)
        seconds = (time.perf_counter() - started) / len(prompts)
    return _Drawn(images, seconds, trace if eraser else None)


def _shows(judge: Any, images: Images, name: str) -> NDArray[np.bool_] | None:
    """Tell whether the judge sees the concept in each image, None where it does not know it."""
    if judge is None or name not in (*judge.styles, *judge.objects):
        return None
    seen = judge(images)
    if name in judge.styles:
        p = np.asarray(seen.p_style)[:, list(judge.styles).index(name)]
    else:
        p = np.asarray(seen.p_object)[:, list(judge.objects).index(name)]
    if not np.isfinite(p).all():
        raise DataError(f"the judge gave NaN or infinity for {name!r}: pass one that gives probabilities")
    return p > judge.thresholds[name]
