"""Print the tables of docs/RESULTS.md on routes from their raw outputs.

python benchmarks/report_routes.py [benchmarks/results/canvas-routes.json] [benchmarks/results/canvas-embeddings.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = ("string-filter", "prompt-only eraser", "CRG", "DNG", "SAeUron (published)", "SAeUron (corrected)")
Row = dict[str, Any]


def share(value: float | None) -> str:
    """A share as the tables have it."""
    return "" if value is None else f"{value:.2f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def routes(rows: Sequence[Row]) -> str:
    """The table of pictures that come in: a line a concept, route, prompt and strength."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["ceiling"] is not None:
            key = tuple(row[name] for name in ("concept", "route", "prompt", "strength", "n"))
            cells.setdefault(key, {})[row["method"]] = row
    measured = [name for name in METHODS if any(name in by for by in cells.values())]
    lines = []
    for (concept, route, prompt, strength, n), by in cells.items():
        if "neuraleraser" not in by:
            continue
        ours = by["neuraleraser"]
        low, high = ours["ci"]
        of_others = [by[name]["shows"] if name in by else None for name in measured]
        lines.append(
            [
                concept.replace("_", " "),
                f"{route}, {prompt}" + ("" if strength in (None, 1.0) else f", {strength:g}"),
                str(n),
                *(share(value) for value in (ours["base"], ours["ceiling"], *of_others)),
                f"**{share(ours['shows'])}** ({low:.2f}-{high:.2f})",
                *(share(ours.get(name)) for name in ("left", "opened")),
                ", ".join(share(row.get("artefacts")) for row in (by["none"], ours)),
            ]
        )
    heads = ["concept", "route, prompt, strength", "n", "base", "ceiling", *measured, "eraser", "left", "opened"]
    return table([*heads, "artefacts: base, eraser"], lines)


def false_openings(rows: Sequence[Row]) -> str:
    """The table of images without the concept in which the eraser acts."""
    found = [r for r in rows if r["method"] == "neuraleraser" and r["route"] in ("control", "other")]
    lines = [
        [
            r["concept"].replace("_", " "),
            "prompts" if r["strength"] is None else f"start images, {r['strength']:g}",
            str(r["n"]),
            share(r["opened"]),
            share(r["unchanged"]),
        ]
        for r in found
    ]
    return table(["concept", "other concepts'", "n", "opened", "same bits"], lines)


def attacks(rows: Sequence[Row]) -> str:
    """The table of learned embeddings: a line an attack."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("concept", "knows", "embeddings", "steps", "blinding", "seed"))
        cells.setdefault(key, {})[row["method"]] = row
    lines = [
        [
            concept.replace("_", " "),
            knows if knows != "gates" else f"gates ({blinding:g})",
            f"{count}, {steps}",
            *(f"{share(by[name]['shows'])} / {share(by[name]['sound'])}" for name in by),
            share(by["neuraleraser"]["opened"]),
        ]
        for (concept, knows, count, steps, blinding, _), by in cells.items()
    ]
    heads = [
        "concept",
        "attacker knows",
        "embeddings, steps",
        "none",
        "filter",
        "prompt gate alone",
        "eraser",
        "opened",
    ]
    return table(heads, lines)


if __name__ == "__main__":
    paths = [Path(p) for p in sys.argv[1:]] or [RESULTS / "canvas-routes.json", RESULTS / "canvas-embeddings.json"]
    for path in paths:
        rows = json.loads(path.read_text())
        print(attacks(rows) if "knows" in rows[0] else f"{routes(rows)}\n\n{false_openings(rows)}", end="\n\n")
