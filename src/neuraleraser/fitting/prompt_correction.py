"""The correction of what is read of a prompt: in closed form, and trained on where that leaves much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import LowRank
from neuraleraser.fitting.correction_training import draw_lessons, train_correction
from neuraleraser.fitting.text_correction import fit_text_correction, read_prompts
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site

ENOUGH = 0.1
"""Share of the distance between the texts up to which the closed form is kept as it is (docs/LOG.md)."""
LESSONS_EACH = 10
"""Lessons in a training step, at most: twice as many in half the steps take as long and leave more (docs/LOG.md)."""


@dataclass(frozen=True)
class PromptCorrection:
    """The correction; the share of the distance between the texts that its closed form leaves; tokens of a text; the
    prompts that it was fitted to; and the seeds, as many as were used."""

    correction: LowRank
    left: float
    tokens: int
    prompts: tuple[str, ...]
    seeds: int


def fit_prompt_correction(
    pipe: Any,
    concept: Concept,
    sites: Sequence[Site],
    time: float,
    first_seed: int,
    settings: FitSettings,
    sampling: Sampling,
    progress: Callable[[float], None],
) -> PromptCorrection:
    """Fit the correction of what `sites` read, all of which read the same text.

    Args:
        pipe: The diffusers pipeline.
        concept: The concept, with its prompts.
        sites: The sites.
        time: A timestep, for the correction's only time bin.
        first_seed: First seed of the images that it is trained on.
        settings: Settings of the fit.
        sampling: How images are generated.
        progress: Called with the share that is done.

    Returns:
        The correction, and what it was made with.
    """
    context = _context_pairs(concept, settings.num_context_pairs)
    pairs = [*dict.fromkeys(concept.pairs), *context]
    read = read_prompts(pipe, sites[0], [p for pair in pairs for p in (pair.positive, pair.negative)], sampling)
    fitted = fit_text_correction(sites, pairs, read.texts, time, settings.rank)
    tokens = next(iter(read.texts.values())).shape[0]
    correction, seeds = fitted.correction, 0
    progress(0.2)
    if fitted.left > ENOUGH and settings.steps:
        own = concept.pairs[:: max(1, len(concept.pairs) // settings.num_pairs)][: settings.num_pairs]
        lessons = draw_lessons(pipe, [*own, *context], first_seed, sampling)
        seeds = len({pair.negative for pair in (*own, *context)})
        progress(0.5)
        correction = train_correction(
            pipe,
            correction,
            lessons,
            read.calls,
            steps=settings.steps,
            batch=min(LESSONS_EACH, sampling.batch_size),
            seed=settings.seed,
            on_step=lambda step, loss: progress(0.5 + 0.5 * (step + 1) / settings.steps),
        )
    return PromptCorrection(correction, fitted.left, tokens, tuple(read.texts), seeds)


def _context_pairs(concept: Concept, count: int) -> list[Pair]:
    """Return the pairs of some prompts of what stays, `count` spread over all: each with all that show the concept."""
    stays = list(dict.fromkeys(pair.negative for pair in concept.context_pairs))
    count = min(count, len(stays))
    some = {stays[i * len(stays) // count] for i in range(count)}
    return [pair for pair in concept.context_pairs if pair.negative in some]
