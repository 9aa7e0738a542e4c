"""Prompts that are changed before the untouched model sees them: shared by the controls that do so."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from neuraleraser.errors import SettingsError

_PROMPTS = ("prompt", "prompt_2", "prompt_3")
"""Arguments of `encode_prompt` that hold what is asked for, in all of diffusers' pipelines."""


@dataclass(frozen=True)
class PromptTrace:
    """Images, counted from 0 in the order of their prompts, whose prompt is changed."""

    fired: dict[int, list[str]] = field(default_factory=dict)


class PromptControl(ABC):
    """Method that changes prompts, and nothing else."""

    concept: str

    @abstractmethod
    def __call__(self, prompt: str) -> str:
        """Return the prompt as it is encoded."""

    def applied(self, pipe: Any) -> AbstractContextManager[PromptTrace]:
        """Change what `pipe.encode_prompt` is given.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields a trace of the prompts that were changed.

        Raises:
            SettingsError: The pipeline has no `encode_prompt`.
        """
        return changed_prompts(pipe, self.concept, self)

    def watched(self, pipe: Any) -> AbstractContextManager[PromptTrace]:
        """Note which prompts would be changed.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields a trace of the prompts that would be changed.

        Raises:
            SettingsError: The pipeline has no `encode_prompt`.
        """
        return changed_prompts(pipe, self.concept, self, act=False)


@contextmanager
def changed_prompts(
    pipe: Any, concept: str, change: Callable[[str], str], *, act: bool = True
) -> Iterator[PromptTrace]:
    """Context manager: prompts of `pipe` are changed before they are encoded, or, if it does not act, only noted.

    `encode_prompt` is shadowed on this one pipeline object; prompts given as embeddings never pass through it. Raises
    SettingsError where there is none.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise SettingsError(f"{type(pipe).__name__} has no encode_prompt, where a filter of prompts would stand")
    encode, before = pipe.encode_prompt, vars(pipe).get("encode_prompt")
    signature, trace, count = inspect.signature(encode), PromptTrace(), 0

    @functools.wraps(encode)  # which keeps the signature, so that filters can stand in a row
    def filtered(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        call = signature.bind(*args, **kwargs)
        given = {name: call.arguments[name] for name in _PROMPTS if call.arguments.get(name) is not None}
        first = [given["prompt"]] if isinstance(given.get("prompt"), str) else given.get("prompt", [])
        trace.fired.update({count + i: [concept] for i, text in enumerate(first) if change(text) != text})
        count += len(first)
        if act:
            cleaned = {
                name: change(value) if isinstance(value, str) else [change(text) for text in value]
                for name, value in given.items()
            }
            call.arguments.update(cleaned)
        return encode(*call.args, **call.kwargs)

    vars(pipe)["encode_prompt"] = filtered
    try:
        yield trace
    finally:
        if before is None:
            del vars(pipe)["encode_prompt"]
        else:
            vars(pipe)["encode_prompt"] = before
