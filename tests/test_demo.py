"""The demo's own part: from phrases to files, anew or going on. (What it calls is tested where it lives.)"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, open_eraser
from neuraleraser import demo as module
from neuraleraser import families
from neuraleraser.assessment import with_measurement
from neuraleraser.concepts import Concept, canvas_concept, concept_of
from neuraleraser.demo import demo
from neuraleraser.eraser import Eraser
from neuraleraser.errors import ConceptError, FileError, SettingsError
from neuraleraser.evaluation.figures import ImagePair
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.families.canvas import CANVAS
from neuraleraser.io.locks import locked
from neuraleraser.settings import DemoSettings, EvaluateSettings, Sampling


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the slow parts; returns the names that were fitted, as they are."""
    names: list[str] = []

    def fit(
        pipe: Any, concept: Concept, settings: Any, progress: Callable[[str, float], None], *, reference: Any
    ) -> Any:
        names.append(concept.name)
        for i in range(4):
            progress("fitting", i / 3)
        return open_eraser(concept.name, concept.kind, seed=len(names))

    def evaluate(pipe: Any, erasers: Any, settings: Any, folder: Path) -> Report:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text("{}")
        (folder / "seen").write_text((folder / "seen").read_text() + "again" if (folder / "seen").exists() else "once")
        one = Estimate(1.0, 20, 0.83, 1.0)
        image = np.zeros((8, 8, 3), np.uint8)
        entries = [
            ErasureReport(
                "neuraleraser", e.name, e.header.kind or "", {"ua": one}, pairs=[ImagePair("a cat", 1, image, image)]
            )
            for e in erasers
        ]
        for e, entry in zip(erasers, entries, strict=True):
            with_measurement(e, entry).save(folder / "erasers" / f"{e.name}.safetensors")
        return Report({"style_accuracy": one}, {"name": "a judge"}, entries)

    monkeypatch.setattr(module, "open_pipeline", lambda *args: object())
    monkeypatch.setattr(families, "FAMILIES", (replace(CANVAS, matches=lambda pipe: True),))
    monkeypatch.setattr(module, "shipped_reference", lambda *args: None)
    monkeypatch.setattr(module, "fit", fit)
    monkeypatch.setattr(module, "evaluate_erasers", evaluate)
    monkeypatch.setattr(module, "first_look", lambda *args: np.zeros((8, 8, 3), np.uint8))
    return names


def test_concepts_from_phrases(fitted: list[str], tmp_path: Path):
    said: list[str] = []
    demo(DemoSettings(folder=tmp_path, phrases=("Van Gogh style", "Fire", "cat")), said.append)
    assert fitted == ["Van_Gogh", "On_Fire", "Cats"]
    looks = [i for i, line in enumerate(said) if line.startswith(str(tmp_path / "erasers")) and ".png" in line]
    assert len(looks) == 3 and looks[0] < next(i for i, line in enumerate(said) if "'Fire' ->" in line)
    assert (tmp_path / "erasers" / "Cats.png").is_file()
    files = ["contact.png", "figures.csv", "report.html", "report.json", "tables.tex"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".lock", *files, "erasers", "run"])
    text = "\n".join(said)
    assert "erased" in text and "n=20" in text and str(tmp_path / "report.html") in text
    kept = Eraser.load(tmp_path / "erasers" / "Cats.safetensors")
    assert kept.header.measured["ua"] == {"value": 1.0, "low": 0.83, "high": 1.0, "n": 20}
    assert f"'Fire' -> {tmp_path / 'erasers' / 'On_Fire.safetensors'}" in text


def test_a_demo_starts_anew_unless_told_to_go_on(fitted: list[str], tmp_path: Path):
    s = DemoSettings(folder=tmp_path, phrases=("cat",))
    demo(s, lambda text: None)
    assert fitted == ["Cats"]
    said: list[str] = []
    demo(replace(s, resume=True), said.append)
    assert fitted == ["Cats"] and "is there already" in "\n".join(said)
    assert (tmp_path / "run" / "seen").read_text() == "onceagain"
    demo(s, lambda text: None)
    assert fitted == ["Cats", "Cats"] and (tmp_path / "run" / "seen").read_text() == "once"


def test_a_folder_that_is_not_the_demos_is_left_alone(fitted: list[str], tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    demo(DemoSettings(folder=tmp_path, phrases=("cat",)), lambda text: None)
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep"


def test_an_unknown_phrase_stops_the_demo_before_anything_is_made(fitted: list[str], tmp_path: Path):
    with pytest.raises(ConceptError, match="no concept 'unicorn'"):
        demo(DemoSettings(folder=tmp_path / "demo", phrases=("cat", "unicorn")), lambda text: None)
    assert fitted == [] and not (tmp_path / "demo").exists()


@pytest.mark.parametrize("acts", [False, True])
def test_a_first_look_shows_what_an_eraser_does(acts: bool, monkeypatch: pytest.MonkeyPatch):
    rows: list[Any] = []
    monkeypatch.setattr(families, "FAMILIES", (replace(CANVAS, matches=lambda pipe: True),))
    monkeypatch.setattr(module, "default_sampling", lambda pipe: Sampling(num_inference_steps=2))
    monkeypatch.setattr(module, "grid_sheet", lambda given, heads: rows.extend(given) or np.zeros((8, 8, 3), np.uint8))
    module.first_look(pipelines.stable_diffusion(), make_eraser(name="Van_Gogh", **({} if acts else SHUT)))
    named = ["Van Gogh" in prompt for prompt, _ in rows]
    assert named == [True, True, True, False] and len({prompt for prompt, _ in rows}) == 4
    assert all(bool((before != after).any()) == acts for _, (before, after) in rows)


def test_a_demo_measures_what_it_erases():
    concepts = [("Fire", canvas_concept("On_Fire")), ("cat", canvas_concept("Cats"))]
    s = module._with_concepts(DemoSettings().evaluate, concepts)
    assert s.styles[-1] == "On_Fire" and s.objects[-1] == "Cats" and len(s.styles) == 8
    assert module._with_concepts(s, concepts) == s
    assert module._with_concepts(EvaluateSettings(), concepts) == EvaluateSettings()  # none named: all


@pytest.mark.parametrize(
    ("phrases", "evaluate", "error"),
    [
        (("cat", "Cats"), EvaluateSettings(), "'Cats' names Cats, as 'cat' does"),
        (("cat", "cat"), EvaluateSettings(), "'cat' names Cats, as 'cat' does"),
        (("cat",), EvaluateSettings(styles=("Nope",)), "Nope"),
        (("mine.json",), EvaluateSettings(), "none of the canvas's own concepts"),
    ],
)
def test_what_cannot_be_shown_or_measured_stops_the_demo_before_anything_is_made(
    fitted: list[str], tmp_path: Path, phrases: tuple[str, ...], evaluate: EvaluateSettings, error: str
):
    mine = tmp_path / "mine.json"
    mine.write_text('{"name": "my cats", "kind": "object", "pairs": [["a cat", "a scene"]]}')
    phrases = tuple(str(mine) if phrase == mine.name else phrase for phrase in phrases)
    with pytest.raises((ConceptError, SettingsError), match=error):
        demo(DemoSettings(folder=tmp_path / "demo", phrases=phrases, evaluate=evaluate), lambda text: None)
    assert fitted == [] and not (tmp_path / "demo").exists()


def test_one_demo_at_a_time_in_a_folder(fitted: list[str], tmp_path: Path):
    with locked(tmp_path / ".lock"), pytest.raises(FileError, match="another demo is at work"):
        demo(DemoSettings(folder=tmp_path, phrases=("cat",)), lambda text: None)
    assert fitted == []


def test_phrases_on_other_pipelines_become_templates():
    concept = concept_of(object(), "Van Gogh style")
    assert concept.kind == "style" and len(concept.pairs) > 10
    assert concept_of(object(), "Van Gogh style", "object").kind == "object"
