"""Training of a text's correction, on from its closed form.

A map of single tokens leaves much of what "a cat and a dog" reads as, if it is to read as "a dog". What counts are the
predictions: a few gradient steps bring those for prompts with the concept nearer to the model's own for the matched
prompts without, at states drawn without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from neuraleraser.concepts import Pair
from neuraleraser.eraser import LowRank
from neuraleraser.eraser.corrections.correction import sites_of
from neuraleraser.families import known_names
from neuraleraser.fitting.trajectories import calls_by_image
from neuraleraser.precision import fast_dtype
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, EditContext, denoiser, edit, replay

EVERY = 3
"""Of the steps of an image one in so many is kept, the first among them."""


@dataclass(frozen=True)
class Lesson:
    """One step of one image that was drawn without the concept, with the model's own prediction; and the prompts with
    the concept for which the same is to be predicted."""

    call: DenoiserCall
    shown: Sequence[str]


def draw_lessons(pipe: Any, pairs: Sequence[Pair], seed: int, sampling: Sampling) -> list[Lesson]:
    """Draw each prompt without the concept once, image i from seed + i, and keep some of its steps."""
    shown: dict[str, list[str]] = {}
    for pair in pairs:
        shown.setdefault(pair.negative, []).append(pair.positive)
    prompts, seen = list(shown), [0] * len(shown)
    lessons: list[Lesson] = []

    def on(image: int, call: DenoiserCall) -> None:
        if seen[image] % EVERY == 0:
            lessons.append(Lesson(call, shown[prompts[image]]))
        seen[image] += 1

    with calls_by_image(pipe, on):
        generate(pipe, prompts, range(seed, seed + len(prompts)), sampling)
    return lessons


def train_correction(
    pipe: Any,
    start: LowRank,
    lessons: Sequence[Lesson],
    conditioning: Mapping[str, DenoiserCall],
    *,
    steps: int,
    batch: int,
    lr: float = 4e-3,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> LowRank:
    """Train a correction on from `start`, by Adam on the squared error of predictions.

    Args:
        pipe: The diffusers pipeline; it is not changed.
        start: The correction to start from.
        lessons: What is learnt from.
        conditioning: A call, of one row, with the conditioning of each prompt with the concept.
        steps: Optimiser steps.
        batch: Lessons in each.
        lr: Peak learning rate; it falls to zero over the last 60 % of the steps.
        seed: Seed of their choice.
        on_step: Called as `on_step(step, loss)`.

    Returns:
        The trained correction.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {k: v.clone().requires_grad_(k != "times") for k, v in start.tensors().items()}
    trained = [v for v in params.values() if v.requires_grad]
    device = start.down.device
    net = denoiser(pipe)
    frozen = [(p, p.requires_grad) for p in net.parameters()]
    adam = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.98))

    def change(x: Tensor, context: EditContext[None]) -> Tensor:
        return LowRank.from_tensors(start.site, params).delta(x, context.timestep)

    def some(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    try:
        for p, _ in frozen:
            p.requires_grad_(False)
        # Plain products: on a CPU the fused kernel's backward pass is several times slower.
        with sdpa_kernel([SDPBackend.MATH]), edit(pipe, dict.fromkeys(sites_of(start), change)):
            for step in range(steps):
                chosen = [lessons[some(len(lessons))] for _ in range(batch)]
                prompts = [lesson.shown[some(len(lesson.shown))] for lesson in chosen]
                drawn = _stacked([lesson.call for lesson in chosen])
                asked = _stacked([conditioning[prompt] for prompt in prompts])
                with torch.autocast(device.type, torch.bfloat16, enabled=fast_dtype(device) == torch.bfloat16):
                    out = replay(pipe, drawn.state, drawn.timestep, asked.conditioning)
                loss = F.mse_loss(out.float(), drawn.prediction.float())
                adam.zero_grad(set_to_none=True)
                loss.backward()
                for group in adam.param_groups:
                    group["lr"] = lr * min(1.0, (step + 1) / 10, (1 - step / steps) / 0.6)
                adam.step()
                if on_step:
                    on_step(step, float(loss.detach()))
    finally:
        for p, needs in frozen:
            p.requires_grad_(needs)
    return LowRank.from_tensors(start.site, {k: v.detach() for k, v in params.items()}, start.also)


def _stacked(calls: Sequence[DenoiserCall]) -> DenoiserCall:
    """Return calls of one row each as one, each row with its own timestep."""
    shared = known_names(lambda family: family.position_arguments)

    def cat(values: Sequence[Any], name: str = "") -> Any:
        if isinstance(values[0], Mapping):
            return {k: cat([v[k] for v in values], k) for k in values[0]}
        if isinstance(values[0], list):
            return [cat(parts) for parts in zip(*values, strict=True)]
        rows = isinstance(values[0], Tensor) and values[0].ndim and name not in shared
        return torch.cat(list(values)) if rows else values[0]

    return DenoiserCall(
        torch.cat([c.state for c in calls]),
        torch.cat([c.timestep.flatten()[:1] for c in calls]),
        cat([dict(c.conditioning) for c in calls]),
        torch.cat([c.prediction for c in calls]),
    )
