"""Prompts with another encoding than their own: the route of `pipe(prompt_embeds=...)`, for `generate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neuraleraser.attacks.denoising import check_one_encoder
from neuraleraser.errors import SettingsError


@contextmanager
def encoded_prompts(pipe: Any, encodings: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: these prompts are encoded as these embeddings, whatever the text encoder makes of them.

    The encoder's own output is replaced, so a method that filters prompts sees the prompt, and one that edits encodings
    edits these. Enter it before the method.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        encodings: Embeddings of each prompt [1, n, d], as `pipe.encode_prompt` gives them; read at each call.

    Returns:
        The context.

    Raises:
        SettingsError: The pipeline has several text encoders or none, or embeddings have another shape.

    Examples:
        >>> embeddings = torch.zeros(1, 24, 128)
        >>> with encoded_prompts(pipe, {"a cat": embeddings}):
        ...     drawn = generate(pipe, ["a cat"], [0], quick)
        >>> drawn.shape
        (1, 64, 64, 3)
    """
    check_one_encoder(pipe)
    rows = {prompt: _ids(pipe, prompt) for prompt in encodings}
    shape = [1, pipe.tokenizer.model_max_length, int(pipe.text_encoder.config.hidden_size)]
    for prompt, x in encodings.items():
        if list(x.shape) != shape:
            raise SettingsError(f"the embeddings of {prompt!r} are {list(x.shape)}: pass {shape}")

    def put(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ids = args[0] if args else kwargs["input_ids"]
        states = output[0]
        for prompt, own in rows.items():
            here = (ids == own.to(ids.device)).all(1)
            states = torch.where(here[:, None, None], encodings[prompt].to(states), states)
        if isinstance(output, tuple):
            return (states, *output[1:])
        return type(output)(**{**output, "last_hidden_state": states})

    handle = pipe.text_encoder.register_forward_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _ids(pipe: Any, prompt: str) -> Tensor:
    """Return a prompt's tokens [1, n], as pipelines make them."""
    length = pipe.tokenizer.model_max_length
    return pipe.tokenizer(
        prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
