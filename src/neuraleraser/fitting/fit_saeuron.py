"""SAeUron (arXiv 2501.18052), with the sign of its code's error term put right: features of an unlabelled SAE in the
image stream, chosen by timestep, blocked where they fire.

What is added is sum_i (multiplier * mean_i - 1) z_i d_i (equation 6), over the features chosen at the timestep that
exceed their mean over all concepts. The SAE's reconstruction is not needed, so its error never enters.
`methods.saeuron` has the method as its code applies it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.concepts import Concept, concept_of, default_neighbours, neighbours_of
from neuraleraser.eraser import Eraser, EraserHeader, Gate, check_nothing_acts
from neuraleraser.eraser.corrections import Scaling
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.families import family_of
from neuraleraser.families.defaults import default_sampling, model_name
from neuraleraser.fitting.trajectories import measure_site
from neuraleraser.fitting.unlabelled_sae import check_sae, sae_provenance, train_unlabelled_sae
from neuraleraser.io.costs import CostMeter
from neuraleraser.io.names import file_name
from neuraleraser.io.outputs import check_outputs
from neuraleraser.sae import SAE
from neuraleraser.sae.scores import Profile, profile, saeuron_score
from neuraleraser.settings import SELECTION_SEEDS, SAeUronSettings, Sampling
from neuraleraser.sites import PROMPT_ROUTES, START_IMAGE, Site, default_block_site, made_for
from neuraleraser.vocabulary import PHRASINGS, SEEN, labelled_prompts

SAES_FOLDER = Path("runs/saes")
"""Folder in which SAEs are made and kept."""
PUBLISHED = {"style": (1, -1.0), "object": (20, -20.0), "other": (20, -20.0)}
"""Features at a timestep, and multiplier: those of all styles, and the middle of the objects' own (table 5)."""
DENSE = 0.99
"""Features that fire more often than this share of all features are none of one concept's (section 4.1). Counted where
the concept is not: among a few dozen concepts a concept's own feature is one of the densest."""
OPEN = 1e-6
"""Evidence from which on the gate is wide open: whatever fires is blocked."""


@dataclass(frozen=True)
class Firing:
    """Firing of an SAE's features on several concepts: means by concept and timestep, and how often each fires on each
    concept at all, [C, n]."""

    profile: Profile
    density: Tensor


def fit_saeuron(
    pipe: Any,
    concept: str | Path | Concept,
    *,
    kind: str | None = None,
    neighbours: Sequence[str | Concept] = (),
    sae: str | Path | SAE | None = None,
    site: str | Site | None = None,
    settings: SAeUronSettings | None = None,
    sampling: Sampling | None = None,
    folder: str | Path = SAES_FOLDER,
    progress: Callable[[str, float], None] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Eraser:
    """Make an eraser of a concept as SAeUron does: what `neuraleraser erase --method saeuron` does, no more, no less.

    It blocks features of an SAE in the image stream, on both guidance branches, wherever they fire; no gate holds it
    off where the concept is not. The multiplier counts in units of the activations, so the published values are good
    for the published SAEs alone: choose it on development concepts.

    Args:
        pipe: The diffusers pipeline; it is not changed.
        concept: A phrase, the path of a JSON file of prompts, or a `Concept`.
        kind: "style" or "object"; None: read from the phrase.
        neighbours: All other concepts, against which features are scored; none: those of its kind in the pipeline's
            vocabulary that are not sealed, or else of a list that ships.
        sae: An SAE of the site, or its file, folder or Hub id; None: one made from the pipeline's own images and kept
            in `folder`. If that is interrupted, the same call goes on.
        site: Site to read and edit, in the image stream; None: one that SAeUron or others found good in the pipeline's
            family, or else the last text-conditioned block but one.
        settings: Settings; None: the defaults.
        sampling: How images are generated; None: as `default_sampling` says.
        folder: Folder in which SAEs are made and kept.
        progress: Called as `progress(what, share)` as the work goes on.
        announce: Called as `announce(sentence)` before an SAE is made.

    Returns:
        The eraser.

    Raises:
        ConceptError: The phrase means nothing on this pipeline, there is no other concept, or no feature fires more for
            the concept.
        FileError: The SAE cannot be read.
        SettingsError: An eraser acts on the pipeline, or the images need more seeds than there are selection seeds.
        SiteError: The pipeline does not have the site, or the SAE is of another.

    Examples:
        >>> settings = SAeUronSettings(num_images=2)
        >>> near, sae = ["mosaic style"], "image-sae.safetensors"
        >>> eraser = fit_saeuron(pipe, concept, neighbours=near, sae=sae, settings=settings, sampling=quick)
        >>> eraser.corrections[0].KIND, eraser.header.method
        ('scaling', 'saeuron')
    """
    check_nothing_acts(pipe, "making an eraser")
    meter = CostMeter(pipe._execution_device)
    meant = concept if isinstance(concept, Concept) else concept_of(pipe, str(concept), kind)
    others = _others(pipe, meant, neighbours)
    sampling, tell, say = sampling or default_sampling(pipe), progress or _silent, announce or (lambda sentence: None)
    s = _with_published(settings or SAeUronSettings(), meant.kind)
    where = Site.parse(str(site)) if site else default_block_site(pipe, meant.kind)
    prompts, labels = _scored_prompts(pipe, meant, others, s.num_images)
    seeds = range(s.seed, s.seed + len(prompts))
    if seeds[-1] not in SELECTION_SEEDS:
        raise SettingsError(
            f"seed is {s.seed}, and {len(prompts)} images take one each: pass a lower seed or fewer images, as tests "
            f"are generated with seeds above {SELECTION_SEEDS.stop - 1}"
        )
    if sae is None:
        known = _own_sae(pipe, where, meant, others, s, sampling, Path(folder), tell, say)
    else:
        known = sae if isinstance(sae, SAE) else SAE.from_pretrained(str(sae))
    known = check_sae(known, pipe, where, sampling)
    tell("seeing what fires", 0.7)
    firing = measure_firing(pipe, known, where, prompts, labels, seeds, sampling)
    features = choose_features_by_time(firing, meant.name, s.num_features or 1)
    gate, correction = block_features(known, where, firing.profile, meant.name, features, s.multiplier or 0.0)
    tell("done", 1.0)
    header = EraserHeader(
        concept=meant.name,
        kind=meant.kind,
        # A start image shows in the image stream (docs/how-to/saeuron.md says how well); others were never tried.
        routes=(*PROMPT_ROUTES, START_IMAGE),
        base=model_name(pipe),
        time_scale="0-1" if float(firing.profile.times.max()) <= 1 else "0-999",
        prompts=tuple(dict.fromkeys(prompts)),
        seeds=(seeds[0], seeds[-1]),
        settings=s,
        sampling=sampling,
        **meter.read(),
        method="saeuron",
        made_for=made_for(pipe, [where]),
        reference=sae_provenance(known).in_short(),
        sae={k: known.header[k] for k in ("format", "k", "calibration") if k in known.header},
    )
    return Eraser(gate, (correction,), header)


def _silent(what: str, share: float) -> None:
    return None


def _with_published(s: SAeUronSettings, kind: str) -> SAeUronSettings:
    """Return the settings with the published values for what is left open."""
    count, multiplier = PUBLISHED[kind]
    return replace(
        s,
        num_features=count if s.num_features is None else s.num_features,
        multiplier=multiplier if s.multiplier is None else s.multiplier,
    )


def _others(pipe: Any, concept: Concept, named: Sequence[str | Concept]) -> list[Concept]:
    """Return the concepts that features are scored against: no sealed one, unless it is named."""
    vocabulary = family_of(pipe).vocabulary
    if named:
        found = neighbours_of(pipe, concept, named)
    elif vocabulary is not None:
        found = [other for other in neighbours_of(pipe, concept) if other.name not in vocabulary.sealed]
    else:
        found = list(default_neighbours(concept))
    found = [other for other in found if other.name != concept.name]
    if not found:
        raise ConceptError(f"{concept.name!r} has no other concepts to be set apart from: name some, as neighbours")
    return found


def _own_prompts(pipe: Any, concept: Concept) -> list[str]:
    """Return the prompts that show a concept, without those that name a sealed one beside it."""
    vocabulary = family_of(pipe).vocabulary
    prompts = [pair.positive for pair in concept.pairs]
    if vocabulary is None:
        return prompts
    closed = [phrase for name in vocabulary.sealed - {concept.name} for phrase in vocabulary.phrases_of(name)]
    return [prompt for prompt in prompts if not any(phrase in prompt for phrase in closed)] or prompts


def _scored_prompts(
    pipe: Any, concept: Concept, others: Sequence[Concept], num_images: int
) -> tuple[list[str], list[str]]:
    """Return the prompts that features are scored on, and the concept of each: `num_images` of the concept, as many of
    all others together, but at least one of each."""
    prompts: list[str] = []
    labels: list[str] = []
    for shown, count in [(concept, num_images), *((other, -(-num_images // len(others))) for other in others)]:
        own = _own_prompts(pipe, shown)
        prompts += [own[i * len(own) // count] for i in range(count)]
        labels += [shown.name] * count
    return prompts, labels


def _own_sae(
    pipe: Any,
    site: Site,
    concept: Concept,
    others: Sequence[Concept],
    s: SAeUronSettings,
    sampling: Sampling,
    folder: Path,
    progress: Callable[[str, float], None],
    announce: Callable[[str], None],
) -> SAE:
    """Return the SAE that is kept in the folder, or else make it: one for all concepts of a vocabulary, otherwise one
    of the concept and the others."""
    vocabulary, name = family_of(pipe).vocabulary, file_name(f"{model_name(pipe)}-{site.path}".replace("/", "--"))
    if vocabulary is None:
        prompts = [prompt for shown in (concept, *others) for prompt in _own_prompts(pipe, shown)]
        name, phrasings = f"{name}-{file_name(concept.name.replace(' ', '-').lower())}", ()
    else:
        drawn = labelled_prompts(vocabulary, 2 * s.sae_images, 1)
        prompts = [prompt for prompt, shown in drawn if not shown & vocabulary.sealed]
        phrasings = tuple(PHRASINGS[SEEN])
    path = folder / f"{name}.safetensors"
    if path.exists():
        return SAE.load(path)
    check_outputs({"the SAE's file": path})
    announce(f"Training an SAE of {site} on {s.sae_images} of the model's own images, into {path}. Ctrl-C stops; the "
             "same call goes on.")  # fmt: skip
    return train_unlabelled_sae(
        pipe, site, prompts, path, s.sae_images, sampling, phrasings, lambda what, share: progress(what, 0.7 * share)
    )


def measure_firing(
    pipe: Any,
    sae: SAE,
    site: Site,
    prompts: Sequence[str],
    labels: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
) -> Firing:
    """Draw the prompts and note how the features fire, on the conditional branch as SAeUron does: means over positions,
    zeros included."""
    placed = copy.deepcopy(sae).to(pipe.device)

    def measure(x: Tensor) -> Tensor:
        z = placed.encode(x.float())
        return torch.stack([z.mean(1), (z > 0).float().mean(1)], 1).half().cpu()

    values, times, _ = measure_site(pipe, site, measure, prompts, seeds, sampling)
    # A scheduler may ask for a timestep twice (Heun does): the first pass counts.
    ascending, first = np.unique(times.numpy(), return_index=True)
    values = values[:, torch.from_numpy(first), -1].float()  # [N, T, 2, n]
    times = torch.from_numpy(ascending).float()
    return Firing(profile(values[:, :, 0], times, labels), profile(values[:, :, 1], times, labels).mean.mean(1))


def choose_features_by_time(firing: Firing, name: str, count: int) -> Tensor:
    """Return which features are chosen at each timestep, bool [T, n]: the `count` of the highest scores (equation 4),
    of those that fire more for the concept, and not too often elsewhere.

    Raises ConceptError where there is none at any timestep.
    """
    score = saeuron_score(firing.profile, name)
    elsewhere = [i for i, other in enumerate(firing.profile.names) if other != name]
    density = firing.density[elsewhere].mean(0)
    score = score.masked_fill(density > density.quantile(DENSE), 0.0)
    best = score.topk(min(count, score.shape[1]), 1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, best.indices, best.values > 0)
    if not bool(chosen.any()):
        raise ConceptError(
            f"no feature fires more for {name!r} than for the others: give other prompts, or another site"
        )
    return chosen


def block_features(
    sae: SAE, site: Site, seen: Profile, name: str, chosen: Tensor, multiplier: float
) -> tuple[Gate, Scaling]:
    """Return the gate and the correction that block the chosen features [T, n] of an SAE (equation 6).

    At each timestep a chosen feature that exceeds its mean over all concepts becomes multiplier * mean * itself, with
    its mean over the concept's images.
    """
    features = chosen.any(0).nonzero()[:, 0]
    on, often = seen.mean[seen.names.index(name)][:, features], seen.mean.mean(0)[:, features]
    return scale_features(sae, site, seen.times, features, chosen[:, features], on, often, multiplier)


def scale_features(
    sae: SAE, site: Site, times: Tensor, features: Tensor, chosen: Tensor, on: Tensor, often: Tensor, multiplier: float
) -> tuple[Gate, Scaling]:
    """Return the gate and the correction that scale features [f] of an SAE where they exceed `often`: by multiplier *
    `on`, at the timesteps [T] at which they are `chosen`; these three are [T, f].

    The gate is wide open wherever one of the features fires, and shut at timesteps at which none is chosen.
    """
    rows = sae.W_enc[features].float()
    bias = sae.b_enc[features].float() - rows @ sae.b_dec.float()
    threshold = sae.threshold[features].float()
    shut = torch.where(chosen.any(1), 0.0, 1e9)
    gate = Gate(
        site=site,
        features=features,
        rows=rows.clone(),
        bias=bias,
        threshold=threshold.clone(),
        weight=torch.ones(len(features)),
        share=1.0,
        times=times,
        low=shut,
        high=shut + torch.where(shut > 0, 1e9, OPEN),
        picture=True,
    )
    correction = Scaling(
        site,
        times=times,
        rows=rows.clone(),
        bias=bias.clone(),
        threshold=torch.maximum(threshold, often),
        decoder=sae.W_dec[features].float().clone(),
        factor=torch.where(chosen, multiplier * on, torch.ones_like(on)),
    )
    return gate, correction
