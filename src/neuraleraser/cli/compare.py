"""`neuraleraser compare`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import app, verb
from neuraleraser.io.names import printable
from neuraleraser.io.tables import text_table


@verb(app, "compare")
def compare(first: Positional[Path], second: Positional[Path], /, every: bool = False) -> None:
    """Compare two reports: figures that differ by more than their intervals, and what one has alone.

    Args:
        first: A report.json.
        second: Another.
        every: Show all figures that both have.
    """
    from neuraleraser.evaluation.comparison import compare_reports

    found = compare_reports(first, second)
    apart = [d for d in found.differences if d.apart]
    shown = found.differences if every else apart
    if shown:
        rows = [
            [
                printable(d.concept),
                printable(d.method),
                printable(d.figure),
                str(d.first),
                str(d.second),
                f"{d.second.value - d.first.value:+.2f}{' *' if d.apart else '  '}",
            ]
            for d in shown
        ]
        head = ["concept", "method", "figure", first.name, second.name, "difference"]
        print(text_table(rows, head, left=(0, 1, 2)))
    print(f"{len(apart)} of {len(found.differences)} figures differ by more than their 95 % intervals")
    for name, keys in ((first, found.only_first), (second, found.only_second)):
        if keys:
            some = "; ".join(printable(", ".join(key)) for key in keys[:5])
            print(f"{len(keys)} figures are in {name} alone: {some}{'; ...' if len(keys) > 5 else ''}")
    for setting, values in found.settings.items():
        print(f"{printable(setting)}: {printable(values[0])} and {printable(values[1])}")
