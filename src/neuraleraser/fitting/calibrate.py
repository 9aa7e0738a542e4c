"""An eraser on other weights of the same architecture: its gate's bounds anew, from a few prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuraleraser.concepts import Concept, concept_of, named_concept, neighbours_of
from neuraleraser.eraser import Calibration, Eraser, check_nothing_acts
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.families.defaults import model_name, sampling_for_eraser
from neuraleraser.fitting.detector import gate_bounds
from neuraleraser.fitting.trajectories import branches_as_rows, measure_site
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import PROMPT_ROUTES, denoiser_calls, is_denoiser, made_for


def calibrate(
    pipe: Any,
    eraser: Eraser,
    concept: str | Concept | None = None,
    neighbours: Sequence[str | Concept] = (),
    *,
    num_pairs: int = 8,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Eraser:
    """Refit the gate's bounds to other weights of the same architecture; return a new eraser.

    Features, weights and corrections of the prompt stay as they are; an image gate and its guided correction are left
    out, and the header's routes say so. The bounds are set from the evidence of its features on the
    images generated here, as they were when it was made. The findings go into the header, as `calibrated`.

    Args:
        pipe: The pipeline with the other weights.
        eraser: The eraser to refit; it is not changed.
        concept: What it erases, as a phrase, the path of a JSON file of prompts, or a `Concept`; None: the name in its
            header.
        neighbours: Concepts that it could be mistaken for, as phrases or concepts, one prompt of each; none: all others
            of its kind in the pipeline's vocabulary.
        num_pairs: Prompts with the concept, and as many without, generated at the same seeds; at least 2.
        sampling: How images are generated; None: as when the eraser was fitted.
        seed: First seed, one of the selection seeds.

    Returns:
        The eraser with the new bounds.

    Raises:
        ConceptError: The features do not detect the concept at any timestep.
        SettingsError: An eraser acts on the pipeline, there are too few pairs, or the gate is outside the denoiser.
        SiteError: The pipeline does not have its site.

    Examples:
        >>> fitted = calibrate(pipe, eraser, neighbours=["cartoon style"], num_pairs=2, sampling=quick)
        >>> fitted.header.calibrated.prompts
        5
    """
    check_nothing_acts(pipe, "calibrating")
    kind = eraser.header.kind
    if not isinstance(concept, Concept):
        concept = concept_of(pipe, concept, kind) if concept else named_concept(pipe, eraser.name, kind)
    near = neighbours_of(pipe, concept, neighbours)
    if num_pairs < 2:
        raise SettingsError(f"{num_pairs} pairs to calibrate with: pass at least 2")
    if not is_denoiser(eraser.gate.site.path.split(".")[0]):
        raise SettingsError(
            f"the gate of {eraser.name!r} is at {eraser.gate.site}: only those in a denoiser are fitted"
        )
    if eraser.gate.picture:
        raise SettingsError(
            f"the gate of {eraser.name!r} opens wherever a feature fires and has no bounds to set: make a new eraser"
        )
    usual = sampling_for_eraser(pipe, eraser.header.sampling)
    s = sampling or replace(usual, batch_size=min(8, num_pairs, usual.batch_size))
    # Spread over the concept's own, whose order goes by phrasing and subject.
    some = [concept.pairs[i * len(concept.pairs) // num_pairs] for i in range(num_pairs)]
    seeds = [seed + i for i in range(num_pairs)]
    gate = eraser.gate.to(pipe.device)

    def evidence(x: Tensor) -> Tensor:
        return gate.evidence(x).float().cpu()

    tokens: list[int | None] = []
    with denoiser_calls(pipe, lambda call: tokens.append(call.text_tokens)):
        without, times, _ = measure_site(pipe, gate.site, evidence, [p.negative for p in some], seeds, s)
    on, _, _ = measure_site(pipe, gate.site, evidence, [p.positive for p in some], seeds, s)
    lacks = [branches_as_rows(without)]
    others = [c.pairs[i % len(c.pairs)].positive for i, c in enumerate(near) if c.name != concept.name]
    if others:
        values, _, _ = measure_site(pipe, gate.site, evidence, others, [seed + i for i in range(len(others))], s)
        lacks.append(branches_as_rows(values))
    # For each of the gate's bins the pass at the nearest time.
    nearest_step = (times[None] - eraser.gate.times.cpu()[:, None]).abs().argmin(1)
    shows, off = on[:, nearest_step, -1], torch.cat(lacks)[:, nearest_step]
    made = eraser.header.settings
    allowed = made.false_openings if isinstance(made, FitSettings) else FitSettings.false_openings
    low, high = gate_bounds(shows, off, allowed)
    separation = (shows > off.amax(0)).float().mean(0)
    opens = float((low < SHUT_BOUND).float().mean())
    if not opens:
        raise ConceptError(
            f"the features of {eraser.name!r} do not tell it from its matches on this model at any timestep: make a "
            "new eraser for it"
        )
    used = [prompt for p in some for prompt in (p.positive, p.negative)] + others
    spans = [*(eraser.header.seeds or ()), seed, seed + max(num_pairs, len(others)) - 1]
    header = replace(
        eraser.header,
        # A test must not draw what the gate was fitted to.
        prompts=tuple(dict.fromkeys((*eraser.header.prompts, *used))),
        seeds=(min(spans), max(spans)),
        base=model_name(pipe),
        made_for=made_for(pipe, eraser.sites),
        open_share=round(opens, 3),
        calibrated=Calibration(len(used), tuple(round(float(v), 4) for v in separation), round(opens, 3)),
        measured={},  # it was on other weights
        # An image gate would need pictures to be fitted to: it is left out, and what it saw with it.
        routes=tuple(route for route in eraser.routes if eraser.image_gate is None or route in PROMPT_ROUTES),
        tradeoff=(),
        image_separation=(),
        least_strength=None,
    )
    fitted = replace(eraser.gate, low=low, high=high, text_tokens=tokens[0])
    return Eraser(fitted, eraser.corrections, header)
