"""Control: the base model, asked for the same without the concept. No method can know as much.

It is handed what every prompt asks for. Where it scores less than 1, the judge errs or the base model draws the concept
unasked; where a start image still shows the concept, its strength is too low for anything to change that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from neuraleraser.errors import ConceptError
from neuraleraser.evaluation.protocol import FRAGMENTS, LEARNED, Cell
from neuraleraser.methods.changed_prompts import PromptControl
from neuraleraser.methods.conditional import method_key
from neuraleraser.vocabulary import Vocabulary


@dataclass(frozen=True, eq=False)
class Oracle(PromptControl):
    """The base model, with each prompt replaced by that for the same without the concept.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        instead: Prompts that bring the concept, each with what stands in its place.

    Examples:
        >>> method = Oracle("Van_Gogh", "style", {"a cat in Van Gogh style": "a cat"})
        >>> with method.applied(pipe):
        ...     plain = generate(pipe, ["a cat in Van Gogh style"], [0], quick)
        >>> np.array_equal(plain, generate(pipe, ["a cat"], [0], quick))
        True
    """

    concept: str
    kind: str
    instead: Mapping[str, str]
    name: str = "oracle"
    made_with: None = None

    @property
    def key(self) -> str:
        """Digest of the prompts."""
        return method_key(sorted(self.instead.items()))

    def __call__(self, prompt: str) -> str:
        """Return the prompt without the concept.

        Args:
            prompt: The prompt.

        Returns:
            What stands in its place; the prompt itself where it does not bring the concept.
        """
        return self.instead.get(prompt, prompt)

    @classmethod
    def of(cls, vocabulary: Vocabulary, concept: str, cells: Sequence[Cell]) -> Oracle:
        """Return the oracle of a concept of a vocabulary.

        Args:
            vocabulary: The vocabulary.
            concept: Name of the concept in it.
            cells: The cells of its evaluation, `EvaluationProtocol.cells[concept]`.

        Returns:
            The oracle. A start image or an inverted latent of the concept is drawn with a prompt that asks for a plain
            picture, or an empty scene, in so many words.

        Raises:
            ConceptError: The vocabulary does not have the name.

        Examples:
            >>> from neuraleraser.canvas.words import VOCABULARY
            >>> cell = Cell("a cat as a Van Gogh painting", 10_000, "Van_Gogh", ("Cats",), "grid")
            >>> Oracle.of(VOCABULARY, "Van_Gogh", [cell]).instead
            {'a cat as a Van Gogh painting': 'a picture of a cat'}
        """
        if concept not in vocabulary:
            raise ConceptError(f"the {vocabulary.name} has no concept {concept!r}: pass one of its styles or objects")
        kind = "style" if concept in vocabulary.styles else "object"
        brings = [c for c in cells if c.asks_for(concept) or c.group in (FRAGMENTS, LEARNED) or _shows(c, concept)]
        return cls(concept, kind, {c.prompt: _without(vocabulary, concept, c) for c in brings})


def _shows(cell: Cell, concept: str) -> bool:
    """Tell whether a cell starts from a picture of the concept."""
    return cell.start is not None and concept in cell.start.shows


def _without(v: Vocabulary, concept: str, cell: Cell) -> str:
    """Return the prompt for what a cell asks for beside the concept."""
    objects = tuple(name for name in cell.objects if name != concept)
    style = v.plain if cell.style in ("", concept) else cell.style
    if cell.start is None:
        return v.fresh_prompt(objects, style) if objects or style != v.plain else v.empty_phrases[0]
    if style != v.plain:
        return v.prompt(objects, style)
    plain = v.style_phrases[v.plain][0]
    if concept in v.objects:
        return v.prompt(objects, style)
    return f"{v.prompt(objects, style)} {plain}" if objects else plain
