"""The fit itself, top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, EraserHeader, check_nothing_acts, time_bin
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import SettingsError
from neuraleraser.families.defaults import default_sampling, model_name
from neuraleraser.families.opening import has_image_to_image
from neuraleraser.fitting.background import rows_without
from neuraleraser.fitting.detector import Detector, build_gate, choose_features, gate_bounds, trade_off
from neuraleraser.fitting.image_gate import CORRECTED, fit_image_part
from neuraleraser.fitting.import_reference import shapes_of
from neuraleraser.fitting.least_strength import least_strength
from neuraleraser.fitting.prompt_correction import fit_prompt_correction
from neuraleraser.fitting.reference import Reference, shipped_reference
from neuraleraser.fitting.trajectories import (
    Pooled,
    branches_as_rows,
    conditional_rows,
    pooled_features,
)
from neuraleraser.io.costs import CostMeter
from neuraleraser.sae import SAE
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import IMAGE_ROUTES, PROMPT_ROUTES, Site, edits_for, made_for

Progress = Callable[[str, float], None]

LEAST_STEPS = 10
"""Steps below which images change too much, if the sampling has as many."""

HARD_MARGIN = 0.01
"""Distance of the bounds from the evidence of hard negatives, as a share of it: it is of features in half precision."""


def fit(
    pipe: Any,
    concept: Concept,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
    *,
    reference: Reference | None = None,
    sampling: Sampling | None = None,
    edits: Sequence[Site] | None = None,
) -> Eraser:
    """Make an eraser of `concept` for `pipe` with a given reference.

    1. Generate matched prompts with and without the concept at the same seeds, and its hard negatives, keeping how
       features fire.
    2. Choose the features that fire with the concept and not with its neighbours; set the gate's bounds above
       everything that lacks it.
    3. Fit a low-rank correction of the text that all blocks read, in closed form: the text of a prompt with the concept
       becomes that of the prompt without; and where something else stands beside the concept, that of the other alone.
       Where that leaves much, train it on, so that the predictions become those for the prompt without.
    4. Fit an image gate on pictures, noised as a start image is; while it is open, the prediction moves from the
       concept's phrase to what stands in its place. Left out where `settings.num_pictures` is 0, or the pipeline has no
       image-to-image form.

    Args:
        pipe: The diffusers pipeline; it is not changed.
        concept: The concept, with its prompts.
        settings: Settings of the fit; None: the defaults.
        progress: Called as `progress(what, share)` as the work goes on.
        reference: The reference; None: the one that ships, which the canvas alone has.
        sampling: How images are generated; None: as `default_sampling` says.
        edits: Sites to edit, all of which read the same text; None: those that `edits_for` names.

    Returns:
        The eraser.

    Raises:
        SettingsError: An eraser acts on the pipeline, the pipeline has no reference, or the reference has another
            width; raised before anything is generated.
        SiteError: The reference is of another site; raised before anything is generated.
        ConceptError: No feature detects the concept.

    Examples:
        >>> eraser = fit(pipe, canvas_concept("Cats"), few, sampling=quick)
        >>> eraser.name, len(eraser.corrections)
        ('Cats', 1)
    """
    check_nothing_acts(pipe, "a fit")
    s, sampling = settings or FitSettings(), sampling or default_sampling(pipe)
    reference = reference or shipped_reference(pipe)
    _check_width(pipe, reference, sampling)
    report_progress = progress or (lambda what, share: None)
    meter = CostMeter(pipe._execution_device)
    edit_sites = list(edits or edits_for(pipe, reference.site))
    pairs = _sample_pairs(concept.pairs, s.num_pairs, s.seed)
    seeds = [s.seed + i for i in range(len(pairs))]
    coarse = _coarse(sampling, len(reference.times))
    report_progress("generating without the concept", 0.0)
    plain, _ = pooled_features(pipe, reference.sae, reference.site, [p.negative for p in pairs], seeds, coarse)
    report_progress("generating with the concept", 0.2)
    shown, _ = pooled_features(pipe, reference.sae, reference.site, [p.positive for p in pairs], seeds, coarse)
    report_progress("choosing features", 0.4)
    nearest = _nearest_steps(shown, reference)
    shows = conditional_rows(shown)[:, nearest]
    lacks = reference.pooled[rows_without(concept, reference.prompts, reference.labels)]
    plain_rows = branches_as_rows(plain.values)[:, nearest]
    hard = _hard_negative_rows(pipe, concept, reference, s, sampling)
    lacks = torch.cat([lacks, plain_rows, *hard])
    detector = choose_features(shows, lacks)
    evidence, other_evidence = _evidence(shows, detector), _evidence(lacks, detector)
    if hard:
        named = other_evidence[-sum(map(len, hard)) :]
        named += HARD_MARGIN * named.abs()
    low, high = gate_bounds(evidence, other_evidence, s.false_openings)
    gate = build_gate(reference.sae, reference.site, detector, reference.times, low, high)
    text = fit_prompt_correction(
        pipe,
        concept,
        edit_sites,
        float(reference.times.mean()),
        seeds[-1] + 1,
        s,
        coarse,
        lambda share: report_progress("fitting the correction", 0.4 + 0.2 * share),
    )
    gate = dataclasses.replace(gate, text_tokens=text.tokens, holds=True)
    header = EraserHeader(
        concept=concept.name,
        kind=concept.kind,
        routes=PROMPT_ROUTES,  # the gate reads a cross-attention: what the image takes out of the prompt
        base=model_name(pipe),
        time_scale="0-1" if float(reference.times.max()) <= 1 else "0-999",
        prompts=tuple(dict.fromkeys((*text.prompts, *concept.hard_negatives))),
        seeds=(seeds[0], seeds[-1] + text.seeds),
        settings=s,
        sampling=sampling,
        separation=tuple(round(float(v), 4) for v in detector.separation),
        tradeoff=trade_off(evidence, other_evidence),
        open_share=round(float((low < SHUT_BOUND).float().mean()), 3),
        text_left=round(text.left, 4),
        **meter.read(),
        made_for=made_for(pipe, [gate.site, *edit_sites]),
        reference=reference.provenance.in_short(),
        # How far thresholds that were calibrated on import differ from what the SAE's own library does.
        sae={k: reference.sae.header[k] for k in ("format", "k", "calibration") if k in reference.sae.header}
        | _labels(reference.sae, gate.features),
    )
    eraser = Eraser(gate, (text.correction,), header)
    if s.num_pictures and has_image_to_image(pipe):
        eraser = _with_image_part(pipe, concept, eraser, report_progress, meter)
    report_progress("done", 1.0)
    return eraser


def _with_image_part(pipe: Any, concept: Concept, eraser: Eraser, progress: Progress, meter: CostMeter) -> Eraser:
    """Return the eraser with an image gate, its guided correction and its least strength."""
    header = eraser.header
    s, sampling = header.settings, header.sampling
    assert isinstance(s, FitSettings) and sampling is not None
    unpadded = dataclasses.replace(sampling, pad_last_batch=False)
    picture = fit_image_part(
        pipe, concept, eraser, s, unpadded, lambda share: progress("fitting the image gate", 0.6 + 0.35 * share)
    )
    progress("measuring start images", 0.95)
    eraser = dataclasses.replace(eraser, image_gate=picture.gate, guided=picture.guided)
    header = dataclasses.replace(
        header,
        routes=(*PROMPT_ROUTES, *IMAGE_ROUTES),
        prompts=tuple(dict.fromkeys((*header.prompts, *picture.prompts))),
        seeds=(s.seed, max((header.seeds or (0, 0))[1], s.seed + CORRECTED - 1)),
        image_separation=tuple(round(float(v), 4) for v in picture.seen),
        made_for=made_for(pipe, eraser.sites),
    )
    eraser = dataclasses.replace(eraser, header=header)
    least = least_strength(pipe, eraser, picture, sampling)
    header = dataclasses.replace(header, least_strength=least, **meter.read())
    return dataclasses.replace(eraser, header=header)


def _labels(sae: SAE, features: Tensor) -> dict[str, list[str]]:
    """Return the labels of those features that were set with one, for the header: they stand first in their SAE."""
    names = sae.header.get("labels", ())
    found = [names[k] for k in features.tolist() if k < len(names)]
    return {"labels": found} if found else {}


def _coarse(sampling: Sampling, times: int) -> Sampling:
    """Return the sampling with no more steps than a reference has timesteps, or ten, and batches that are not filled
    up: images that are only measured need be no better."""
    steps = min(sampling.num_inference_steps, max(times, LEAST_STEPS))
    return dataclasses.replace(sampling, num_inference_steps=steps, pad_last_batch=False)


def _check_width(pipe: Any, reference: Reference, sampling: Sampling) -> None:
    """Raise SettingsError where the reference's SAE has another width than its site in this pipeline."""
    width = shapes_of(pipe, [reference.site], sampling)[reference.site][1]
    if width != reference.sae.d_in:
        raise SettingsError(
            f"{reference.site} of this {type(pipe).__name__} is {width} wide, and the reference's SAE takes "
            f"{reference.sae.d_in}: pass a reference that was made for this pipeline"
        )


def _sample_pairs(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    """Return `count` of the pairs in random order; where there are fewer, they come again."""
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)]


def _hard_negative_rows(
    pipe: Any, concept: Concept, reference: Reference, settings: FitSettings, sampling: Sampling
) -> list[Tensor]:
    """Return the pooled features [N, T, shares, n] of the hard negatives, if there are any: those of the guidance
    branch that reads the prompt, in as many rows as bring every step, each at the reference's timestep nearest to it.
    Seeds are those of the pairs, again and again."""
    prompts = concept.hard_negatives
    if not prompts:
        return []
    seeds = [settings.seed + i % settings.num_pairs for i in range(len(prompts))]
    pooled, _ = pooled_features(pipe, reference.sae, reference.site, prompts, seeds, sampling)
    bins = time_bin(reference.times.flip(0), pooled.times).neg() + len(reference.times) - 1
    near = [
        (bins == i).nonzero()[:, 0].tolist() or [int(step)] for i, step in enumerate(_nearest_steps(pooled, reference))
    ]
    rows = conditional_rows(pooled)
    return [rows[:, [steps[min(k, len(steps) - 1)] for steps in near]] for k in range(max(map(len, near)))]


def _nearest_steps(pooled: Pooled, reference: Reference) -> Tensor:
    """Return for each of the reference's timesteps the number of the step that is nearest to it [T]."""
    return time_bin(pooled.times.flip(0), reference.times).neg() + len(pooled.times) - 1


def _evidence(pooled: Tensor, detector: Detector) -> Tensor:
    """Return the evidence [N, T] of pooled features [N, T, shares, n]."""
    return pooled[:, :, detector.share][..., detector.features].float() @ detector.weight
