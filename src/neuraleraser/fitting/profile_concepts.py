"""Statistics of an SAE's features on concepts, from images that a pipeline draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuraleraser.concepts import Concept
from neuraleraser.errors import ConceptError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting.trajectories import conditional_rows, pooled_features
from neuraleraser.sae import SAE
from neuraleraser.sae.scores import Profile, profile
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site


def profile_concepts(
    pipe: Any,
    sae: SAE,
    site: Site,
    concepts: Sequence[Concept],
    num_images: int = 20,
    sampling: Sampling | None = None,
) -> Profile:
    """Return how the features of `sae` fire on concepts, and on the same prompts without them ("no cat"), by timestep.

    `num_images` are drawn of each concept and as many without it, with the same noise. Raises ConceptError for no
    concept, SiteError for a site that the pipeline has not.
    """
    if not concepts:
        raise ConceptError("no concept was named: pass phrases such as 'Van Gogh style' cat")
    prompts: list[str] = []
    labels: list[str] = []
    for concept in concepts:
        pairs = [concept.pairs[i * len(concept.pairs) // num_images] for i in range(num_images)]
        prompts += [p.positive for p in pairs] + [p.negative for p in pairs]
        labels += [concept.name] * num_images + [f"no {concept.name}"] * num_images
    seeds = [i % num_images for i in range(len(prompts))]  # a pair shares its noise
    pooled, _ = pooled_features(pipe, sae, site, prompts, seeds, sampling or default_sampling(pipe))
    return profile(conditional_rows(pooled)[:, :, 0], pooled.times, labels)
