"""SAEmnesia, Cassano, Renzulli, Nurisso, Zaffaroni, Perotti and Grangetto, ICML 2026, arXiv 2509.21379: SAeUron with
one feature for each concept.

Published (abstract, project page and EIDOSLAB/SAEmnesia at fd5ac5a; the training code is announced, not released).
SAeUron's SAE is trained on, with labels. First each concept gets a feature: concepts are sorted by their best score
(`sae.scores.saeuron_score`, averaged over timesteps), objects before styles, and each takes its best one that is free.
With v_bc what that feature makes of map b before the selection of the largest, and T_b the concepts of the map,

    loss = L_SAE + binding (L_CA + decorrelation L_DC) + sparsity L_1,
    L_CA = -mean over b of the mean over c in T_b of log sigmoid(v_bc),
    L_DC = mean over objects i and styles j of the correlation of v_i and v_j over the maps.

To erase, the concept's feature z becomes multiplier * m * z wherever z > m_all, with its means m over the concept's
images and m_all over those of all concepts, at each timestep: SAeUron's edit, on one feature. So only the multiplier is
searched, of -1, -5, -10, -15, -20, -25 and -30. Adam at 5e-6, 128 maps a step, up to 150 epochs.

Not confirmed: L_CA and L_DC are as others report them, the weights of all terms, the form of L_1 (here the mean of what
is above 0), and how a map's positions are pooled (here by their maximum: a concept need not be everywhere). L_CA knows
no maps without the concept, so a feature that fires everywhere would do; `sae.supervised.binding_loss` counts both.

Ours: the error term has the right sign, where the released code repeats SAeUron's fault (`methods.saeuron`); the
feature is one for all timesteps, and fires above a threshold of its own; v is not cut at 0, which would leave a feature
that fires nowhere without a gradient; the training has a fixed number of steps, without early stopping, on maps of the
conditional half. Features of concepts come first, objects before styles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.eraser import Eraser, EraserHeader
from neuraleraser.errors import SettingsError
from neuraleraser.families.defaults import model_name
from neuraleraser.fitting.fit_saeuron import scale_features
from neuraleraser.fitting.unlabelled_sae import check_sae, sae_provenance
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.saeuron import features_at_once
from neuraleraser.sae import SAE, TrainSettings, labelled_batches
from neuraleraser.sae.architectures.architecture import architecture_named
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.settings import Sampling, check_number, check_seed, check_whole
from neuraleraser.sites import PROMPT_ROUTES, START_IMAGE, Site, made_for

_THRESHOLD_STEPS = 8
"""Last steps, whose mean firing threshold is the features'."""


@dataclass(frozen=True)
class SAEmnesiaSettings:
    """Settings of SAEmnesia's training.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> SAEmnesiaSettings(steps=100).maps
        32
    """

    steps: int = 300
    """Steps of training."""
    maps: int = 32
    """Maps of a step: all positions of an image at a timestep."""
    learning_rate: float = 1e-3
    binding: float = 0.1
    """Weight of what labels ask for (beta in the paper)."""
    decorrelation: float = 0.1
    """Weight of the correlation of objects and styles, within that (eta in the paper)."""
    sparsity: float = 1e-3
    """Weight of what features add up to (lambda in the paper)."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 1, 1_000_000)
        check_whole("maps", self.maps, 2, 1_000_000)
        check_number("learning_rate", self.learning_rate, 0, 1, above=True)
        for name in ("binding", "decorrelation", "sparsity"):
            check_number(name, getattr(self, name), 0, 1e6)
        check_seed(self.seed)


@dataclass(frozen=True)
class SAEmnesia(EraserMethod):
    """SAEmnesia: the one feature that labels bound to the concept is multiplied by a negative number where it fires.

    It acts on both guidance branches, and no gate holds it off where the concept is not. An image in which the feature
    never fires keeps its bits.

    Attributes:
        eraser: The eraser, as `fit` makes it.
        strength: Strength from 0 (nothing) to 2; 1 is as fitted.

    Examples:
        >>> few = SAEmnesiaSettings(steps=2, maps=4)
        >>> shown = [{"Cats", "Van_Gogh"}, {"Dogs", "Mosaic"}]
        >>> asked = ["a cat in Van Gogh style", "a dog in mosaic style"]
        >>> groups = [["Cats", "Dogs"], ["Van_Gogh", "Mosaic"]]
        >>> start = SAE.load("image-sae.safetensors")
        >>> labelled = SAEmnesia.train_sae(pipe, start, asked, shown, groups, [0, 1], quick, few)
        >>> method = SAEmnesia.fit(pipe, "Van_Gogh", "style", labelled, multiplier=-5.0)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> erased.shape
        (2, 64, 64, 3)
    """

    @staticmethod
    def train_sae(
        pipe: Any,
        sae: SAE,
        prompts: Sequence[str],
        shown: Sequence[Collection[str]],
        groups: tuple[Sequence[str], Sequence[str]] | Sequence[Sequence[str]],
        seeds: Sequence[int],
        sampling: Sampling,
        settings: SAEmnesiaSettings | None = None,
        phrasings: tuple[int, ...] = (),
        progress: Callable[[float], None] | None = None,
    ) -> SAE:
        """Train an SAE on with labels, so that each concept has a feature. One is good for every concept.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            sae: SAE of a site in the image stream, whose header names it, as `fit_saeuron` makes one.
            prompts: Prompts that show the concepts, each at least once and none in all.
            shown: Names of the concepts that each prompt shows.
            groups: Names of the objects, and of the styles.
            seeds: Seeds of the images, one for each prompt.
            sampling: How images are generated.
            settings: Settings of the training; None: the defaults.
            phrasings: Numbers of the canvas's phrasings that the prompts use.
            progress: Called with the share that is done.

        Returns:
            The SAE. Its first features are those of the objects and the styles, which its header names as "labels"; it
            has their means, too, as "means".

        Raises:
            SettingsError: Prompts, names and seeds do not match, a concept is shown nowhere or everywhere, or the SAE
                has fewer features than there are concepts, does not name its site, or not how many fire.
            SiteError: The SAE is of another pipeline.
        """
        s, names = settings or SAEmnesiaSettings(), [name for group in groups for name in group]
        site = _site_of(sae)
        y = _labels(prompts, shown, names, seeds)
        if len(names) > sae.n_features:
            raise SettingsError(f"there are {len(names)} concepts, and the SAE has {sae.n_features} features")
        check_sae(sae, pipe, site, sampling)
        x, times = _maps(pipe, site, prompts, seeds, sampling)
        if progress:
            progress(0.5)
        scores = concept_scores(_pooled(sae, x), y)
        first = assign_features(scores, len(groups[0]))
        sae = _with_first(sae, first)
        bound = _bind(sae, x, y, len(groups[0]), s, progress)
        on = _means(_pooled(bound, x)[..., : len(names)], y)  # [C, T, C]
        own, often = on.diagonal(dim1=0, dim2=2).T, on.mean(0).T  # [C, T] both
        known = sae_provenance(sae)
        made = replace(
            known,
            seeds=(*known.seeds, (min(seeds), max(seeds))),
            prompts=tuple(dict.fromkeys((*known.prompts, *prompts))),
            phrasings=tuple(sorted({*known.phrasings, *phrasings})),
            labels=tuple(names),
        )
        bound.header |= {
            "provenance": made.in_short().as_json(),
            "labels": names,
            "concepts": len(names),
            "means": {"times": times.tolist(), "own": own.tolist(), "all": often.tolist()},
        }
        return bound

    @classmethod
    def fit(cls, pipe: Any, concept: str, kind: str, sae: SAE, multiplier: float = -1.0) -> SAEmnesia:
        """Make the eraser of a concept.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept, one of the SAE's labels.
            kind: "style" or "object".
            sae: SAE as `train_sae` makes it.
            multiplier: What the feature is multiplied by, together with its mean, -1e6 to 1e6; below 0 erases.

        Returns:
            The method.

        Raises:
            SettingsError: The SAE has no feature of the concept, or the multiplier is out of range.
        """
        check_number("multiplier", multiplier, -1e6, 1e6)
        site, labels, means = _site_of(sae), sae.header.get("labels", ()), sae.header.get("means")
        if concept not in labels or means is None:
            raise SettingsError(
                f"the SAE has no feature of {concept!r}, but of {', '.join(labels) or 'no concept'}: make it with "
                "SAEmnesia.train_sae, from prompts that show the concept"
            )
        at = labels.index(concept)
        times = torch.tensor(means["times"])
        own, often = (torch.tensor(means[name][at])[:, None] for name in ("own", "all"))
        wanted = torch.ones(len(times), 1, dtype=torch.bool)
        gate, correction = scale_features(sae, site, times, torch.tensor([at]), wanted, own, often, multiplier)
        header = EraserHeader(
            concept,
            kind,
            routes=(*PROMPT_ROUTES, START_IMAGE),  # as fit_saeuron has it, and for its reasons
            base=model_name(pipe),
            time_scale="0-1" if float(times.max()) <= 1 else "0-999",
            seeds=sae_provenance(sae).seeds[-1],
            method="saemnesia",
            made_for=made_for(pipe, [site]),
            reference=sae_provenance(sae).in_short(),
        )
        return cls(Eraser(gate, (correction,), header))


def concept_scores(pooled: Tensor, y: Tensor) -> Tensor:
    """Return SAeUron's score of each feature for each concept, averaged over timesteps [C, n], from features pooled
    over positions [N, T, n] and labels y [N, C]: its share of all activation where the concept is, minus that where it
    is not."""
    on, off = (means / (means.sum(-1, keepdim=True) + 1e-8) for means in (_means(pooled, y), _means(pooled, 1 - y)))
    return (on - off).mean(1)


def assign_features(scores: Tensor, objects: int) -> list[int]:
    """Return the feature of each concept, no two the same, from scores [C, n] of which the first rows are objects.

    By turns, objects before styles and the best scores first, each takes the best one that is left.
    """
    best = scores.amax(1)
    turns = sorted(range(len(scores)), key=lambda c: (c >= objects, -float(best[c])))
    free, found = scores.clone(), [0] * len(scores)
    for c in turns:
        found[c] = int(free[c].argmax())
        free[:, found[c]] = -math.inf
    return found


def assignment_loss(v: Tensor, y: Tensor) -> Tensor:
    """Return L_CA (a scalar) of features v [M, C], each of its concept, on maps with labels y [M, C]; maps that show no
    concept count as 0."""
    each = (logsigmoid(v) * y).sum(1) / y.sum(1).clamp_min(1)
    return -each.mean()


def decorrelation_loss(v: Tensor, objects: int) -> Tensor:
    """Return L_DC (a scalar) of features v [M, C], of which the first are objects'; 0 for features that never vary."""
    away = normalize(v - v.mean(0), dim=0)
    return (away[:, :objects].T @ away[:, objects:]).mean()


def _bind(
    sae: SAE, x: Tensor, y: Tensor, objects: int, s: SAEmnesiaSettings, progress: Callable[[float], None] | None
) -> SAE:
    """Return the SAE trained on maps x [N, T, P, d] of images with labels y [N, C], whose features come first.

    On data scaled to E|x|^2 = d, as SAEs are trained."""
    count, positions = y.shape[1], x.shape[2]
    bank = x.flatten(0, 1)
    scale = math.sqrt(x.shape[3] / float(bank[:: max(1, len(bank) // 512)].float().square().sum(-1).mean()))
    some = scale * bank[:: max(1, len(bank) // 64)].float().flatten(0, 1)
    variance = float((some - some.mean(0)).square().sum(1).mean())
    own = (sae.W_enc, scale * sae.b_enc, sae.W_dec, scale * sae.b_dec)
    w = Weights(*(v.detach().float().clone().requires_grad_() for v in own))
    training = TrainSettings(sae.n_features, features_at_once(sae), s.steps)
    select, optimizer = architecture_named("batchtopk"), torch.optim.Adam(list(w), lr=s.learning_rate)
    thresholds = list[Tensor]()
    stream = labelled_batches(bank, y.repeat_interleave(x.shape[1], 0), min(s.maps, len(bank)), s.seed)(0)
    for step, (raw, labels) in zip(range(s.steps), stream, strict=False):
        vectors = scale * raw.float()
        pre = torch.nn.functional.linear(vectors - w.b_dec, w.W_enc, w.b_enc)
        v = pre[:, :count].unflatten(0, (-1, positions)).amax(1)
        asked = assignment_loss(v, labels) + s.decorrelation * decorrelation_loss(v, objects)
        loss = select.forward(w, {}, vectors, variance, training, vectors.dtype).loss
        loss = loss + s.binding * asked + s.sparsity * pre.relu().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w.W_dec.div_(w.W_dec.norm(dim=1, keepdim=True))
            if step >= s.steps - _THRESHOLD_STEPS:
                found = select.last_firing_threshold(w, vectors, training)
                assert found is not None
                thresholds.append(found)
        if progress:
            progress(0.5 + 0.5 * (step + 1) / s.steps)
    threshold = torch.stack(thresholds).mean().clamp_min(0) / scale
    parts = [v.detach() for v in w]
    return SAE(
        parts[0], parts[1] / scale, parts[2], parts[3] / scale, threshold.expand(sae.n_features), dict(sae.header)
    )


def _site_of(sae: SAE) -> Site:
    if "site" not in sae.header:
        raise SettingsError("the SAE does not name its site: make it with fit_saeuron, or neuraleraser train")
    return Site.parse(sae.header["site"])


def _labels(
    prompts: Sequence[str], shown: Sequence[Collection[str]], names: Sequence[str], seeds: Sequence[int]
) -> Tensor:
    """Return which prompt shows which concept [N, C]. Raises SettingsError as `train_sae` says."""
    if not prompts or len({len(prompts), len(shown), len(seeds)}) > 1 or len(set(names)) < len(names):
        raise SettingsError(
            f"there are {len(prompts)} prompts, names for {len(shown)} and {len(seeds)} seeds, and {len(names)} "
            "concepts: pass as many of the first three, and no name twice"
        )
    y = torch.tensor([[float(name in some) for name in names] for some in shown])
    share = y.mean(0)
    if wrong := [name for name, v in zip(names, share.tolist(), strict=True) if v in (0.0, 1.0)]:
        raise SettingsError(f"no prompt, or every prompt, shows {', '.join(wrong)}: pass some of both")
    return y


def _maps(
    pipe: Any, site: Site, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Draw images; return the maps of the conditional half, float16 [N, T, P, d], and the timesteps [T], ascending."""
    found: dict[float, list[Tensor]] = {}

    def on_activations(batch: ActivationBatch) -> None:
        if batch.branch == CONDITIONAL:
            found.setdefault(batch.timestep, []).append(batch.x[: len(batch.images)].detach().half().cpu())

    collect(pipe, prompts, seeds, [site], on_activations, sampling)
    times = sorted(found)
    return torch.stack([torch.cat(found[t])[: len(prompts)] for t in times], 1), torch.tensor(times)


@torch.no_grad()
def _pooled(sae: SAE, x: Tensor) -> Tensor:
    """Return the features of maps x [N, T, P, d], averaged over positions: [N, T, n]."""
    return torch.stack([sae.encode(maps.float()).mean(1) for maps in x])


def _means(pooled: Tensor, y: Tensor) -> Tensor:
    """Return means of [N, T, n] over the images with each label of y [N, C]: [C, T, n]."""
    return torch.einsum("itn,ic->ctn", pooled, y) / y.sum(0)[:, None, None]


def _with_first(sae: SAE, first: Sequence[int]) -> SAE:
    """Return the SAE with these features first."""
    order = torch.tensor([*first, *sorted(set(range(sae.n_features)) - set(first))])
    rows = (v[order].detach().float().cpu() for v in (sae.W_enc, sae.b_enc, sae.W_dec, sae.threshold))
    w_enc, b_enc, w_dec, threshold = rows
    return SAE(w_enc, b_enc, w_dec, sae.b_dec.detach().float().cpu(), threshold, dict(sae.header))
