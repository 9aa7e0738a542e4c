"""report.json, report.html, the console table, the contact sheet: content, form, how they are written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuraleraser.bench.measure import Measure
from neuraleraser.bench.page import page, save_html
from neuraleraser.bench.pictures import contact_sheet, difference
from neuraleraser.bench.report import ConceptSection, FeaturePanel, Pair, Report, size_text, terminal_table
from neuraleraser.errors import DataError, FileError

EVIL = '<script>alert(\'x\')</script> " onload="x" & <img src=http://example.org/a.png>'


def flat(*colour: int) -> np.ndarray:
    return np.full((16, 16, 3), colour, dtype=np.uint8)


RED, BLUE = flat(200, 20, 20), flat(20, 20, 200)
PAIR = Pair("a cat in Van Gogh style", 188, RED, BLUE)
SAME = Pair("a dog", 288, RED, RED.copy())
HALF = Measure(0.5, 60, 0.4, 0.6)


def section(**change) -> ConceptSection:
    names = ("ua", "ira", "cra", "kept", "artefact_rate", "unchanged_share")
    figures = {name: HALF for name in names} | {"bystander": None, "make_seconds": 41.5}
    figures |= {"bytes": 48_213, "overhead": 1.01} | change.pop("metrics", {})
    return ConceptSection(**{"name": "Van_Gogh", "kind": "style", "metrics": figures} | change)


def report(*sections: ConceptSection, **change) -> Report:
    base = {"style_accuracy": HALF, "object_accuracy": HALF, "artefact_rate": HALF}
    judge = {"style_accuracy": 0.99, "object_accuracy": 0.98}
    settings = {"steps": np.int64(25), "sites": ("a", "b"), "folder": Path("x"), "fit": {"rank": 8}}
    return Report(**{"base": base, "judge": judge, "concepts": sections, "settings": settings} | change)


def full() -> Report:
    panels = [FeaturePanel("feature 7", "fires on swirls", [("step 3", RED)]), FeaturePanel(EVIL)]
    whole = section(
        pairs=[PAIR, SAME], others=[SAME, PAIR], features=panels, became=[("Seed_Images", HALF), (EVIL, 0.5)]
    )
    other = section(name=EVIL, kind="object", method="oracle", pairs=[Pair(EVIL, 1, RED, BLUE)])
    return report(whole, other, versions={EVIL: EVIL}, title=EVIL, intro=EVIL)


def test_report_json_has_the_promised_keys(tmp_path: Path):
    named = report(section(became=[("Mosaic", HALF)], metrics={"extra": HALF}), section(method="none"))
    named.save_json(tmp_path / "report.json")

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert list(data) == ["base", "judge", "concepts", "settings", "versions"]
    assert {"style_accuracy", "object_accuracy", "artefact_rate"} <= set(data["base"])
    assert (data["judge"]["style_accuracy"], data["judge"]["object_accuracy"]) == (0.99, 0.98)
    concept = data["concepts"][0]
    assert list(concept)[:14] == [
        "method", "name", "kind", "n", "ua", "ira", "cra", "kept", "bystander", "artefact_rate",
        "unchanged_share", "make_seconds", "bytes", "overhead",
    ]  # fmt: skip
    assert (concept["ua"], concept["n"], concept["bystander"]) == (0.5, 60, None)
    assert concept["ci"]["ua"] == [0.4, 0.6] and concept["ns"]["kept"] == 60
    assert "bystander" not in concept["ci"] and "bytes" not in concept["ci"]
    assert (concept["make_seconds"], concept["bytes"], concept["overhead"]) == (41.5, 48_213, 1.01)
    assert concept["extra"] == 0.5
    assert concept["became"] == [{"label": "Mosaic", "share": 0.5, "ci": {"share": [0.4, 0.6]}, "ns": {"share": 60}}]
    assert data["settings"] == {"steps": 25, "sites": ["a", "b"], "folder": "x", "fit": {"rank": 8}}


def test_a_ratio_that_a_weak_base_leaves_empty_is_null() -> None:
    data = report(section(metrics={"kept": None, "bystander": None})).to_dict()
    assert data["concepts"][0]["kept"] is None and "kept" not in data["concepts"][0]["ci"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (report(section(metrics={"ua": float("nan")})), r"'Van_Gogh'\.ua is nan"),
        (report(section(metrics={"ua": Measure(0.5, 1, 0.1, float("inf"))})), "ci.ua"),
        (report(section(metrics={"unchanged_share": None})), "has no unchanged_share"),
        (report(section(metrics={"bytes": None})), "has no bytes"),
        (report(section(kind="colour")), "kind 'colour'"),
        (report(section(), section()), "twice"),
        (report(section(became=[("Mosaic", float("nan"))])), "became 'Mosaic'"),
        (report(base={}), "base has no style_accuracy, object_accuracy, artefact_rate"),
        (report(settings={"a": {"b": [1, float("nan")]}}), r"settings\.a\.b\[1\]"),
        (report(settings={"a": object()}), "settings.a is a object|settings.a is an object"),
    ],
)
def test_a_report_that_lacks_something_is_not_written(tmp_path: Path, broken: Report, says: str):
    for save in (broken.save_json, lambda path: save_html(broken, path)):
        with pytest.raises(DataError, match=says):
            save(tmp_path / "report")
    assert os.listdir(tmp_path) == []


class Page(HTMLParser):
    """Checks that every element is closed where it should be, and collects what a browser would load."""

    VOID = frozenset({"meta", "img", "br", "path", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_and_needs_nothing_else():
    text = page(full())
    tags = Page(text).tags
    names = {name for name, _ in tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "video", "audio", "form", "base"}
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    for name, attrs in tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("srcset", "poster", "action")]
        if "src" in attrs:
            assert name == "img" and re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", attrs["src"] or "")
        if "href" in attrs:
            assert (attrs["href"] or "").removeprefix("#") in ids
    style = re.search("<style>(.*)</style>", text, re.DOTALL)
    assert style and not re.search(r"url\(|@import|@font-face|https?:", style[1])
    pictures = [attrs for name, attrs in tags if name == "img"]
    assert len(pictures) == 2 * 3 + 2 * 2 + 1 + 3
    assert all(attrs["alt"] and attrs["width"] == "16" for attrs in pictures)


def test_the_page_says_what_the_report_says():
    words = " ".join(" ".join(Page(page(full())).words).split())
    assert "0.50 (0.40\u20130.60)" in words
    assert "Van Gogh" in words and "48 kB" in words and "42 s" in words and "\u00d71.01" in words
    assert "1 of 2 shown here are the base model's image, bit for bit" in words
    assert words.count(EVIL) >= 6, "text from prompts stands there as text"
    assert "fires on swirls" in words and "Seed Images" in words


def test_files_are_written_aside_and_then_renamed(tmp_path: Path, monkeypatch):
    writers = {
        "report.json": full().save_json,
        "report.html": lambda path: save_html(full(), path),
        "sheet.png": lambda path: contact_sheet([("Van_Gogh", [PAIR])], path),
    }
    for name, write in writers.items():
        write(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in writers}
    for failure, expected in (
        (OSError(28, "No space left on device"), FileError),
        (KeyboardInterrupt(), None),
    ):

        def fail(*_, failure=failure):
            raise failure

        monkeypatch.setattr(os, "replace", fail)
        for name, write in writers.items():
            with pytest.raises(expected or KeyboardInterrupt):
                write(tmp_path / name)
    assert {name: (tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))} == before


def test_pictures_are_checked():
    for bad in (RED.astype(np.float32), RED[..., 0], RED[:0], [[1]]):
        with pytest.raises(DataError, match="'before' of 'a cat' at seed 3"):
            Pair("a cat", 3, bad, RED)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"\(16, 16, 3\) and \(8, 16, 3\)"):
        Pair("a cat", 3, RED, RED[:8])
    with pytest.raises(DataError, match="heatmap 'step 3' of feature 'f'"):
        FeaturePanel("f", heatmaps=[("step 3", RED / 255)])


def test_difference_is_four_times_the_gap_either_way():
    pair = Pair("p", 0, flat(10, 100, 0), flat(0, 110, 255))
    assert difference(pair)[0, 0].tolist() == [40, 40, 255]
    assert not difference(SAME).any() and SAME.identical and not PAIR.identical


def test_the_contact_sheet_shows_before_left_of_after(tmp_path: Path):
    wide = Pair("p", 0, np.tile(RED, (1, 2, 1)), np.tile(BLUE, (1, 2, 1)))
    contact_sheet([("Van_Gogh", [PAIR, PAIR]), ("Cats", [wide])], tmp_path / "sheet.png", tile=64)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    red, blue = ((sheet == colour).all(axis=2) for colour in (RED[0, 0], BLUE[0, 0]))
    assert red.sum() == blue.sum() == 2 * 64 * 64 + 64 * 32, "the wide picture keeps its proportions"
    rows, columns = np.nonzero(red)
    assert columns.min() < np.nonzero(blue)[1].min()
    label = sheet[rows.min() : rows.min() + 64, : columns.min()]
    assert (label < 100).all(axis=2).any(), "there is a label left of the first row"
    with pytest.raises(DataError, match="'Cats'"):
        contact_sheet([("Cats", [])], tmp_path / "sheet.png")
    with pytest.raises(DataError, match="0 rows"):
        contact_sheet([], tmp_path / "sheet.png")


def test_the_console_table_is_aligned_and_fits():
    long = section(name="A_very_long_name_of_a_concept", method="another_long_method_name")
    ratio = Measure(1.004, 123_456, 0.991, 1.017)
    wide = section(metrics={"bystander": ratio, "ira": ratio, "ua": ratio, "make_seconds": 12345, "bytes": 123e6})
    lines = terminal_table([section(), long, dataclasses.replace(wide, kind="object")]).splitlines()
    assert len(lines) == 2 + 3 * 2
    assert max(map(len, lines)) <= 120 and all(line.isascii() for line in lines)
    at = lines[0].index("ua") + 2
    assert lines[2][at - 4 : at] == "0.50" and lines[3][at - 9 : at] == "0.40-0.60" and lines[6][at - 4 : at] == "1.00"
    assert "48 kB" in lines[2] and "x1.01" in lines[2] and "60" in lines[2] and "style, eraser" in lines[3]


def test_sizes_read_well():
    assert [size_text(n) for n in (0, 812, 999.6, 1500, 48_213, 999_999, 2_500_000)] == [
        "0 B", "812 B", "1.0 kB", "1.5 kB", "48 kB", "1.0 MB", "2.5 MB",
    ]  # fmt: skip
