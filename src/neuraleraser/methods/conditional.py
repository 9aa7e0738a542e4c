"""Guidance that changes the conditional prediction of each step: what its methods share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods.untraced import Untraced
from neuraleraser.sites import FinishedForward, NoiseLevel, Rows, Step, Text, edit_prediction, noise_level


class Update(Protocol):
    """Change of one drawing's predictions, step by step; it may keep what it needs of earlier steps."""

    def __call__(self, conditional: Tensor, without: Tensor, shown: Tensor, level: NoiseLevel) -> Tensor:
        """Return the change of the conditional prediction [images, ...], given those for the empty prompt and for the
        concept's, alike."""
        ...


class GuidanceMethod(Untraced, ABC):
    """Method that changes the conditional prediction of each step, given that for a prompt of the concept."""

    prompt: str

    @abstractmethod
    def _update(self, guidance: float) -> Update:
        """Return the update of one drawing, given its scale of guidance."""

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Guide away from the concept.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method cannot tell where it acts.
        """
        return guided_away(pipe, self.prompt, self._update)


@contextmanager
def guided_away(pipe: Any, prompt: str, start: Callable[[float], Update]) -> Iterator[None]:
    """Context manager: an update changes the conditional prediction of each step; guidance acts on what it leaves.

    prompt: shows the concept. start: called as each drawing begins, with its scale of guidance.
    """
    texts = prompt_texts(pipe, ["", prompt], default_sampling(pipe))
    with edit_prediction(pipe, lambda call: _Drawing(call.pipeline or pipe, texts, start(call.guidance))):
        yield


@dataclass
class _Drawing:
    """One drawing of a pipeline, and its last step."""

    pipe: Any
    texts: Sequence[Text]
    update: Update
    step: Step | None = None

    def __call__(self, finished: FinishedForward, rows: Rows) -> Tensor | None:
        call, blocks = finished.call, rows.prompt_blocks()
        # Of two passes of one step with the same text the second is the unconditional one.
        if not blocks or (self.step is not None and self.step.is_of(call)):
            return None
        self.step = finished.step
        images = list(range(blocks[0] * rows.images, (blocks[0] + 1) * rows.images))
        shown = call.state.shape[1]  # channels behind these, where there are some, are a learned variance
        predictions = [call.prediction[images], *finished.predict(images, self.texts)]
        conditional, without, concept = (x[:, :shown] for x in predictions)
        change = self.update(conditional, without, concept, noise_level(self.pipe.scheduler, call.timestep))
        whole = torch.zeros_like(call.prediction)
        for block in blocks:
            whole[block * rows.images : (block + 1) * rows.images, :shown] = change
        return whole


def squared_norm(x: Tensor) -> Tensor:
    """Return the sum of squares of each image [images], in float32 or better."""
    return x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)).square().sum(1)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Return values [images] as factors of a prediction [images, ...]."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def method_key(*parts: object) -> str:
    """Return a digest of what a method is made of."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
