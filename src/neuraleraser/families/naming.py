"""Concepts of a pipeline from words: of its family's vocabulary where that is known, else from the phrase alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuraleraser.concepts import Concept, file_concept, phrase_concept, vocabulary_concept
from neuraleraser.errors import ConceptError
from neuraleraser.families import family_of


def concept_of(pipe: Any, phrase: str, kind: str | None = None) -> Concept:
    """Return what `phrase` means on `pipe`: a concept of its vocabulary, a JSON file of prompts, or the phrase in
    templates.

    Raises ConceptError; where the vocabulary is known it names the concepts that sound alike.
    """
    if not phrase.strip():
        raise ConceptError("the concept is an empty phrase: say what to erase, such as 'Van Gogh style' or 'a cat'")
    if phrase.endswith(".json"):
        return file_concept(Path(phrase))
    return named_concept(pipe, phrase, kind)


def named_concept(pipe: Any, phrase: str, kind: str | None = None) -> Concept:
    """Return the concept of `phrase` on `pipe` as `concept_of` does, but open no file of that name: for names that come
    out of files."""
    vocabulary = family_of(pipe).vocabulary
    if vocabulary is None:
        return phrase_concept(phrase, kind)
    name = vocabulary.resolve(phrase)
    if name is None:
        near = vocabulary.similar_to(phrase)
        known = ", ".join((*vocabulary.styles, *vocabulary.objects))
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It knows {known}."
        raise ConceptError(f"the {vocabulary.name} has no concept {phrase!r}. {hint}")
    return vocabulary_concept(vocabulary, name)


def neighbours_of(pipe: Any, concept: Concept, named: Sequence[str | Concept] = ()) -> list[Concept]:
    """Return what `concept` could be mistaken for: the concepts that are `named`, by phrases or as they are, or else
    all others of its kind in the pipeline's vocabulary; [] where that is not known."""
    vocabulary = family_of(pipe).vocabulary
    if named or vocabulary is None:
        kind = concept.kind if concept.kind != "other" else None
        return [n if isinstance(n, Concept) else concept_of(pipe, n, kind) for n in named]
    names = vocabulary.styles if concept.kind == "style" else vocabulary.objects
    return [vocabulary_concept(vocabulary, name) for name in names if name not in (concept.name, vocabulary.plain)]
