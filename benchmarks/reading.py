"""Images of cells as a table of results, for benchmarks that take figures from `evaluation.metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from neuraleraser.evaluation.protocol import Cell
from neuraleraser.evaluation.results import BASE, Results, Row
from neuraleraser.judges import Judge, JudgeSpec
from neuraleraser.sampling import Images


def read(judge: Judge, cells: Sequence[Cell], images: Images, concept: str = "", kind: str = "") -> Results:
    """Judge the images of `cells`: those of the base, or with a concept named those of an eraser."""
    seen = judge(images)
    method = "neuraleraser" if concept else BASE
    artefacts = [None] * len(cells) if seen.artefact is None else seen.artefact.tolist()
    rows = [
        Row(
            method=method, concept=concept, kind=kind, prompt=c.prompt, seed=c.seed, group=c.group, route=c.route,
            cell_style=c.style, cell_objects=c.objects, p_style=p_style, p_object=p_object, artefact=artefact,
        )
        for c, p_style, p_object, artefact in zip(cells, seen.p_style, seen.p_object, artefacts, strict=True)
    ]  # fmt: skip
    return Results.of(JudgeSpec.of(judge), rows)
