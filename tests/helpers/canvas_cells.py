"""Cells of the canvas, and a family that draws them with a tiny random pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from neuraleraser.canvas import words
from neuraleraser.evaluation.evaluate import default_protocol
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import Cell, EvaluationProtocol
from neuraleraser.evaluation.split import check_split
from neuraleraser.evaluation.vocabulary_cells import VocabularyCells
from neuraleraser.families import FAMILIES, Family
from neuraleraser.families.canvas import CANVAS, render
from neuraleraser.settings import EvaluateSettings


def canvas_protocol(concepts: Sequence[str], settings: EvaluateSettings, *, sealed: bool = False) -> EvaluationProtocol:
    return default_protocol(CANVAS, concepts, settings, sealed=sealed)


def canvas_cells(settings: EvaluateSettings | None = None, *, sealed: bool = False) -> VocabularyCells:
    return VocabularyCells.of(words.VOCABULARY, settings or EvaluateSettings(), sealed=sealed)


def base_cells(rounds: int, phrasing: int = 0) -> list[Cell]:
    return canvas_cells().grid(rounds, phrasing)


def target_cells(name: str, settings: EvaluateSettings) -> list[Cell]:
    return canvas_cells(settings).target(name)


def fragment_cells(name: str, count: int) -> list[Cell]:
    return canvas_cells(EvaluateSettings(fragment_prompts=count)).fragments(name)


def notes_on(method: Method, cells: Iterable[Cell]) -> list[str]:
    """What `check_split` says of a method and these cells."""
    return check_split(method, EvaluationProtocol({method.concept: list(cells)}, vocabulary=words.VOCABULARY))


TINY = Family(
    "tiny",
    matches=lambda pipe: type(pipe).__name__ == "StableDiffusionPipeline",
    vocabulary=words.VOCABULARY,
    render=render,
)
WITH_TINY = (FAMILIES[0], TINY, *FAMILIES[1:])
"""Families in which a tiny pipeline is asked for the canvas's concepts."""
