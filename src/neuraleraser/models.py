"""Opening pipelines by name, and the sites where each family is best read and edited."""

from __future__ import annotations

import inspect
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from neuraleraser.canvas import words
from neuraleraser.canvas.pipeline import load_pipeline
from neuraleraser.errors import FileError, SettingsError, SiteError
from neuraleraser.io.names import printable
from neuraleraser.precision import fast_dtype
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, candidate_sites, text_streams

CANVAS = "canvas"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_HELP = "pass 'canvas', a folder with a model_index.json, or a Hub id such as 'stabilityai/sdxl-turbo'"


def open_pipeline(name: str, dtype: torch.dtype | None = None, *, revision: str | None = None) -> Any:
    """Open a diffusers pipeline: "canvas" is the one that ships, else a folder, else an id on the Hub.

    `dtype` None is, for the canvas, bfloat16 where the CPU has it (1.8 times as fast as float32) and float32 elsewhere;
    for others it is float32. `revision` names a commit, tag or branch on the Hub; a commit pins what is opened.

    Only safetensors weights are read, and no code that comes with them is run: diffusers refuses it in the oldest
    version that is allowed here (before 0.38 it did not for folders on the disk: CVE-2026-44513). Raises FileError
    where there is no such pipeline, it is damaged, it brings code of its own, or the Hub does not answer.
    """
    _quietly()
    if name == CANVAS:
        return load_pipeline(dtype=dtype or fast_dtype())
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if not os.path.isfile(folder / "model_index.json"):
            raise FileError(f"the folder {name!r} holds no pipeline (no model_index.json): {_HELP}")
        pipe = _opened(name, str(folder), dtype, "from that folder", local_files_only=True)
    elif _HUB_ID.fullmatch(name):
        where = "from the Hub (check the id, the network, and access to it)"
        pipe = _opened(name, name, dtype, where, revision=revision)
    else:
        raise FileError(f"there is no pipeline {printable(name)!r}: {_HELP}")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _quietly() -> None:
    """No progress bars for loading, which takes a second."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _opened(name: str, source: str, dtype: torch.dtype | None, where: str, **settings: Any) -> Any:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            source, dtype=dtype or torch.float32, use_safetensors=True, trust_remote_code=False, **settings
        )
    except Exception as error:  # diffusers, transformers and the Hub's client each raise kinds of their own
        reason = printable(error, 200) or type(error).__name__
        raise FileError(f"the pipeline {name!r} could not be opened {where}: {reason}") from error


def image_to_image(pipe: Any) -> Any:
    """The image-to-image pipeline of the same modules as `pipe`; nothing is copied.

    Raises SettingsError where diffusers has none for this kind of pipeline.
    """
    from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image

    try:
        made = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise SettingsError(f"{type(pipe).__name__} has no image-to-image form in diffusers") from error
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def speaks_canvas(pipe: Any) -> bool:
    """Whether `pipe` has the canvas's small vocabulary, so that its concepts, cells and judges fit."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or len(tokenizer) > 5000:
        return False
    names = (*words.OBJECTS, *(style for style in words.STYLES if style != words.PLAIN))
    known = {word for name in names for word in words.phrases_of(name)[0].split()}
    return all(len(tokenizer.tokenize(word)) == 1 for word in known)


# Where each family was found to be good, and by whom. A family's sites are offered to all its members (SD 2 has
# SD 1's layout): the source says on which it was found.
_CANVAS = {
    Site("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"): "detects styles and objects: docs/SITES.md",
}
_SAEURON = "SAeUron (arXiv 2501.18052), Stable Diffusion 1.5"
_SD1 = {
    Site("unet.up_blocks.1.attentions.1"): f"objects: {_SAEURON}",
    Site("unet.up_blocks.1.attentions.2"): f"styles: {_SAEURON}",
}
_UNBOX = "sdxl-unbox (arXiv 2410.22366), SDXL Turbo"
_SDXL = {
    Site("unet.down_blocks.2.attentions.1", "update"): f"composition: {_UNBOX}",
    Site("unet.mid_block.attentions.0", "update"): f"spatial relations: {_UNBOX}",
    Site("unet.up_blocks.0.attentions.0", "update"): f"details: {_UNBOX}",
    Site("unet.up_blocks.0.attentions.1", "update"): f"style: {_UNBOX}",
}
# The last of the double blocks.
_FLUX = {Site("transformer.transformer_blocks.18"): "sdxl-unbox (its folder flux_integration), FLUX.1"}


def called(pipe: Any) -> str:
    """What a file calls the pipeline that it was made for: "canvas", its Hub id, or its folder's name; no path of
    this machine."""
    if speaks_canvas(pipe):
        return CANVAS
    name = str(getattr(pipe, "name_or_path", None) or getattr(pipe.config, "_name_or_path", None) or "")
    hub = _HUB_ID.fullmatch(name) and not Path(name).is_dir()
    return name if hub else Path(name).name or type(pipe).__name__


def known_sites(pipe: Any) -> dict[Site, str]:
    """The sites of the pipeline's family that were found good, those of them that it has, and where each was
    published; {} where none are known."""
    unet = getattr(pipe, "unet", None)
    if speaks_canvas(pipe):
        family = _CANVAS
    elif unet is not None:
        family = _SDXL if unet.config.get("addition_embed_type") == "text_time" else _SD1
    elif type(getattr(pipe, "transformer", None)).__name__ == "FluxTransformer2DModel":
        family = _FLUX
    else:
        family = {}
    return {site: source for site, source in family.items() if _has(pipe, site)}


def preset_sites(pipe: Any) -> tuple[Site, ...]:
    """The sites of `known_sites`, in the order they run."""
    return tuple(known_sites(pipe))


def site_for(pipe: Any, kind: str) -> Site:
    """Where a concept of this kind is best looked for: the site that was found good for its kind, or else for
    anything, in the pipeline's family; a text-conditioned block in the middle where none is known.

    Raises SettingsError for a pipeline without such a block.
    """
    known = known_sites(pipe)
    for site, source in known.items():
        if source.startswith(kind):
            return site
    found = [*known, *(blocks := candidate_sites(pipe))[len(blocks) // 2 :]]
    if not found:
        raise SettingsError(f"{type(pipe).__name__} has no text-conditioned block that is known here: pass a site")
    return found[0]


def edits_for(pipe: Any, site: Site, most: int = 3) -> list[tuple[Site, ...]]:
    """Where an eraser that looks at `site` edits: what the blocks after its own read of the prompt. Each tuple of sites
    is for one correction.

    In a UNet, PixArt or Sana all blocks read the same prompt, so one correction serves all that follow. In SD3 and FLUX
    the text changes from block to block, and what is written into it stays: corrections of their own for at most so
    many blocks, evenly spread, the last among them. Where no block follows, what the site's own block returns.

    Raises SiteError for a site that is in no text-conditioned block.
    """
    blocks = candidate_sites(pipe)
    at = [i for i, b in enumerate(blocks) if f"{site.path}.".startswith(f"{b.path}.")]
    if not at:
        raise SiteError(f"{site} is in none of the blocks that are known: pass the sites to edit")
    after = [Site(b.path, "input", "text") for b in blocks[at[0] + 1 :]]
    if not after:
        return [(site,)]
    if not text_streams(pipe):
        return [tuple(after)]
    count = min(most, len(after))
    return [(after[-(-len(after) * (k + 1) // count) - 1],) for k in range(count)]


def usual_sampling(
    pipe: Any, steps: int | None = None, guidance: float | None = None, batch: int | None = None
) -> Sampling:
    """How `pipe` is usually sampled, but for what is given: the canvas as here, others by their own call's defaults, a
    few images at a time."""
    own = Sampling()
    if not speaks_canvas(pipe):
        defaults = inspect.signature(type(pipe).__call__).parameters
        own = Sampling(
            steps=defaults["num_inference_steps"].default if "num_inference_steps" in defaults else own.steps,
            guidance=defaults["guidance_scale"].default if "guidance_scale" in defaults else own.guidance,
            batch=4,
        )
    given = {"steps": steps, "guidance": guidance, "batch": batch}
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def _has(pipe: Any, site: Site) -> bool:
    part, path = site.path.split(".", 1)
    try:
        getattr(pipe, part).get_submodule(path)
    except AttributeError:
        return False
    return True
