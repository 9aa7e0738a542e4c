"""The picture's part of an eraser: a gate that sees the concept in the image stream, and the guided correction."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, Gate, Guided, attach
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.eraser.guided import MAX_WEIGHT
from neuraleraser.fitting.detector import FALSE_OPENINGS
from neuraleraser.fitting.learnt_features import evidence_of, learn_features, most_mistaken
from neuraleraser.fitting.noised_pictures import NoisedStates, in_half_precision, noised_states
from neuraleraser.fitting.pictures import Pictures, has_renders, pictures_for
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.fitting.trajectories import measure_site
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site, default_image_site

Progress = Callable[[float], None]

MARGIN = 0.1
"""Distance of the bounds from what sets them, as a share of the tail that begins at the last twentieth: sampling passes
more states than the levels that are looked at."""
LEVELS_EACH = 2
"""Levels of noise at which a picture is learnt from: more pictures teach more than more levels of each."""
LEAST_SEEN = 0.2
"""Share of the concept's states that a gate must see at a level of noise: else it is shut there."""
FIRST_STEPS = 250
"""Steps of the fit that only chooses more pictures."""
CORRECTED = 12
"""Images whose prompts name the concept and are corrected, at which the gate may not open."""

PLAIN = "as a plain picture"
"""Words for what stands in a style's place."""


@dataclass(frozen=True)
class ImageFit:
    """The picture's part of an eraser; the share of the pictures with the concept at which its gate opens, by level of
    noise; the evidence above which a picture is in doubt; the pictures; and the prompts that they and the others
    were generated from."""

    gate: Gate
    guided: Guided
    seen: Tensor
    doubt: float
    shows: Pictures
    prompts: tuple[str, ...]


def fit_image_part(
    pipe: Any, concept: Concept, eraser: Eraser, settings: FitSettings, sampling: Sampling, progress: Progress
) -> ImageFit:
    """Fit the picture's part of an eraser of prompts, on `settings.num_pictures` pictures of the concept, as many of
    other things, and half as many again that set the bounds.

    What does not fill a picture, as a style does, is harder to see and to take out: as many more pictures are looked
    through, the half of which that a first fit takes for the concept most is learnt from, too; where pictures are
    rendered, twice as many of the concept are learnt from and of these others looked through; and the guided correction
    has `LOCAL_WEIGHT` times the weight.

    Raises SettingsError where the pipeline has no image-to-image form, by which pictures come in.
    """
    site, n = default_image_site(pipe), settings.num_pictures
    share = SHARE_OF_KIND.get(concept.kind, LOCAL_SHARE)
    local, bound = share < 1, n // 2
    of_concept = 2 * n if local and has_renders(pipe, concept) else n
    searched = of_concept if local else 0
    shows, lacks = pictures_for(pipe, concept, of_concept, n + searched + bound, sampling, settings.seed)

    def states(pictures: Pictures, each: int | None, start: float, end: float) -> NoisedStates:
        part = _part(progress, start, end)
        return noised_states(pipe, site, pictures, each=each, batch_size=sampling.batch_size, progress=part)

    on, off = states(shows, LEVELS_EACH, 0.05, 0.2), states(lacks[:n], LEVELS_EACH, 0.2, 0.35)
    if searched:  # what stands somewhere is like other things that do
        first = learn_features(on, off, share, steps=FIRST_STEPS, seed=settings.seed)
        off = off.joined(most_mistaken(first, states(lacks[n : n + searched], LEVELS_EACH, 0.4, 0.55), searched // 2))
    bounding = states(lacks[n + searched :], None, 0.55, 0.75)
    rng = random.Random(settings.seed)
    named = [pair.positive for pair in rng.sample(concept.pairs, min(CORRECTED, len(concept.pairs)))]
    seeds = range(settings.seed, settings.seed + len(named))
    corrected = corrected_states(pipe, eraser, named, seeds, sampling, on)
    progress(0.8)
    gate, seen, doubt = fit_image_gate(
        site,
        concept.kind,
        on,
        off,
        bounding,
        settings,
        corrected,
        _part(progress, 0.8, 1.0),
    )
    weight = min(MAX_WEIGHT, settings.guided_weight * (LOCAL_WEIGHT if local else 1))
    guided = fit_guided(pipe, concept, sampling, weight)
    return ImageFit(gate, guided, seen, doubt, shows, (*named, *shows.generated_from, *lacks.generated_from))


def corrected_states(
    pipe: Any, eraser: Eraser, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, like: NoisedStates
) -> NoisedStates:
    """Generate images of `prompts` with an eraser and return their states in every step and guidance branch, by the
    nearest level of noise of `like`; steps too noisy for it, at which a gate is shut, are left out.
    """
    site = default_image_site(pipe)
    with attach(pipe, eraser):
        values, times, _ = measure_site(pipe, site, lambda x: in_half_precision(x, site), prompts, seeds, sampling)
    bins = torch.cat([_beyond(like.times), like.times])
    levels = (bins[None] - times[:, None]).abs().argmin(1) - 1
    values, levels = values[:, levels >= 0].transpose(1, 2).flatten(1, 2), levels[levels >= 0]
    levels = levels.repeat(values.shape[1] // max(1, len(levels)))
    return NoisedStates(values, levels.expand(len(values), -1), like.times, like.grid)


def _beyond(times: Tensor) -> Tensor:
    """Return a time [1] noisier than the noisiest of `times`: nearer to it than to them, gates are shut."""
    return 2 * times[:1] - times[1:2]


def _part(progress: Progress, start: float, end: float) -> Progress:
    return lambda share: progress(start + (end - start) * share)


LOCAL_WEIGHT = 2
"""Factor of the guided correction's weight for what stands somewhere in a picture (docs/LOG.md)."""
DOUBTED = 0.1
"""Share of the pictures without the concept that are in doubt: who asks if it is gone looks closer than the gate."""
SHARE_OF_KIND = {"style": 1.0}
"""Share of positions that features are pooled over: a style fills a picture."""
LOCAL_SHARE = 1 / 64
"""That of everything else, which stands somewhere in it."""


def fit_image_gate(
    site: Site,
    kind: str,
    shows: NoisedStates,
    lacks: NoisedStates,
    bounding: NoisedStates,
    settings: FitSettings,
    corrected: NoisedStates | None = None,
    progress: Progress | None = None,
) -> tuple[Gate, Tensor, float]:
    """Fit a gate to states of pictures that show a concept of this kind, and of pictures that lack it.

    Features are learnt on `shows` and `lacks`. `bounding`, other pictures that lack it, each at all levels of noise,
    set the bounds, by image; and so do states of `corrected` images, whose prompts name it: the denoiser's image stream
    holds what it reads of the text, too, and a push beside the prompt's correction leaves artefacts (docs/LOG.md).

    Returns the gate; the share of the pictures with the concept at which it opens, by level of noise [T + 1], the
    noisiest first, beyond those of the states, where it is shut; and the evidence that `DOUBTED` of the others exceed
    at the lowest level.
    """
    share = SHARE_OF_KIND.get(kind, LOCAL_SHARE)
    found = learn_features(shows, lacks, share, seed=settings.seed, on_step=progress)
    on, off = (evidence_of(found, states) for states in (shows, bounding))
    on_by_level = [shows.of_level(on, level) for level in range(len(shows.times))]
    low, high = image_bounds(on_by_level, off, None, settings.false_openings)
    if corrected is not None:
        above = highest_corrected(evidence_of(found, corrected), corrected, low)
        low, high = image_bounds(on_by_level, off, above, settings.false_openings)
    seen = torch.stack([(x > bound).float().mean() for x, bound in zip(on_by_level, low, strict=True)])
    # Shut beyond the noisiest level: no states are known there, and evidence rises without the concept (docs/LOG.md).
    times, seen = torch.cat([_beyond(shows.times), shows.times]), torch.cat([seen.new_zeros(1), seen])
    low, high = torch.cat([low.new_tensor([SHUT_BOUND]), low]), torch.cat([high.new_tensor([2 * SHUT_BOUND]), high])
    gate = Gate(
        site=site,
        features=torch.arange(len(found.weight)),
        rows=found.rows,
        bias=found.bias,
        threshold=torch.zeros_like(found.bias),
        weight=found.weight,
        share=share,
        times=times.flip(0).float(),
        low=low.flip(0),
        high=high.flip(0),
        picture=True,
        window=found.window,
    )
    return gate, seen, float(off[:, -1].quantile(1 - DOUBTED))


def highest_corrected(evidence: Tensor, states: NoisedStates, low: Tensor) -> Tensor:
    """Return the highest evidence [T] at each level of noise in images whose prompts were corrected: evidence [N, K] at
    levels that are the same for all N.

    Images in which it exceeds low [T] at the cleanest level do not count: there the correction left the concept, for
    the gate to see. 0 where there are none.
    """
    at = states.levels[0]
    gone = evidence[(evidence[:, at == len(low) - 1] <= low[-1]).all(1)]
    found = [gone[:, at == level].flatten() for level in range(len(low))]
    return torch.stack([x.max() if len(x) else x.new_zeros(()) for x in found])


def image_bounds(
    shows: Sequence[Tensor],
    lacks: Tensor,
    above: Tensor | None = None,
    false_openings: float = FALSE_OPENINGS,
) -> tuple[Tensor, Tensor]:
    """Return low and high [T], between which the gate opens, from evidence with the concept, [n] of each of T levels of
    noise, and without [M, T]; and `above` [T], evidence at which it must be shut whatever it costs.

    low keeps all but the share `false_openings` of the pictures without the concept shut at all levels together: those
    that stand out most at some level are given up, and low lies a little above (`MARGIN`) all others at each level.
    high lies just above, a fiftieth of the way from low to what `LEAST_SEEN` of those with the concept exceed: half of
    the correction would leave half of the concept. A level at which that lies below low cannot tell: there the gate
    stays shut, and the others need not allow for it.
    """
    tail, top = (lacks.quantile(q, 0) for q in (min(0.95, 1 - 2 * false_openings), 1 - false_openings))
    standing_out = (lacks - tail) / (top - tail).clamp(min=1e-6)
    kept = max(1, len(lacks) - int(false_openings * len(lacks)))
    typical = torch.stack([x.quantile(1 - LEAST_SEEN) for x in shows])
    least = torch.full_like(tail, 1e-6) if above is None else above + MARGIN * (above - tail).clamp(min=0)
    low, shut = top, typical <= torch.maximum(top, least)
    while not bool(shut.all()):
        others = lacks[standing_out[:, ~shut].amax(1).argsort()[:kept]]
        low = others.amax(0)
        low = torch.maximum(low + MARGIN * (low - tail), least).clamp(min=1e-6)
        if not bool((typical <= low)[~shut].any()):
            break
        shut = shut | (typical <= low)
    high = low + 0.02 * (typical - low).clamp(min=1e-3)
    return torch.where(shut, SHUT_BOUND, low), torch.where(shut, 2 * SHUT_BOUND, high)


def fit_guided(pipe: Any, concept: Concept, sampling: Sampling, weight: float) -> Guided:
    """Return the correction that moves the prediction from the concept's phrase to what stands in its place.

    The phrases are those in which the concept's first pair of prompts differs. Where nothing stands in its place, as in
    place of a style, `PLAIN` does: an empty prompt asks for no other style, and so leaves the one that is there.
    """
    shown, without = differing_words(concept.pairs[0])
    without = without or PLAIN
    texts = prompt_texts(pipe, [without, shown], sampling)
    return Guided(weight, texts[0], texts[1], (without, shown))


def differing_words(pair: Pair) -> tuple[str, str]:
    """Return the words of a pair's two prompts between those that both begin with and those that both end with."""
    shown, without = pair.positive.split(), pair.negative.split()
    while shown and without and shown[0] == without[0]:
        shown, without = shown[1:], without[1:]
    while shown and without and shown[-1] == without[-1]:
        shown, without = shown[:-1], without[:-1]
    return " ".join(shown), " ".join(without)
