"""Scores of an SAE's features for concepts, from statistics of their activations by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.errors import ConceptError


@dataclass(frozen=True)
class Profile:
    """Statistics of every feature at one site for several concepts, by timestep.

    names [C]; times [T] ascending; mean [C, T, n]: the mean over images and positions, zeros included;
    spread [C, T, n]: standard deviation over images of the image means.
    """

    names: tuple[str, ...]
    times: Tensor
    mean: Tensor
    spread: Tensor


def profile(pooled: Tensor, times: Tensor, labels: Sequence[str]) -> Profile:
    """Return the profile of pooled feature activations [N images, T, n] with one label an image.

    Raises ConceptError where activations, labels and times do not match.
    """
    names = tuple(dict.fromkeys(labels))
    if pooled.shape[0] != len(labels) or pooled.shape[1] != len(times):
        raise ConceptError(
            f"activations {tuple(pooled.shape)} for {len(labels)} labels, {len(times)} times: expected [N, T, n]"
        )
    rows = [torch.tensor([i for i, label in enumerate(labels) if label == name]) for name in names]
    mean = torch.stack([pooled[r].float().mean(0) for r in rows])
    spread = torch.stack([pooled[r].float().std(0, unbiased=False) for r in rows])
    return Profile(names, times, mean, spread)


def _others(profile: Profile, name: str) -> tuple[int, list[int]]:
    """Return the concept's number and those of all others."""
    if name not in profile.names or len(profile.names) < 2:
        raise ConceptError(f"a profile of {', '.join(profile.names)} cannot score {name!r}: profile it and one other")
    c = profile.names.index(name)
    return c, [i for i in range(len(profile.names)) if i != c]


def saeuron_score(profile: Profile, name: str) -> Tensor:
    """Return SAeUron's score (arXiv 2501.18052, equation 4): [T, n].

    The feature's share of all activation on the concept, minus its share on all other concepts together.
    """
    c, others = _others(profile, name)
    on, off = profile.mean[c], profile.mean[others].mean(0)
    return on / (on.sum(-1, keepdim=True) + 1e-8) - off / (off.sum(-1, keepdim=True) + 1e-8)


def margin_score(profile: Profile, name: str) -> Tensor:
    """Return the gap to the worst neighbouring concept, in units of the pooled spread: [T, n].

    (mean_c - max over other concepts of mean) / (spread_c + spread of that neighbour + eps): a feature that
    one neighbour shares scores low however rare it is among all, so that erasing cats keeps dogs.
    """
    c, others = _others(profile, name)
    worst, which = profile.mean[others].max(0)
    spread = profile.spread[others].gather(0, which.unsqueeze(0))[0]
    return (profile.mean[c] - worst) / (profile.spread[c] + spread + 1e-3 * profile.mean[c].amax() + 1e-8)
