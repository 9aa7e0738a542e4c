"""Figures of attacks, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from helpers.result_tables import JUDGE, row, table
from neuraleraser.evaluation.attack_metrics import AttackFigures
from neuraleraser.evaluation.measure import measure
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.terminal import terminal_tables

SHOWN, GONE = (["Van_Gogh"], ["Cats"]), (["Mosaic"], ["Cats"])
ERASED = ("Van_Gogh", "style")


def rows_of(group: str, pairs: list[tuple[Any, Any]], acted: int, first: int) -> list[Any]:
    """Pairs of images of the base and of a method that acts in some of them; it watched no base image."""
    rows = []
    for number, (before, after) in enumerate(pairs):
        cell, more = ("", ["Cats"]), {"group": group, "route": "attack"}
        rows.append(replace(row(cell, before, first + number), **more))
        own = replace(row(cell, after, first + number, ERASED), **more)
        rows.append(own if number < acted else replace(own, fired=[]))
    return rows


PLAIN = [row(("Mosaic", ["Cats"]), GONE, 50), row(("Mosaic", ["Cats"]), GONE, 50, ERASED, identical=True)]
NOISE = [replace(r, artefact=20.0) for r in rows_of("attack by noise", [(SHOWN, SHOWN)], 0, 20)]
STRONG = rows_of("attack by one", [(SHOWN, SHOWN), (SHOWN, GONE), (SHOWN, GONE), (GONE, GONE)], 1, 0)
WEAK = rows_of("attack by two", [(GONE, GONE), (GONE, GONE)], 2, 10)


def plain(a: AttackFigures) -> dict[str, Any]:
    return {name: (f.value, f.n) for name, f in a.figures.items() if f and not isinstance(f, float)}


def test_each_attack_has_figures_of_its_own():
    (e,) = measure(table([*PLAIN, *WEAK, *STRONG])).erasures
    assert {a.attack: plain(a) for a in e.attacks} == {
        "two": {"shown_base": (0, 2), "shown_after": (0, 2), "sound_after": (0, 2), "acted": (1, 2)},
        "one": {"shown_base": (0.75, 4), "shown_after": (0.25, 4), "sound_after": (0.25, 4), "acted": (0.25, 4)},
    }
    assert [a.attack for a in e.attacks] == ["two", "one"]


def test_noise_that_the_judge_takes_for_the_concept_is_not_sound():
    (found,) = measure(table([*PLAIN, *NOISE])).erasures[0].attacks
    assert plain(found) == {"shown_base": (1, 1), "shown_after": (1, 1), "sound_after": (0, 1), "acted": (0, 1)}
    blind = replace(JUDGE, artefact_threshold=None)
    rows = [replace(r, artefact=None) for r in (*PLAIN, *NOISE)]
    (found,) = measure(table(rows, blind)).erasures[0].attacks
    assert found.figures["sound_after"] is None


def test_an_image_that_escaped_the_method_is_no_fault_of_it():
    """It is not the base's, as what was found is another, and the method rightly says that it did not act."""
    assert measure(table([*PLAIN, *STRONG])).findings == []
    elsewhere = [replace(r, group="grid") for r in STRONG]
    (fault,) = measure(table([*PLAIN, *elsewhere])).findings
    assert fault.level == "error"


def test_no_other_figure_counts_them():
    without, among = (measure(table(rows)).erasures[0] for rows in (PLAIN, [*PLAIN, *STRONG, *WEAK]))
    assert replace(among, attacks=()) == replace(without, attacks=())


def test_the_terminal_has_a_line_an_attack_and_its_budget():
    (e,) = measure(table([*PLAIN, *STRONG, *NOISE])).erasures
    attacks = [
        replace(a, figures={**a.figures, "seconds": 12.3, "seconds_base": 45.6}, budget="9 steps") for a in e.attacks
    ]
    entry = ErasureReport(e.method, e.concept, e.kind, {}, attacks=attacks)
    lines = terminal_tables(Report(base={}, judge={}, erasures=[entry])).splitlines()
    assert lines[0].split()[:2] == ["Attacks", "n"] and lines[2].strip() == "Van_Gogh, eraser"
    assert lines[3].split() == "one 4 0.75 0.25-1.00 0.25 0.00-0.75 0.25 0.00-0.75 0.25 0.00-0.75 46 s 12 s".split()
    assert lines[5:] == ["  one: 9 steps", "  noise: 9 steps"] and max(map(len, lines)) <= 120
