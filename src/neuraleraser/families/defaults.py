"""Facts of a pipeline that follow from its family: its name, sites and sampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from neuraleraser.families import RecommendedSite, family_of
from neuraleraser.families.family import name_of
from neuraleraser.io.hub import HUB_ID
from neuraleraser.settings import EvaluateSettings, Sampling
from neuraleraser.site import Site


def model_name(pipe: Any) -> str:
    """Return what a file calls the pipeline that it was made for: its family's name where that ships, its Hub id, or
    its folder's name; no path of this machine."""
    family = family_of(pipe)
    if family.load is not None:
        return family.name
    name = name_of(pipe)
    hub = HUB_ID.fullmatch(name) and not Path(name).is_dir()
    return name if hub else Path(name).name or type(pipe).__name__


def recommended_sites(pipe: Any) -> list[RecommendedSite]:
    """Return the sites that were found good in the pipeline's family, those of them that it has, in the order they run;
    [] where none is known."""
    return [known for known in family_of(pipe).sites if _has(pipe, known.site)]


def default_sampling(
    pipe: Any,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
) -> Sampling:
    """Return how a pipeline is usually sampled, but for what is given.

    That is: what its family says (the canvas: 25 steps, guidance 3, 20 images at a time); for the distilled models that
    are known (SD Turbo, SDXL Turbo, SD 3.5 Large Turbo, FLUX.1 schnell), by their names, what their authors recommend;
    else the defaults of the pipeline's own call. Name the steps and guidance of other distilled models yourself.

    Args:
        pipe: The diffusers pipeline.
        num_inference_steps: Denoising steps; None: as usual.
        guidance_scale: Classifier-free guidance scale; None: as usual.
        batch_size: Images generated together; None: 4, or what the family says.

    Returns:
        The sampling.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> one = default_sampling(pipe, batch_size=1)
        >>> one.num_inference_steps, one.guidance_scale
        (25, 3.0)
    """
    usual = family_of(pipe).default_sampling(pipe)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


def evaluation_sampling(pipe: Any, settings: EvaluateSettings, published: Sampling | None = None) -> Sampling:
    """Return how the images of an evaluation are generated: as its settings say, else as its protocol was `published`,
    else as `pipe` is usually sampled."""
    return settings.sampling or published or default_sampling(pipe)


def sampling_for_eraser(pipe: Any, fitted: Sampling | None) -> Sampling:
    """Return how to generate with an eraser that was fitted on images sampled so, in the pipeline's usual batch.

    None, where its header does not say: as `pipe` is usually sampled. An eraser of a one-step model is calibrated and
    diagnosed at one step, too.
    """
    usual = default_sampling(pipe)
    return usual if fitted is None else replace(fitted, batch_size=usual.batch_size)


def _has(pipe: Any, site: Site) -> bool:
    part, path = site.path.split(".", 1)
    try:
        getattr(pipe, part).get_submodule(path)
    except AttributeError:
        return False
    return True
