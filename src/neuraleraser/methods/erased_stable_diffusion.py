"""Erased Stable Diffusion (ESD-x), Gandikota, Materzynska, Fiotto-Kaufman and Bau, ICCV 2023, arXiv 2303.07345.

Published (paper, and rohitgandikota/erasing): with v0 the model's own prediction and v that of the model in training,
for the concept's prompt c, at states x of images that v itself draws of c, from random noise down to a random step,

    loss = |v(x, c) - (v0(x, "") - strength (v0(x, c) - v0(x, "")))|^2,

by Adam, in 1,000 steps of one state at a rate of 1e-5, strength 1, images guided by 3. ESD-x trains the
cross-attentions alone, which suits a concept that prompts name.

Ours: several states a step; images are drawn anew after every `refresh` steps, whole, and their states are taken from
all of their steps. The prompts are all phrases that are passed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods.fine_tuning import (
    DrawnState,
    StateBatch,
    TrainedWeights,
    Weights,
    check_prompts,
    cross_attentions,
    detached,
    drawn_states,
    fine_tune,
)
from neuraleraser.methods.weights import changed_weights
from neuraleraser.settings import Sampling, check_number, check_whole
from neuraleraser.sites import Text, denoiser, unwrap


@dataclass(frozen=True)
class ESDSettings:
    """Settings of ESD-x.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> ESDSettings(steps=100).batch
        8
    """

    steps: int = 200
    """Steps of training."""
    batch: int = 8
    """States of a step."""
    learning_rate: float = 1e-4
    strength: float = 1.0
    """Share of the way beyond the empty prompt's prediction."""
    refresh: int = 20
    """Steps after which images are drawn anew."""
    images: int = 8
    """Images that are drawn each time."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "refresh", "images"):
            check_whole(name, getattr(self, name), 1, 1_000_000)
        check_number("learning_rate", self.learning_rate, 0, 1, above=True)
        check_number("strength", self.strength, 0, 100)


@dataclass(frozen=True, eq=False)
class ErasedStableDiffusion(TrainedWeights):
    """ESD-x: cross-attentions that were trained away from the concept. Every image changes, if often little.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        weights: The trained weights of the denoiser, by name.
        prompts: Prompts that it was trained on.
        seeds: First and last seed of images that it was trained on.

    Examples:
        >>> few = ESDSettings(steps=1, batch=1, images=1)
        >>> method = ErasedStableDiffusion.train(pipe, "Van_Gogh", "style", ["in Van Gogh style"], quick, few)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    name: str = "esd-x"

    @classmethod
    def train(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        phrases: Sequence[str],
        sampling: Sampling,
        settings: ESDSettings | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> ErasedStableDiffusion:
        """Train ESD-x.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            phrases: Prompts that show the concept and nothing else.
            sampling: How images are generated.
            settings: Settings of the training; None: the defaults.
            progress: Called with the share that is done.

        Returns:
            The method.

        Raises:
            SettingsError: There are no phrases, or the denoiser has no cross-attentions of diffusers' names.
        """
        s = settings or ESDSettings()
        check_prompts(phrases=phrases)
        module = unwrap(denoiser(pipe))
        weights = cross_attentions(module, "ESD-x")
        texts = prompt_texts(pipe, ["", *phrases], sampling)
        rng, states = random.Random(s.seed), list[DrawnState]()

        def loss(step: int) -> Tensor:
            if step % s.refresh == 0:
                first = s.seed + step // s.refresh * s.images
                seeds = range(first, first + s.images)
                with changed_weights(module, weights):
                    states[:] = drawn_states(pipe, phrases, [seed % len(phrases) for seed in seeds], seeds, sampling)
            some = rng.sample(states, min(s.batch, len(states)))
            shown = [texts[1 + x.prompt] for x in some]
            return negative_guidance_loss(StateBatch.of(module, some), weights, {}, texts[0], shown, s.strength)

        fine_tune(weights, loss, s.steps, s.learning_rate, progress=progress)
        last = s.seed + ((s.steps - 1) // s.refresh + 1) * s.images - 1
        return cls(concept, kind, detached(weights), tuple(phrases), (s.seed, last))


def negative_guidance_loss(
    batch: StateBatch, weights: Weights, before: Weights, empty: Text, shown: Sequence[Text], strength: float
) -> Tensor:
    """Return the loss of `weights` at states of images that show the concept, each with its text.

    before: weights whose predictions the target is made of. empty: the empty prompt's text.
    """
    with torch.no_grad():
        without, concept = batch.predict(before, [empty] * len(shown)), batch.predict(before, shown)
        target = without - strength * (concept - without)
    return (batch.predict(weights, shown) - target).float().square().mean()
