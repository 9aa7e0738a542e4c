"""Tables as text: aligned, as wide as they may be, and of text alone."""

from __future__ import annotations

import pytest

from neuraleraser.io.tables import text_table


def test_columns_are_aligned_figures_to_the_right() -> None:
    lines = text_table([("a", "1.00"), ("longer", "12.50")], ("name", "value")).splitlines()
    assert lines[0] == "name    value" and set(lines[1]) == {"-"} and len(lines[1]) == len(lines[0])
    assert lines[2:] == ["a        1.00", "longer  12.50"]
    assert text_table([("a", "1"), ("b", "12")], left=(0, 1)) == "a  1\nb  12"


def test_cells_are_no_markup() -> None:
    assert "[red]x[/red]" in text_table([("[red]x[/red]", ":smile:")])
    assert ":smile:" in text_table([("[red]x[/red]", ":smile:")])


@pytest.mark.parametrize("width", [20, 40])
def test_a_width_is_kept_by_wrapping(width: int) -> None:
    text = text_table([("a" * 30, "b" * 30)], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("a") == text.count("b") == 30, "no cell is cut"


def test_what_is_no_terminal_gets_a_row_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(text_table([("a" * 300, "b" * 300)]).splitlines()) == 1
