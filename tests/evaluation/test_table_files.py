"""A report's figures as CSV and LaTeX: every one, with its interval, and nothing that breaks either format."""

from __future__ import annotations

import csv
import io

from neuraleraser.evaluation.columns import TABLES
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.route_metrics import RouteFigures
from neuraleraser.evaluation.table_files import CSV_HEAD, figures_csv, latex_tables

HALF, ALL = Estimate(0.5, 60, 0.4, 0.6), Estimate(1.0, 20, 0.83, 1.0)
EVIL = 'a_b & 50 % of $x, "quoted"\\\n{y} ~ #1'


def report(concept: str = "Van_Gogh") -> Report:
    routes = [RouteFigures("image-to-image, empty", 0.5, {"shown_after": HALF, "ceiling": None})]
    ours = ErasureReport("ours", concept, "style", {"ua": ALL, "bytes": 1234.0, "ira": None}, route_figures=routes)
    return Report({}, {}, [ours, ErasureReport("none", concept, "style", {"ua": HALF})])


def test_the_csv_has_every_figure():
    head, *rows = csv.reader(io.StringIO(figures_csv(report(EVIL))))
    assert tuple(head) == CSV_HEAD and {row[0] for row in rows} == {EVIL}
    assert [row[2:] for row in rows] == [
        ["ours", "", "", "ua", "1.0", "0.83", "1.0", "20"],
        ["ours", "", "", "bytes", "1234.0", "", "", ""],
        ["ours", "", "", "ira", "", "", "", ""],
        ["ours", "image-to-image, empty", "0.5", "shown_after", "0.5", "0.4", "0.6", "60"],
        ["ours", "image-to-image, empty", "0.5", "ceiling", "", "", "", ""],
        ["none", "", "", "ua", "0.5", "0.4", "0.6", "60"],
    ]


def test_the_latex_has_a_table_for_each_that_is_filled():
    text = latex_tables(report())
    filled = [t for t in TABLES if t.filled(report().erasures)]
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(filled) > 0
    lines = text.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith(r"\quad ours & 1.00")]
    assert r"\tiny 0.83--1.00" in lines[at + 1] and lines[at - 1].endswith(r"{Van\_Gogh} \\")
    rows = [line for line in lines[: lines.index(r"\end{tabular}")] if line.endswith(r"\\") and "multicol" not in line]
    assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1, "as many cells in every row"


def test_names_are_escaped():
    text = latex_tables(report(EVIL))
    assert r"a\_b \& 50 \% of \$x" in text and r"\textbackslash{}" in text and r"\{y\} \textasciitilde{} \#1" in text
