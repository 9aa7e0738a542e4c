"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv 2310.11868): tokens of the vocabulary, searched by gradients.

Published (OPTML-Group/Diffusion-MU-Attack): k tokens before a prompt are rows of a relaxed one-hot matrix. A step draws
tokens from the rows, passes gradients straight through the draw, holds each element of a gradient in [-1, 1], and takes
a step of Adam (rate 0.01, weight decay 0.1), after which the rows are projected onto the simplex. The loss is the
denoiser's own, through the method, on one picture of the concept. 50 timesteps, 10 to 990, take turns, 40 steps each;
after each the likeliest tokens are tried, and the first that succeed end it.

Ours: the pictures and prompts may be several; the matrix begins at random, theirs even unless asked otherwise; special
tokens are never taken; the prompt alone is not tried first; the projection is exact (Duchi et al. 2008), theirs by
bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.attacks.denoising import Context, attacked, chosen, denoising_target, usable_tokens
from neuraleraser.attacks.latents import latents_of
from neuraleraser.attacks.learned_embeddings import check_inversion, learned_word
from neuraleraser.sampling import Images
from neuraleraser.settings import check_whole

_RATE, _DECAY = 0.01, 0.1
"""Of Adam, as published."""


def searched_tokens(
    pipe: Any,
    images: Images,
    prompts: Sequence[str],
    *,
    applied: Context = nullcontext,
    count: int = 5,
    turns: int = 50,
    steps: int = 40,
    batch_size: int = 1,
    seed: int = 0,
    succeeds: Callable[[Tensor], bool] | None = None,
    on_turn: Callable[[int, float], None] | None = None,
) -> list[int]:
    """Search tokens that bring a concept back in a prompt, in place of the word "<learned>".

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        images: Pictures of the concept, uint8 [N, H, W, 3].
        prompts: A prompt for each, which holds the word "<learned>" where the tokens stand.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        count: Tokens.
        turns: Timesteps that take turns, spread evenly.
        steps: Steps of each turn.
        batch_size: Pictures in a step.
        seed: Of the matrix, the draws and the noise.
        succeeds: Called after each turn with the embeddings [count, d] of the likeliest tokens; True ends the search.
        on_turn: Called as `on_turn(turn, loss)`, the mean loss of the turn.

    Returns:
        The tokens, for `pipe.text_encoder.get_input_embeddings().weight[tokens]` and `learned_word`.

    Raises:
        SettingsError: As `learn_embeddings`.
        DataError: The images are of another shape or type.

    Examples:
        >>> prompts = ["<learned> a picture", "<learned>"]
        >>> tokens = searched_tokens(pipe, images, prompts, count=2, turns=1, steps=2)
        >>> len(tokens)
        2
    """
    check_inversion(pipe, images, prompts, count)
    for name, value in (("turns", turns), ("steps", steps), ("batch_size", batch_size)):
        check_whole(name, value, 1, 100_000)
    generator = torch.Generator().manual_seed(seed)
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    allowed = usable_tokens(pipe).cpu()
    rows = torch.nn.Parameter(project_to_simplex(torch.rand(count, len(allowed), generator=generator)))
    adam = torch.optim.Adam([rows], lr=_RATE, weight_decay=_DECAY)
    latents = latents_of(pipe, images).cpu()
    last = int(pipe.scheduler.config["num_train_timesteps"])
    vectors: list[Tensor] = list(table[allowed[:count]])

    def likeliest() -> list[int]:
        return allowed[rows.detach().argmax(1)].tolist()

    with attacked(pipe, applied, learned_word(pipe, vectors)) as predict:
        for turn in range(turns):
            time, losses = int((turn + 0.5) * last / turns), []
            for _ in range(steps):
                some = torch.randint(len(latents), (batch_size,), generator=generator)
                noise = torch.randn(latents[some].shape, generator=generator)
                times = torch.full((batch_size,), time)
                noisy, target = denoising_target(pipe, latents[some], noise, times)
                with torch.enable_grad():
                    drawn = torch.multinomial(rows.detach().clamp(min=1e-9), 1, generator=generator)[:, 0]
                    hard = F.one_hot(drawn, len(allowed)).to(rows)
                    vectors[:] = (hard + rows - rows.detach()) @ table[allowed].to(rows)
                    found = predict(noisy, times, chosen(prompts, some))
                    loss = F.mse_loss(found, target.float())
                    adam.zero_grad(set_to_none=True)
                    loss.backward()
                assert rows.grad is not None
                rows.grad.clamp_(-1, 1)
                adam.step()
                rows.data = project_to_simplex(rows.data)
                losses.append(float(loss.detach()))
            if on_turn:
                on_turn(turn, sum(losses) / len(losses))
            if succeeds and succeeds(table[likeliest()]):
                break
    return likeliest()


def project_to_simplex(x: Tensor) -> Tensor:
    """Return the nearest rows [k, n] that are not negative and sum to 1 (Duchi et al., ICML 2008)."""
    ordered = x.sort(1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, x.shape[1] + 1)
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (x - excess.gather(1, last)).clamp(min=0)
