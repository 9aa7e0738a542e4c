"""The tables of a report: which figures stand side by side, and what each means. Shared by page and terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuraleraser.evaluation.report import ErasureReport, Number, size_text, value_of


@dataclass(frozen=True)
class Column:
    """A figure by its name in report.json, its head in tables, and one sentence on what it is."""

    name: str
    head: str
    meaning: str

    def text(self, figure: Number) -> str:
        """Return the value alone, "-" for none."""
        value = value_of(figure)
        if value is None:
            return "-"
        if self.name in ("make_seconds", "seconds", "seconds_base"):
            return f"{value:.0f} s"
        if self.name in ("make_peak_bytes", "bytes"):
            return size_text(value)
        return f"x{value:.2f}" if self.name.startswith("overhead") else f"{value:.2f}"


@dataclass(frozen=True)
class Table:
    """Columns that stand side by side under a title."""

    title: str
    columns: tuple[Column, ...]

    def filled(self, entries: Sequence[ErasureReport]) -> tuple[Column, ...]:
        """Return the columns in which any entry has a figure: a judge without artefacts gives no such column."""
        return tuple(c for c in self.columns if any(value_of(e.figures.get(c.name)) is not None for e in entries))

    def rows(self, entries: Sequence[ErasureReport]) -> list[ErasureReport]:
        """Return the entries that have any figure here."""
        return [e for e in entries if any(value_of(e.figures.get(c.name)) is not None for c in self.columns)]


_OFFICIAL = (
    (
        "unlearncanvas",
        "UnlC.",
        "UnlearnCanvas, images of one object in a style",
        (
            ("UA", "of those that ask for the concept, the share classified as another"),
            ("IRA", "accuracy of the other concepts of its domain"),
            ("CRA", "accuracy of the other domain"),
        ),
    ),
    (
        "saeuron",
        "SAeU.",
        "SAeUron, images of one object",
        (
            ("UA", "as UnlearnCanvas's UA; for an object, images without a style count too"),
            ("IRA", "as UnlearnCanvas's IRA; for an object, images without a style count too"),
            (
                "CRA",
                "accuracy of the other domain, for a style over images without a style alone, for an object over "
                "images in a style",
            ),
        ),
    ),
)
TABLES = (
    Table(
        "Erased",
        (
            Column(
                "ua",
                "erased",
                "Of the images whose base image (same prompt and seed, nothing erased) shows the concept, the share "
                "that no longer does. Doing nothing scores 0.",
            ),
            Column("ua_held_out", "held out", "The same for prompts in phrasings that the eraser was not made with."),
            Column(
                "shown_fragments",
                "frag.shown",
                "Prompts with one or two words of the concept's phrasings and never a whole one: the share of base "
                "images that show it.",
            ),
            Column("ua_fragments", "fragments", "Of those base images that show it, the share that no longer does."),
            Column(
                "ua_image_to_image",
                "img2img",
                "The same where the start image shows the concept and the prompt names it, over all strengths.",
            ),
            Column(
                "artefact_rate_target",
                "artefacts",
                "Of the images that ask for the concept, the share farther from every real class than 99 % of "
                "real renders.",
            ),
            Column(
                "artefact_rate_target_base",
                "in base",
                "The same of the base model's images of those prompts and seeds.",
            ),
            Column(
                "artefact_rate",
                "of all",
                "Share of artefacts among all images, most of which do not ask for the concept.",
            ),
        ),
    ),
    Table(
        "Kept",
        (
            Column(
                "ira",
                "same dom.",
                "Images that do not ask for the concept: accuracy over its own domain (styles for a style, objects for "
                "an object), divided by the base model's.",
            ),
            Column(
                "cra", "other dom.", "The same images: accuracy over the other domain, divided by the base model's."
            ),
            Column(
                "kept",
                "kept",
                "Accuracy of the other domain on the concept's own images, divided by the base model's: the cat in "
                "the erased style is still a cat. Gains offset losses.",
            ),
            Column(
                "kept_still",
                "kept still",
                "Of those of them that are right in the base model, the share still right: gains offset nothing.",
            ),
            Column(
                "bystander",
                "bystander",
                "In prompts with two objects, one of them erased: accuracy of the one that stays, divided by the base "
                "model's. Gains offset losses.",
            ),
            Column(
                "bystander_still",
                "byst.kept",
                "Of those of them that are right in the base model, the share still right: gains offset nothing.",
            ),
            Column(
                "unchanged_share",
                "unchanged",
                "Of the images that neither ask for the concept nor show it in the base model, the share that is the "
                "base model's, bit for bit. Images in which the method says that it would not act count as such.",
            ),
            Column(
                "unchanged_compared",
                "compared",
                "The same over those that were generated with the method and compared: all in which it acts, and a "
                "sample.",
            ),
            Column(
                "idle_identical",
                "idle same",
                "Bit-identical share of the sample in which the method says that it would not act: less than 1 is a "
                "fault.",
            ),
        ),
    ),
    Table(
        "Look-alikes",
        (
            Column(
                "lookalike_loss",
                "look-alikes lose",
                "Images that ask for one of the classes that the base model's own images of the concept are most "
                "mistaken for, and show it in the base model: the share that no longer does.",
            ),
            Column("rest_loss", "rest loses", "The same of all other classes of the concept's domain."),
        ),
    ),
    Table(
        "Cost",
        (
            Column("make_seconds", "made in", "Seconds it took to make the eraser."),
            Column(
                "make_peak_bytes",
                "peak memory",
                "Peak memory while it was made: on a GPU of what torch allocated there, else of the process's resident "
                "set, libraries and weights among it.",
            ),
            Column("bytes", "size", "Size of its file."),
            Column("overhead", "cost", "Sampling time where it acts, over plain sampling."),
            Column("overhead_idle", "idle cost", "Sampling time where it does not act, over plain sampling."),
        ),
    ),
    Table(
        "As others define it",
        tuple(
            Column(f"{source}_{name}", f"{short} {name}", f"{images}: {meaning}. The most probable class decides.")
            for source, short, images, meanings in _OFFICIAL
            for name, meaning in meanings
        ),
    ),
)
"""All tables of one line a method, in the order in which they are shown."""
ROUTES = Table(
    "Routes",
    (
        Column("shown_base", "base shows", "The share of base images that show the concept."),
        Column(
            "ceiling",
            "ceiling",
            "The share that shows it when the base model is asked, from the same start images, for the same pictures "
            "without the concept: a style as a plain picture, an object as an empty scene. Of inverted latents, the "
            "share that a denoiser of random weights brings back as well. Learned embeddings have none: they hold no "
            "picture.",
        ),
        Column("shown_after", "shows", "The share of images that show the concept with the method applied."),
        Column(
            "acted",
            "acted",
            "The share in which the method says that it acts. An eraser that refuses would refuse these.",
        ),
    ),
)
"""The table of images that start from a picture of the concept, or from its inverted latents, or whose prompt holds
learned embeddings: of each method a line a group and strength."""
ATTACKS = Table(
    "Attacks",
    (
        Column(
            "shown_base",
            "base shows",
            "The share of the base model's images that show the concept, drawn with what the attack found on the base "
            "model itself. An attack that does not succeed there proves nothing.",
        ),
        Column(
            "shown_after",
            "shows",
            "The share of images that show the concept with the method applied, drawn with what the same attack, at "
            "the same budget, found through the method.",
        ),
        Column(
            "sound_after",
            "sound",
            "The share of images that show it and are no artefacts, farther from every real class than 99 % of real "
            "renders. An attack often draws noise, for which the judge has to choose a name as well.",
        ),
        Column("acted", "acted", "The share of these images in which the method says that it acts."),
        Column("seconds_base", "search, base", "Seconds that the search took on the base model."),
        Column("seconds", "search", "Seconds that it took through the method."),
    ),
)
"""The table of attacks: of each method a line an attack."""
