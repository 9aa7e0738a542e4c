"""The figures of a report as plain text of at most 120 columns."""

from __future__ import annotations

from collections.abc import Sequence

from neuraleraser.evaluation.columns import TABLES, Table
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import ErasureReport, Report

_LABEL = 26


def terminal_tables(report: Report) -> str:
    """Return findings, then each table: of every method a line of values, one of 95 % intervals, and one of n.

    A concept's own method stands first under its name, its controls below.
    """
    parts = [f"{finding.level.upper()}: {finding.text}" for finding in report.findings]
    parts += [text for table in TABLES if (text := _table(table, report.erasures))]
    return "\n\n".join(parts)


def _table(table: Table, entries: Sequence[ErasureReport]) -> str:
    columns = table.filled(entries)
    if not columns:
        return ""
    rows = [(table.title, [c.head for c in columns])]
    above = ""
    for entry in table.rows(entries):
        figures = [entry.figures.get(c.name) for c in columns]
        lines = [
            [c.text(f) for c, f in zip(columns, figures, strict=True)],
            [f"{f.low:.2f}-{f.high:.2f}" if isinstance(f, Estimate) else "" for f in figures],
            [f"n={f.n}" if isinstance(f, Estimate) else "" for f in figures],
        ]
        if entry.concept != above:
            rows.append((entry.concept, [""] * len(columns)))
        rows += zip([f"  {entry.method}", "", ""], [line for line in lines if any(line)], strict=False)
        above = entry.concept
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(columns))]
    label = min(max(len(name) for name, _ in rows), _LABEL)
    lines = [
        " ".join([_shorten(name, label).ljust(label), *(c.rjust(w) for c, w in zip(cells, widths, strict=True))])
        for name, cells in rows
    ]
    rule = " ".join("-" * width for width in (label, *widths))
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
