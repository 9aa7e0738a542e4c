"""The figures of a report as plain text of at most 120 columns."""

from __future__ import annotations

from collections.abc import Sequence

from neuraleraser.evaluation.columns import ATTACKS, ROUTES, TABLES, Column, Table
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import ErasureReport, Number, Report
from neuraleraser.io.tables import text_table

_LABEL, _ROUTE_LABEL = 26, 30


def terminal_tables(report: Report) -> str:
    """Return findings, then each table: of every method a line of values, one of 95 % intervals, and one of n; those of
    routes, with a line a group of cells and strength, and of attacks come last.

    A concept's own method stands first under its name, its controls below.
    """
    parts = [f"{finding.level.upper()}: {finding.text}" for finding in report.findings]
    parts += [text for table in TABLES if (text := _table(table, report.erasures))]
    apart = _in_pictures(report.erasures)
    more = (apart, _routes(report.erasures), _attacks(report.erasures), _detections(report.erasures))
    return "\n\n".join(part for part in (*parts, *more) if part)


def _table(table: Table, entries: Sequence[ErasureReport]) -> str:
    """Return a table as text: value, interval and n of each figure, one below the other."""
    columns = table.filled(entries)
    if not columns:
        return ""
    rows: list[list[str]] = []
    above = ""
    for entry in table.rows(entries):
        figures = [entry.figures.get(c.name) for c in columns]
        lines = [
            [c.text(f) for c, f in zip(columns, figures, strict=True)],
            [f"{f.low:.2f}-{f.high:.2f}" if isinstance(f, Estimate) else "" for f in figures],
            [f"n={f.n}" if isinstance(f, Estimate) else "" for f in figures],
        ]
        if entry.concept != above:
            rows.append([entry.concept, *[""] * len(columns)])
        names = [f" {entry.method}", "", ""]
        rows += [[name, *line] for name, line in zip(names, [x for x in lines if any(x)], strict=False)]
        above = entry.concept
    for row in rows:
        row[0] = _shorten(row[0], _LABEL)
    return text_table(rows, [_shorten(table.title, _LABEL), *(c.head for c in columns)], width=120)


def _routes(entries: Sequence[ErasureReport]) -> str:
    """Return the table of routes as text; "" if no image starts from a picture."""
    rows: list[list[str]] = []
    above = ""
    for entry in entries:
        if entry.route_figures and entry.concept != above:
            rows.append([_shorten(entry.concept, _ROUTE_LABEL), *[""] * len(ROUTES.columns)])
            above = entry.concept
        for i, r in enumerate(entry.route_figures):
            if i == 0:
                rows.append([_shorten(f" {entry.method}", _ROUTE_LABEL), *[""] * len(ROUTES.columns)])
            figures = [r.figures.get(c.name) for c in ROUTES.columns]
            values = [_in_one_line(c, f) for c, f in zip(ROUTES.columns, figures, strict=True)]
            strength = f" {r.strength:.1f}" if r.strength else ""
            rows.append([f"  {_shorten(r.group, _ROUTE_LABEL - 6)}{strength}", *values])
    return text_table(rows, [ROUTES.title, *(c.head for c in ROUTES.columns)], width=120) if rows else ""


def _in_pictures(entries: Sequence[ErasureReport]) -> str:
    """Return CLIP scores, with the distances from the base's images, as text, a line a method; "" if no CLIP was
    given."""
    rows: list[list[str]] = []
    for e in entries:
        if e.clip:
            scores = (e.clip.others_base, e.clip.others, e.clip.target_base, e.clip.target)
            values = ["-" if m is None else f"{m.value:.2f} {m.low:.2f}-{m.high:.2f}" for m in scores]
            apart = ("-", "-") if e.distance is None else (f"{e.distance.kid.value:.3f}", f"{e.distance.fid:.3f}")
            rows.append([_shorten(f"{e.concept}, {e.method}", _ROUTE_LABEL), *values, *apart])
    heads = ["CLIP scores", "others, base", "others", "concept, base", "concept", "KID", "FID"]
    return text_table(rows, heads, width=120) if rows else ""


def _detections(entries: Sequence[ErasureReport]) -> str:
    """Return detections before and after as text, a line a class; "" from a judge that does not count."""
    rows: list[list[str]] = []
    for entry in entries:
        if entry.detections:
            head = f"{entry.concept}, {entry.method}"
            rows.append([_shorten(head, _ROUTE_LABEL), "", "", f"{entry.detections.images} images"])
            rows += [[f"  {name}", str(base), str(after), ""] for name, base, after in entry.detections.rows()]
    return text_table(rows, ["Detections", "before", "after", ""], width=120) if rows else ""


def _attacks(entries: Sequence[ErasureReport]) -> str:
    """Return the table of attacks as text, their budgets below; "" if none were run."""
    rows: list[list[str]] = []
    budgets = {a.attack: a.budget for entry in entries for a in entry.attacks}
    for entry in entries:
        if entry.attacks:
            rows.append([_shorten(f"{entry.concept}, {entry.method}", _LABEL), *[""] * (len(ATTACKS.columns) + 1)])
        for a in entry.attacks:
            shown = a.figures.get("shown_after")
            n = str(shown.n) if isinstance(shown, Estimate) else "-"
            values = [_in_one_line(c, a.figures.get(c.name)).partition(" n=")[0] for c in ATTACKS.columns]
            rows.append([f"  {_shorten(a.attack, _LABEL - 2)}", n, *values])
    if not rows:
        return ""
    table = text_table(rows, [ATTACKS.title, "n", *(c.head for c in ATTACKS.columns)], width=120)
    return "\n".join((table, *(f"  {name}: {budget}" for name, budget in budgets.items())))


def _in_one_line(column: Column, figure: Number) -> str:
    if isinstance(figure, Estimate):
        return f"{figure.value:.2f} {figure.low:.2f}-{figure.high:.2f} n={figure.n}"
    return column.text(figure)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "~"
