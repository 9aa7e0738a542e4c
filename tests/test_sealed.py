"""The one look at the sealed concepts: on a tiny random pipeline, with erasers that are given."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.canvas_cells import WITH_TINY
from helpers.erasers import open_eraser
from helpers.stamp_judge import StampJudge, reader, stamping
from neuraleraser import families
from neuraleraser import sealed as module
from neuraleraser.canvas import words
from neuraleraser.cli import main
from neuraleraser.concepts import Concept, vocabulary_concept
from neuraleraser.eraser import Provenance
from neuraleraser.errors import SettingsError, SplitError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.sealed import evaluate_sealed
from neuraleraser.settings import EvaluateSettings, Sampling

STYLES, OBJECTS = ("Seed_Images", "Bricks", "Mosaic"), ("Bears", "Dogs", "Horses")
S = EvaluateSettings(
    grid_rounds=1,
    target_rounds=0,
    two_object_rounds=1,
    held_out_rounds=1,
    start_image_rounds=1,
    fragment_prompts=2,
    held_out_grid_rounds=0,
    unhooked_checks=2,
    idle_checks=0,
    timings=1,
    timed_images=1,
    sampling=Sampling(num_inference_steps=4, batch_size=8),
    styles=STYLES,
    objects=OBJECTS,
)


class Judge(StampJudge):
    styles, objects = STYLES, OBJECTS

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__(stop_at)
        self.thresholds = dict.fromkeys((*STYLES, *OBJECTS), 0.1)


@pytest.fixture(autouse=True, scope="module")
def family() -> Iterator[None]:
    """A tiny pipeline is asked for the canvas's concepts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", WITH_TINY)
        yield


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "generate", stamping)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean git checkout of one commit."""
    folder = tmp_path / "checkout"
    (folder / "docs").mkdir(parents=True)
    (folder / "code.py").write_text("pass")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        git(folder, *arguments)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def make(pipe: Any, concept: Concept) -> Any:
    e = open_eraser(concept.name, concept.kind)
    return replace(e, header=replace(e.header, reference=Provenance(((0, 999),))))


def run(checkout: Path, tmp_path: Path, judge: Judge | None = None) -> Any:
    names = ("Bricks", "Bears")
    return evaluate_sealed(
        reader(), S, tmp_path / "run", make=make, judge=judge or Judge(), checkout=checkout, names=names
    )


def test_a_run_adds_its_line_once_for_a_commit(checkout: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        run(checkout, tmp_path, Judge(stop_at=4))
    assert not (checkout / "docs/SEALED.md").exists(), "stopped before its end it has no figures"
    report = run(checkout, tmp_path)  # and goes on
    assert [e.concept for e in report.erasures] == ["Bricks"] * 4 + ["Bears"] * 4
    assert report.erasures[0].figures["ua"] is not None and (tmp_path / "run/report.html").exists()
    text = (checkout / "docs/SEALED.md").read_text()
    commit = git(checkout, "rev-parse", "HEAD")
    (line,) = [line for line in text.splitlines() if commit in line]
    assert "Bricks, neuraleraser: ua " in line and "Bears, none: ua 0.00" in line
    for cell in line.split("; "):
        assert ("image-to-image, empty 0." in cell) == (", neuraleraser: " in cell), "controls see no picture"
    git(checkout, "stash", "-u", "-q")
    assert run(checkout, tmp_path) is not None
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "its figures")
    with pytest.raises(SettingsError, match="a run of another commit"):
        run(checkout, tmp_path)
    record = checkout / "docs/SEALED.md"
    record.write_text(record.read_text() + git(checkout, "rev-parse", "HEAD"))
    git(checkout, "update-index", "--assume-unchanged", "docs/SEALED.md")
    with pytest.raises(SplitError, match="already"):
        run(checkout, tmp_path)


def test_a_tree_with_changes_or_without_commits_is_refused(checkout: Path, tmp_path: Path):
    (checkout / "code.py").write_text("changed")
    with pytest.raises(SplitError, match=r"the working tree has changes \(M code.py\)"):
        run(checkout, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(SettingsError, match="no git checkout"):
        run(tmp_path / "elsewhere", tmp_path)
    assert not (tmp_path / "run").exists()


def test_it_makes_erasers_of_all_twelve_as_the_verb_does(monkeypatch: pytest.MonkeyPatch):
    sealed = words.VOCABULARY.sealed
    assert sealed == {*words.SEALED_STYLES, *words.SEALED_OBJECTS} and len(sealed) == 12
    made: list[Any] = []
    monkeypatch.setattr(module, "fit", lambda *arguments, **more: made.append((arguments, more)))
    pipe = reader()
    module._make(pipe, vocabulary_concept(words.VOCABULARY, "Bricks"))
    (arguments, more) = made[0]
    assert arguments[0] is pipe and arguments[1].name == "Bricks" and more == {}


def test_the_record_has_no_figures_by_hand():
    """The file of the repository starts as the code would start it."""
    record = Path(__file__).parents[1] / module.RECORD
    assert record.read_text(encoding="utf-8").startswith(module._HEAD)


def test_the_verb_makes_its_own_erasers(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "--sealed", "--erasers", "a.safetensors"]) == 2
    assert "--sealed makes its own erasers" in capsys.readouterr().err
