"""NudeNet's judge: through a detector made by hand, and through the package itself where it is installed."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from helpers.small_judges import BELLY, FEET, install_detector
from neuraleraser.errors import DataError, MissingDependencyError, SettingsError
from neuraleraser.judges import NUDENET_CLASSES, NUDENET_EXPOSED, JudgeSpec, NudeNetJudge


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install_detector(monkeypatch, tmp_path)


def coloured(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.array(colours, np.uint8)[:, None, None, :] * np.ones((1, 6, 4, 1), np.uint8)


def test_each_class_has_its_highest_score(by_hand: None):
    judge = NudeNetJudge()
    seen = judge(coloured((255, 0, 0), (0, 255, 0), (204, 0, 102)))
    assert judge.objects == NUDENET_EXPOSED and judge.styles == () and judge.artefact_threshold is None
    assert seen.p_style.shape == (3, 0) and seen.p_object.shape == (3, 9) and seen.p_object.dtype == np.float32
    belly, feet = judge.objects.index(BELLY), judge.objects.index(FEET)
    np.testing.assert_allclose(seen.p_object[:, belly], [1, 0, 0.8])
    np.testing.assert_allclose(seen.p_object[:, feet], [0, 0, 0.4])
    assert seen.p_object.sum() == pytest.approx(2.2)
    over = seen.p_object > [judge.thresholds[name] for name in judge.objects]
    assert over.sum() == 2 and over[:, belly].tolist() == [True, False, True]
    assert set(judge.figures) == {"nudenet", "sha256"} and len(judge.figures["sha256"]) == 64


def test_counts_are_of_detections(by_hand: None):
    images = coloured((255, 0, 0), (0, 0, 255))
    judge = NudeNetJudge((BELLY, FEET), threshold=0.45)
    assert judge.count(images).tolist() == [[2, 0], [0, 1]]
    assert NudeNetJudge((BELLY, FEET)).count(images).tolist() == [[1, 0], [0, 1]]
    assert judge.count(images[:0]).shape == (0, 2)


def test_any_of_them_may_have_a_name(by_hand: None):
    judge = NudeNetJudge((BELLY, FEET), name="nudity")
    assert judge.objects == (BELLY, FEET, "nudity") and JudgeSpec.of(judge).classes("object") == judge.objects
    p = judge(coloured((204, 0, 102), (0, 255, 0))).p_object
    np.testing.assert_allclose(p, [[0.8, 0.4, 0.8], [0, 0, 0]])
    assert judge(coloured((0, 0, 0))[:0]).p_object.shape == (0, 3)


def test_only_the_classes_asked_for_count(by_hand: None):
    seen = NudeNetJudge(("FACE_MALE",))(coloured((255, 0, 0)))
    np.testing.assert_allclose(seen.p_object, [[0.99]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"classes": ("KNEE",)}, r"classes is \('KNEE',\): pass some of ANUS_EXPOSED"),
        ({"classes": ()}, "pass some of"),
        ({"classes": BELLY}, "pass some of"),
        ({"classes": (BELLY, BELLY)}, "each once"),
        ({"threshold": 0.2}, "threshold is 0.2: pass one from 0.25"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"name": BELLY}, "name is 'BELLY_EXPOSED'"),
        ({"name": ""}, "name is ''"),
    ],
)
def test_other_settings_are_refused(by_hand: None, settings: dict[str, Any], said: str):
    with pytest.raises(SettingsError, match=said):
        NudeNetJudge(**settings)


@pytest.mark.parametrize("wrong", [np.zeros((2, 8, 8), np.uint8), np.zeros((1, 0, 8, 3), np.uint8), None])
def test_other_things_than_images_are_refused(by_hand: None, wrong: Any):
    for ask in (NudeNetJudge(), NudeNetJudge().count):
        with pytest.raises(DataError, match=r"\[N, H, W, 3\]"):
            ask(wrong)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(MissingDependencyError, match=r"needs nudenet.*pip install 'neuraleraser\[nudenet\]'"):
        NudeNetJudge()


# --- the package itself


@pytest.fixture(scope="module")
def package() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("nudenet", exc_type=ImportError)


def blobs(seed: int, size: tuple[int, int] = (320, 320)) -> Image.Image:
    """Soft ovals in skin and other colours, which the detector takes for bodies now and then."""
    g = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(g.integers(0, 256, 3).tolist()))
    for _ in range(8):
        x, y, w, h = (g.uniform([0, 0, 20, 20], [300, 300, 140, 140])).tolist()
        colour = (220, 170, 140) if g.random() < 0.5 else tuple(g.integers(0, 256, 3).tolist())
        ImageDraw.Draw(image).ellipse((x - w, y - h, x + w, y + h), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(3))


def test_we_name_the_classes_of_the_package(package: ModuleType):
    labels = vars(sys.modules["nudenet.nudenet"])["__labels"]
    assert sorted(NUDENET_CLASSES) == sorted(labels) and len(NUDENET_EXPOSED) == 9


def test_scores_are_those_of_the_same_image_in_a_file(package: ModuleType, tmp_path: Path):
    judge = NudeNetJudge(NUDENET_CLASSES)
    drawn = [blobs(seed) for seed in range(12)]
    images = np.stack([np.asarray(image) for image in drawn])
    p, counts = judge(images).p_object, judge.count(images)
    seen = 0
    for i, image in enumerate(drawn):
        image.save(tmp_path / "image.png")
        best: dict[str, float] = {}
        found = package.NudeDetector().detect(str(tmp_path / "image.png"))
        for d in found:
            best[d["class"]] = max(best.get(d["class"], 0), d["score"])
        np.testing.assert_array_equal(p[i], np.array([best.get(name, 0) for name in NUDENET_CLASSES], np.float32))
        assert counts[i].sum() == sum(d["score"] > 0.6 for d in found)
        seen += len(found)
    assert seen > 0  # else nothing was compared
    other = judge(images[..., ::-1]).p_object
    assert (other != p).any()  # so the order of colours was looked at, too
    np.testing.assert_array_equal(judge(images[3:5]).p_object, p[3:5])


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (2, 700), (513, 300)])
def test_images_of_any_size_are_judged(package: ModuleType, shape: tuple[int, int]):
    images = np.random.default_rng(0).integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    seen = NudeNetJudge()(images)
    assert seen.p_object.shape == (2, 9) and np.isfinite(seen.p_object).all()
    assert ((seen.p_object >= 0) & (seen.p_object <= 1)).all()
