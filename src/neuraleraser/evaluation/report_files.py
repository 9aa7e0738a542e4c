"""The files of a report."""

from __future__ import annotations

from pathlib import Path

from neuraleraser.evaluation.figures import contact_sheet
from neuraleraser.evaluation.html import save_html
from neuraleraser.evaluation.report import Report
from neuraleraser.evaluation.table_files import figures_csv, latex_tables
from neuraleraser.io.atomic import write_bytes


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.html, report.json, figures.csv, tables.tex and contact.png.

    figures.csv has a row for every figure, tables.tex the page's tables in LaTeX, with the package booktabs.
    contact.png has one row per concept, of four pairs; the last starts from a picture of the concept, if the evaluation
    has such images. It is left out if the base shows none of them.

    Args:
        report: The report.
        folder: Folder of the files.

    Returns:
        The paths of the files.

    Raises:
        FileError: A file cannot be written.

    Examples:
        >>> [path.name for path in write_report(report, Path("report"))]
        ['report.html', 'report.json', 'figures.csv', 'tables.tex', 'contact.png']
    """
    paths = [folder / name for name in ("report.html", "report.json", "figures.csv", "tables.tex", "contact.png")]
    save_html(report, paths[0])
    report.save_json(paths[1])
    write_bytes(paths[2], figures_csv(report).encode())
    write_bytes(paths[3], latex_tables(report).encode())
    rows = [
        (entry.concept, [*entry.pairs[: 4 - len(entry.started[:1])], *entry.started[:1]])
        for entry in report.erasures
        if entry.pairs
    ]
    if not rows:
        return paths[:4]
    contact_sheet(rows, paths[4])
    return paths
