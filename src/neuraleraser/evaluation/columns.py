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
        plain = {"make_seconds": f"{value:.0f} s", "bytes": size_text(value)}
        ratio = f"x{value:.2f}" if self.name.startswith("overhead") else f"{value:.2f}"
        return plain.get(self.name, ratio)


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
    ("UA", "images that ask for the concept and are classified as another"),
    ("IRA", "accuracy of the other concepts of its domain"),
    ("CRA", "accuracy in the other domain"),
)
TABLES = (
    Table(
        "Erased",
        (
            Column(
                "ua",
                "erased",
                "Of the images whose twin from the base model (same prompt and seed) shows the concept, the share that "
                "no longer does. Doing nothing scores 0.",
            ),
            Column("ua_held_out", "held out", "The same for phrasings that nothing was made with."),
            Column(
                "shown_fragments",
                "frag.shown",
                "Prompts with one or two words of the concept's phrasings and never a whole one: the share of base "
                "images that show it.",
            ),
            Column("ua_fragments", "fragments", "Of those that show it, the share that no longer does."),
            Column("ua_image_to_image", "img2img", "Erased share where a picture of the concept is the start image."),
            Column(
                "artefact_rate_target",
                "artefacts",
                "Of the concept's own images, the share farther from every real class than 99 % of real renders.",
            ),
            Column("artefact_rate_target_base", "in base", "The same of the base model's images of those prompts."),
            Column("artefact_rate", "of all", "Share of artefacts among all images, most of which are left alone."),
        ),
    ),
    Table(
        "Kept",
        (
            Column(
                "ira",
                "same dom.",
                "Accuracy over the other concepts of the same domain (styles for a style, objects for an object), "
                "divided by the base model's on the same cells.",
            ),
            Column("cra", "other dom.", "The same over the other domain."),
            Column(
                "kept",
                "kept",
                "Accuracy of the other domain on the concept's own images, divided by the base model's: the cat that "
                "was drawn in the erased style is still a cat. Gains offset losses.",
            ),
            Column(
                "kept_still", "kept still", "Of those right in the base model's images, the share that is still right."
            ),
            Column(
                "bystander",
                "bystander",
                "In prompts with two objects, one of them erased: accuracy of the one that stays, divided by the base "
                "model's. Gains offset losses.",
            ),
            Column(
                "bystander_still", "byst.still", "Of those right in the base model's images, the share still right."
            ),
            Column(
                "unchanged_share",
                "unchanged",
                "Share of images without the concept that are the base model's, bit for bit; where the method says "
                "that it would not act they count as such.",
            ),
            Column(
                "unchanged_compared",
                "compared",
                "The same over those that were drawn with the method and compared: all in which it acts, and a sample.",
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
        "Cost",
        (
            Column("make_seconds", "made in", "Seconds it took to make the eraser."),
            Column("bytes", "size", "Size of its file."),
            Column("overhead", "cost", "Sampling time where it acts, over plain sampling."),
            Column("overhead_idle", "idle cost", "Sampling time where it does not act, over plain sampling."),
        ),
    ),
    Table(
        "As others define it",
        tuple(
            Column(f"{source}_{name}", f"{short} {name}", f"{paper}: {meaning}. The most probable class decides.")
            for source, short, paper in (
                ("unlearncanvas", "UnlC.", "UnlearnCanvas"),
                ("saeuron", "SAeU.", "SAeUron"),
            )
            for name, meaning in _OFFICIAL
        ),
    ),
)
"""All tables, in the order in which they are shown."""
