"""Prompts to draw activations from, and what they show: lines of a text file, or captions of a family's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io.names import prompt_error
from neuraleraser.io.reading import read_bytes
from neuraleraser.vocabulary import labelled_prompts

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 2**28
"""Bytes of a file of prompts, at most."""

Lines = list[tuple[str, tuple[str, ...]]]
"""Prompts, each with the names of what it shows."""


@dataclass(frozen=True, eq=False)
class LabelledPrompts:
    """Prompts and what they show.

    texts: the prompts. names: the names of all that they show. labels: uint8 [prompts, names], 1 where a prompt shows
    it; None where no prompt says what it shows.
    """

    texts: tuple[str, ...]
    names: tuple[str, ...] = ()
    labels: Tensor | None = None


def read_prompts(path: str | Path) -> Lines:
    """Read a text file of prompts: one per line, after a tab the names of what it shows, separated by commas.

    Args:
        path: The file.

    Returns:
        Each prompt with those names, a tuple that may be empty; blank lines are left out.

    Raises:
        FileError: There are no prompts, one cannot be used, or the file is no text.

    Examples:
        >>> _ = Path("prompts.txt").write_text("a cat on a table\\tcat\\na dog beside a cat\\tdog,cat\\n")
        >>> read_prompts("prompts.txt")
        [('a cat on a table', ('cat',)), ('a dog beside a cat', ('dog', 'cat'))]
    """
    try:
        lines = read_bytes(path, MAX_BYTES).decode("utf-8").splitlines()
    except (FileError, UnicodeDecodeError) as error:
        raise FileError(
            f"the prompts {str(path)!r} cannot be read ({error}): pass a text file, one per line"
        ) from error
    found = []
    for line in lines:
        prompt, _, names = line.partition("\t")
        if error := prompt_error(prompt):
            raise FileError(f"the prompts {str(path)!r} cannot be used, as {error}: change it")
        if prompt.strip():
            found.append((prompt.strip(), tuple(name.strip() for name in names.split(",") if name.strip())))
    if not found:
        raise FileError(f"{str(path)!r} holds no prompts: write one per line")
    return found


def label_prompts(lines: Sequence[tuple[str, Sequence[str]]]) -> LabelledPrompts:
    """Return prompts, each given with the names of what it shows, with one label for each name."""
    import torch  # not at the top: a command line reads prompts before it needs torch

    texts = tuple(prompt for prompt, _ in lines)
    names = tuple(sorted({name for _, shown in lines for name in shown}))
    if not names:
        return LabelledPrompts(texts)
    labels = torch.tensor([[name in shown for name in names] for _, shown in lines], dtype=torch.uint8)
    return LabelledPrompts(texts, names, labels)


def default_prompts(pipe: Any, count: int) -> LabelledPrompts:
    """Return `count` captions of the vocabulary of the pipeline's family.

    Raises SettingsError for a pipeline whose family has none.
    """
    from neuraleraser.families import family_of  # with torch, too

    vocabulary = family_of(pipe).vocabulary
    if vocabulary is None:
        raise SettingsError(f"no vocabulary is known of this {type(pipe).__name__}: pass prompts, with --prompts FILE")
    drawn = labelled_prompts(vocabulary, count, 1)
    return label_prompts([(prompt, sorted(shown - {vocabulary.plain})) for prompt, shown in drawn])
