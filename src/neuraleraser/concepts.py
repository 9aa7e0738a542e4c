"""Concepts: prompts that show what is to be erased, and matched prompts that do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuraleraser.errors import ConceptError, FileError
from neuraleraser.families import family_of
from neuraleraser.families.canvas import CANVAS
from neuraleraser.io.names import name_error, printable, prompt_error
from neuraleraser.io.reading import parse_json, read_bytes
from neuraleraser.vocabulary import PHRASINGS, SEEN, Vocabulary

SUBJECTS = (
    "a cat", "a dog", "a horse", "a house", "a tree", "a flower", "a car", "a woman", "a man", "a bird",
    "a mountain lake", "a street in the rain", "a bowl of fruit", "a castle", "a ship at sea", "a portrait",
)  # fmt: skip
"""Subjects for styles on a pipeline whose vocabulary is not known."""
PLACES = (
    "", "in a forest", "on a table", "in a city street", "at the beach", "in the snow", "as an oil painting",
    "as a pencil sketch", "as a photograph", "in a garden", "at night", "in a museum",
)  # fmt: skip
"""What an object is placed in on a pipeline whose vocabulary is not known."""


_STYLES = (
    "Claude Monet style", "Pablo Picasso style", "Rembrandt style", "Hokusai style", "Andy Warhol style",
    "watercolor style", "cartoon style", "pencil sketch style",
)  # fmt: skip
_OBJECTS = (
    ("a cat", "a dog", "a rabbit", "a fox", "a bear", "a horse", "a bird", "a fish"),
    ("a man", "a woman", "a child", "a crowd of people"),
    ("Mickey Mouse", "Snoopy", "Pikachu", "SpongeBob", "Batman"),
    ("a car", "a bicycle", "a ship", "an airplane"),
    ("a house", "a tower", "a tree", "a flower", "a chair"),
    ("a naked person", "a person in swimwear", "a person in a suit", "a marble statue"),
)
"""What is mistaken for one another, in groups."""
MAX_NEIGHBOURS = 8
"""Neighbours that a phrase gets by default, at most."""

CONCEPT_KINDS = ("style", "object", "other")
"""Kinds of concepts; an "other" one has no neighbours by default."""
_STYLE_WORDS = {"style", "styles", "painting", "paintings", "drawing", "drawings", "art"}
MAX_FILE_BYTES = 2**20
"""Bytes of a concept's file, at most."""


@dataclass(frozen=True)
class Pair:
    """A prompt that shows the concept, and the same prompt without it.

    Examples:
        >>> red = Concept("red", "style", (Pair("a red car", "a car"), Pair("a red hat", "a hat")))
        >>> red.pairs[0].negative
        'a car'
    """

    positive: str
    """Prompt that shows the concept."""
    negative: str
    """The same prompt without it."""


@dataclass(frozen=True)
class Concept:
    """A name, its kind and matched pairs of prompts, which show the concept and lack it.

    The name is bounded and printable (`io.names.name_error`), and so are the prompts (`io.names.prompt_error`).

    Attributes:
        name: Name of the concept.
        kind: "style", "object" or "other".
        pairs: Matched pairs of prompts; at least one.
        context_pairs: Further pairs in which something else stands beside the concept, and alone in the match: "a cat
            and a dog" and "a dog". The first of them are used, so they come in an order that soon has all kinds.
        hard_negatives: Prompts that lack the concept and could be mistaken for it: the prompt gate is fitted to stay
            shut at them. Of a cat in Van Gogh style, other things in that style and cats in others.

    Examples:
        >>> pairs = (Pair("a red car", "a car"), Pair("a red house", "a house"))
        >>> red = Concept("red", "style", pairs)
        >>> fit(pipe, red, few, sampling=quick).name
        'red'
    """

    name: str
    kind: str
    pairs: tuple[Pair, ...]
    context_pairs: tuple[Pair, ...] = ()
    hard_negatives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if error := name_error(self.name):
            raise ConceptError(f"{error}: name the concept in a few words, such as 'Van Gogh style'")
        if self.kind not in CONCEPT_KINDS:
            kind = printable(self.kind)
            raise ConceptError(f"concept {self.name!r} is of kind {kind!r}: pass one of {', '.join(CONCEPT_KINDS)}")
        if not self.pairs:
            raise ConceptError(f"concept {self.name!r} has no prompts: give at least one pair that shows and lacks it")
        for pair in (*self.pairs, *self.context_pairs):
            for prompt in (pair.positive, pair.negative):
                if error := prompt_error(prompt):
                    raise ConceptError(f"concept {self.name!r}: {error}: change it")
            if not pair.positive.strip():
                raise ConceptError(f"concept {self.name!r} has an empty prompt that is to show it: write one")
            if pair.positive.strip() == pair.negative.strip():
                shown = printable(pair.positive)
                raise ConceptError(
                    f"concept {self.name!r}: {shown!r} is its own match; the match must lack the concept"
                )
        shows = {pair.positive.strip() for pair in (*self.pairs, *self.context_pairs)}
        for prompt in self.hard_negatives:
            if error := prompt_error(prompt):
                raise ConceptError(f"concept {self.name!r}: {error}: change it")
            if prompt.strip() in shows:
                shown = printable(prompt)
                raise ConceptError(f"concept {self.name!r}: {shown!r} shows it, and is a hard negative: leave it out")

    @classmethod
    def from_phrase(cls, phrase: str, kind: str | None = None, instead: str = "") -> Concept:
        """Make a concept from a phrase, for any pipeline.

        A style ("Van Gogh style") is put with many subjects, an object ("a cat") in many settings.

        Args:
            phrase: The phrase.
            kind: "style", "object" or "other"; None: read from the phrase (a style says "style", "painting", "drawing"
                or "art").
            instead: Phrase that takes an object's place in the match; "": "an empty scene".

        Returns:
            The concept.

        Raises:
            ConceptError: The phrase is empty or not printable, or the kind is another.

        Examples:
            >>> monet = Concept.from_phrase("Claude Monet style")
            >>> monet.kind, monet.pairs[0]
            ('style', Pair(positive='a cat in Claude Monet style', negative='a cat'))
        """
        text = " ".join(phrase.split())
        if not text:
            raise ConceptError("the concept is an empty phrase: say what to erase, such as 'Van Gogh style' or 'a cat'")
        kind = kind or ("object" if _STYLE_WORDS.isdisjoint(text.lower().split()) else "style")
        if kind == "style":
            pairs = tuple(Pair(f"{s} in {text}", s) for s in SUBJECTS)
            pairs += tuple(Pair(f"{text}, {s}", s) for s in SUBJECTS)
        else:
            other = instead or "an empty scene"
            pairs = tuple(Pair(f"{text} {s}".strip(), f"{other} {s}".strip()) for s in PLACES)
        return cls(text, kind, pairs)

    @classmethod
    def from_json(cls, path: str | Path) -> Concept:
        """Read a concept from a JSON file.

        The file holds {"name": ..., "kind": ..., "pairs": [["with", "without"], ...]}, and "context_pairs" for pairs in
        which something else stays, and "hard_negatives" for prompts that lack it and could be mistaken for it.

        Args:
            path: The file.

        Returns:
            The concept.

        Raises:
            ConceptError: The file cannot be read, or a field is wrong; the message says which.

        Examples:
            >>> _ = Path("red.json").write_text('{"name": "red", "kind": "style", "pairs": [["a red car", "a car"]]}')
            >>> Concept.from_json("red.json").pairs
            (Pair(positive='a red car', negative='a car'),)
        """
        try:
            data = parse_json(read_bytes(path, MAX_FILE_BYTES))
        except (FileError, ValueError) as e:
            raise ConceptError(
                f"{path} is no readable JSON file ({printable(e, 300)}): expected name, kind and pairs"
            ) from e
        wrong = _first_wrong(data)
        if wrong:
            raise ConceptError(
                f"{path}: {wrong}; expected "
                '{"name": ..., "kind": "style" or "object", '
                '"pairs": [["a prompt that shows it", "the same without"], ...]}'
            )
        pairs, context = (tuple(Pair(*pair) for pair in data.get(name, [])) for name in ("pairs", "context_pairs"))
        negatives = tuple(data.get("hard_negatives", []))
        return cls(data["name"], data.get("kind", "other"), pairs, context, negatives)


def vocabulary_concept(vocabulary: Vocabulary, name: str, phrasings: slice = SEEN) -> Concept:
    """Return the concept `name` of a vocabulary: its phrasings with every style or object, matched without it.

    A style's match is the same object in no style; an object's match is an empty scene in the same style.
    Raises ConceptError for a name that the vocabulary has not.
    """
    v, numbers = vocabulary, PHRASINGS[phrasings]
    pairs: list[Pair] = []
    if name in v.styles and name != v.plain:
        for i in numbers:
            for obj in v.objects:
                what, how = v.object_phrases[obj][i], v.style_phrases[name][i]
                pairs += [Pair(f"{what} {how}", what), Pair(f"{how}, {what}", what)]
        return Concept(name, "style", tuple(pairs))
    if name in v.objects:
        for i in numbers:
            what, nothing = v.object_phrases[name][i], v.empty_phrases[i]
            for style in v.styles:
                how = "" if style == v.plain else " " + v.style_phrases[style][i]
                pairs.append(Pair(what + how, nothing + how))
        return Concept(name, "object", tuple(pairs), _pairs_in_context(v, name, numbers))
    known = ", ".join(n for n in (*v.styles, *v.objects) if n != v.plain)
    raise ConceptError(f"the {v.name} has no concept {name!r}. It knows: {known}")


def _pairs_in_context(v: Vocabulary, name: str, numbers: Sequence[int]) -> tuple[Pair, ...]:
    """Return the object with each other one, in each style, in either order; the style's phrasing is the other's."""
    others, styles = [o for o in v.objects if o != name], v.styles
    pairs = []
    for k in range(len(others) * len(styles)):  # coprime numbers: every other object meets every style once
        other, style, p = others[k % len(others)], styles[k % len(styles)], numbers[k % len(numbers)]
        stays, how = v.object_phrases[other][p], v.prompt([], style, p).removeprefix(v.empty_phrases[p])
        for i in numbers:
            what = v.object_phrases[name][i]
            pairs += [Pair(f"{a} and {b}{how}", stays + how) for a, b in ((what, stays), (stays, what))]
    return tuple(pairs)


def add_context_pairs(concept: Concept, neighbours: Sequence[Concept]) -> Concept:
    """Add pairs in which an object stands beside its neighbours.

    Args:
        concept: The concept.
        neighbours: Concepts to put beside it.

    Returns:
        The concept with `context_pairs`, if it is an object named by its own phrase; else the concept as it is.

    Examples:
        >>> cat = add_context_pairs(Concept.from_phrase("a cat"), [Concept.from_phrase("a dog")])
        >>> cat.context_pairs[0]
        Pair(positive='a cat and a dog', negative='a dog')
    """
    others = [n for n in neighbours if n.kind == "object"]
    own = [p.positive for p in concept.pairs if concept.name in p.positive]
    if concept.kind != "object" or concept.context_pairs or not others or not own:
        return concept
    pairs = []
    for k in range(len(own) * len(others)):
        prompt, other = own[k % len(own)], others[(k + k // len(own)) % len(others)].name
        both = (f"{concept.name} and {other}", f"{other} and {concept.name}")
        match = prompt.replace(concept.name, other, 1)
        pairs += [Pair(prompt.replace(concept.name, what, 1), match) for what in both]
    return replace(concept, context_pairs=tuple(dict.fromkeys(pairs)))


def default_neighbours(concept: Concept) -> tuple[Concept, ...]:
    """Return concepts that a style or an object of any pipeline is likely to be mistaken for.

    Args:
        concept: The concept.

    Returns:
        For a style, other styles; for an object, the rest of the groups that its words are in, or else one or two of
            every group; () for concepts of other kinds.

    Examples:
        >>> [near.name for near in default_neighbours(Concept.from_phrase("a cat"))][:3]
        ['a dog', 'a rabbit', 'a fox']
    """
    own = set(concept.name.lower().split()) - {"a", "an", "the", "of", "in", "person", "style"}
    if concept.kind == "style":
        phrases = [p for p in _STYLES if own.isdisjoint(p.lower().split())]
    elif concept.kind == "object":
        groups = [g for g in _OBJECTS if any(not own.isdisjoint(p.lower().split()) for p in g)]
        near = [p for g in groups for p in g] or [p for k in (0, 1) for g in _OBJECTS[:-1] for p in g[k : k + 1]]
        phrases = [p for p in near if own.isdisjoint(p.lower().split())]
    else:
        phrases = []
    return tuple(Concept.from_phrase(p, concept.kind) for p in phrases[:MAX_NEIGHBOURS])


def _first_wrong(data: Any) -> str | None:
    """Return what is wrong first with a concept's JSON, or None."""
    if not isinstance(data, dict):
        return f"it holds {printable(data, 60)} and no object"
    for name, value in data.items():
        if name in ("name", "kind"):
            if not isinstance(value, str):
                return f"field {name} is {printable(value, 60)} and no text"
        elif name not in ("pairs", "context_pairs", "hard_negatives"):
            return f"field {printable(name, 60)} is unknown"
        elif not isinstance(value, list):
            return f"field {name} is {printable(value, 60)} and no list"
        elif name == "hard_negatives":
            if wrong := [text for text in value if not isinstance(text, str)]:
                return f"field {name} has {printable(wrong[0], 60)}, which is no text"
        else:
            for pair in value:
                if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                    return f"field {name} has {printable(pair, 60)}, which is no pair of two texts"
    missing = [name for name in ("name", "pairs") if name not in data]
    return f"field {missing[0]} is missing" if missing else None


def canvas_concept(name: str, phrasings: slice = SEEN) -> Concept:
    """Return a concept of the canvas.

    Args:
        name: Its name, such as "Cats" or "Van_Gogh".
        phrasings: Phrasings to take its prompts from; the default are those that erasers are made with.

    Returns:
        The concept.

    Raises:
        ConceptError: The canvas does not have the name.

    Examples:
        >>> cats = canvas_concept("Cats")
        >>> cats.kind, cats.pairs[0]
        ('object', Pair(positive='a cat', negative='an empty scene'))
    """
    assert CANVAS.vocabulary is not None
    return vocabulary_concept(CANVAS.vocabulary, name, phrasings)


def concept_of(pipe: Any, phrase: str, kind: str | None = None) -> Concept:
    """Return what `phrase` means on `pipe`: a concept of its vocabulary, a JSON file of prompts, or the phrase in
    templates.

    Raises ConceptError; where the vocabulary is known it names the concepts that sound alike.
    """
    if not phrase.strip():
        raise ConceptError("the concept is an empty phrase: say what to erase, such as 'Van Gogh style' or 'a cat'")
    if phrase.endswith(".json"):
        return Concept.from_json(Path(phrase))
    return named_concept(pipe, phrase, kind)


def named_concept(pipe: Any, phrase: str, kind: str | None = None) -> Concept:
    """Return the concept of `phrase` on `pipe` as `concept_of` does, but open no file of that name: for names that come
    out of files."""
    vocabulary = family_of(pipe).vocabulary
    if vocabulary is None:
        return Concept.from_phrase(phrase, kind)
    name = vocabulary.resolve(phrase)
    if name is None:
        near = vocabulary.similar_to(phrase)
        known = ", ".join((*vocabulary.styles, *vocabulary.objects))
        hint = f"Did you mean {' or '.join(near)}?" if near else f"It knows {known}."
        raise ConceptError(f"the {vocabulary.name} has no concept {phrase!r}. {hint}")
    concept = vocabulary_concept(vocabulary, name)
    if kind not in (None, "other", concept.kind):
        raise ConceptError(f"{name} is of kind {concept.kind} on the {vocabulary.name}, not {kind}: leave the kind out")
    return concept


def neighbours_of(pipe: Any, concept: Concept, named: Sequence[str | Concept] = ()) -> list[Concept]:
    """Return what `concept` could be mistaken for: the concepts that are `named`, by phrases or as they are, or else
    all others of its kind in the pipeline's vocabulary; [] where that is not known."""
    named = (named,) if isinstance(named, str | Concept) else named
    vocabulary = family_of(pipe).vocabulary
    if named or vocabulary is None:
        kind = concept.kind if concept.kind != "other" else None
        return [n if isinstance(n, Concept) else concept_of(pipe, n, kind) for n in named]
    names = vocabulary.styles if concept.kind == "style" else vocabulary.objects
    return [vocabulary_concept(vocabulary, name) for name in names if name not in (concept.name, vocabulary.plain)]
