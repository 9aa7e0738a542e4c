"""Prompts that fill the text encoder: the concept behind many other words, where its evidence is weakest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neuraleraser.concepts import Pair
from neuraleraser.fit.states import replayed
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, EditContext, Site, record, replay

_LONGEST = 1000
"""Tokens from which on a text encoder is not filled: T5's 512 and more are never full of words."""


def fill(tokenizer: Any, before: str, prompt: str) -> str:
    """Return `prompt` behind as many repetitions of `before` as the tokenizer's length holds."""
    limit = getattr(tokenizer, "model_max_length", _LONGEST)
    if limit >= _LONGEST:
        return prompt
    text = prompt
    while len(tokenizer(longer := f"{before}, {text}").input_ids) <= limit:
        text = longer
    return text


def filled_activations(
    pipe: Any,
    site: Site,
    measure: Callable[[Tensor], Tensor],
    pairs: Sequence[Pair],
    states: Sequence[DenoiserCall],
    seeds: Sequence[int],
    sampling: Sampling,
) -> tuple[Tensor, Tensor] | None:
    """Measure activations x [B, P, d] -> [B, ...] at `site` for filled prompts, at `states` drawn without the concept.

    Returns (with the concept, without it), each [N, T, ...] over the pairs and the states; None for a pipeline whose
    prompts cannot be filled. The concept stands at the end, behind its matched prompt.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or getattr(tokenizer, "model_max_length", _LONGEST) >= _LONGEST:
        return None
    found: list[Tensor] = []
    for last in ([p.shows for p in pairs], [p.without for p in pairs]):
        texts = [fill(tokenizer, p.without, text) for p, text in zip(pairs, last, strict=True)]
        one_step = replace(sampling, steps=1)
        conditioning = replayed(pipe, texts, seeds, one_step, site, lambda x: x.new_zeros(len(x)))[0][0].conditioning
        found.append(_replayed_with(pipe, site, measure, states, conditioning))
    return found[0], found[1]


@torch.no_grad()
def _replayed_with(
    pipe: Any,
    site: Site,
    measure: Callable[[Tensor], Tensor],
    states: Sequence[DenoiserCall],
    conditioning: Mapping[str, Any],
) -> Tensor:
    """Return what is measured [N, T, ...] where the denoiser reads `conditioning` at these states."""
    seen: list[Tensor] = []

    def note(_: Site, x: Tensor, context: EditContext[None]) -> None:
        seen.append(measure(x))

    with record(pipe, [site], note):
        for call in states:
            replay(pipe, call.state, call.timestep, conditioning)
    return torch.stack(seen, 1)
