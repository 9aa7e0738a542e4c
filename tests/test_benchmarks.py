"""Benchmarks still load, and what they wrote is what they say that they write."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="a source distribution has no benchmarks")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def results(name: str) -> Any:
    return json.loads((FOLDER / "results" / name).read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_loads(name: str) -> None:
    """A name that the package no longer has is found here, and not when someone measures."""
    module = importlib.import_module(name)
    assert module.__doc__ and (not hasattr(module, "main") or "benchmarks/" in module.__doc__)


def test_every_rival_has_a_setting_that_was_tried() -> None:
    rivals, rows = importlib.import_module("canvas_rivals"), results("canvas-tuning.json")
    for label, rival in rivals.RIVALS.items():
        assert rivals.chosen(label, rows) in list(rival.grid), label


def test_the_official_run_has_ours_and_its_controls_on_all_concepts() -> None:
    official, whole = importlib.import_module("canvas_official"), results("canvas-official.json")
    places = [(entry["method"], entry["name"]) for entry in whole["concepts"]]
    assert len(set(places)) == len(places)
    for method in ("neuraleraser", "none", "oracle", "string-filter-all", "string-filter-seen"):
        assert {name for m, name in places if m == method} == {*official.STYLES, *official.OBJECTS}
    identity = [entry for entry in whole["concepts"] if entry["method"] == "none"]
    assert all(entry["ua"] == 0 and entry["unchanged_share"] == 1 for entry in identity)
    rivals = importlib.import_module("canvas_rivals")
    assert {*rivals.RIVALS, *official.SAEURON} <= {method for method, _ in places}


def test_attacks_have_the_row_of_the_base_model_beside_them() -> None:
    keys = {"attack", "method", "concept", "n", "before", "after", "control", "budget", "sound", "ci"}
    rows, known = results("canvas-attacks.json"), importlib.import_module("canvas_attacks").ATTACKS
    base = {(row["attack"], row["concept"]) for row in rows if row["method"] == "none"}
    for row in rows:
        assert set(row) == keys and row["attack"] in known
        assert (row["attack"], row["concept"]) in base
        assert 0 <= row["sound"] <= row["after"] <= 1 and row["budget"]["seconds"] >= 0


def test_the_tables_of_the_results_page_are_what_the_raw_outputs_say(capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("report_official").main()
    page = (FOLDER.parent / "docs/RESULTS.md").read_text()
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) > 60
    assert [line for line in lines if line not in page] == []


def test_rows_for_the_board_count_a_prompt_that_needs_no_attack_as_a_success() -> None:
    def entry(method: str, ua: float | None, **attacks: float) -> dict[str, Any]:
        found = [{"attack": name.replace("_", " "), "shown_after": share} for name, share in attacks.items()]
        return {"name": "Van_Gogh", "method": method, "ua": ua, "attacks": found, "distance": {"fid": 12.345}}

    entries = [entry("b", 0.9, searched_tokens=0.25), entry("a", 0.8, searched_tokens=0.0), entry("none", 0.0)]
    entries += [entry("c", 0.9, learned_embeddings=1.0), entry("d", None, searched_tokens=1.0)]
    found = importlib.import_module("unlearndiffatk_rows").rows([{"concepts": entries[:1]}, {"concepts": entries[1:]}])
    assert found == {"Van_Gogh": [["a", "20.00", "20.00", "12.35", ""], ["b", "10.00", "25.00", "12.35", ""]]}


def test_what_erasers_cost_is_measured_at_every_gate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The scripts themselves, on the smallest denoisers: a table that cannot be made again proves nothing."""
    overhead, picture = (importlib.import_module(name) for name in ("overhead", "overhead_picture"))
    rows = overhead.measure("tiny", 1, overhead.Settings(erasers=(1,), repeats=1))
    names = ["plain", "eraser", "eraser-shut", "eraser-shut, image gate shut", "full-sae-hook"]
    assert [row["name"] for row in rows] == names and all(row["ratio_to_plain"] >= 1 for row in rows)
    assert rows[3]["bytes"] > rows[2]["bytes"], "the image gate's features are in it"
    rows = picture.measure("canvas", 1, picture.Settings(repeats=1))
    assert [row["name"] for row in rows][-3:] == ["shut by bounds", "open", "first look"]
