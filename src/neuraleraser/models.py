"""Opening pipelines by name, and the sites where each family is best read and edited."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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


_CANVAS = (
    RecommendedSite(
        Site("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"), "any", "styles and objects", "docs/SITES.md"
    ),
)
_SAEURON = "SAeUron (arXiv 2501.18052), Stable Diffusion 1.5"
_SD1 = (
    RecommendedSite(Site("unet.up_blocks.1.attentions.1"), "object", "objects", _SAEURON),
    RecommendedSite(Site("unet.up_blocks.1.attentions.2"), "style", "styles", _SAEURON),
)
_UNBOX = "sdxl-unbox (arXiv 2410.22366), SDXL Turbo"
_SDXL = (
    # Composition is which things a picture shows and where they stand, so this is where an object is looked for.
    RecommendedSite(Site("unet.down_blocks.2.attentions.1", "update"), "object", "composition", _UNBOX),
    RecommendedSite(Site("unet.mid_block.attentions.0", "update"), "", "spatial relations", _UNBOX),
    RecommendedSite(Site("unet.up_blocks.0.attentions.0", "update"), "", "details", _UNBOX),
    RecommendedSite(Site("unet.up_blocks.0.attentions.1", "update"), "style", "colour, light and style", _UNBOX),
)
_FLUX = (
    RecommendedSite(
        Site("transformer.transformer_blocks.18"),  # the last of the double blocks
        "any",
        "features of the published SAE",
        "sdxl-unbox (its folder flux_integration), FLUX.1",
    ),
)


def called(pipe: Any) -> str:
    """What a file calls the pipeline that it was made for: "canvas", its Hub id, or its folder's name; no path of
    this machine."""
    if speaks_canvas(pipe):
        return CANVAS
    name = str(getattr(pipe, "name_or_path", None) or getattr(pipe.config, "_name_or_path", None) or "")
    hub = _HUB_ID.fullmatch(name) and not Path(name).is_dir()
    return name if hub else Path(name).name or type(pipe).__name__


def recommended_sites(pipe: Any) -> list[RecommendedSite]:
    """Return the sites that were found good in the pipeline's family, those of them that it has, in the order they run;
    [] where none is known."""
    unet = getattr(pipe, "unet", None)
    if speaks_canvas(pipe):
        family = _CANVAS
    elif unet is not None:
        family = _SDXL if unet.config.get("addition_embed_type") == "text_time" else _SD1
    elif type(getattr(pipe, "transformer", None)).__name__ == "FluxTransformer2DModel":
        family = _FLUX
    else:
        family = ()
    return [known for known in family if _has(pipe, known.site)]


def default_gate_site(pipe: Any, kind: str) -> Site:
    """Return where a concept of this kind ("style", "object" or "other") is best looked for.

    That is the site that is recommended for its kind in the pipeline's family, or else for any; else the first that is
    recommended at all; else a text-conditioned block in the middle.

    Raises SettingsError for a pipeline without such a block.
    """
    known = recommended_sites(pipe)
    for wanted in (kind, "any"):
        for recommended in known:
            if recommended.kind == wanted:
                return recommended.site
    blocks = candidate_sites(pipe)
    found = [*(recommended.site for recommended in known), *blocks[len(blocks) // 2 :]]
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


def default_sampling(
    pipe: Any, steps: int | None = None, guidance: float | None = None, batch: int | None = None
) -> Sampling:
    """Return how `pipe` is usually sampled, but for what is given: the canvas by `Sampling`'s own defaults, others by
    the defaults of their own call, 4 images at a time."""
    usual = Sampling()
    if not speaks_canvas(pipe):
        defaults = inspect.signature(type(pipe).__call__).parameters
        usual = Sampling(
            steps=defaults["num_inference_steps"].default if "num_inference_steps" in defaults else usual.steps,
            guidance=defaults["guidance_scale"].default if "guidance_scale" in defaults else usual.guidance,
            batch=4,
        )
    given = {"steps": steps, "guidance": guidance, "batch": batch}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})


def sampling_of(pipe: Any, header: Mapping[str, Any]) -> Sampling:
    """Return how the images that an eraser was fitted on were sampled, from its header.

    What that does not say, or not in a usable form, is as `pipe` is usually sampled, and so is the batch. An eraser of
    a one-step model is calibrated and diagnosed at one step, too.
    """
    usual, said = default_sampling(pipe), header.get("sampling")
    if not isinstance(said, Mapping):
        return usual
    bounds = {"steps": (1, 1000), "height": (0, 8192), "width": (0, 8192)}
    found: dict[str, Any] = {
        name: said[name]
        for name, (least, most) in bounds.items()
        if type(said.get(name)) is int and least <= said[name] <= most
    }
    guidance = said.get("guidance")
    if isinstance(guidance, int | float) and 0 <= guidance <= 100:
        found["guidance"] = float(guidance)
    return replace(usual, **found)


def _has(pipe: Any, site: Site) -> bool:
    part, path = site.path.split(".", 1)
    try:
        getattr(pipe, part).get_submodule(path)
    except AttributeError:
        return False
    return True
