"""States of pictures as a start image brings them: noised to some levels, with some text, and measured at a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import SettingsError
from neuraleraser.families.opening import image_to_image
from neuraleraser.fitting.pictures import Pictures
from neuraleraser.sites import EditContext, Site, record

NOISE_LEVELS = (0.8, 0.6, 0.4, 0.22, 0.07)
"""Strengths of image-to-image that pictures are noised to: the share of the way back to noise."""
_STEPS = 100
"""Steps of the schedule, of which one is run: enough that each level has a step of its own."""


class _FirstForwardDone(Exception):
    """Raised to leave a pipeline's call in its first forward."""


class _EncodedOnce:
    """Context manager: after `rewind`, an autoencoder gives again what it gave, in the same order.

    Encoding takes half as long as a forward, and is the same at every level.
    """

    def __init__(self, vae: Any) -> None:
        self.vae, self.encode, self.own = vae, vae.encode, vars(vae).get("encode")
        self.made: list[Any] = []
        self.position = 0

    def __enter__(self) -> _EncodedOnce:
        vars(self.vae)["encode"] = self._encoded
        return self

    def __exit__(self, *error: object) -> None:
        del vars(self.vae)["encode"]
        if self.own is not None:  # somebody else's, in place of the class's
            vars(self.vae)["encode"] = self.own

    def rewind(self) -> None:
        """Begin again with the first encoding."""
        self.position = 0

    def _encoded(self, *args: Any, **kwargs: Any) -> Any:
        if self.position == len(self.made):
            self.made.append(self.encode(*args, **kwargs))
        self.position += 1
        return self.made[self.position - 1]


@dataclass(frozen=True)
class NoisedStates:
    """Activations of pictures at a site, each noised to some of T levels.

    values: [N, K, P, d], in half precision. levels: the K levels of each picture, int64 [N, K], ascending. times: the
    timesteps of all levels [T], descending, as the denoiser is given them. grid: height and width of the P positions,
    None where they are not known.
    """

    values: Tensor
    levels: Tensor
    times: Tensor
    grid: tuple[int, int] | None

    def of_level(self, values: Tensor, level: int) -> Tensor:
        """Return those of some values [N, K] that belong to a level."""
        return values[self.levels == level]

    def rows(self, rows: Tensor) -> NoisedStates:
        """Return those of some pictures."""
        return replace(self, values=self.values[rows], levels=self.levels[rows])

    def joined(self, other: NoisedStates) -> NoisedStates:
        """Return these and others at the same levels."""
        values, levels = torch.cat([self.values, other.values]), torch.cat([self.levels, other.levels])
        return replace(self, values=values, levels=levels)


def in_half_precision(x: Tensor, site: Site) -> Tensor:
    """Return activations in half precision, on the CPU. Raises SettingsError where they do not fit."""
    half = x.half().cpu()
    if not bool(half.isfinite().all()):
        raise SettingsError(
            f"activations at {site} reach {float(x.abs().max()):.3g}, more than half precision holds (65504), so no "
            "image gate can look there: make an eraser of prompts alone (num_pictures=0)"
        )
    return half


def noised_states(
    pipe: Any,
    site: Site,
    pictures: Pictures,
    *,
    levels: Sequence[float] = NOISE_LEVELS,
    each: int | None = None,
    batch_size: int = 20,
    progress: Callable[[float], None] | None = None,
) -> NoisedStates:
    """Start image-to-image from each picture at each of `levels`, and return the activations in the first forward.

    One forward without guidance for each picture and level, of the same noise at every level. each: number of levels
    of a picture, which pictures take by turns; None: all.

    Raises SettingsError where the pipeline has no image-to-image form, or half precision does not hold the activations.
    """
    start = image_to_image(pipe)
    start.set_progress_bar_config(disable=True)
    steps = min(_STEPS, start.scheduler.config.get("original_inference_steps") or _STEPS)
    seen: list[tuple[Tensor, float, tuple[int, int] | None]] = []
    times: dict[int, float] = {}
    k = each or len(levels)

    def on_activations(at: Site, x: Tensor, context: EditContext[None]) -> None:
        seen.append((in_half_precision(x, at), float(context.timestep[0]), context.grid))
        raise _FirstForwardDone

    turns = 1 if k == len(levels) else len(levels)
    order = [i for turn in range(turns) for i in range(turn, len(pictures.images), turns)]
    batches: list[Tensor] = []
    taken: list[Tensor] = []
    for part in (b for turn in range(turns) for b in _batches(range(turn, len(pictures.images), turns), batch_size)):
        here = sorted((part[0] + i * (len(levels) // k)) % len(levels) for i in range(k))
        pixels = torch.from_numpy(pictures.images[list(part)]).permute(0, 3, 1, 2).float().div(255)
        seen.clear()
        with _EncodedOnce(start.vae) as encodings, record(pipe, [site], on_activations), torch.no_grad():
            for level in here:
                encodings.rewind()
                with suppress(_FirstForwardDone):
                    start(
                        [pictures.prompts[i] for i in part],
                        image=pixels,
                        strength=levels[level],
                        num_inference_steps=steps,
                        guidance_scale=1.0,
                        generator=[
                            torch.Generator("cpu").manual_seed(int(s)) for s in (pictures.seeds[i] for i in part)
                        ],
                        output_type="latent",
                    )
        batches.append(torch.stack([x for x, _, _ in seen], 1))
        taken.append(torch.tensor(here).expand(len(pixels), k))
        times |= {level: time for level, (_, time, _) in zip(here, seen, strict=True)}
        if progress:
            progress(sum(map(len, taken)) / len(order))
    back = torch.tensor(order).argsort()
    known = torch.tensor([times[j] for j in sorted(times)])
    return NoisedStates(torch.cat(batches)[back], torch.cat(taken)[back], known, seen[0][2])


def _batches(indices: range, size: int) -> list[range]:
    return [indices[first : first + size] for first in range(0, len(indices), size)]
