"""report.json, report.html, the console table, the contact sheet: content, form, how they are written."""

from __future__ import annotations

import base64
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuraleraser.errors import DataError, FileError
from neuraleraser.evaluation.columns import TABLES
from neuraleraser.evaluation.damage_metrics import ClassDamage, LookAlikes
from neuraleraser.evaluation.figures import (
    FeaturePanel,
    GatePanel,
    ImagePair,
    contact_sheet,
    difference,
    overlay,
    png,
    reduced,
    spaced_sample,
)
from neuraleraser.evaluation.html import page, save_html
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.measure import Finding
from neuraleraser.evaluation.report import ErasureReport, Report, size_text
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.terminal import terminal_tables

EVIL = '<script>alert(\'x\')</script> " onload="x" & <img src=http://example.org/a.png> {{ data }}'


def flat(*colour: int) -> np.ndarray:
    return np.full((16, 16, 3), colour, dtype=np.uint8)


RED, BLUE = flat(200, 20, 20), flat(20, 20, 200)
PAIR = ImagePair("a cat in Van Gogh style", 188, RED, BLUE)
SAME = ImagePair("a dog", 288, RED, RED.copy())
STARTED = ImagePair("", 388, RED, BLUE, "start image")
HALF = Estimate(0.5, 60, 0.4, 0.6)
COSTS = {"make_seconds": 41.5, "make_peak_bytes": 1.5e9, "bytes": 48_213, "overhead": 1.01, "overhead_idle": 1.0}
FIGURES = {c.name: HALF for table in TABLES for c in table.columns} | COSTS | {"bystander": None}


def entry(**change) -> ErasureReport:
    figures = FIGURES | change.pop("figures", {})
    return ErasureReport(
        **{"method": "neuraleraser", "concept": "Van_Gogh", "kind": "style", "figures": figures} | change
    )


def report(*entries: ErasureReport, **change) -> Report:
    base = {"style_accuracy": HALF, "object_accuracy": HALF, "artefact_rate": HALF}
    judge = {"name": "StampJudge", "figures": {"style": 0.99, "object": 0.98}}
    settings = {"steps": np.int64(25), "sites": ("a", "b"), "folder": Path("x"), "fit": {"rank": 8}}
    return Report(**{"base": base, "judge": judge, "erasures": entries, "settings": settings} | change)


def full() -> Report:
    panels = [FeaturePanel("feature 7", "fires on swirls", [("step 3", RED)]), FeaturePanel(EVIL)]
    gates = [GatePanel("Image gate", "sees", [(EVIL, BLUE)], panels), GatePanel(EVIL, EVIL)]
    whole = entry(
        pairs=[PAIR, SAME],
        started=[STARTED],
        others=[SAME, PAIR],
        gates=gates,
        routes=EVIL,
        became=[("Seed_Images", HALF), (EVIL, HALF)],
        beside=[PAIR, SAME],
        damage=[ClassDamage(EVIL, "style", HALF), ClassDamage("Cats", "object", HALF)],
        lookalikes=LookAlikes(((EVIL, 0.25),), Estimate(0.0, 60, -0.1, 0.1)),
    )
    control = entry(method="string filter", beside=[SAME, PAIR])
    other = entry(concept=EVIL, kind="object", method=EVIL, pairs=[ImagePair(EVIL, 1, RED, BLUE)])
    findings = [Finding("error", f"base images differ {EVIL}")]
    return report(whole, control, other, versions={EVIL: EVIL}, title=EVIL, intro=EVIL, findings=findings)


def test_report_json_has_the_promised_keys(tmp_path: Path):
    named = report(
        entry(became=[("Mosaic", HALF)], figures={"extra": HALF}), entry(method="none"), findings=[Finding("note", "x")]
    )
    named.save_json(tmp_path / "report.json")

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert list(data) == ["findings", "base", "judge", "concepts", "settings", "versions"]
    assert {"style_accuracy", "object_accuracy", "artefact_rate"} <= set(data["base"])
    assert data["judge"]["figures"] == {"style": 0.99, "object": 0.98}
    concept = data["concepts"][0]
    assert list(concept)[:4] == ["method", "name", "kind", "n"] and set(FIGURES) < set(concept)
    assert (concept["ua"], concept["n"], concept["bystander"]) == (0.5, 60, None)
    assert concept["ci"]["ua"] == [0.4, 0.6] and concept["ns"]["kept_still"] == 60
    assert "bystander" not in concept["ci"] and "bytes" not in concept["ci"]
    assert {name: concept[name] for name in COSTS} == COSTS and concept["extra"] == 0.5
    assert concept["became"] == [{"label": "Mosaic", "share": 0.5, "ci": {"share": [0.4, 0.6]}, "ns": {"share": 60}}]
    assert data["settings"] == {"steps": 25, "sites": ["a", "b"], "folder": "x", "fit": {"rank": 8}}
    assert data["findings"] == [{"level": "note", "text": "x"}]


def test_every_share_has_its_interval_and_n_in_every_form():
    """In report.json, on the page and in the terminal; the controls and the concept's own artefacts are there too."""
    whole = report(entry(), entry(method="string filter"), entry(method="none"))
    for concept in whole.to_dict()["concepts"]:
        shares = [name for name, value in concept.items() if isinstance(value, float) and name not in COSTS]
        assert set(shares) == set(concept["ci"]) == set(concept["ns"])
    columns = [c for table in TABLES for c in table.columns if c.name not in COSTS and c.name != "bystander"]
    for text in (page(whole), terminal_tables(whole)):
        assert text.count("string filter") >= len(TABLES) and "artefacts" in text and "UnlC. UA" in text
        assert len(re.findall(r"n ?= ?60", text)) == 3 * len(columns) + (3 if "<html" in text else 0)
        assert len(re.findall(r"0\.40(-|&ndash;)0\.60", text)) == 3 * len(columns) + (3 if "<html" in text else 0)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (report(entry(figures={"ua": float("nan")})), r"'Van_Gogh'\.ua is nan"),
        (report(entry(figures={"ua": Estimate(0.5, 1, 0.1, float("inf"))})), "ci.ua"),
        (report(entry(kind="colour")), "kind 'colour'"),
        (report(entry(), entry()), "twice"),
        (report(entry(became=[("Mosaic", Estimate(float("nan"), 1, 0, 1))])), "became 'Mosaic'"),
        (report(settings={"a": {"b": [1, float("nan")]}}), r"settings\.a\.b\[1\]"),
        (report(settings={"a": object()}), "settings.a is a object|settings.a is an object"),
    ],
)
def test_a_report_that_is_wrong_is_not_written(tmp_path: Path, broken: Report, says: str):
    for save in (broken.save_json, lambda path: save_html(broken, path)):
        with pytest.raises(DataError, match=says):
            save(tmp_path / "report")
    assert os.listdir(tmp_path) == []


def test_details_are_added_to_one_entry():
    before = report(entry(figures={"bytes": None}), entry(method="none"))
    after = before.with_details("neuraleraser", "Van_Gogh", {"bytes": 7.0}, [GatePanel("g")], "by a prompt")
    assert after.of("neuraleraser", "Van_Gogh").figures["bytes"] == 7 and len(after.erasures[0].gates) == 1
    assert after.erasures[1] is before.erasures[1] and before.erasures[0].figures["bytes"] is None
    with pytest.raises(DataError, match="no method 'oracle'"):
        after.of("oracle", "Van_Gogh")


def test_a_column_without_figures_is_left_out():
    blind = report(*(entry(figures={c: None for c in FIGURES if "artefact" in c}) for _ in range(1)))
    for text in (page(blind), terminal_tables(blind)):
        assert "artefacts" not in text.replace("Base model, artefacts", "") and "held out" in text


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
    others, beside = 2 + 3, 2 + 2 * 2  # differences where there are any, and no second picture of the same bits
    assert len(pictures) == 2 * 3 + 3 + others + 2 + 3 + beside, "but for those, of the first method of each concept"
    assert all(attrs["alt"] and attrs["width"] == "16" for attrs in pictures)


def test_the_page_says_what_the_report_says():
    words = " ".join(" ".join(Page(page(full())).words).split())
    assert "0.50 0.40\u20130.60 n = 60" in words
    assert "Van Gogh" in words and "48 kB" in words and "42 s" in words and "x1.01" in words
    assert "1 of 2 shown here are the base model's image, bit for bit" in words and "difference \u00d74" in words
    assert "start image seed 388" in words
    assert words.count(EVIL) >= 12, "text from prompts stands there as text, and no template runs in it"
    assert (
        "fires on swirls" in words
        and "Image gate sees" in words
        and "Seed Images" in words
        and "base images differ" in words
    )


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
            ImagePair("a cat", 3, bad, RED)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match=r"\(16, 16, 3\) and \(8, 16, 3\)"):
        ImagePair("a cat", 3, RED, RED[:8])
    with pytest.raises(DataError, match="heatmap 'step 3' of feature 'f'"):
        FeaturePanel("f", heatmaps=[("step 3", RED / 255)])
    with pytest.raises(DataError, match="heatmap 'step 3' of the gate 'Image gate'"):
        GatePanel("Image gate", heatmaps=[("step 3", RED / 255)])


def test_difference_is_four_times_the_gap_either_way():
    pair = ImagePair("p", 0, flat(10, 100, 0), flat(0, 110, 255))
    assert difference(pair)[0, 0].tolist() == [40, 40, 255]
    assert not difference(SAME).any() and SAME.identical and not PAIR.identical


def test_large_pictures_are_reduced_in_the_page():
    noise = np.random.default_rng(0).integers(0, 256, (600, 300, 3), dtype=np.uint8)
    small = reduced(noise, 256)
    assert small.shape == (256, 128, 3) and reduced(RED, 256) is RED
    halves = noise[:512, :256].astype(float).reshape(256, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(reduced(noise[:512, :256], 256) - halves).max() <= 1
    text = page(report(entry(pairs=[ImagePair("p", 0, noise, noise[::-1].copy())])))
    assert base64.b64encode(png(small)).decode() in text and 'width="300" height="600"' in text


def test_the_contact_sheet_shows_before_left_of_after(tmp_path: Path):
    wide = ImagePair("p", 0, np.tile(RED, (1, 2, 1)), np.tile(BLUE, (1, 2, 1)))
    contact_sheet([("Van_Gogh", [PAIR, PAIR]), ("Cats", [wide])], tmp_path / "sheet.png", tile=64)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    red, blue = ((sheet == colour).all(axis=2) for colour in (RED[0, 0], BLUE[0, 0]))
    assert red.sum() == blue.sum() == 2 * 64 * 64 + 64 * 32, "the wide picture keeps its proportions"
    rows, columns = np.nonzero(red)
    assert columns.min() < np.nonzero(blue)[1].min()
    started = replace(PAIR, route="start image")
    contact_sheet([("Van_Gogh", [PAIR, started])], tmp_path / "routes.png", tile=64)
    head = np.array(Image.open(tmp_path / "routes.png"))[: rows.min() - 2]
    ink = [
        np.nonzero((head[:, side] < 200).all(axis=2))[0].size
        for side in (np.s_[: head.shape[1] // 2], np.s_[head.shape[1] // 2 :])
    ]
    assert ink[1] > ink[0] > 0, "the route stands above its column"
    label = sheet[rows.min() : rows.min() + 64, : columns.min()]
    assert (label < 100).all(axis=2).any(), "there is a label left of the first row"
    with pytest.raises(DataError, match="'Cats'"):
        contact_sheet([("Cats", [])], tmp_path / "sheet.png")
    with pytest.raises(DataError, match="0 rows"):
        contact_sheet([], tmp_path / "sheet.png")


def test_the_console_tables_are_aligned_and_fit():
    ratio = Estimate(1.004, 123_456, 0.991, 1.017)
    long = entry(concept="A_very_long_name_of_a_concept", method="another_very_long_method_name")
    wide = entry(figures=dict.fromkeys(FIGURES, ratio) | {"make_seconds": 12345, "bytes": 123e6}, kind="object")
    text = terminal_tables(report(entry(), long, wide, findings=[Finding("error", "a bit changed")]))
    assert text.startswith("ERROR: a bit changed\n\n")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120 and all(line.isascii() for line in lines)
    heads = next(i for i, line in enumerate(lines) if line.startswith("Erased"))
    at = lines[heads].index(" erased") + 7
    assert [lines[heads + k][:at].split()[-1] for k in (3, 4, 5)] == ["0.50", "0.40-0.60", "n=60"]
    assert any("1.5 GB" in line and "48 kB" in line and "x1.01" in line for line in lines)
    assert "Kept" in text and "As others define it" in text
    every = dict.fromkeys((c.name for table in TABLES for c in table.columns), ratio)
    names = terminal_tables(report(entry(method="string-filter-seen", figures=every | COSTS)))
    assert len(re.findall(r"^ string-filter-seen ", names, re.MULTILINE)) == len(TABLES), "a method's name is wrapped"


def test_spaced_samples_are_even():
    assert spaced_sample("abcdefgh", 4) == list("adeh")
    assert spaced_sample("ab", 4) == list("aabb")
    assert spaced_sample("", 4) == []
    cells = [(row, column) for row in range(25) for column in range(20)]
    assert len({column for _, column in spaced_sample(cells, 8)}) > 3


def test_a_heatmap_shows_where():
    heat = np.zeros((2, 2))
    heat[0, 1] = 1
    image = overlay(np.full((8, 8, 3), 200, np.uint8), heat)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert (image[:8, 8:] == image[0, 8]).all() and (image[:8, :8] == image[0, 0]).all()
    assert image[0, 8, 0] > image[0, 8, 2] + 50  # warm where it fires
    assert len(set(image[0, 0].tolist())) == 1  # grey where not


def test_a_report_without_pictures_has_no_sheet(tmp_path: Path):
    files = ["report.html", "report.json", "figures.csv", "tables.tex"]
    assert [p.name for p in write_report(report(entry()), tmp_path)] == files
    assert [p.name for p in write_report(full(), tmp_path)] == [*files, "contact.png"]


def test_sizes_read_well():
    assert [size_text(n) for n in (0, 812, 999.6, 1500, 48_213, 999_999, 2_500_000, 1.23e9)] == [
        "0 B", "812 B", "1.0 kB", "1.5 kB", "48 kB", "1.0 MB", "2.5 MB", "1.2 GB",
    ]  # fmt: skip
