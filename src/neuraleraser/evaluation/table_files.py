"""A report's figures for other programs: as one CSV file, and as LaTeX tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from neuraleraser.evaluation.columns import TABLES, Table
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import ErasureReport, Number, Report

CSV_HEAD = ("concept", "kind", "method", "group", "strength", "figure", "value", "low", "high", "n")
"""Columns of figures.csv; group and strength are empty but for figures of routes, and group of attacks."""
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def figures_csv(report: Report) -> str:
    """Return every figure of a report as a row of CSV: value, ends of the 95 % interval and number of images."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    for e in report.erasures:
        for name, figure in e.figures.items():
            writer.writerow([e.concept, e.kind, e.method, "", "", name, *_numbers(figure)])
        for route in e.route_figures:
            for name, figure in route.figures.items():
                writer.writerow([e.concept, e.kind, e.method, route.group, route.strength, name, *_numbers(figure)])
        for a in e.attacks:
            for name, figure in a.figures.items():
                writer.writerow([e.concept, e.kind, e.method, a.group, "", name, *_numbers(figure)])
        for d in e.damage:
            name = f"still_right_{d.name}"
            writer.writerow([e.concept, e.kind, e.method, "", "", name, *_numbers(d.still_right)])
        if e.distance is not None:
            for name, figure in vars(e.distance).items():
                writer.writerow([e.concept, e.kind, e.method, "", "", name, *_numbers(figure)])
        for name, figure in vars(e.clip).items() if e.clip else ():
            writer.writerow([e.concept, e.kind, e.method, "", "", f"clip_score_{name}", *_numbers(figure)])
        for name, base, after in e.detections.rows() if e.detections else ():
            for when, count in (("base", base), ("after", after)):
                writer.writerow([e.concept, e.kind, e.method, "", "", f"detections_{when}_{name}", count, "", "", ""])
        if e.lookalikes is not None:
            writer.writerow([e.concept, e.kind, e.method, "", "", "lookalike_gap", *_numbers(e.lookalikes.gap)])
    return text.getvalue()


def _numbers(figure: Number) -> list[float | int | str]:
    if isinstance(figure, Estimate):
        return [figure.value, figure.low, figure.high, figure.n]
    return ["" if figure is None else figure, "", "", ""]


def latex_tables(report: Report) -> str:
    """Return the tables of a report in LaTeX, with the package booktabs: a row a method, values with intervals."""
    parts = ["% \\usepackage{booktabs}; values with 95 % intervals below"]
    parts += ["\n".join(_latex_table(table, report.erasures)) for table in TABLES if table.filled(report.erasures)]
    return "\n\n".join(parts) + "\n"


def _latex_table(table: Table, entries: Sequence[ErasureReport]) -> Iterator[str]:
    columns = table.filled(entries)
    yield r"\begin{table}"
    yield rf"\caption{{{_escaped(table.title)}}}"
    yield rf"\begin{{tabular}}{{l{'r' * len(columns)}}}"
    yield r"\toprule"
    yield " & ".join(["", *(_escaped(c.head) for c in columns)]) + r" \\"
    above = ""
    for entry in table.rows(entries):
        if entry.concept != above:
            yield r"\midrule"
            yield rf"\multicolumn{{{1 + len(columns)}}}{{l}}{{{_escaped(entry.concept)}}} \\"
            above = entry.concept
        figures = [entry.figures.get(c.name) for c in columns]
        values = [_escaped(c.text(f)) for c, f in zip(columns, figures, strict=True)]
        yield " & ".join([rf"\quad {_escaped(entry.method)}", *values]) + r" \\"
        if any(isinstance(f, Estimate) for f in figures):
            ends = [rf"\tiny {f.low:.2f}--{f.high:.2f}" if isinstance(f, Estimate) else "" for f in figures]
            yield " & ".join(["", *ends]) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield r"\end{table}"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
