"""report.html: one file that needs nothing else. Pictures are inside, no script runs, nothing is loaded."""

from __future__ import annotations

import base64
import json
import os
from importlib import resources
from typing import Any

import numpy as np

from neuraleraser.evaluation.columns import ATTACKS, ROUTES, TABLES
from neuraleraser.evaluation.damage_grid import damage_grids
from neuraleraser.evaluation.figures import DIFFERENCE_GAIN, difference, png, reduced
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import Number, Report, value_of
from neuraleraser.evaluation.tradeoff import tradeoffs
from neuraleraser.io.atomic import write_bytes

PICTURE_SIDE = 256
"""Pixels of the longer side of a picture in a page, at most: a page of a real model's images is to stay small."""
INTRO = (
    "Each concept below was taken out of an image model. Every picture after erasure stands beside the one that the "
    "untouched model draws for the same prompt and seed, and the figures come from comparing many such twins. Below "
    "each concept's own row stand the controls on the same prompts and seeds: doing nothing, and a filter that deletes "
    "the concept's phrases from the prompt before the model sees it (all of them, or those that erasers are made "
    "with). Where the filter does as well, a figure says nothing for the eraser."
)


def save_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page atomically.

    Raises DataError as `Report.to_dict` does, so that no page shows what report.json would refuse; FileError if the
    system refuses.
    """
    report.to_dict()
    write_bytes(path, page(report).encode())


def page(report: Report) -> str:
    """Return the whole HTML document. All text is escaped by the template."""
    import jinja2

    def read(name: str) -> str:
        return resources.files(__package__ or "neuraleraser.evaluation").joinpath(name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "said": _setting_text,
        "words": lambda name: name.replace("_", " "),
        "percent": _scale_position,
    }
    environment.tests["estimate"] = lambda figure: isinstance(figure, Estimate)
    tables = [(table.title, table.filled(report.erasures), table.rows(report.erasures)) for table in TABLES]
    concepts: dict[str, list[Any]] = {}
    for entry in report.erasures:
        concepts.setdefault(entry.concept, []).append(entry)
    return environment.get_template("page.html.jinja").render(
        report=report,
        intro=report.intro or INTRO,
        style=read("page.css"),
        tables=[(title, columns, rows) for title, columns, rows in tables if columns],
        routes=ROUTES if any(entry.route_figures for entry in report.erasures) else None,
        attacks=ATTACKS if any(entry.attacks for entry in report.erasures) else None,
        concepts=concepts,
        grids=damage_grids(report.erasures),
        plots=tradeoffs(report.erasures),
        tiles=_tiles(report),
        data=_data_url,
        difference=difference,
        value_of=value_of,
        gain=DIFFERENCE_GAIN,
    )


def _tiles(report: Report) -> list[tuple[str, Number]]:
    """Return the figures of the base and the judge that stand above the tables, with their labels."""
    judged = report.judge.get("figures", {})
    tiles: list[tuple[str, Number]] = [
        ("Base model, style as asked", report.base.get("style_accuracy")),
        ("Base model, object as asked", report.base.get("object_accuracy")),
        ("Base model, artefacts", report.base.get("artefact_rate")),
        ("Base model, same bits with nothing attached", report.base.get("unhooked_identical")),
        ("Judge, styles of real renders", judged.get("style")),
        ("Judge, objects of real renders", judged.get("object")),
    ]
    return [(label, figure) for label, figure in tiles if figure is not None]


def _data_url(image: np.ndarray) -> str:
    """Return an image as the address of a picture that lies in the page."""
    return f"data:image/png;base64,{base64.b64encode(png(reduced(image, PICTURE_SIDE))).decode()}"


def _scale_position(value: float) -> str:
    """Return where `value` lies on a drawn scale from 0 to 1, in per cent; what lies outside stands at its end."""
    return f"{100 * min(max(value, 0.0), 1.0):.1f}"


def _setting_text(value: Any) -> str:
    """Return a setting as one line of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value, default=str)
