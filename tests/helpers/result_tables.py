"""Small tables of results, written by hand."""

from __future__ import annotations

from collections.abc import Sequence

from neuraleraser.evaluation.results import BASE, Results, Row
from neuraleraser.judges import JudgeSpec

STYLES = ("Van_Gogh", "Mosaic", "Seed_Images")
OBJECTS = ("Cats", "Dogs", "Birds")
GROUP = "grid"
JUDGE = JudgeSpec(STYLES, OBJECTS, dict.fromkeys((*STYLES, *OBJECTS), 0.5), 10.0)


def seen(names: Sequence[str], here: Sequence[str]) -> list[float]:
    """Probabilities of a judge that sees `here`, the first of them best, and nothing else."""
    return [0.95 - 0.05 * here.index(name) if name in here else 0.04 for name in names]


def row(
    cell: tuple[str, Sequence[str]],
    judged: tuple[Sequence[str], Sequence[str]],
    number: int,
    erased: tuple[str, str] = ("", ""),
    *,
    method: str = "eraser",
    artefact: float = 1.0,
    identical: bool = False,
) -> Row:
    """Image `number`: (style, objects) asked for, (styles, objects) seen; `erased` is (concept, kind)."""
    name = f"{method}/{erased[0]}/k"
    return Row(
        method=method if erased[0] else BASE,
        concept=erased[0],
        kind=erased[1],
        method_key="k" if erased[0] else "",
        prompt=f"prompt {number}",
        group=GROUP,
        route="named",
        seed=number,
        cell_style=cell[0],
        cell_objects=tuple(cell[1]),
        p_style=seen(STYLES, judged[0]),
        p_object=seen(OBJECTS, judged[1]),
        artefact=artefact,
        watched=[name] if erased[0] else [],
        fired=[name] if erased[0] and not identical else [],
        compared=bool(erased[0]) and not identical,
        identical=identical,
        seconds=0.5,
    )


def table(rows: Sequence[Row], judge: JudgeSpec = JUDGE) -> Results:
    return Results.of(judge, rows)


VG, MO, SE = STYLES
# Asked for, seen in the base image, seen once Van_Gogh is erased: (styles, objects) each; then: same bits?
STYLE_STORY = [
    ((VG, ["Cats"]), ([VG], ["Cats"]), ([MO], ["Cats"]), False),  # gone, cat kept
    ((VG, ["Dogs"]), ([VG], ["Dogs"]), ([SE], ["Birds"]), False),  # gone, dog lost
    ((VG, ["Birds"]), ([VG], ["Birds"]), ([VG], ["Birds"]), False),  # still there
    ((VG, ["Cats"]), ([MO], ["Cats"]), ([VG], ["Dogs"]), False),  # the base never drew it
    ((VG, ["Dogs"]), ([VG], ["Cats"]), ([], ["Cats"]), False),  # gone; the base drew another object
    ((MO, ["Cats"]), ([MO], ["Cats"]), ([MO], ["Cats"]), True),  # left alone
    ((MO, ["Dogs"]), ([MO], ["Dogs"]), ([SE], ["Dogs"]), False),  # style damaged
    ((SE, ["Birds"]), ([SE], ["Dogs"]), ([VG], ["Dogs"]), False),  # style damaged, object never right
    ((MO, ["Birds"]), ([VG], ["Birds"]), ([MO], ["Birds"]), False),  # shown unasked, and gone
    (("", ["Cats"]), ([SE], ["Cats"]), ([SE], ["Dogs"]), False),  # no style asked for, object damaged
]
# The same for Cats, with two objects in a prompt.
OBJECT_STORY = [
    ((MO, ["Cats", "Dogs"]), ([MO], ["Cats", "Dogs"]), ([MO], ["Birds", "Dogs"]), False),  # dog there, a bird leads
    ((MO, ["Dogs", "Cats"]), ([MO], ["Cats", "Dogs"]), ([SE], ["Birds"]), False),  # dog lost
    ((VG, ["Cats", "Birds"]), ([VG], ["Cats"]), ([VG], ["Birds"]), False),  # the base had no bird
    ((VG, ["Cats", "Dogs"]), ([VG], ["Cats", "Dogs"]), ([VG], ["Cats", "Dogs", "Birds"]), False),  # cat and dog stay
    ((VG, ["Dogs", "Birds"]), ([VG], ["Dogs", "Birds"]), ([VG], ["Dogs"]), False),  # no cat asked for
    ((SE, ["Cats"]), ([SE], ["Cats"]), ([SE], []), False),  # gone, nothing instead
    ((SE, ["Dogs"]), ([SE], ["Dogs"]), ([MO], ["Dogs"]), True),
]


def story(rows: Sequence[tuple], erased: tuple[str, str]) -> Results:
    """Base rows and erased rows; the first two erased images and the fifth base image are artefacts."""
    base = [row(cell, before, i, artefact=12.0 if i == 4 else 1.0) for i, (cell, before, _, _) in enumerate(rows)]
    after = [
        row(cell, then, i, erased, artefact=12.0 - i if i < 2 else 1.0, identical=same)
        for i, (cell, _, then, same) in enumerate(rows)
    ]
    return table([*base, *after])


def style_story() -> Results:
    return story(STYLE_STORY, ("Van_Gogh", "style"))


def object_story() -> Results:
    return story(OBJECT_STORY, ("Cats", "object"))
