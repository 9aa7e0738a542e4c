"""The shipped judges on renders that nobody has seen, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuraleraser.canvas.artefact_distance import damage_images
from neuraleraser.canvas.canvas_judge import CanvasJudge, Judgement
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import DataError, FileError, SettingsError

SEED = 99_000_000
N = 100


def levels(judge: CanvasJudge, kind: str = "object") -> np.ndarray:
    """Thresholds in the order of the columns."""
    return np.array([judge.thresholds[name] for name in (judge.styles if kind == "style" else judge.objects)])


@pytest.fixture(scope="module", params=["first", "second"])
def judge(request: pytest.FixtureRequest) -> CanvasJudge:
    return CanvasJudge.load(request.param)


@pytest.fixture(scope="module")
def contents() -> list[Content]:
    """A hundred single objects: every style four times, every object five times."""
    return [Content((OBJECTS[i % 20],), STYLES[i % 25]) for i in range(N)]


@pytest.fixture(scope="module")
def images(contents: list[Content]) -> np.ndarray:
    return np.stack([render(c, SEED + i) for i, c in enumerate(contents)])


def test_it_names_what_fresh_renders_show(judge: CanvasJudge, images: np.ndarray, contents: list[Content]):
    seen = judge(images)
    style = np.array([judge.styles.index(c.style) for c in contents])
    shown = np.array([judge.objects.index(c.objects[0]) for c in contents])
    assert (seen.p_style.argmax(1) == style).mean() >= 0.95
    assert (seen.p_style[np.arange(N), style] > levels(judge, "style")[style]).mean() >= 0.95
    assert (seen.p_object.argmax(1) == shown).mean() >= 0.95
    assert (seen.p_object[np.arange(N), shown] > levels(judge)[shown]).mean() >= 0.95


def test_it_sees_two_objects_and_none(judge: CanvasJudge):
    pairs = [Content((OBJECTS[i], OBJECTS[(i + 9) % 20]), STYLES[i]) for i in range(20)]
    seen = judge(np.stack([render(c, SEED + i) for i, c in enumerate(pairs)])).p_object
    over = seen > levels(judge)
    there = np.array([[o in c.objects for o in OBJECTS] for c in pairs])
    assert (over == there).all(1).mean() >= 0.8
    empty = judge(np.stack([render(Content((), s), SEED) for s in STYLES])).p_object
    assert (empty > levels(judge)).any(1).mean() <= 0.1


def test_the_second_judge_tells_artefacts(images: np.ndarray):
    judge = CanvasJudge.load("second")
    share = {}
    for name, made in damage_images(images).items():
        artefact = judge(made).artefact
        assert artefact is not None
        share[name] = (artefact > judge.artefact_threshold).mean()
    assert share["clean"] <= 0.05
    assert share["blurred"] <= 0.1
    assert share["noise_0.15"] >= 0.9
    assert share["noise_0.25"] >= 0.9
    assert share["grey"] == 1


def test_the_first_judge_measures_no_artefacts(images: np.ndarray):
    judge = CanvasJudge.load("first")
    assert judge.artefact_threshold is None
    assert judge(images[:2]).artefact is None


def test_judgements_are_probabilities(judge: CanvasJudge, images: np.ndarray):
    seen = judge(images)
    assert seen.p_style.shape == (N, 25)
    assert seen.p_object.shape == (N, 20)
    assert {x.dtype for x in (seen.p_style, seen.p_object)} == {np.dtype(np.float32)}
    np.testing.assert_allclose(seen.p_style.sum(1), 1, atol=1e-5)
    assert ((seen.p_object >= 0) & (seen.p_object <= 1)).all()


def test_neighbours_and_batches_change_nothing(judge: CanvasJudge, images: np.ndarray):
    together = judge(np.concatenate([images, images[:30]]))  # one full batch, one short
    for part in (slice(0, 1), slice(17, 24)):
        _close(judge(images[part]), together, part)
    _close(judge(images[::-1][:10][::-1]), together, slice(90, 100))


def _close(alone: Judgement, together: Judgement, part: slice) -> None:
    np.testing.assert_allclose(alone.p_style, together.p_style[part], atol=1e-4)
    np.testing.assert_allclose(alone.p_object, together.p_object[part], atol=1e-4)
    if alone.artefact is not None and together.artefact is not None:
        np.testing.assert_allclose(alone.artefact, together.artefact[part], rtol=1e-3)


def test_the_callers_array_is_left_alone_and_may_be_read_only(judge: CanvasJudge, images: np.ndarray):
    mine = images[:3].copy()
    mine.setflags(write=False)
    judge(mine)
    judge(mine[:, ::-1, ::-1])
    np.testing.assert_array_equal(mine, images[:3])


def test_no_images_no_judgements(judge: CanvasJudge):
    seen = judge(np.zeros((0, 64, 64, 3), np.uint8))
    assert (seen.p_style.shape, seen.p_object.shape) == ((0, 25), (0, 20))
    assert seen.artefact is None or seen.artefact.shape == (0,)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (np.zeros((2, 64, 64, 3), np.float32), r"float32 \[2, 64, 64, 3\].*uint8"),
        (np.zeros((64, 64, 3), np.uint8), r"shape \[64, 64, 3\].*\[N, 64, 64, 3\]"),
        (np.zeros((2, 3, 64, 64), np.uint8), r"shape \[2, 3, 64, 64\]"),
        (np.zeros((2, 128, 128, 3), np.uint8), r"shape \[2, 128, 128, 3\]"),
        (np.zeros((2, 64, 64, 4), np.uint8), r"shape \[2, 64, 64, 4\]"),
        ([[0]], "a list"),
        (None, "a NoneType"),
    ],
)
def test_other_things_than_images_are_refused(judge: CanvasJudge, wrong: Any, said: str):
    with pytest.raises(DataError, match=said):
        judge(wrong)


def test_other_names_and_files_are_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"'third'.*'first' or 'second'"):
        CanvasJudge.load("third")  # type: ignore[arg-type]
    with pytest.raises(FileError):
        CanvasJudge.load("first", tmp_path / "nothing.safetensors")


def test_the_file_carries_its_figures(judge: CanvasJudge):
    assert judge.figures["style"] >= 0.99
    assert judge.figures["object"] >= 0.97
    assert judge.figures["both_objects"] >= 0.9
    assert set(judge.figures["by_object"]) == set(OBJECTS)
    assert set(judge.thresholds) == {*STYLES, *OBJECTS}
    assert all(0 < value < 1 for value in judge.thresholds.values())
