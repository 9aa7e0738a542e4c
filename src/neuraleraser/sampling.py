"""Making images: the only code that calls a pipeline.

Every image has its own seed and its own generator, and short batches are padded to full ones, so that at
equal batch shape an image's bits depend on its own prompt and seed alone (docs/explanation/laws.md, law 7).
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neuraleraser.errors import DataError, SettingsError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.io.names import printable
from neuraleraser.settings import Sampling, check_seed
from neuraleraser.sites import Batch, Series, denoiser, generating_batch, unwrap

Images = NDArray[np.uint8]
"""uint8 [N, H, W, 3]."""


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    *,
    image: Images | None = None,
    mask_image: NDArray[np.bool_] | None = None,
    latents: torch.Tensor | None = None,
    on_batch_start: Callable[[int, int], None] | None = None,
    on_batch_end: Callable[[range, Images], None] | None = None,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
) -> Images:
    """Generate one image per prompt, each from its own seed.

    Args:
        pipe: The diffusers pipeline.
        prompts: One prompt per image.
        seeds: One seed per image.
        sampling: Steps, guidance, size and batch size; None: as `default_sampling` says.
        image: Start images of an image-to-image or inpainting pipeline, uint8 [N, H, W, 3]. What is drawn has their
            size, whatever `sampling` says.
        mask_image: For inpainting: True where the start image is drawn anew, bool [N, H, W].
        latents: The noise that images start from, instead of their seeds' own, [N, c, h, w], not with `image`.
        on_batch_start: Called as `on_batch_start(first, real)` before each batch, with the index of its first image
            and the number of its images that are not padding.
        on_batch_end: Called as `on_batch_end(indices, images)` with each finished batch.
        callback_on_step_end: Passed to the pipeline: diffusers calls it after each step.

    Returns:
        The images, uint8 [N, H, W, 3].

    Raises:
        SettingsError: The lengths differ, a seed is out of range, a prompt is no text, the strength leaves no step to
            go, latents have another shape than the pipeline's, the pipeline takes no start images or masks or needs
            them, or it refuses itself (more steps than its schedule has, a size that it cannot generate).
        DataError: The start images or masks have another type or shape, or a mask is empty; or an image, or latents,
            have NaN or infinity.

    Examples:
        >>> generate(pipe, ["a cat", "a dog"], [3, 4], quick).shape
        (2, 64, 64, 3)
    """
    s = sampling or default_sampling(pipe)
    if isinstance(prompts, str):
        raise SettingsError(f"prompts is the text {prompts[:100]!r}: pass a list of prompts")
    if latents is not None and image is not None:
        raise SettingsError("there are start images and latents: pass one of `image` and `latents`")
    _check_start(pipe, image, mask_image)
    counts = {"prompts": prompts, "seeds": seeds, "start images": image, "masks": mask_image, "latents": latents}
    given = {name: len(some) for name, some in counts.items() if some is not None}
    if len(set(given.values())) > 1:
        raise SettingsError(f"{', '.join(f'{n} {name}' for name, n in given.items())}: pass as many of each")
    if latents is not None:
        _check_latents(pipe, latents, s)
    if image is not None:
        check_strength(s)
    for seed in seeds:
        check_seed(seed)
    for prompt in prompts:
        _check_text(prompt)
    precision: Any = unwrap(denoiser(pipe)).dtype if latents is not None else None
    extra: dict[str, Any] = {}
    if s.height:
        extra["height"] = s.height
    if s.width:
        extra["width"] = s.width
    if image is not None:
        extra = {"strength": s.strength}
    if mask_image is not None:  # diffusers would draw in the pipeline's own size
        extra["height"], extra["width"] = mask_image.shape[1:]
    if callback_on_step_end:
        extra["callback_on_step_end"] = callback_on_step_end
    out: list[Images] = []
    size = batch_size_for(len(prompts), s)
    series = Series(len(prompts))
    for start in range(0, len(prompts), size):
        real = min(size, len(prompts) - start)
        # Padding repeats the last image: same batch shape, same kernels, same bits.
        index = [*range(start, start + real), *[start + real - 1] * (size - real)]
        if on_batch_start:
            on_batch_start(start, real)
        if image is not None:
            extra["image"] = torch.from_numpy(image[index]).permute(0, 3, 1, 2).float().div(255)
        if latents is not None:
            extra["latents"] = latents[index].to(precision)
        if mask_image is not None:
            extra["mask_image"] = torch.from_numpy(mask_image[index])[:, None].float()
        try:
            with torch.no_grad(), generating_batch(Batch(series, start, real, size)), _inpaintable(pipe, mask_image):
                result = pipe(
                    [prompts[i] for i in index],
                    num_inference_steps=s.num_inference_steps,
                    guidance_scale=s.guidance_scale,
                    generator=[torch.Generator("cpu").manual_seed(int(seeds[i])) for i in index],
                    output_type="np",
                    **extra,
                ).images
        except ValueError as error:
            if _refused_by_the_pipeline(error):
                raise SettingsError(f"{type(pipe).__name__} refuses these settings: {printable(error, 300)}") from error
            raise
        result = np.asarray(result)
        if not np.isfinite(result).all():
            raise DataError(
                f"NaN or infinity in an image of {[prompts[i] for i in index[:real]][:3]}: use float32 or bfloat16"
            )
        images = np.asarray(np.clip(result * 255 + 0.5, 0, 255), np.uint8)[:real]
        out.append(images)
        if on_batch_end:
            on_batch_end(range(start, start + real), images)
    return np.concatenate(out) if out else np.zeros((0, 0, 0, 3), np.uint8)


@contextmanager
def _inpaintable(pipe: Any, mask_image: NDArray[np.bool_] | None) -> Iterator[None]:
    """Say, while a UNet that takes latents alone inpaints, that they have 4 channels: diffusers takes no other number
    for such a UNet, and the canvas's have 8. The number is only looked at there, never used; but whoever uses the UNet
    in another thread meanwhile reads it, too.
    """
    unet = getattr(pipe, "unet", None)
    if mask_image is None or unet is None or unet.config["in_channels"] != pipe.vae.config["latent_channels"]:
        yield
        return
    channels = unet.config["in_channels"]
    unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)


def check_pictures(name: str, x: Any) -> None:
    """Raise DataError unless x is uint8 [N, height, width, 3]."""
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3:
        raise DataError(
            f"the {name} are {_described(x)}: pass one array, uint8 [N, height, width, 3]; of PIL images, "
            'np.stack([np.asarray(i.convert("RGB")) for i in images])'
        )


def _check_start(pipe: Any, image: Any, mask_image: Any) -> None:
    """Raise DataError for start images and masks that are none, SettingsError for those that the pipeline does not
    take, or takes and is not given."""
    taken, kind = inspect.signature(type(pipe).__call__).parameters, type(pipe).__name__
    for name, given, sign, form in (
        ("image", image, "strength", "AutoPipelineForImage2Image"),
        ("mask_image", mask_image, "mask_image", "AutoPipelineForInpainting"),
    ):
        if given is None and sign in taken:
            raise SettingsError(f"{kind} needs `{name}`, and it is None: pass one for each prompt")
        if given is not None and sign not in taken:
            raise SettingsError(f"{kind} takes no `{name}`: pass {form}.from_pipe(pipe), of diffusers, in its place")
    if image is None:
        return
    check_pictures("start images", image)
    (height, width), cell = image.shape[1:3], getattr(pipe, "vae_scale_factor", 1)  # pixels to a latent's side
    if not height or not width or height % cell or width % cell:
        raise DataError(f"the start images are {height} x {width} px: pass sides that are multiples of {cell}")
    if mask_image is None:
        return
    if not isinstance(mask_image, np.ndarray) or mask_image.dtype != bool or mask_image.shape[1:] != (height, width):
        raise DataError(f"the masks are {_described(mask_image)}: pass one array, bool [N, {height}, {width}]")
    # As diffusers brings a mask to the latents' size.
    if empty := np.flatnonzero(~mask_image[:, ::cell, ::cell].any((1, 2))).tolist():
        raise DataError(
            f"the masks of images {empty[:8]} are empty, or too small for latents of {cell} x {cell} px, so nothing "
            "would be drawn: pass True where an image is to be drawn anew, or leave it out"
        )


def _described(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else f"of type {type(x).__name__}"


def _check_latents(pipe: Any, latents: torch.Tensor, s: Sampling) -> None:
    """Raise SettingsError for latents of another shape than the pipeline's UNet takes, DataError where not finite."""
    unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
    if unet is not None and vae is not None:
        size = unet.config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        if s.height:
            height, width = (n // int(pipe.vae_scale_factor) for n in (s.height, s.width))
        expected = [vae.config["latent_channels"], height, width]
        if list(latents.shape[1:]) != expected:
            raise SettingsError(f"the latents of an image are {list(latents.shape[1:])}: pass {expected} each")
    if not torch.isfinite(latents).all():
        raise DataError("the latents have NaN or infinity: pass finite ones")


def check_strength(sampling: Sampling) -> None:
    """Raise SettingsError where the strength leaves no step to go from a start image."""
    s = sampling
    if s.num_inference_steps * s.strength < 1:
        raise SettingsError(
            f"strength {s.strength:g} of {s.num_inference_steps} steps is less than one step: pass more of either"
        )


_ARGUMENT_CHECKS = {"check_inputs", "set_timesteps", "retrieve_timesteps", "prepare_latents"}
"""Functions of diffusers that look at what its caller passed: an error out of one of them is not a bug."""


def _refused_by_the_pipeline(error: ValueError) -> bool:
    """True where diffusers' own check of a call's arguments raised `error`."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.name in _ARGUMENT_CHECKS and "diffusers" in Path(last.filename).parts


def batch_size_for(count: int, sampling: Sampling) -> int:
    """Return the size of the batches that `count` images are generated in, the last of them filled up: the sampling's
    own, or without `pad_last_batch` as few equal ones as it allows."""
    if sampling.pad_last_batch:
        return sampling.batch_size
    count = max(count, 1)
    return ceil(count / ceil(count / sampling.batch_size))


def _check_text(prompt: Any) -> None:
    """Raise SettingsError for what is no string, or holds halves of surrogate pairs, which no tokenizer reads."""
    try:
        str.encode(prompt)
    except (TypeError, UnicodeEncodeError) as error:
        raise SettingsError(
            f"the prompt {ascii(prompt)[:100]} is no text: pass a string of whole characters"
        ) from error
