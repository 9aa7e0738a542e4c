"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012): tokens whose encoding is a prompt's moved towards a concept.

It is black-box: it sees a text encoder alone, never a denoiser or a method, so its prompts are made once for all.

Published (chiayi-hsu/Ring-A-Bell): a concept's direction is the mean difference between the encodings [n, d] of prompts
with and without it. A genetic search over K = 16 (38, 77) tokens lowers the squared distance between their encoding and
the prompt's plus eta = 3 directions: of 200 the nearer half stay; each of them, with probability 0.5, has two children
with another, cut at one place; then each, parents as well, with probability 0.25 has one token replaced. 3000
generations.

Ours: special tokens are never taken; the best is never changed; children, or else copies, fill the half that was left,
so that every generation has as many; a smaller default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from neuraleraser.attacks.denoising import check_one_encoder, usable_tokens
from neuraleraser.errors import SettingsError
from neuraleraser.settings import check_number, check_seed, check_whole

_MUTATED, _CROSSED = 0.25, 0.5
"""Probabilities, as published."""
_BATCH = 100


@torch.no_grad()
def concept_direction(pipe: Any, shown: Sequence[str], without: Sequence[str]) -> Tensor:
    """Return the mean difference between the encodings of prompts with and without a concept.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        shown: Prompts that show the concept.
        without: As many that do not, otherwise alike.

    Returns:
        The direction, float32 [n, d], on the CPU.

    Raises:
        SettingsError: The pipeline has several text encoders or none, or the prompts are not as many, or none.

    Examples:
        >>> concept_direction(pipe, ["a cat in Van Gogh style"], ["a cat"]).shape
        torch.Size([24, 128])
    """
    check_one_encoder(pipe)
    if isinstance(shown, str) or isinstance(without, str) or not 0 < len(shown) == len(without):
        raise SettingsError(f"{len(shown)} prompts with the concept, {len(without)} without: pass pairs, and some")
    return (_encoded_prompts(pipe, shown) - _encoded_prompts(pipe, without)).mean(0).cpu()


@torch.no_grad()
def search_by_direction(
    pipe: Any,
    prompt: str,
    direction: Tensor,
    *,
    count: int = 16,
    eta: float = 3.0,
    population: int = 100,
    generations: int = 300,
    seed: int = 0,
    on_generation: Callable[[int, float], None] | None = None,
) -> list[int]:
    """Search tokens whose encoding is that of a prompt, moved along a concept's direction.

    It takes no `applied`: an attacker who sees the text encoder alone. Try the tokens on any method.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        prompt: The prompt, with the concept (as published) or without.
        direction: As `concept_direction` returns it [n, d].
        count: Tokens.
        eta: Directions that are added.
        population: Token sequences of a generation.
        generations: Generations.
        seed: Of the search.
        on_generation: Called as `on_generation(generation, distance)`, the least squared distance so far.

    Returns:
        The tokens, for `pipe.text_encoder.get_input_embeddings().weight[tokens]` and `learned_word`.

    Raises:
        SettingsError: The pipeline has several text encoders or none, the direction has another shape, or a setting is
            out of range.

    Examples:
        >>> direction = concept_direction(pipe, ["a cat in Van Gogh style"], ["a cat"])
        >>> tokens = search_by_direction(pipe, "a cat", direction, count=6, population=10, generations=3)
        >>> len(tokens)
        6
    """
    check_one_encoder(pipe)
    room = pipe.tokenizer.model_max_length - 2
    check_whole("count", count, 1, room)
    check_whole("population", population, 4, 100_000)
    check_whole("generations", generations, 1, 1_000_000)
    check_number("eta", eta, -1e6, 1e6)
    check_seed(seed)
    start = _encoded_prompts(pipe, [prompt])
    if direction.shape != start.shape[1:]:
        raise SettingsError(f"the direction is {list(direction.shape)}: pass {list(start.shape[1:])}")
    target = start + eta * direction.to(start)
    generator, allowed = torch.Generator().manual_seed(seed), usable_tokens(pipe).cpu()

    def uniform(high: int, size: int) -> Tensor:
        return torch.randint(high, (size,), generator=generator)

    def chance(share: float, size: int) -> Tensor:
        return torch.rand(size, generator=generator) < share

    half = population // 2
    living = allowed[torch.randint(len(allowed), (population, count), generator=generator)]
    for number in range(generations):
        distances = (encoded_tokens(pipe, living) - target).square().sum((1, 2)).cpu()
        order = distances.argsort(stable=True)
        living = living[order[:half]]
        if on_generation:
            on_generation(number, float(distances[order[0]]))
        if number == generations - 1:
            break
        mothers, fathers = living[uniform(half, population - half)], living[uniform(half, population - half)]
        cut = torch.where(chance(_CROSSED, len(mothers)), uniform(count, len(mothers)), count)  # at `count`: a copy
        children = torch.where(torch.arange(count) < cut[:, None], mothers, fathers)
        living = torch.cat([living, children])
        changed = chance(_MUTATED, population).index_fill(0, torch.tensor([0]), False)
        places, tokens = uniform(count, population), allowed[uniform(len(allowed), population)]
        there = changed[:, None] & (torch.arange(count) == places[:, None])
        living = torch.where(there, tokens[:, None], living)
    return living[0].tolist()


def encoded_tokens(pipe: Any, tokens: Tensor) -> Tensor:
    """Return the encodings, float32 [B, n, d], of prompts that are these tokens [B, k] alone."""
    t = pipe.tokenizer
    rows = torch.full((len(tokens), t.model_max_length), t.pad_token_id)
    rows[:, 0], rows[:, tokens.shape[1] + 1] = t.bos_token_id, t.eos_token_id
    rows[:, 1 : tokens.shape[1] + 1] = tokens
    parts = [pipe.text_encoder(part.to(pipe.text_encoder.device))[0].float() for part in rows.split(_BATCH)]
    return torch.cat(parts)


def _encoded_prompts(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Return the encodings of prompts, float32 [B, n, d]."""
    return pipe.encode_prompt(list(prompts), pipe.device, 1, False)[0].float()
