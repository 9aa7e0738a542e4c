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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods.weights import changed_weights, weights_digest
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling, check_number, check_whole
from neuraleraser.sites import DenoiserCall, Text, denoiser, denoiser_calls, unwrap
from neuraleraser.sites.finished import with_text


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
class ErasedStableDiffusion:
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

    concept: str
    kind: str
    weights: Mapping[str, Tensor]
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, int] = (0, 0)
    name: str = "esd-x"

    @property
    def key(self) -> str:
        """Digest of the weights."""
        return weights_digest(self.weights)

    @property
    def made_with(self) -> MadeWith:
        """Its prompts and seeds."""
        return MadeWith(seeds=(self.seeds,), prompts=self.prompts)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Give the denoiser the trained weights.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method acts everywhere.

        Raises:
            SettingsError: The weights are of another model.
        """
        return changed_weights(unwrap(denoiser(pipe)), self.weights)

    def watched(self, pipe: Any) -> AbstractContextManager[None]:
        """Note nothing: it would act everywhere.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None.
        """
        return nullcontext(None)

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
            SettingsError: The denoiser has no cross-attentions of diffusers' names.
        """
        s = settings or ESDSettings()
        module = unwrap(denoiser(pipe))
        names = [name for name, _ in module.named_parameters() if ".attn2." in name]
        if not names:
            raise SettingsError(f"{type(module).__name__} has no cross-attentions called attn2: ESD-x trains these")
        weights = {name: module.get_parameter(name).detach().clone().requires_grad_() for name in names}
        optimizer = torch.optim.Adam(weights.values(), lr=s.learning_rate)
        texts = prompt_texts(pipe, ["", *phrases], sampling)
        rng, states = random.Random(s.seed), list[_State]()
        for step in range(s.steps):
            if step % s.refresh == 0:
                first = s.seed + step // s.refresh * s.images
                with changed_weights(module, weights):
                    states = _states(pipe, phrases, range(first, first + s.images), sampling)
            batch = rng.sample(states, min(s.batch, len(states)))
            loss = _loss(module, weights, batch, texts, s.strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress:
                progress((step + 1) / s.steps)
        last = s.seed + ((s.steps - 1) // s.refresh + 1) * s.images - 1
        trained = {name: x.detach() for name, x in weights.items()}
        return cls(concept, kind, trained, tuple(phrases), (s.seed, last))


@dataclass(frozen=True)
class _State:
    """One image in one step of its drawing, as a call of one row, and the number of its phrase."""

    call: DenoiserCall
    phrase: int


def _states(pipe: Any, phrases: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> list[_State]:
    """Draw images of the phrases by turns and return all their states."""
    numbers = [seed % len(phrases) for seed in seeds]
    found: list[_State] = []
    size = max(1, sampling.batch_size)
    for first in range(0, len(seeds), size):
        part = numbers[first : first + size]

        def on_call(call: DenoiserCall, part: Sequence[int] = part) -> None:
            found.extend(_State(call.rows([row]), number) for row, number in enumerate(part))

        with denoiser_calls(pipe, on_call):
            generate(pipe, [phrases[number] for number in part], seeds[first : first + size], sampling)
    return found


def _loss(
    module: nn.Module, weights: Mapping[str, Tensor], batch: Sequence[_State], texts: Sequence[Text], strength: float
) -> Tensor:
    """Return the loss of some states; `texts` are the empty prompt's and the phrases'."""
    state = torch.cat([s.call.state for s in batch])
    time = torch.stack([s.call.timestep.flatten()[0] for s in batch])
    one = batch[0].call.rows([0] * len(batch)).conditioning
    plain = with_text(one, [texts[0]] * len(batch))
    shown = with_text(one, [texts[1 + s.phrase] for s in batch])

    def predict(weights: Mapping[str, Tensor], conditioning: Mapping[str, Any]) -> Tensor:
        return functional_call(module, dict(weights), (state, time), {**conditioning, "return_dict": False})[0]

    with torch.no_grad():
        without, concept = predict({}, plain), predict({}, shown)
        target = without - strength * (concept - without)
    return (predict(weights, shown) - target).float().square().mean()
