"""Prompts for the verbs that draw, and what they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io.names import prompt_error
from neuraleraser.io.reading import read_bytes

MAX_BYTES = 2**28
"""Bytes of a file of prompts, at most."""

Lines = list[tuple[str, tuple[str, ...]]]


def read_prompts(path: Path) -> Lines:
    """The lines of a text file that are not blank: (prompt, the names after a tab, separated by commas). Raises
    FileError if there are none."""
    try:
        lines = read_bytes(path, MAX_BYTES).decode("utf-8").splitlines()
    except (FileError, UnicodeDecodeError) as error:
        raise FileError(f"the prompts {str(path)!r} cannot be read ({error}): pass a text file, one a line") from error
    found = []
    for line in lines:
        prompt, _, names = line.partition("\t")
        if error := prompt_error(prompt):
            raise FileError(f"the prompts {str(path)!r} cannot be used, as {error}: change it")
        if prompt.strip():
            found.append((prompt.strip(), tuple(name.strip() for name in names.split(",") if name.strip())))
    if not found:
        raise FileError(f"{str(path)!r} holds no prompts: write one a line")
    return found


def prompts_of(pipe: Any, model: str, lines: Lines | None, count: int) -> tuple[list[str], Any, list[str]]:
    """(prompts, labels [prompts, C] of 0 and 1 or None, the C names): of a file's lines, or else `count` prompts of
    the family's vocabulary. Raises SettingsError for another pipeline without a file."""
    import torch

    from neuraleraser.families import family_of
    from neuraleraser.fitting.reference import labelled_prompts

    if lines is None:
        vocabulary = family_of(pipe).vocabulary
        if vocabulary is None:
            raise SettingsError(f"{model!r} is not the canvas, so its prompts are unknown here: pass --prompts FILE")
        drawn = labelled_prompts(vocabulary, count, 1)
        lines = [(prompt, tuple(sorted(shown - {vocabulary.plain}))) for prompt, shown in drawn]
    texts = [prompt for prompt, _ in lines]
    names = sorted({name for _, shown in lines for name in shown})
    if not names:
        return texts, None, []
    return texts, torch.tensor([[name in shown for name in names] for _, shown in lines], dtype=torch.uint8), names
