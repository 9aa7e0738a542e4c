"""Names of strangers: bounded, fit to print, and file names that stay in their folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuraleraser.io.names import MAX_NAME, file_name, name_error, printable

BAD = [
    "",
    "  ",
    "a\nb",
    "a\x1b[31mb",
    "a\0b",
    "a\x7f",
    "x" * (MAX_NAME + 1),
    "\u202eabc",
    "\ud800",
    "a\u2028b",
    5,
    None,
]
GOOD = ["Cats", "Van_Gogh", "a cat", "AC/DC style", "../../../x", "Monet's été", "猫", "x" * MAX_NAME]
PATHS = ["../../../x", "..", ".", "a/b", "a\\b", "/etc/passwd", "C:\\x", "~", "a:b", "CON", "nul.txt", ".hidden", "a."]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_names_that_are_none(name: object):
    error = name_error(name)
    assert error and error.isprintable() and len(error) < 250


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are_some(name: str):
    assert name_error(name) is None


@pytest.mark.parametrize("name", PATHS)
def test_no_name_leads_out_of_its_folder(name: str, tmp_path: Path):
    path = tmp_path / f"{file_name(name)}.safetensors"
    path.write_text("x")
    assert path.resolve().parent == tmp_path.resolve() and [p.name for p in tmp_path.iterdir()] == [path.name]
    assert file_name(name) != name and not path.name.startswith(".")


@pytest.mark.parametrize("name", ["Cats", "Van_Gogh", "a cat", "x.y-z", "été"])
def test_a_plain_name_is_kept(name: str):
    assert file_name(name) == name


@given(st.text(max_size=300))
def test_any_text_is_a_file_s_name(name: str):
    stem = file_name(name)
    assert stem and Path(stem).name == stem and stem not in (".", "..") and len(stem.encode()) < 140
    assert stem.isprintable() and file_name(stem) == stem


@given(st.lists(st.text("ab/\\.: \u0301é", max_size=6), unique=True, max_size=30))
def test_two_names_never_share_a_file(names: list[str]):
    assert len({file_name(name) for name in names}) == len(names)


@given(st.text(), st.integers(4, 60))
def test_any_text_can_be_printed(text: str, most: int):
    line = printable(text, most)
    assert line.isprintable() and len(line) <= most
    line.encode()
    if text.isprintable() and len(text) <= most and text == " ".join(text.split()):
        assert line == text
