"""Print the figures of report.json files as the Markdown tables of docs/RESULTS.md.

    python benchmarks/report_table.py benchmarks/results/demo.json benchmarks/results/demo_more.json

First one table of all concepts of all files together, a row for each method; then the tables of each file. A figure
reads "value (95 % interval; n)".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neuraleraser.evaluation.columns import TABLES
from neuraleraser.evaluation.intervals import proportion

SHARES = (
    "ua", "ua_held_out", "ua_fragments", "kept_still", "bystander_still", "unchanged_share", "artefact_rate_target",
)  # fmt: skip
"""Figures that are shares of images, so that those of several concepts add up."""


def cell(entry: dict[str, Any], name: str) -> str:
    """Return a figure with its interval and n, "" where there is none."""
    value = entry.get(name)
    if value is None:
        return ""
    interval = entry["ci"].get(name)
    if interval is None:
        return f"{value:.2f}"
    return f"{value:.2f} ({interval[0]:.2f}-{interval[1]:.2f}; {entry['ns'][name]})"


def table(concepts: list[dict[str, Any]], names: tuple[str, ...]) -> str:
    """Return one table: a row for each concept and method, a column for each figure that anyone has."""
    used = [name for name in names if any(entry.get(name) is not None for entry in concepts)]
    lines = [["concept", "method", *used], ["---"] * (2 + len(used))]
    lines += [[entry["name"], entry["method"], *(cell(entry, name) for name in used)] for entry in concepts]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pooled(entries: Sequence[dict[str, Any]], name: str) -> str:
    """Return a share over the images of several entries, "" where none has it."""
    there = [entry for entry in entries if entry.get(name) is not None]
    if not there:
        return ""
    n = sum(entry["ns"][name] for entry in there)
    good = np.arange(n) < sum(round(entry[name] * entry["ns"][name]) for entry in there)
    share = proportion(good, np.ones(n, dtype=bool), name, 0)
    return f"{share.value:.3f} ({share.low:.3f}-{share.high:.3f}; {good.sum()} of {n})"


def route_table(concepts: Sequence[dict[str, Any]]) -> str:
    """Return one table of the images that start from a picture, or hold learned embeddings: a row for each group and
    strength, of the erasers of all styles together, and of all objects; "" where there are none."""
    lines = []
    for kind in ("style", "object"):
        routes: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for entry in concepts:
            if entry["kind"] == kind and entry["method"] == "neuraleraser":
                for route in entry.get("route_figures", ()):
                    routes.setdefault((route["group"], route["strength"]), []).append(route)
        for (group, strength), parts in routes.items():
            shares = [pooled(parts, name) for name in ("shown_base", "ceiling", "shown_after", "acted")]
            lines.append([f"{kind}s", f"{group}{f', {strength:.1f}' if strength else ''}", *shares])
    head = ["concepts", "images", "base", "ceiling", "eraser", "gate opened"]
    table = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) if lines else ""


def pooled_table(concepts: Sequence[dict[str, Any]]) -> str:
    """Return one table of all concepts together: a row for each method, a column for each share."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for entry in concepts:
        by_method.setdefault(entry["method"], []).append(entry)
    lines = [["method", *SHARES], ["---"] * (1 + len(SHARES))]
    lines += [[method, *(pooled(entries, name) for name in SHARES)] for method, entries in by_method.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(paths: list[str]) -> None:
    """Print the table of all reports together, and the tables of each."""
    reports = {path: json.loads(Path(path).read_text()) for path in paths}
    concepts = [entry for report in reports.values() for entry in report["concepts"]]
    print(f"## All {len({entry['name'] for entry in concepts})} concepts\n\n{pooled_table(concepts)}\n")
    if routes := route_table(concepts):
        print(f"{routes}\n")
    for path, report in reports.items():
        print(f"## {path}\n\nbase: " + ", ".join(f"{k} {cell(report['base'], k)}" for k in report["base"]["ns"]))
        for part in TABLES:
            names = tuple(column.name for column in part.columns)
            print(f"\n### {part.title}\n\n{table(report['concepts'], names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
