"""The fit itself, top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
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
from neuraleraser.fitting.correction_training import TrainingExample, train_corrections
from neuraleraser.fitting.detector import Detector, build_gate, choose_features, gate_bounds
from neuraleraser.fitting.image_gate import CORRECTED, fit_image_part
from neuraleraser.fitting.import_reference import shapes_of
from neuraleraser.fitting.least_strength import least_strength
from neuraleraser.fitting.reference import Reference, shipped_reference
from neuraleraser.fitting.trajectories import (
    SHARES,
    branches_as_rows,
    conditional_rows,
    pool,
    record_calls,
    record_trajectories,
)
from neuraleraser.sae import SAE
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import IMAGE_ROUTES, PROMPT_ROUTES, DenoiserCall, Site, edits_for, made_for, record, replay

Progress = Callable[[str, float], None]


def fit(
    pipe: Any,
    concept: Concept,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
    *,
    reference: Reference | None = None,
    sampling: Sampling | None = None,
    edits: Sequence[tuple[Site, ...]] | None = None,
) -> Eraser:
    """Make an eraser of `concept` for `pipe` with a given reference.

    1. Generate matched prompts with and without the concept at the same seeds, keeping every denoiser call.
    2. Choose the features that fire with the concept and not with its neighbours; set the gate's bounds above
       everything that lacks it.
    3. Fit a low-rank correction of the prompt that later blocks read, so that the prediction for the prompt with the
       concept becomes the model's own for the prompt without, on the states of both; and for prompts in which something
       else stands beside the concept, the model's own for that alone.
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
        edits: Sites to edit, one tuple per correction; None: those that `edits_for` names.

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
    started = time.monotonic()
    edit_sites = list(edits or edits_for(pipe, reference.site))
    pairs = _sample_pairs(concept.pairs, s.num_pairs, s.seed)
    seeds = [s.seed + i for i in range(len(pairs))]
    report_progress("generating without the concept", 0.0)
    recording = sampling, reference.sae, reference.site
    plain_calls, pooled_plain = record_trajectories(pipe, [p.negative for p in pairs], seeds, *recording)
    report_progress("generating with the concept", 0.1)
    shown_calls, pooled_shown = record_trajectories(pipe, [p.positive for p in pairs], seeds, *recording)
    report_progress("choosing features", 0.2)
    replayed_calls, pooled_replayed = _replay_with_concept(pipe, plain_calls, shown_calls, reference)
    nearest_step = time_bin(pooled_shown.times.flip(0), reference.times).neg() + len(pooled_shown.times) - 1
    shows = torch.cat([conditional_rows(pooled_shown), pooled_replayed])[:, nearest_step]
    lacks = reference.pooled[rows_without(concept, reference.prompts, reference.labels)]
    plain_rows = branches_as_rows(pooled_plain.values)[:, nearest_step]
    lacks = torch.cat([lacks, plain_rows])
    detector = choose_features(shows, lacks)
    report_progress("generating what stays", 0.2)
    context = _context_prompts(concept, s.num_context_pairs)
    context_seeds = range(seeds[-1] + 1, seeds[-1] + 1 + len(context))
    examples = _training_examples(pipe, plain_calls, shown_calls, replayed_calls)
    if context:
        for part in _context_examples(pipe, context, context_seeds, sampling, reference.site):
            examples += part
    report_progress("fitting the edit", 0.3)
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        report_progress("fitting the edit", 0.3 + 0.3 * step / s.steps)

    corrections = train_corrections(
        pipe,
        edit_sites,
        examples,
        rank=s.rank,
        steps=s.steps,
        batch=s.train_batch_size,
        lr=s.learning_rate,
        seed=s.seed,
        on_step=on_step,
    )
    low, high = gate_bounds(_evidence(shows, detector), _evidence(lacks, detector))
    gate = build_gate(reference.sae, reference.site, detector, reference.times, low, high)
    gate = dataclasses.replace(gate, text_tokens=plain_calls[0].text_tokens)
    header = EraserHeader(
        concept=concept.name,
        kind=concept.kind,
        routes=PROMPT_ROUTES,  # the gate reads a cross-attention: what the image takes out of the prompt
        base=model_name(pipe),
        time_scale="0-1" if float(reference.times.max()) <= 1 else "0-999",
        prompts=_used_prompts(pairs, context),
        seeds=(seeds[0], seeds[-1] + len(context)),
        settings=s,
        sampling=sampling,
        separation=tuple(round(float(v), 4) for v in detector.separation),
        open_share=round(float((low < SHUT_BOUND).float().mean()), 3),
        loss=(round(float(np.mean(losses[:10])), 5), round(float(np.mean(losses[-10:])), 5)) if losses else (),
        seconds=round(time.monotonic() - started, 1),
        made_for=made_for(pipe, [gate.site, *(site for c in corrections for site in (c.site, *c.also))]),
        reference=reference.provenance.in_short(),
        # How far thresholds that were calibrated on import differ from what the SAE's own library does.
        sae={k: reference.sae.header[k] for k in ("format", "k", "calibration") if k in reference.sae.header}
        | _labels(reference.sae, gate.features),
    )
    eraser = Eraser(gate, corrections, header)
    if s.num_pictures and has_image_to_image(pipe):
        eraser = _with_image_part(pipe, concept, eraser, report_progress, started)
    report_progress("done", 1.0)
    return eraser


def _with_image_part(pipe: Any, concept: Concept, eraser: Eraser, progress: Progress, started: float) -> Eraser:
    """Return the eraser with an image gate, its guided correction and its least strength."""
    header = eraser.header
    s, sampling = header.settings, header.sampling
    assert isinstance(s, FitSettings) and sampling is not None
    picture = fit_image_part(
        pipe, concept, eraser, s, sampling, lambda share: progress("fitting the image gate", 0.6 + 0.35 * share)
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
    header = dataclasses.replace(header, least_strength=least, seconds=round(time.monotonic() - started, 1))
    return dataclasses.replace(eraser, header=header)


def _labels(sae: SAE, features: Tensor) -> dict[str, list[str]]:
    """Return the labels of those features that were set with one, for the header: they stand first in their SAE."""
    names = sae.header.get("labels", ())
    found = [names[k] for k in features.tolist() if k < len(names)]
    return {"labels": found} if found else {}


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


def _replay_with_concept(
    pipe: Any, plain: Sequence[DenoiserCall], shown: Sequence[DenoiserCall], reference: Reference
) -> tuple[list[DenoiserCall], Tensor]:
    """Replay the states drawn without the concept with the conditioning of its prompts: there a finished eraser works.

    Returns the calls, with their unedited predictions, and the pooled features [N, T, shares, n].
    """
    calls: list[DenoiserCall] = []
    pooled: list[Tensor] = []

    def on_activations(site: Site, x: Tensor, call: Any) -> None:
        z = reference.sae.encode(x.float())
        pooled.append(torch.stack([pool(z, q) for q in SHARES], 1).half())

    with record(pipe, [reference.site], on_activations), torch.no_grad():
        for a, b in zip(plain, shown, strict=True):
            prediction = replay(pipe, a.state, a.timestep, b.conditioning)
            calls.append(DenoiserCall(a.state, a.timestep, b.conditioning, prediction))
    return calls, torch.stack(pooled, 1)


def _training_examples(
    pipe: Any, plain: Sequence[DenoiserCall], shown: Sequence[DenoiserCall], replayed: Sequence[DenoiserCall]
) -> list[TrainingExample]:
    """Return the examples of the concept's own prompts, at states drawn without the concept and with it.

    The target is the model's own prediction for the matched prompt at those states.

    Those without count twice: that is where the states of a finished eraser's run lie.
    """
    examples = [TrainingExample(a, b.prediction) for a, b in zip(replayed, plain, strict=True)] * 2
    return examples + [TrainingExample(a, _matched_prediction(pipe, a, b)) for a, b in zip(shown, plain, strict=True)]


def _context_prompts(concept: Concept, count: int) -> dict[str, list[str]]:
    """Return the first `count` prompts of what stays, each with the prompts that show the concept beside it."""
    context: dict[str, list[str]] = {}
    for pair in concept.context_pairs:
        if pair.negative in context or len(context) < count:
            context.setdefault(pair.negative, []).append(pair.positive)
    return context


def _context_examples(
    pipe: Any, context: Mapping[str, Sequence[str]], seeds: Sequence[int], sampling: Sampling, site: Site
) -> list[list[TrainingExample]]:
    """Return one list for each way of naming the concept beside what stays.

    An example is that prompt's conditioning at the states of what stays. Only what stays is drawn; of the prompts with
    the concept one step is, for their conditioning.
    """

    def calls(prompts: Sequence[str], sampling: Sampling) -> list[DenoiserCall]:
        return record_calls(pipe, prompts, seeds, sampling, site, lambda x: x.new_zeros(len(x)))[0]

    plain = calls(list(context), sampling)
    examples = []
    for way in range(max(map(len, context.values()))):
        conditioning = calls(
            [shows[way % len(shows)] for shows in context.values()],
            dataclasses.replace(sampling, num_inference_steps=1),
        )[0]
        examples.append([TrainingExample(_with_conditioning(call, conditioning), call.prediction) for call in plain])
    return examples


def _used_prompts(pairs: Sequence[Pair], context: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return every prompt that the fit draws or conditions on, each once: a test must not repeat them."""
    prompts = [prompt for pair in pairs for prompt in (pair.positive, pair.negative)]
    prompts += [prompt for alone, both in context.items() for prompt in (*both, alone)]
    return tuple(dict.fromkeys(prompts))


def _with_conditioning(call: DenoiserCall, other: DenoiserCall) -> DenoiserCall:
    """Return the call with the conditioning of another."""
    return DenoiserCall(call.state, call.timestep, other.conditioning, call.prediction)


@torch.no_grad()
def _matched_prediction(pipe: Any, shown: DenoiserCall, plain: DenoiserCall) -> Tensor:
    """Return the matched prompt's prediction at the states drawn with the concept."""
    return replay(pipe, shown.state, shown.timestep, plain.conditioning)


def _evidence(pooled: Tensor, detector: Detector) -> Tensor:
    """Return the evidence [N, T] of pooled features [N, T, shares, n]."""
    return pooled[:, :, detector.share][..., detector.features].float() @ detector.weight
