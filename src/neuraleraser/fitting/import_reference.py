"""A reference from another library's SAE: SAeUron's, sdxl-unbox's, or any that `sae.formats` reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from neuraleraser.activations import activation_matrix
from neuraleraser.eraser import Provenance, check_nothing_acts
from neuraleraser.errors import DataError, SiteError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting.reference import Reference, reference_from_sae
from neuraleraser.sae import formats
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, edits_for, record


def import_reference(
    pipe: Any,
    path: str | os.PathLike[str],
    site: Site,
    prompts: Sequence[str],
    labels: Sequence[Sequence[str]] | None = None,
    *,
    format: formats.Format | None = None,
    vectors_per_image: int = 1024,
    sampling: Sampling | None = None,
    seed: int = 500,
) -> Reference:
    """Read another library's SAE and see how it fires on prompts, so that `fit` can make erasers with it.

    Features that compete (TopK) get thresholds of their own, calibrated on the activations of the prompts' images. How
    far the two differ is in `sae.header["calibration"]`, and every eraser made with it says so.

    Args:
        pipe: The diffusers pipeline; it is not changed.
        path: The SAE's file or folder.
        site: The site of this pipeline that the SAE was made for.
        prompts: Prompts of many things, on which its features are seen to fire.
        labels: Names of what each prompt shows, or None. Prompts that show a concept are no background for it: `fit`
            leaves those rows out, by the labels, or if none names the concept by the prompt's words.
        format: Format of the SAE's files; None: recognised from the files.
        vectors_per_image: Activation vectors per prompt's image to calibrate on.
        sampling: How images are generated; None: as `default_sampling` says.
        seed: First seed; the others follow.

    Returns:
        The reference.

    Raises:
        SettingsError: An eraser acts on the pipeline.
        FileError: The SAE cannot be read.
        SiteError: The SAE has another width than the site, or the site is in no block.
        DataError: There are no prompts, or not as many labels as prompts.

    Examples:
        >>> known = import_reference(pipe, "saeuron", site, ["a cat", "a dog", "a house", "a tree"], sampling=quick)
        >>> known.sae.header["format"]
        'saeuron'
    """
    if not prompts:
        raise DataError("there are no prompts to see the SAE fire on: pass prompts of many things, hundreds are good")
    if labels is not None and len(labels) != len(prompts):
        raise DataError(f"{len(labels)} labels for {len(prompts)} prompts: pass the names of each, () for none")
    check_nothing_acts(pipe, "a reference")
    s = sampling or default_sampling(pipe)
    edits_for(pipe, site)  # raises where no eraser could edit
    width = shapes_of(pipe, [site], s)[site][1]
    seeds = range(seed, seed + len(prompts))
    x = activation_matrix(pipe, prompts, seeds, [site], vectors_per_image, s)[site]
    try:
        sae = formats.read(path, format, calibrate=x)
    except DataError as error:
        raise SiteError(f"{site} is {width} wide, and {path} was made for another site ({error})") from error
    if sae.d_in != width:
        raise SiteError(f"{site} is {width} wide, and {path} holds an SAE for {sae.d_in}: pass the site it reads")
    sae.header["site"] = str(site)
    background = [(prompt, frozenset(of)) for prompt, of in zip(prompts, labels or [()] * len(prompts), strict=True)]
    # Thresholds are calibrated on the background's own images; what the SAE was trained on is not known here.
    learnt_from = Provenance((), (), sae=str(sae.header.get("format", "another library")))
    return reference_from_sae(pipe, sae, site, background, s, seed, learnt_from)


def shapes_of(pipe: Any, sites: Sequence[Site], sampling: Sampling) -> Mapping[Site, tuple[int, int]]:
    """Positions and width of each site's activations, from one step."""
    found: dict[Site, tuple[int, int]] = {}

    def note(site: Site, x: Tensor, call: EditContext[None]) -> None:
        found[site] = (x.shape[1], x.shape[2])

    with record(pipe, dict.fromkeys(sites), note):
        generate(
            pipe,
            ["a picture"],
            [0],
            Sampling(
                num_inference_steps=1, guidance_scale=1.0, batch_size=1, height=sampling.height, width=sampling.width
            ),
        )
    return {site: found[site] for site in dict.fromkeys(sites)}
