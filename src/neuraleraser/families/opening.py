"""Opening pipelines by name."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.families import FAMILIES
from neuraleraser.io.hub import parse_hub_id
from neuraleraser.io.names import printable
from neuraleraser.precision import fast_dtype

_HELP = "pass 'canvas', a folder with a model_index.json, or a Hub id such as 'stabilityai/sdxl-turbo'"


def open_pipeline(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Any:
    """Open a diffusers pipeline.

    Progress bars of loading are switched off, those of diffusers and transformers for the whole process.

    Only safetensors weights are read, and no code that comes with them is run: diffusers refuses it in the oldest
    version that is allowed here (before 0.38 it did not for folders on the disk: CVE-2026-44513).

    Args:
        name: "canvas", which ships; a folder; or "owner/name" or "owner/name@revision" on the Hub.
        dtype: Number format of the weights. None: bfloat16 on a GPU; on a CPU float32, but for the canvas bfloat16 if
            the CPU has it (1.8 times as fast as float32).
        device: Device that it is moved to, such as "cuda".
        revision: A commit, tag or branch on the Hub; a commit pins what is opened.

    Returns:
        The pipeline.

    Raises:
        FileError: There is no such pipeline, it is damaged, it brings code of its own, or the Hub does not answer.
        SettingsError: Two revisions are given, or there is no such device.

    Examples:
        >>> pipe = open_pipeline("canvas")  # or a folder, or a Hub id
        >>> type(pipe).__name__
        'StableDiffusionPipeline'
    """
    _quietly()
    try:
        torch.zeros(1, device=device)  # before anything is fetched
    except (AssertionError, RuntimeError) as error:  # torch raises either
        reason = printable(error, 150)
        raise SettingsError(f"device {printable(device)} cannot be used ({reason}): pass another") from error
    if dtype is None and torch.device(device).type != "cpu":
        dtype = fast_dtype(device)
    return _found(name, dtype, revision).to(device)


def _found(name: str, dtype: torch.dtype | None, revision: str | None) -> Any:
    """Return the pipeline of that name, on the CPU."""
    for family in FAMILIES:
        if family.name == name and family.load is not None:
            return family.load(dtype)
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):
        if not os.path.isfile(folder / "model_index.json"):
            raise FileError(f"the folder {name!r} holds no pipeline (no model_index.json): {_HELP}")
        pipe = _opened(name, str(folder), dtype, "from that folder", local_files_only=True)
    elif asked := parse_hub_id(name, revision):
        where = "from the Hub"
        pipe = _opened(name, asked[0], dtype, where, revision=asked[1])
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
    except MemoryError:
        raise
    except Exception as error:  # diffusers, transformers and the Hub's client each raise kinds of their own
        reason = printable(error, 200) or type(error).__name__
        advice = "" if settings.get("local_files_only") else ": check the id, the network, and access to it"
        raise FileError(f"the pipeline {name!r} could not be opened {where} ({reason}){advice}") from error


def image_to_image(pipe: Any) -> Any:
    """The image-to-image pipeline of the same modules as `pipe`; nothing is copied.

    Raises SettingsError where diffusers has none for this kind of pipeline.
    """
    from diffusers.pipelines.auto_pipeline import AutoPipelineForImage2Image

    return _form(pipe, AutoPipelineForImage2Image, "image-to-image")


def inpainting(pipe: Any) -> Any:
    """The inpainting pipeline of the same modules as `pipe`; nothing is copied.

    Raises SettingsError where diffusers has none for this kind of pipeline.
    """
    from diffusers.pipelines.auto_pipeline import AutoPipelineForInpainting

    return _form(pipe, AutoPipelineForInpainting, "inpainting")


def _form(pipe: Any, task: Any, name: str) -> Any:
    """Return the pipeline of the same modules for a task of diffusers."""
    try:
        made = task.from_pipe(pipe)
    except ValueError as error:
        raise SettingsError(f"{type(pipe).__name__} has no {name} form in diffusers") from error
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def native_side(pipe: Any) -> int:
    """Return the side in pixels of the square images that a pipeline generates by default."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    size = getattr(pipe, "default_sample_size", None) or denoiser.config["sample_size"]
    return int(size if isinstance(size, int) else min(size)) * int(pipe.vae_scale_factor)


def has_image_to_image(pipe: Any) -> bool:
    """Return True where diffusers has an image-to-image form of this kind of pipeline, that takes a strength.

    FLUX Kontext's and others' edit a picture that stands beside the noise.
    """
    try:
        made = image_to_image(pipe)
    except SettingsError:
        return False
    return "strength" in inspect.signature(type(made).__call__).parameters
