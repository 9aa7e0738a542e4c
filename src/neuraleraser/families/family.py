"""Knowledge of a model family, as one object a family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neuraleraser.judges import Judge
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site
from neuraleraser.vocabulary import Vocabulary


@dataclass(frozen=True)
class RecommendedSite:
    """A site that was found good in a model family, and by whom.

    kind: the kind of concept that a gate looks for there ("style" or "object"), "any" for every kind, "" for none: it
    carries something else. carries: what its features were found to carry, in words. source: where that is published,
    and on which model; the whole family is offered it (SD 2 has SD 1's layout).
    """

    site: Site
    kind: Literal["style", "object", "any", ""]
    carries: str
    source: str


@dataclass(frozen=True)
class PublishedSAE:
    """An SAE on the Hub: the models (Hub ids) and the site that it reads, its repository, folder and files there, and
    where that is published.

    revision: the commit that is fetched. None of those known here names one in its paper or code, which read the branch
    "main": where it is None, what was fetched is in the reference's header, and can be pinned by it.
    """

    models: tuple[str, ...]
    site: Site
    repo: str
    folder: str
    files: tuple[str, ...]
    source: str
    kind: Literal["model", "space"] = "model"
    revision: str | None = None


Render = Callable[[Sequence[str], str, int, int], NDArray[np.uint8]]
"""Draws a picture of objects in a style from a seed, at a size: uint8 [size, size, 3]."""


@dataclass(frozen=True, eq=False)
class Family:
    """Knowledge of one model family.

    matches: tells whether a pipeline is of it. sites: those found good, in the order they run. published: SAEs that
    others have published. sampling: how it is usually sampled; None: by the defaults of the pipeline's own call.

    Of a family whose world is known: vocabulary: its styles and objects. judge: opens a judge of them that measures
    artefacts and that no fit reads. render: draws them, for image-to-image to start from. reference: the folder of the
    reference that ships. load: opens the pipeline that ships, in a dtype, by the family's name.
    """

    name: str
    matches: Callable[[Any], bool]
    sites: tuple[RecommendedSite, ...] = ()
    published: tuple[PublishedSAE, ...] = ()
    sampling: Sampling | None = None
    vocabulary: Vocabulary | None = None
    judge: Callable[[], Judge] | None = None
    render: Render | None = None
    reference: Path | None = None
    load: Callable[[torch.dtype | None], Any] | None = None

    def sampling_of(self, pipe: Any) -> Sampling:
        """Return how `pipe` is usually sampled; four images at a time where the family does not say."""
        if self.sampling is not None:
            return self.sampling
        usual, call = Sampling(), inspect.signature(type(pipe).__call__).parameters
        return Sampling(
            num_inference_steps=call["num_inference_steps"].default
            if "num_inference_steps" in call
            else usual.num_inference_steps,
            guidance_scale=call["guidance_scale"].default if "guidance_scale" in call else usual.guidance_scale,
            batch_size=4,
        )


def has_transformer(*names: str) -> Callable[[Any], bool]:
    """Return a test for pipelines whose transformer is of a class with one of these names."""
    return lambda pipe: type(getattr(pipe, "transformer", None)).__name__ in names
