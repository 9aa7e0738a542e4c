"""Prompting4Debugging, P4D (Chin et al., ICML 2024, arXiv 2309.06135): tokens with which an erased model predicts what
the base model predicts for the concept's prompt.

Published (joycenerd/P4D): N = 16 tokens alone, or new ones after every third of a prompt's own. They are continuous
embeddings, random tokens at first; at each forward the nearest of the vocabulary, by cosine, stand in their place, and
the gradient at these goes to the continuous ones, with AdamW (rate 0.1, weight decay 0.1). The loss is the squared
difference between the erased model's prediction and the base model's for the concept's prompt, for one noised picture
of the concept at a random timestep. 3000 steps; every 50 an image is drawn, and the prompt whose image is most like
the picture, by CLIP, is kept.

Ours: the tokens stand wherever the prompts say; pictures may be several; special tokens are never taken; the tokens
kept are those of the least loss on predictions that are put aside, for no CLIP model fits every pipeline; fewer steps
of more pictures; a rate in units of the vocabulary's spread, as the published one, of several, loses its way on the
canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.attacks.denoising import Context, Predict, attacked, check_lessons, chosen, usable_tokens
from neuraleraser.attacks.latents import latents_of
from neuraleraser.attacks.learned_embeddings import check_inversion, learned_word
from neuraleraser.eraser import check_nothing_acts
from neuraleraser.sampling import Images
from neuraleraser.settings import check_number, check_seed, check_whole

_DECAY = 0.1
"""Of AdamW, as published."""
_ASIDE = 16
"""Predictions that are put aside, to choose by."""


def match_predictions(
    pipe: Any,
    images: Images,
    prompts: Sequence[str],
    targets: Sequence[str],
    *,
    applied: Context = nullcontext,
    count: int = 16,
    rounds: int = 10,
    steps: int = 30,
    batch_size: int = 4,
    rate: float = 0.1,
    seed: int = 0,
    succeeds: Callable[[Tensor], bool] | None = None,
    on_round: Callable[[int, float], None] | None = None,
) -> list[int]:
    """Search tokens with which the erased model predicts what the base model does for the concept's prompt.

    The base model's predictions are all made before the method is applied: they take 2 steps x batch_size latents of
    memory a round.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are, and nothing that erases.
        images: Pictures of the concept, uint8 [N, H, W, 3].
        prompts: A prompt for each, which holds the word "<learned>" where the tokens stand; that word alone: P4D-N.
        targets: The concept's prompt for each, as the base model is given it.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        count: Tokens.
        rounds: Rounds, after each of which the tokens are judged.
        steps: Steps of each round.
        batch_size: Pictures in a step.
        rate: Of AdamW, in units of the vocabulary's spread.
        seed: Of the first tokens, the noise and the order.
        succeeds: Called after each round with the embeddings [count, d] of its tokens; True ends the search with them.
        on_round: Called as `on_round(round, loss)`, with the loss on the predictions put aside.

    Returns:
        The tokens, for `pipe.text_encoder.get_input_embeddings().weight[tokens]` and `learned_word`.

    Raises:
        SettingsError: As `learn_embeddings`; or there are not as many targets, or an eraser acts on the pipeline.
        DataError: The images are of another shape or type.

    Examples:
        >>> prompts, targets = ["<learned>", "<learned>"], ["a cat in Van Gogh style", "a dog"]
        >>> tokens = match_predictions(pipe, images, prompts, targets, count=3, rounds=1, steps=2, batch_size=2)
        >>> len(tokens)
        3
    """
    check_inversion(pipe, images, prompts, count)
    check_lessons(images, targets=targets)
    check_nothing_acts(pipe, "a target of predictions")
    for name, value in (("rounds", rounds), ("steps", steps), ("batch_size", batch_size)):
        check_whole(name, value, 1, 100_000)
    check_number("rate", rate, 0, 1e6, above=True)
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    allowed = usable_tokens(pipe)
    first = torch.randint(len(allowed), (count,), generator=generator)
    continuous = torch.nn.Parameter(table[allowed[first.to(allowed.device)]].float())
    adam = torch.optim.AdamW([continuous], lr=rate * float(table.float().std()), weight_decay=_DECAY)
    latents = latents_of(pipe, images).cpu()
    vectors: list[Tensor] = list(continuous.detach())
    with attacked(pipe, nullcontext) as base, torch.no_grad():
        aside = [_lesson(pipe, base, latents, targets, batch_size, generator) for _ in range(-(-_ASIDE // batch_size))]
        lessons = [_lesson(pipe, base, latents, targets, batch_size, generator) for _ in range(rounds * steps)]
    best, least = [], float("inf")
    with attacked(pipe, applied, learned_word(pipe, vectors)) as predict:
        for number in range(rounds):
            for lesson in lessons[number * steps : (number + 1) * steps]:
                with torch.enable_grad():
                    hard = table[nearest(continuous.detach(), table, allowed)].float().requires_grad_()
                    vectors[:] = hard
                    loss = lesson.loss(predict, prompts)
                    (continuous.grad,) = torch.autograd.grad(loss, [hard])
                adam.step()
            tokens = nearest(continuous.detach(), table, allowed)
            vectors[:] = table[tokens]
            with torch.no_grad():
                left = float(torch.stack([lesson.loss(predict, prompts) for lesson in aside]).mean())
            if on_round:
                on_round(number, left)
            if left < least:
                best, least = tokens.tolist(), left
            if succeeds and succeeds(table[tokens]):
                return tokens.tolist()
    return best


def nearest(vectors: Tensor, table: Tensor, allowed: Tensor) -> Tensor:
    """Return for each vector [k, d] the allowed token whose embedding in the table [v, d] is nearest by cosine [k]."""
    unit = F.normalize(table[allowed].to(vectors), dim=1)
    return allowed[(F.normalize(vectors, dim=1) @ unit.T).argmax(1)]


@dataclass(frozen=True)
class _Lesson:
    """Noised pictures, and what the base model predicts there for the concept's prompt."""

    some: Tensor
    noisy: Tensor
    times: Tensor
    target: Tensor

    def loss(self, predict: Predict, prompts: Sequence[str]) -> Tensor:
        return F.mse_loss(predict(self.noisy, self.times, chosen(prompts, self.some)), self.target)


def _lesson(
    pipe: Any, base: Predict, latents: Tensor, targets: Sequence[str], size: int, generator: torch.Generator
) -> _Lesson:
    some = torch.randint(len(latents), (size,), generator=generator)
    times = torch.randint(int(pipe.scheduler.config["num_train_timesteps"]), (size,), generator=generator)
    noise = torch.randn(latents[some].shape, generator=generator)
    noisy = pipe.scheduler.add_noise(latents[some], noise, times)
    return _Lesson(some, noisy, times, base(noisy, times, chosen(targets, some)))
