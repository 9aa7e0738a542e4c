"""Concepts: what to erase, as prompts that show it and matched prompts that do not; and what features say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from neuraleraser.canvas import words
from neuraleraser.errors import ConceptError, FileError
from neuraleraser.io.names import name_error, printable, prompt_error
from neuraleraser.io.reading import parse_json, read_bytes

SUBJECTS = (
    "a cat", "a dog", "a horse", "a house", "a tree", "a flower", "a car", "a woman", "a man", "a bird",
    "a mountain lake", "a street in the rain", "a bowl of fruit", "a castle", "a ship at sea", "a portrait",
)  # fmt: skip
"""Subjects for styles on a pipeline whose vocabulary is not known."""
SETTINGS = (
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
MOST_NEIGHBOURS = 8

KINDS = ("style", "object", "other")
_STYLE_WORDS = {"style", "styles", "painting", "paintings", "drawing", "drawings", "art"}
MAX_FILE = 2**20
"""Bytes of a concept's file, at most."""


@dataclass(frozen=True)
class Pair:
    """A prompt that shows the concept, and the same prompt without it."""

    shows: str
    without: str


@dataclass(frozen=True)
class Concept:
    """A name, its kind ("style", "object" or "other") and matched pairs of prompts.

    The name is bounded and printable (`io.names.name_error`), and so are the prompts (`io.names.prompt_error`).

    `beside` are further pairs in which something else stands beside the concept, and alone in the match: "a cat and a
    dog" and "a dog". The first of them are used, so they come in an order that soon has all kinds.
    """

    name: str
    kind: str
    pairs: tuple[Pair, ...]
    beside: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if error := name_error(self.name):
            raise ConceptError(f"{error}: name the concept in a few words, such as 'Van Gogh style'")
        if self.kind not in KINDS:
            kind = printable(self.kind)
            raise ConceptError(f"concept {self.name!r} is of kind {kind!r}: pass one of {', '.join(KINDS)}")
        if not self.pairs:
            raise ConceptError(f"concept {self.name!r} has no prompts: give at least one pair that shows and lacks it")
        for pair in (*self.pairs, *self.beside):
            for prompt in (pair.shows, pair.without):
                if error := prompt_error(prompt):
                    raise ConceptError(f"concept {self.name!r}: {error}: change it")
            if not pair.shows.strip():
                raise ConceptError(f"concept {self.name!r} has an empty prompt that is to show it: write one")
            if pair.shows.strip() == pair.without.strip():
                shown = printable(pair.shows)
                raise ConceptError(
                    f"concept {self.name!r}: {shown!r} is its own match; the match must lack the concept"
                )


def resolve(phrase: str) -> str | None:
    """The canvas's own name for a phrase ("Van Gogh style", "cat", "Fire"), or None."""
    text = " ".join(phrase.replace("_", " ").lower().split())
    bare = text.removesuffix(" style").removeprefix("the ").removeprefix("a ").removeprefix("an ")
    if bare in words.ALIASES:
        return words.ALIASES[bare]
    for name in (*words.STYLES, *words.OBJECTS):
        if bare == name.replace("_", " ").lower():
            return name
    for name, phrases in (words.OBJECT_PHRASES | words.STYLE_PHRASES).items():
        if text in {p.lower() for p in phrases} or bare in {p.lower().split(" ", 1)[-1] for p in phrases}:
            return name
    return None


def canvas_concept(name: str, phrasings: slice = words.SEEN) -> Concept:
    """The concept `name` of the canvas: its phrasings with every style or object, matched without it.

    A style's match is the same object in no style; an object's match is an empty scene in the same style.
    Raises ConceptError for a name the canvas has not.
    """
    which = range(4)[phrasings]
    pairs: list[Pair] = []
    if name in words.STYLES and name != words.PLAIN:
        for i in which:
            for obj in words.OBJECTS:
                what = words.OBJECT_PHRASES[obj][i]
                how = words.STYLE_PHRASES[name][i]
                pairs.append(Pair(f"{what} {how}", what))
                pairs.append(Pair(f"{how}, {what}", what))
        return Concept(name, "style", tuple(pairs))
    if name in words.OBJECTS:
        for i in which:
            what, nothing = words.OBJECT_PHRASES[name][i], words.EMPTY_PHRASES[i]
            for style in words.STYLES:
                how = "" if style == words.PLAIN else " " + words.STYLE_PHRASES[style][i]
                pairs.append(Pair(what + how, nothing + how))
        return Concept(name, "object", tuple(pairs), _canvas_beside(name, which))
    near = ", ".join(n for n in (*words.STYLES, *words.OBJECTS) if n != words.PLAIN)
    raise ConceptError(f"the canvas has no concept {name!r}. It knows: {near}")


def _canvas_beside(name: str, which: Sequence[int]) -> tuple[Pair, ...]:
    """The object with each other one, in each style, in either order; the style's phrasing is that of the other."""
    others, styles = [o for o in words.OBJECTS if o != name], words.STYLES
    pairs = []
    for k in range(len(others) * len(styles)):  # coprime numbers: every other object meets every style once
        other, style, p = others[k % len(others)], styles[k % len(styles)], which[k % len(which)]
        stays, how = words.OBJECT_PHRASES[other][p], words.prompt([], style, p).removeprefix(words.EMPTY_PHRASES[p])
        for i in which:
            what = words.OBJECT_PHRASES[name][i]
            pairs += [Pair(f"{a} and {b}{how}", stays + how) for a, b in ((what, stays), (stays, what))]
    return tuple(pairs)


def with_neighbours(concept: Concept, neighbours: Sequence[Concept]) -> Concept:
    """The concept with `neighbours` beside it, where it is an object named by its own phrase; else as it is."""
    others = [n for n in neighbours if n.kind == "object"]
    own = [p.shows for p in concept.pairs if concept.name in p.shows]
    if concept.kind != "object" or concept.beside or not others or not own:
        return concept
    pairs = []
    for k in range(len(own) * len(others)):
        prompt, other = own[k % len(own)], others[(k + k // len(own)) % len(others)].name
        both = (f"{concept.name} and {other}", f"{other} and {concept.name}")
        match = prompt.replace(concept.name, other, 1)
        pairs += [Pair(prompt.replace(concept.name, what, 1), match) for what in both]
    return replace(concept, beside=tuple(dict.fromkeys(pairs)))


def phrase_concept(phrase: str, kind: str | None = None, instead: str = "") -> Concept:
    """A concept of any pipeline from a phrase: "Van Gogh style" with many subjects, "a cat" in many settings.

    `kind` is read from the phrase (a style says "style", "painting", "drawing" or "art") unless given. An object's
    match puts `instead` (by default "an empty scene") in its place.
    """
    text = " ".join(phrase.split())
    if not text:
        raise ConceptError("the concept is an empty phrase: say what to erase, such as 'Van Gogh style' or 'a cat'")
    kind = kind or ("object" if _STYLE_WORDS.isdisjoint(text.lower().split()) else "style")
    if kind == "style":
        pairs = tuple(Pair(f"{s} in {text}", s) for s in SUBJECTS) + tuple(Pair(f"{text}, {s}", s) for s in SUBJECTS)
    else:
        other = instead or "an empty scene"
        pairs = tuple(Pair(f"{text} {s}".strip(), f"{other} {s}".strip()) for s in SETTINGS)
    return Concept(text, kind, pairs)


def shipped_neighbours(concept: Concept) -> tuple[Concept, ...]:
    """What a style or an object of any pipeline is likely to be mistaken for: other styles; the rest of a group that
    the object's words are in, or else one or two of every group. () for concepts of other kinds."""
    own = set(concept.name.lower().split()) - {"a", "an", "the", "of", "in", "person", "style"}
    if concept.kind == "style":
        phrases = [p for p in _STYLES if own.isdisjoint(p.lower().split())]
    elif concept.kind == "object":
        groups = [g for g in _OBJECTS if any(not own.isdisjoint(p.lower().split()) for p in g)]
        near = [p for g in groups for p in g] or [p for k in (0, 1) for g in _OBJECTS[:-1] for p in g[k : k + 1]]
        phrases = [p for p in near if own.isdisjoint(p.lower().split())]
    else:
        phrases = []
    return tuple(phrase_concept(p, concept.kind) for p in phrases[:MOST_NEIGHBOURS])


def file_concept(path: str | Path) -> Concept:
    """A concept from a JSON file: {"name": ..., "kind": ..., "pairs": [["with", "without"], ...]}, and "beside" for
    pairs in which something else stays.

    Raises ConceptError saying which field is wrong.
    """
    try:
        data = parse_json(read_bytes(path, MAX_FILE))
    except (FileError, ValueError) as e:
        raise ConceptError(
            f"{path} is no readable JSON file ({printable(e, 300)}): expected name, kind and pairs"
        ) from e
    try:
        pairs, beside = (
            tuple(Pair(_text(a), _text(b)) for a, b in map(_list, part))
            for part in (data["pairs"], data.get("beside", []))
        )
        return Concept(_text(data["name"]), _text(data.get("kind", "other")), pairs, beside)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ConceptError(
            f"{path}: field {printable(e)} is missing or malformed; expected "
            '{"name": ..., "kind": "style" or "object", "pairs": [["a prompt that shows it", "the same without"], ...]}'
        ) from e


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{printable(value, 40)!r}, not a text,")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError(f"{printable(value, 40)!r}, not a pair,")
    return value


@dataclass(frozen=True)
class Profile:
    """Statistics of every feature at one site for several concepts, by timestep.

    names [C]; times [T] ascending; mean [C, T, n]: the mean over images and positions, zeros included;
    spread [C, T, n]: standard deviation over images of the image means.
    """

    names: tuple[str, ...]
    times: Tensor
    mean: Tensor
    spread: Tensor


def profile(pooled: Tensor, times: Tensor, labels: Sequence[str]) -> Profile:
    """From pooled feature activations [N images, T, n] with one label an image."""
    names = tuple(dict.fromkeys(labels))
    if pooled.shape[0] != len(labels) or pooled.shape[1] != len(times):
        raise ConceptError(
            f"activations {tuple(pooled.shape)} for {len(labels)} labels, {len(times)} times: expected [N, T, n]"
        )
    rows = [torch.tensor([i for i, label in enumerate(labels) if label == name]) for name in names]
    mean = torch.stack([pooled[r].float().mean(0) for r in rows])
    spread = torch.stack([pooled[r].float().std(0, unbiased=False) for r in rows])
    return Profile(names, times, mean, spread)


def _others(profile: Profile, name: str) -> tuple[int, list[int]]:
    """The concept's number and those of all others."""
    if name not in profile.names or len(profile.names) < 2:
        raise ConceptError(f"a profile of {', '.join(profile.names)} cannot score {name!r}: profile it and one other")
    c = profile.names.index(name)
    return c, [i for i in range(len(profile.names)) if i != c]


def share_score(profile: Profile, name: str) -> Tensor:
    """SAeUron's score (arXiv 2501.18052, equation 4) -> [T, n].

    The feature's share of all activation on the concept, minus its share on all other concepts together.
    """
    c, others = _others(profile, name)
    on, off = profile.mean[c], profile.mean[others].mean(0)
    return on / (on.sum(-1, keepdim=True) + 1e-8) - off / (off.sum(-1, keepdim=True) + 1e-8)


def neighbour_score(profile: Profile, name: str) -> Tensor:
    """Ours -> [T, n]: the gap to the worst neighbouring concept, in units of the pooled spread.

    (mean_c - max over other concepts of mean) / (spread_c + spread of that neighbour + eps): a feature that
    one neighbour shares scores low however rare it is among all, so that erasing cats keeps dogs.
    """
    c, others = _others(profile, name)
    worst, which = profile.mean[others].max(0)
    spread = profile.spread[others].gather(0, which.unsqueeze(0))[0]
    return (profile.mean[c] - worst) / (profile.spread[c] + spread + 1e-3 * profile.mean[c].amax() + 1e-8)
