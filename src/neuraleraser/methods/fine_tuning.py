"""Methods that train a denoiser's own weights: the states that they train at, the loop, and how they are applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.untraced import Untraced
from neuraleraser.methods.weights import changed_weights, weights_digest
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, Text, denoiser, denoiser_calls, unwrap
from neuraleraser.sites.finished import with_text
from neuraleraser.sites.modules import forward_arguments

Weights = Mapping[str, Tensor]
"""Weights of a denoiser by name; those that are missing are its own."""


@dataclass(frozen=True, eq=False)
class TrainedWeights(Untraced):
    """Method that gives the denoiser weights that were trained. Every image changes, if often little."""

    concept: str
    kind: str
    weights: Weights
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, int] = (0, 0)
    name: str = "trained"

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


def check_prompts(**prompts: Sequence[str]) -> None:
    """Raise SettingsError for lists of prompts that are empty, or one text in place of a list."""
    for name, some in prompts.items():
        if isinstance(some, str) or not some:
            raise SettingsError(f"{name} is {some!r}: pass a list of one prompt or more")


def cross_attentions(module: nn.Module, method: str) -> dict[str, Tensor]:
    """Return copies of the weights of a denoiser's cross-attentions, to train.

    Raises SettingsError where it has none of diffusers' names.
    """
    found = {name: x.detach().clone().requires_grad_() for name, x in module.named_parameters() if ".attn2." in name}
    if not found:
        raise SettingsError(
            f"{type(module).__name__} has no cross-attentions called attn2: {method} trains these; pass a pipeline "
            "whose denoiser has some, such as Stable Diffusion's"
        )
    return found


@dataclass(frozen=True)
class DrawnState:
    """One image in one step of its drawing, as a call of one row, and the number of its prompt."""

    call: DenoiserCall
    prompt: int


def drawn_states(
    pipe: Any, prompts: Sequence[str], numbers: Sequence[int], seeds: Sequence[int], sampling: Sampling
) -> list[DrawnState]:
    """Draw an image of each numbered prompt and return all their states."""
    found: list[DrawnState] = []
    size = max(1, sampling.batch_size)
    for first in range(0, len(seeds), size):
        part = numbers[first : first + size]

        def on_call(call: DenoiserCall, part: Sequence[int] = part) -> None:
            found.extend(DrawnState(call.rows([row]), number) for row, number in enumerate(part))

        with denoiser_calls(pipe, on_call):
            generate(pipe, [prompts[number] for number in part], seeds[first : first + size], sampling)
    return found


@dataclass(frozen=True)
class StateBatch:
    """States [B, ...] of which a denoiser is asked with different texts and weights; time: [B]."""

    module: nn.Module
    state: Tensor
    time: Tensor
    conditioning: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module, states: Sequence[DrawnState]) -> StateBatch:
        """Return a batch of states."""
        return cls(
            module,
            torch.cat([s.call.state for s in states]),
            torch.stack([s.call.timestep.flatten()[0] for s in states]),
            states[0].call.rows([0] * len(states)).conditioning,
        )

    def predict(self, weights: Weights, texts: Sequence[Text]) -> Tensor:
        """Return the predictions [B, ...] with these weights, of each state with its text."""
        given = {forward_arguments(self.module)[0]: self.state, "timestep": self.time, "return_dict": False}
        # Its own weights without gradients: training is to leave none behind on them.
        held = {name: x.detach() for name, x in self.module.named_parameters()} | dict(weights)
        return functional_call(self.module, held, (), given | with_text(self.conditioning, texts))[0]


def fine_tune(
    weights: Weights,
    loss: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    masks: Weights | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Train weights in place by Adam.

    loss: the loss of a step, given its number. masks: 1 where a weight is trained, 0 elsewhere; None: all are.
    progress: called after each step with the share that is done.
    """
    optimizer = torch.optim.Adam(weights.values(), lr=learning_rate)
    for step in range(steps):
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        for name, mask in (masks or {}).items():
            gradient = weights[name].grad
            if gradient is not None:
                gradient.mul_(mask)  # Adam moves no weight whose gradient was always 0
        optimizer.step()
        if progress:
            progress((step + 1) / steps)


def detached(weights: Weights) -> dict[str, Tensor]:
    """Return copies of weights without gradients."""
    return {name: x.detach().clone() for name, x in weights.items()}
