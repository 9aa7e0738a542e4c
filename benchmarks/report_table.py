"""Print the figures of a report.json as the Markdown tables of docs/RESULTS.md.

    python benchmarks/report_table.py benchmarks/results/demo.json

A figure reads "value (95 % interval; n)".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from neuraleraser.evaluation.columns import TABLES


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


def main(paths: list[str]) -> None:
    """Print the tables of each report."""
    for path in paths:
        report = json.loads(Path(path).read_text())
        print(f"## {path}\n\nbase: " + ", ".join(f"{k} {cell(report['base'], k)}" for k in report["base"]["ns"]))
        for part in TABLES:
            names = tuple(column.name for column in part.columns)
            print(f"\n### {part.title}\n\n{table(report['concepts'], names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
