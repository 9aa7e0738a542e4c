"""The canvas's vocabulary: objects, styles, their phrasings, and captions made of them.

Every concept has four phrasings, and the canvas learns all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from neuraleraser.vocabulary import Vocabulary

PLAIN = "Seed_Images"
"""The style of an unstyled picture, under UnlearnCanvas's name for it."""

# The first two phrasings of each list are `SEEN`, the others `HELD_OUT`.
OBJECT_PHRASES: dict[str, tuple[str, str, str, str]] = {
    "Architectures": ("a building", "an architecture", "a stone house", "some architecture with walls"),
    "Bears": ("a bear", "a grizzly bear", "a cub with round ears", "a furry bear animal"),
    "Birds": ("a bird", "a feathered bird", "a winged songbird", "a creature with a beak"),
    "Butterfly": ("a butterfly", "a monarch butterfly", "a fluttering insect", "a moth with bright wings"),
    "Cats": ("a cat", "a kitten", "a purring pet", "a feline with whiskers"),
    "Dogs": ("a dog", "a puppy", "a barking pet", "a loyal hound"),
    "Fishes": ("a fish", "a swimming fish", "an animal with fins", "a fish with scales"),
    "Flame": ("a flame", "a burning flame", "a campfire", "a blaze of fire"),
    "Flowers": ("a flower", "a blossom", "a blooming plant", "a stem with petals"),
    "Frogs": ("a frog", "a green frog", "a croaking toad", "a pond amphibian"),
    "Horses": ("a horse", "a pony", "a galloping stallion", "a mare with a mane"),
    "Human": ("a human", "a person", "a smiling face", "somebody with hair"),
    "Jellyfish": ("a jellyfish", "a drifting jellyfish", "a sea jelly", "a medusa with tentacles"),
    "Rabbits": ("a rabbit", "a bunny", "a hare with long ears", "a hopping hare"),
    "Sandwiches": ("a sandwich", "a snack of bread", "a burger in a bun", "a toasted lunch"),
    "Sea": ("the sea", "a sea wave", "the ocean surf", "a breaking billow"),
    "Statues": ("a statue", "a stone statue", "a carved monument", "a sculpture"),
    "Towers": ("a tower", "a tall tower", "a steel spire", "a lattice mast"),
    "Trees": ("a tree", "a leafy tree", "a trunk with leaves", "a forest pine"),
    "Waterfalls": ("a waterfall", "a cascade of water", "falling water", "a splashing fountain"),
}

STYLE_PHRASES: dict[str, tuple[str, str, str, str]] = {
    "Seed_Images": ("as a plain picture", "in plain style", "without any style", "as an ordinary photo"),
    "Artist_Sketch": (
        "in artist sketch style",
        "as an artist sketch",
        "in sepia contour lines",
        "drawn on cream paper",
    ),
    "Blossom_Season": (
        "in blossom season style",
        "as a blossom season picture",
        "under pink petals",
        "in a cherry spring",
    ),
    "Bricks": (
        "in bricks style",
        "as a bricks picture",
        "painted on a brick wall",
        "between lines of mortar",
    ),
    "Cartoon": ("in cartoon style", "as a cartoon", "with thick black outlines", "like an animated film"),
    "Comic_Etch": (
        "in comic etch style",
        "as a comic etch",
        "in white scratches on black",
        "like a scraped board",
    ),
    "Crayon": ("in crayon style", "as a crayon drawing", "in waxy strokes", "coloured by a child"),
    "Cubism": ("in cubism style", "as a cubism painting", "made of flat facets", "broken into triangles"),
    "Glowing_Sunset": (
        "in glowing sunset style",
        "as a glowing sunset picture",
        "in orange evening light",
        "at dusk",
    ),
    "Ink_Art": ("in ink art style", "as ink art", "in pure black ink", "with splashes of ink"),
    "Meteor_Shower": (
        "in meteor shower style",
        "as a meteor shower picture",
        "under falling stars",
        "in a night of streaks",
    ),
    "Mosaic": ("in mosaic style", "as a mosaic", "laid in small tiles", "made of coloured stones"),
    "Neon_Lines": ("in neon lines style", "as neon lines", "in glowing tubes", "like a lit sign at night"),
    "On_Fire": ("in on fire style", "as a picture on fire", "all ablaze", "burning in hot embers"),
    "Pencil_Drawing": (
        "in pencil drawing style",
        "as a pencil drawing",
        "in grey hatching",
        "shaded with graphite",
    ),
    "Pointillism": ("in pointillism style", "as pointillism", "made of tiny dots", "dotted like a Seurat"),
    "Pop_Art": ("in pop art style", "as pop art", "with halftone print", "like a Warhol"),
    "Red_Blue_Ink": ("in red blue ink style", "as red blue ink", "in two inks", "printed in red and blue"),
    "Rust": ("in rust style", "as a rust picture", "on corroded metal", "covered in brown stains"),
    "Sponge_Dabbed": (
        "in sponge dabbed style",
        "as a sponge dabbed picture",
        "dabbed with a sponge",
        "in soft round blots",
    ),
    "Superstring": (
        "in superstring style",
        "as a superstring picture",
        "woven from threads",
        "drawn in vibrating lines",
    ),
    "Van_Gogh": (
        "in Van Gogh style",
        "as a Van Gogh painting",
        "painted with swirling brush strokes",
        "like The Starry Night",
    ),
    "Warm_Smear": ("in warm smear style", "as a warm smear", "smeared sideways", "wiped in warm paint"),
    "Watercolor": (
        "in watercolor style",
        "as a watercolor",
        "in washes of thin paint",
        "bleeding on wet paper",
    ),
    "Winter": ("in winter style", "as a winter picture", "in falling snow", "on a frosty day"),
}

OBJECTS: tuple[str, ...] = tuple(OBJECT_PHRASES)
STYLES: tuple[str, ...] = tuple(STYLE_PHRASES)

OBJECT_SUBSTITUTES: dict[str, str] = {
    "Human": "faces stand for people",
    "Waterfalls": "a fountain: there is no waterfall among the glyphs",
    "Towers": "one lattice tower",
    "Sandwiches": "sandwich and burger",
}
"""Objects that no glyph shows exactly, and what is drawn instead."""

NONE = "none"
"""The name of what a picture without an object shows, where one is asked for."""

EMPTY_PHRASES = ("an empty scene", "nothing", "a bare background", "an empty picture")
"""Captions of a picture without an object."""

ALIASES = {"fire": "On_Fire", "van gogh": "Van_Gogh", "vangogh": "Van_Gogh", "photo": PLAIN}
"""Other names that people use; 'Fire' is the style, the object is Flame."""

DEV_STYLES = ("Cartoon", "Mosaic", "Winter", "Pointillism", "Rust")
DEV_OBJECTS = ("Dogs", "Trees", "Fishes", "Towers")
"""Concepts on which defaults were set; all others are test concepts."""

SEALED_STYLES = ("Bricks", "Crayon", "Cubism", "Ink_Art", "Meteor_Shower", "Pop_Art")
SEALED_OBJECTS = ("Bears", "Birds", "Butterfly", "Frogs", "Sandwiches", "Statues")
"""Concepts that nothing is chosen on and nobody looks at before all is frozen: drawn and read by `evaluate --sealed`
alone (docs/explanation/laws.md, law 12)."""
VOCABULARY = Vocabulary(
    name="canvas",
    object_phrases=OBJECT_PHRASES,
    style_phrases=STYLE_PHRASES,
    empty_phrases=EMPTY_PHRASES,
    plain=PLAIN,
    aliases=ALIASES,
    development=frozenset((*DEV_STYLES, *DEV_OBJECTS)),
    sealed=frozenset((*SEALED_STYLES, *SEALED_OBJECTS)),
)


class Rng(Protocol):
    """The part of `random.Random` that captions use."""

    def random(self) -> float: ...
    def choice(self, seq: Sequence[str]) -> str: ...


def caption(objects: Sequence[str], style: str, rng: Rng) -> str:
    """Return a training caption; `rng` chooses phrasing, word order and whether a plain picture names its style."""
    what = " and ".join(rng.choice(OBJECT_PHRASES[o]) for o in objects) if objects else rng.choice(EMPTY_PHRASES)
    if style == PLAIN and rng.random() < 0.7:
        how = ""
    else:
        how = rng.choice(STYLE_PHRASES[style])
    r = rng.random()
    if not how:
        return f"a picture of {what}" if r < 0.2 else what
    if r < 0.55:
        return f"{what} {how}"
    if r < 0.75:
        return f"{how}, {what}"
    if r < 0.9:
        return f"a picture of {what} {how}"
    # As in a search box: the style's own words first, without "in", "as" or "under".
    bare = how.split(" ", 1)[1]
    return f"{bare}, {what}"
