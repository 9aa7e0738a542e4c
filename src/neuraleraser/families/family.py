"""Facts about a model family, as one object per family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neuraleraser.judges import Judge
from neuraleraser.settings import Sampling
from neuraleraser.site import Site
from neuraleraser.vocabulary import Vocabulary


@dataclass(frozen=True)
class Blocks:
    """Blocks of a transformer that the prompt conditions. Classes go by their names; subclasses are as they are.

    lists: parts of the transformer that hold them, in the order they run; items that read no prompt are left out.
    text_first: classes of blocks that take hidden_states and encoder_hidden_states and return (text, image). Stated,
    not guessed: others return the two the other way round (CogVideoX, HunyuanVideo), and no tensor shows it.
    one_sequence: classes of blocks that have an argument for the prompt, and hold it in one sequence with the image.
    """

    lists: tuple[str, ...] = ("transformer_blocks", "single_transformer_blocks")
    text_first: tuple[str, ...] = ()
    one_sequence: tuple[str, ...] = ()


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
    """Facts about a model family: how to recognise it, its blocks, and where its features were found good.

    The last five are for a family whose world is known.

    Attributes:
        name: Name of the family.
        matches: Tells whether a pipeline is of it.
        sites: Sites found good, in the order they run.
        image_site: Where an image gate looks; None: no site is known to be good.
        published: SAEs that others have published.
        sampling: How it is usually sampled; None: by the defaults of the pipeline's own call.
        distilled: Steps and guidance of its models that these defaults do not suit, by the last part of their names.
        blocks: Blocks of its transformer.
        further_denoisers: Components that denoise beside `unet` or `transformer`.
        guidance_names: Variables of its call that hold the scale of classifier-free guidance, if `guidance_scale` does
            not.
        position_arguments: Arguments of its denoiser that number positions, so have no row per image.
        vocabulary: Its styles and objects.
        judge: Opens a judge of them that measures artefacts and that no fit reads.
        render: Draws them, for image-to-image to start from.
        reference: Folder of the reference that ships.
        load: Opens the pipeline that ships, in a dtype, by the family's name.

    Examples:
        >>> family = Family("mine", matches=lambda pipe: "StableDiffusion" in type(pipe).__name__, sampling=quick)
        >>> family.matches(pipe), family.default_sampling(pipe).num_inference_steps
        (True, 2)
    """

    name: str
    matches: Callable[[Any], bool]
    sites: tuple[RecommendedSite, ...] = ()
    image_site: Site | None = None
    published: tuple[PublishedSAE, ...] = ()
    sampling: Sampling | None = None
    distilled: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    blocks: Blocks = Blocks()
    further_denoisers: tuple[str, ...] = ()
    guidance_names: tuple[str, ...] = ()
    position_arguments: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    judge: Callable[[], Judge] | None = None
    render: Render | None = None
    reference: Path | None = None
    load: Callable[[torch.dtype | None], Any] | None = None

    def default_sampling(self, pipe: Any) -> Sampling:
        """Return how `pipe` is usually sampled.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            The sampling; four images at a time if the family does not say.
        """
        if self.sampling is not None:
            return self.sampling
        # A copy in a folder keeps the model's name, as a rule.
        steps, guidance = self.distilled.get(PurePath(name_of(pipe)).name.lower(), (None, None))
        usual, call = Sampling(), inspect.signature(type(pipe).__call__).parameters
        if steps is None:
            steps = call["num_inference_steps"].default if "num_inference_steps" in call else usual.num_inference_steps
        if guidance is None:
            guidance = call["guidance_scale"].default if "guidance_scale" in call else usual.guidance_scale
        if guidance is None:  # Qwen-Image: a scale for distilled models alone
            guidance = 1.0
        return Sampling(num_inference_steps=steps, guidance_scale=guidance, batch_size=4)


def name_of(pipe: Any) -> str:
    """Return the Hub id or the folder that a pipeline was opened from; "" if it was made of parts."""
    return str(getattr(pipe, "name_or_path", None) or getattr(pipe.config, "_name_or_path", None) or "")


def has_transformer(*names: str) -> Callable[[Any], bool]:
    """Return a test for pipelines whose transformer is of a class with one of these names, or of a subclass."""

    def matches(pipe: Any) -> bool:
        transformer = getattr(pipe, "transformer", None)
        plain = getattr(transformer, "_orig_mod", transformer)  # without torch.compile's wrapper
        return any(base.__name__ in names for base in type(plain).__mro__)

    return matches


def unet_config(pipe: Any) -> Mapping[str, Any] | None:
    """Return the configuration of a pipeline's UNet; None where it has no UNet."""
    unet = getattr(pipe, "unet", None)
    return None if unet is None else getattr(unet, "config", {})
