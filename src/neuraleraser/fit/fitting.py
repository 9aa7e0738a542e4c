"""The fit itself, top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, nearest
from neuraleraser.fit.dictionary import Dictionary, load_dictionary
from neuraleraser.fit.edits import learnt, replace, scale
from neuraleraser.fit.gate import SHUT, Detector, bounds, build, choose
from neuraleraser.fit.states import SHARES, conditional, pool, recorded, rows_of
from neuraleraser.models import called
from neuraleraser.sae import SAE
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import DenoiserCall, Site, made_for, record, replay

Progress = Callable[[str, float], None]


def fit(
    pipe: Any,
    concept: Concept,
    settings: FitSettings | None = None,
    progress: Progress | None = None,
    *,
    known: Dictionary | None = None,
    sampling: Sampling | None = None,
) -> Eraser:
    """Make an eraser of `concept` for `pipe`, with what is `known` of it (the canvas's own dictionary if not given).

    1. Draw matched prompts with and without the concept at the same seeds, keeping every denoiser call.
    2. Choose the features that fire with the concept and not with its neighbours; set the gate's bounds above
       everything that lacks it.
    3. Fit a low-rank correction at all edit sites together, so that the prediction for the prompt with the
       concept becomes the model's own for the prompt without, on the states of both.

    `progress(what, share)` is told how far it is. Raises ConceptError if no feature detects the concept.
    """
    s, sampling, known = settings or FitSettings(), sampling or Sampling(), known or load_dictionary()
    say = progress or (lambda what, share: None)
    started = time.monotonic()
    pairs = _some(concept.pairs, s.pairs, s.seed)
    seeds = [s.seed + i for i in range(len(pairs))]
    say("drawing without the concept", 0.0)
    plain, pooled_plain = recorded(pipe, [p.without for p in pairs], seeds, sampling, known.sae, known.site)
    say("drawing with the concept", 0.1)
    shown, pooled_shown = recorded(pipe, [p.shows for p in pairs], seeds, sampling, known.sae, known.site)
    say("choosing features", 0.2)
    crossed, pooled_crossed = _cross(pipe, plain, shown, known)
    at = nearest(pooled_shown.times.flip(0), known.times).neg() + len(pooled_shown.times) - 1
    shows = torch.cat([conditional(pooled_shown), pooled_crossed])[:, at]
    lacks = _others(known, concept)
    own = rows_of(pooled_plain.values)[:, at]
    lacks = torch.cat([lacks, own])
    detector = choose(shows, lacks)
    speaking = detector.features[detector.weight > 0]
    say("fitting the edit", 0.3)
    losses: list[float] = []

    def on_step(step: int, loss: float) -> None:
        losses.append(loss)
        say("fitting the edit", 0.3 + 0.65 * step / s.steps)

    if s.mode == "scale":
        corrections = (scale(known.sae, known.site, speaking, known.times, s.factor),)
    elif s.mode == "replace":
        corrections = (replace(pipe, known.sae, known.site, speaking, plain),)
    else:
        target = [_retarget(a, b) for a, b in zip(crossed, plain, strict=True)]
        back = [_teach(pipe, a, b) for a, b in zip(shown, plain, strict=True)]
        # Where a finished eraser stands counts twice: on states drawn without the concept.
        states = list(zip(crossed, target, strict=True)) * 2 + list(zip(shown, back, strict=True))
        spans = {known.site: _span(known.sae, speaking, shows, own)} if s.mode == "span" else {}
        corrections = learnt(
            pipe,
            {known.site: known.sae.d} if spans else known.edits,
            states,
            rank=s.rank,
            bins=s.bins,
            steps=s.steps,
            batch=s.batch,
            lr=s.learning_rate,
            seconds=s.seconds,
            seed=s.seed,
            spans=spans,
            on_step=on_step,
        )
    low, high = bounds(_evidence(shows, detector), _evidence(lacks, detector))
    gate = build(known.sae, known.site, detector, known.times, low, high)
    say("done", 1.0)
    header = {
        "concept": concept.name,
        "kind": concept.kind,
        "base": called(pipe),
        "time_scale": "0-1" if float(known.times.max()) <= 1 else "0-999",
        "prompts": [p.shows for p in pairs],
        "seeds": [seeds[0], seeds[-1]],
        "settings": asdict(s),
        "sampling": asdict(sampling),
        "separation": [round(float(v), 4) for v in detector.separation],
        "open_share": round(float((low < SHUT).float().mean()), 3),
        "loss": [round(float(np.mean(losses[:10])), 5), round(float(np.mean(losses[-10:])), 5)] if losses else [],
        "seconds": round(time.monotonic() - started, 1),
        "made_for": made_for(pipe, [gate.site, *(c.site for c in corrections)]),
        # How far thresholds that were calibrated on import differ from what the SAE's own library does.
        "sae": {k: known.sae.header[k] for k in ("format", "k", "calibration") if k in known.sae.header},
    }
    return Eraser(gate, corrections, header)


def _some(pairs: Sequence[Pair], count: int, seed: int) -> list[Pair]:
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[order[i % len(pairs)]] for i in range(count)]


def _others(known: Dictionary, concept: Concept) -> Tensor:
    """Rows of the dictionary that lack the concept."""
    keep = [i for i, objects in enumerate(known.objects) if concept.name not in (known.styles[i], *objects.split("+"))]
    return known.pooled[keep]


def _cross(
    pipe: Any, plain: Sequence[DenoiserCall], shown: Sequence[DenoiserCall], known: Dictionary
) -> tuple[list[DenoiserCall], Tensor]:
    """The prompts with the concept at the states drawn without it: where a finished eraser will stand.

    -> (calls with their unedited predictions, pooled features [N, T, shares, n]).
    """
    out: list[DenoiserCall] = []
    seen: list[Tensor] = []

    def note(site: Site, x: Tensor, call: Any) -> None:
        z = known.sae.encode(x.float())
        seen.append(torch.stack([pool(z, q) for q in SHARES], 1).half())

    with record(pipe, [known.site], note), torch.no_grad():
        for a, b in zip(plain, shown, strict=True):
            prediction = replay(pipe, a.state, a.timestep, b.conditioning)
            out.append(DenoiserCall(a.state, a.timestep, b.conditioning, prediction))
    return out, torch.stack(seen, 1)


def _retarget(call: DenoiserCall, plain: DenoiserCall) -> DenoiserCall:
    """The call at the same state whose prediction is to be reached."""
    return DenoiserCall(call.state, call.timestep, plain.conditioning, plain.prediction)


@torch.no_grad()
def _teach(pipe: Any, shown: DenoiserCall, plain: DenoiserCall) -> DenoiserCall:
    """The matched prompt's prediction at the states drawn with the concept."""
    prediction = replay(pipe, shown.state, shown.timestep, plain.conditioning)
    return DenoiserCall(shown.state, shown.timestep, plain.conditioning, prediction)


def _span(sae: SAE, features: Tensor, shows: Tensor, lacks: Tensor) -> Tensor:
    """Decoder rows [q, d] of the detecting features and of as many that fire more without the concept."""
    gain = lacks[:, :, 0].float().mean((0, 1)) - shows[:, :, 0].float().mean((0, 1))
    instead = gain.index_fill(0, features, -1.0).topk(len(features)).indices
    return sae.W_dec[torch.cat([features, instead])].float()


def _evidence(pooled: Tensor, detector: Detector) -> Tensor:
    """[N, T, shares, n] -> [N, T]."""
    return pooled[:, :, detector.share][..., detector.features].float() @ detector.weight
