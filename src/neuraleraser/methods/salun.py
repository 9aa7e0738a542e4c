"""SalUn, saliency unlearning: Fan, Liu, Zhang, Wong, Wei and Liu, ICLR 2024, arXiv 2310.12508.

Published (paper, and OPTML-Group/Unlearn-Saliency): v predicts the noise e in an image that was noised to x. Of all
weights those are trained on whose absolute gradient of the sum of |v(x, c) - e|^2 over images of the concept is in the
upper half. They are trained by

    loss = |v(x, c) - v(x, c')|^2 + beta |v(y, d) - e|^2,

where x is noised from images of the concept, of prompt c, and c' is another class's prompt, in whose term no gradient
flows; y from images of other things, of prompts d. By Adam at a rate of 1e-5, 8 images of each kind a step, 5 rounds
of 800 images, beta 0.1 to 0.5. The code's gradient for the mask is of a prediction guided by 7.5.

Ours: the model draws all images itself, of prompts that are passed, and each prompt of the concept is passed with the
one that it is moved to. States are finished latents with new noise, at timesteps of the drawing's own schedule. The
mask's gradient is of the prediction without guidance, as in the paper; weights without a gradient are never trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuraleraser.errors import SettingsError
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods.fine_tuning import (
    StateBatch,
    TrainedWeights,
    Weights,
    check_prompts,
    cross_attentions,
    detached,
    fine_tune,
)
from neuraleraser.sampling import generate
from neuraleraser.settings import MAX_SEED, Sampling, check_number, check_whole
from neuraleraser.sites import (
    DenoiserCall,
    Text,
    denoiser,
    denoiser_calls,
    input_and_target,
    scheduler_steps,
    unwrap,
)


@dataclass(frozen=True)
class SalUnSettings:
    """Settings of SalUn.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> SalUnSettings(steps=100).share
        0.5
    """

    steps: int = 150
    """Steps of training."""
    batch: int = 8
    """Images of the concept in a step, and as many others."""
    learning_rate: float = 1e-4
    share: float = 0.5
    """Share of the weights that are trained: those with the largest gradients."""
    retain_weight: float = 0.5
    """Weight of the loss for other images (beta in the paper)."""
    cross_attentions_only: bool = False
    """Train and mask cross-attentions alone, as the code can; otherwise all weights of the denoiser."""
    images: int = 40
    """Images of the concept that are drawn, and as many others."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "images"):
            check_whole(name, getattr(self, name), 1, 1_000_000)
        check_number("learning_rate", self.learning_rate, 0, 1, above=True)
        check_number("share", self.share, 0, 1, above=True)
        check_number("retain_weight", self.retain_weight, 0, 1000)
        check_whole("seed", self.seed, 0, MAX_SEED - 2 * self.images)


@dataclass(frozen=True, eq=False)
class SalUn(TrainedWeights):
    """SalUn: the weights that matter most to the concept are trained to take its prompts for others.

    Every image changes, if often little.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        weights: The trained weights of the denoiser, by name.
        prompts: Prompts that it was trained on.
        seeds: First and last seed of images that it was trained on.

    Examples:
        >>> few = SalUnSettings(steps=1, batch=1, images=1)
        >>> forget, instead, retain = ["a cat in Van Gogh style"], ["a cat"], ["a dog in mosaic style"]
        >>> method = SalUn.train(pipe, "Van_Gogh", "style", forget, instead, retain, quick, few)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    name: str = "salun"

    @classmethod
    def train(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        forget: Sequence[str],
        anchors: Sequence[str],
        retain: Sequence[str],
        sampling: Sampling,
        settings: SalUnSettings | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> SalUn:
        """Train SalUn.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            forget: Prompts that show the concept.
            anchors: A prompt for each of them, which it is moved to: of another class, or without the concept.
            retain: Prompts of other things, which are to be drawn as before.
            sampling: How images are generated.
            settings: Settings of the training; None: the defaults.
            progress: Called with the share of the training's steps that is done.

        Returns:
            The method.

        Raises:
            SettingsError: A list of prompts is empty, there are not as many anchors as prompts of the concept, or
                cross-attentions alone are to be trained and the denoiser has none of diffusers' names.
        """
        s = settings or SalUnSettings()
        check_prompts(forget=forget, anchors=anchors, retain=retain)
        if len(anchors) != len(forget):
            raise SettingsError(
                f"{len(forget)} prompts are to be forgotten, and there are {len(anchors)} anchors: pass one for each"
            )
        module = unwrap(denoiser(pipe))
        weights = cross_attentions(module, "SalUn") if s.cross_attentions_only else _all_weights(module)
        texts = prompt_texts(pipe, [*forget, *anchors, *retain], sampling)
        shown, instead, others = texts[: len(forget)], texts[len(forget) : -len(retain)], texts[-len(retain) :]
        middle, end = s.seed + s.images, s.seed + 2 * s.images
        of_concept = _drawn_pictures(pipe, forget, range(s.seed, middle), sampling)
        of_others = _drawn_pictures(pipe, retain, range(middle, end), sampling)
        generator = torch.Generator().manual_seed(s.seed)

        def diffusion_loss(pictures: _DrawnPictures, texts: Sequence[Text], rows: Sequence[int]) -> Tensor:
            batch, target = pictures.noised(module, rows, generator)
            prediction = batch.predict(weights, pictures.texts(texts, rows))
            return (prediction[:, : target.shape[1]] - target).float().square().mean()

        gradients = {name: torch.zeros_like(x) for name, x in weights.items()}
        for first in range(0, s.images, s.batch):
            rows = range(first, min(first + s.batch, s.images))
            found = torch.autograd.grad(
                diffusion_loss(of_concept, shown, rows), list(weights.values()), allow_unused=True
            )
            for total, x in zip(gradients.values(), found, strict=True):
                if x is not None:
                    total += x * len(rows)
        masks = saliency_masks(gradients, s.share)
        del gradients

        def loss(step: int) -> Tensor:
            rows, other = (torch.randint(s.images, (s.batch,), generator=generator).tolist() for _ in range(2))
            batch, _ = of_concept.noised(module, rows, generator)
            with torch.no_grad():
                target = batch.predict(weights, of_concept.texts(instead, rows))
            moved = (batch.predict(weights, of_concept.texts(shown, rows)) - target).float().square().mean()
            return moved + s.retain_weight * diffusion_loss(of_others, others, other)

        fine_tune(weights, loss, s.steps, s.learning_rate, masks, progress)
        trained = detached({name: x for name, x in weights.items() if masks[name].any()})
        return cls(concept, kind, trained, (*forget, *anchors, *retain), (s.seed, end - 1))


def _all_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in module.named_parameters()}


def saliency_masks(gradients: Weights, share: float) -> dict[str, Tensor]:
    """Return True for the share of all weights whose gradients are largest, and not 0, by name."""
    sizes = torch.cat([x.flatten().abs() for x in gradients.values()])
    count = max(1, round(share * len(sizes)))
    least = sizes.kthvalue(len(sizes) - count + 1).values
    return {name: (x.abs() >= least) & (x != 0) for name, x in gradients.items()}


@dataclass(frozen=True)
class _DrawnPictures:
    """Finished latents [N, ...] that a pipeline drew, and what it takes to show them to its denoiser with new noise.

    prompts: the number of each one's prompt. call: a call of one row. scheduler: as it was left. times: timesteps of
    the schedule, and as the denoiser is given them.
    """

    latents: Tensor
    prompts: Sequence[int]
    call: DenoiserCall
    scheduler: Any
    times: Sequence[tuple[float, Tensor]]

    def texts(self, texts: Sequence[Text], rows: Sequence[int]) -> list[Text]:
        """Return the texts of some pictures, of those of all prompts."""
        return [texts[self.prompts[row]] for row in rows]

    def noised(self, module: nn.Module, rows: Sequence[int], generator: torch.Generator) -> tuple[StateBatch, Tensor]:
        """Return some pictures with noise, at random timesteps, and what the denoiser is to predict there."""
        steps = torch.randint(len(self.times), (len(rows),), generator=generator).tolist()
        noise = torch.randn(len(rows), *self.latents.shape[1:], generator=generator)
        found = []
        for row, step, e in zip(rows, steps, noise, strict=True):
            x = self.latents[row : row + 1]
            found.append(input_and_target(self.scheduler, x, e[None].to(x), self.times[step][0]))
        state, target = (torch.cat(some) for some in zip(*found, strict=True))
        given = torch.stack([self.times[step][1] for step in steps])
        one = self.call.rows([0] * len(rows)).conditioning
        return StateBatch(module, state.to(self.call.state.dtype), given, one), target


def _drawn_pictures(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling) -> _DrawnPictures:
    """Draw an image for each seed, of the prompts by turns, and return them as latents."""
    numbers = [i % len(prompts) for i in range(len(seeds))]
    first: list[DenoiserCall] = []
    given: list[Tensor] = []
    latest: list[Tensor] = []
    finished: list[Tensor] = []

    def on_call(call: DenoiserCall) -> None:
        if not first:
            first.append(call.rows([0]))
        given.append(call.timestep.flatten()[0])

    def on_latents(latents: Tensor) -> None:
        latest[:] = [latents]

    def on_batch_end(indices: range, images: Any) -> None:
        finished.append(latest[0][: len(indices)].float())

    with denoiser_calls(pipe, on_call), scheduler_steps(pipe, on_latents):
        generate(pipe, [prompts[i] for i in numbers], seeds, sampling, on_batch_end=on_batch_end)
    known = [float(t) for t in torch.as_tensor(pipe.scheduler.timesteps)]
    seen = {float(t): t for t in given}  # one for each step, whether guidance takes one pass or two
    times = list(zip(sorted(set(known)), (seen[t] for t in sorted(seen)), strict=True))
    return _DrawnPictures(torch.cat(finished), numbers, first[0], copy.deepcopy(pipe.scheduler), times)
