"""Two reports side by side: what differs by more than chance, what one has alone, and what is no report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import refused
from neuraleraser.cli import main
from neuraleraser.errors import FileError
from neuraleraser.evaluation.comparison import compare_reports


def entry(method: str = "neuraleraser", routes: bool = False, **figures: tuple[float, float, float]) -> dict[str, Any]:
    """An entry of a report: value, low and high of each figure, of 40 images."""

    def written(figures: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
        return {
            **{name: value for name, (value, _, _) in figures.items()},
            "ci": {name: [low, high] for name, (_, low, high) in figures.items()},
            "ns": dict.fromkeys(figures, 40),
        }

    route = {"group": "image-to-image, empty", "strength": 0.5, **written({"shown_after": (0.1, 0.0, 0.2)})}
    return {"name": "Van_Gogh", "method": method, **written(figures), "route_figures": [route] * routes}


def write(path: Path, *entries: dict[str, Any], **settings: Any) -> Path:
    path.write_text(json.dumps({"concepts": entries, "settings": settings}))
    return path


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    first = write(tmp_path / "a.json", entry(ua=(1, 0.9, 1), ira=(0.9, 0.8, 1)), entry("none", ua=(0, 0, 0.1)), seed=1)
    second = write(tmp_path / "b.json", entry(routes=True, ua=(0.5, 0.4, 0.6), ira=(0.95, 0.9, 1)), seed=2)
    return first, second


def test_what_differs_and_what_one_has_alone(both: tuple[Path, Path]):
    found = compare_reports(*both)
    assert [(d.figure, d.apart) for d in found.differences] == [("ua", True), ("ira", False)]
    assert found.differences[0].first.n == 40 and found.differences[0].second.value == 0.5
    assert found.only_first == (("Van_Gogh", "none", "ua"),)
    assert found.only_second == (("Van_Gogh", "neuraleraser", "image-to-image, empty 0.5: shown_after"),)
    assert found.settings == {"seed": (1, 2)}
    turned = compare_reports(*reversed(both))
    assert [d.apart for d in turned.differences] == [True, False], "whichever is the lower"


def test_intervals_that_touch_are_not_apart(tmp_path: Path):
    first, second = (write(tmp_path / f"{i}.json", entry(ua=x)) for i, x in enumerate([(1, 0.9, 1), (0.8, 0.7, 0.9)]))
    assert not compare_reports(first, second).differences[0].apart


def test_a_report_is_as_itself():
    path = Path(__file__).parents[2] / "benchmarks/results/demo.json"
    found = compare_reports(path, path)
    assert len(found.differences) > 100 and not any(d.apart for d in found.differences)
    assert not found.only_first and not found.only_second and not found.settings


def test_the_verb(both: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    assert main(["compare", *map(str, both)]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "-0.50 *" in line]
    assert line.split()[:3] == ["Van_Gogh", "neuraleraser", "ua"] and "ira" not in out
    assert "1 of 2 figures differ by more than their 95 % intervals" in out and "seed: 1 and 2" in out
    assert f"1 figures are in {both[0]} alone: Van_Gogh, none, ua" in out
    assert main(["compare", *map(str, both), "--every"]) == 0
    assert "+0.05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no report"),
        ('{"concepts": 3}', "is no report"),
        ('{"concepts": [], "settings": []}', "is no report"),
        ('{"concepts": [{"name": "a"}]}', "is a damaged report"),
        ('{"concepts": [{"name": "a", "method": "b", "ci": {"ua": [0]}, "ns": {}, "ua": 1}]}', "is a damaged report"),
        ('{"concepts": [{"name": "a", "method": "b", "ci": [], "route_figures": 3}]}', "is a damaged report"),
        ('{"concepts": ["a"]}', "is a damaged report"),
        *(
            (
                f'{{"concepts": [{{"name": "a", "method": "b", "ci": {{"x": {ci}}}, "ns": {{"x": 1}}, "x": {x}}}]}}',
                error,
            )
            for ci, x, error in (
                ("[0, 1]", "1" + "0" * 400, "is a damaged report"),
                ("[5, -5]", "1", "is a damaged report"),
                ("[0, 1]", "true", "is a damaged report"),
            )
        ),
        (json.dumps({"concepts": [entry(ua=(1, 1, 1)), entry(ua=(0, 0, 0))]}), "stands there twice"),
    ],
)
def test_what_is_no_report_is_refused(
    text: str, message: str, both: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(FileError, match=message):
        compare_reports(both[0], tmp_path / "c.json")
    assert message in refused(["compare", str(tmp_path / "c.json"), str(both[0])], capsys)
    with pytest.raises(FileError, match=r"none\.json"):
        compare_reports(tmp_path / "none.json", both[0])
