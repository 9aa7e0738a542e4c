"""CLIP scores: of each image with its own prompt, before and after, and distances in the same features."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from helpers.canvas_cells import canvas_protocol
from helpers.measured import S
from helpers.stamp_judge import StampJudge, stamping
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation import feature_distances
from neuraleraser.evaluation.certificate import certify, compare_folder, read_certificate
from neuraleraser.evaluation.clip_scores import score
from neuraleraser.evaluation.comparison import compare_reports
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.intervals import mean
from neuraleraser.evaluation.protocol import GRID, MAIN_GROUPS, Cell
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.terminal import terminal_tables
from neuraleraser.judges import JudgeSpec
from neuraleraser.methods import DoNothing, StringFilter


class Letters:
    """Knows images by some bytes, and sentences by how often they have some letters."""

    name, digest = "letters", "abc"

    def features(self, images: NDArray[np.uint8], /) -> NDArray[np.float32]:
        seen = images.reshape(len(images), -1)[:, 100:104] / 255 - 0.3
        return (seen / np.linalg.norm(seen, axis=1, keepdims=True)).astype(np.float32)

    def text_features(self, texts: Sequence[str], /) -> NDArray[np.float32]:
        seen = np.array([[text.count(letter) + 1.0 for letter in "aeio"] for text in texts])
        return (seen / np.linalg.norm(seen, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "generate", stamping)
    monkeypatch.setattr(feature_distances, "FEWEST_IMAGES", 4)


def test_a_score_is_of_an_image_and_its_own_sentence():
    images, texts = np.array([[1.0, 0], [0.6, 0.8], [-1, 0]]), np.array([[1.0, 0], [1, 0], [1, 0]])
    assert score(images, texts).tolist() == pytest.approx([100, 60, 0]), "against it is no less than none"
    assert score(images, np.array([[0.0, 1], [0, 1], [-1, 0]])).tolist() == pytest.approx([0, 80, 100])


def test_the_interval_of_a_mean():
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = mean(values)
    assert found.value == pytest.approx(values.mean()) and found.n == 400
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)
    assert mean(np.array([3.0])).low == mean(np.array([3.0])).high == 3
    with pytest.raises(DataError, match="no values"):
        mean(np.array([]))


def test_scores_are_of_the_pictures_in_the_folder(pipe: Any, tmp_path: Path):
    # Deletes "a": prompts without the concept change as well.
    methods = [StringFilter("Van_Gogh", "style", {"a": ""}), DoNothing("Van_Gogh", "style")]
    judge, model = StampJudge(), Letters()
    report = evaluate(pipe, methods, S, tmp_path, judge=judge, clip=model)
    cells, run = canvas_protocol(["Van_Gogh"], S).cells["Van_Gogh"], RunFolder(tmp_path, JudgeSpec.of(judge))

    def by_hand(some: list[Cell], place: tuple[str, str]) -> float:
        pictures = model.features(np.stack([run.image(*place, c) for c in some]))
        texts = [model.text_features([c.prompt])[0] for c in some]
        return float(np.mean([100 * max(0, a @ b) for a, b in zip(pictures, texts, strict=True)]))

    target = [c for c in cells if c.group in MAIN_GROUPS and c.asks_for("Van_Gogh")]
    others = [c for c in cells if c.group == GRID and not c.asks_for("Van_Gogh")]
    for method in methods:
        entry = report.of(method.name, "Van_Gogh")
        assert entry.clip is not None and entry.distance is not None, "the judge has no features, and this has"
        for name, some in (("target", target), ("others", others)):
            before, after = getattr(entry.clip, f"{name}_base"), getattr(entry.clip, name)
            assert before.n == after.n == len(some)
            assert before.value == pytest.approx(by_hand(some, ("base", "")))
            assert after.value == pytest.approx(by_hand(some, (method.name, "Van_Gogh")))
    changed, none = (report.of(m.name, "Van_Gogh").clip for m in methods)
    assert changed and none and changed.target and changed.others != changed.others_base
    assert none.others == none.others_base
    page = write_report(report, tmp_path)[0].read_text()
    assert "in the space of letters" in page and "In the features of letters, not Inception" in page
    cells_of_ours = page[page.index('id="clip"') :].partition("</tr>\n<tr>")[0].partition("</thead>")[2]
    order = [f"{m.value:.2f}" for m in (changed.others_base, changed.others, changed.target_base, changed.target) if m]
    assert re.findall(r"<b>([\d.]+)</b>", cells_of_ours)[:4] == order
    assert "CLIP scores" in terminal_tables(report)
    csv = (tmp_path / "figures.csv").read_text()
    assert f"{methods[0].name},,,clip_score_target,{changed.target.value}" in csv


def test_what_pictures_and_classes_say_is_compared_and_certified(pipe: Any, tmp_path: Path):
    methods = [DoNothing("Van_Gogh", "style")]
    report = evaluate(pipe, methods, S, tmp_path / "run", judge=StampJudge(), clip=Letters())
    write_report(report, tmp_path / "run")
    path = tmp_path / "run/report.json"
    names = {d.figure for d in compare_reports(path, path).differences}
    assert {"kid", "clip_score_target", "clip_score_others", "still_right_Mosaic", "still_right_Dogs"} <= names
    assert "fid" not in names, "it has no interval"
    certify(tmp_path / "run", tmp_path / "c.json")
    content = read_certificate(tmp_path / "c.json")
    assert {f["figure"] for f in content["figures"]} == names and compare_folder(content, tmp_path / "run") == []
    altered = json.loads(path.read_text())
    altered["concepts"][0]["clip"]["target"] += 1
    path.write_text(json.dumps(altered))
    assert compare_folder(content, tmp_path / "run") == ["figure Van_Gogh, none, clip_score_target"]


def test_what_is_measured_by_two_models_is_not_compared(pipe: Any, tmp_path: Path):
    one, two = Letters(), Letters()
    two.digest = "def"
    for k, model in enumerate((one, two, one)):
        report = evaluate(pipe, [DoNothing("Van_Gogh", "style")], S, tmp_path / f"{k}", judge=StampJudge(), clip=model)
        write_report(report, tmp_path / f"{k}")
    paths = [tmp_path / f"{k}/report.json" for k in range(3)]
    same, other = compare_reports(paths[0], paths[2]), compare_reports(paths[0], paths[1])
    assert "kid" in {d.figure for d in same.differences} and not same.settings
    assert not {d.figure for d in other.differences} & {"kid", "clip_score_target"}
    assert other.settings == {"features of KID": ("abc", "def"), "CLIP": ("abc", "def")}
    assert "ua" in {d.figure for d in other.differences}
    certify(tmp_path / "0", tmp_path / "c.json")
    content = read_certificate(tmp_path / "c.json")
    assert content["features"] == {"features": "letters", "clip": "letters", "clip_digest": "abc"}
    assert "features of the run" in compare_folder(content, tmp_path / "1")


@pytest.mark.parametrize("value", [-1.0, 101.0])
def test_a_score_that_cannot_be_is_not_certified(pipe: Any, tmp_path: Path, value: float):
    report = evaluate(pipe, [DoNothing("Van_Gogh", "style")], S, tmp_path, judge=StampJudge(), clip=Letters())
    write_report(report, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    written["concepts"][0]["clip"]["target"] = value
    (tmp_path / "report.json").write_text(json.dumps(written))
    with pytest.raises(FileError, match="states what no evaluation finds"):
        certify(tmp_path, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_the_judges_own_features_come_first_and_many_images_are_sampled(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Featured(StampJudge):
        def features(self, images: NDArray[np.uint8], /) -> NDArray[np.float32]:
            return images.reshape(len(images), -1)[:, :3].astype(np.float32)

    monkeypatch.setattr(feature_distances, "MOST_IMAGES", 5)
    report = evaluate(pipe, [DoNothing("Van_Gogh", "style")], S, tmp_path, judge=Featured(), clip=Letters())
    entry = report.of("none", "Van_Gogh")
    assert report.judge["features"] == "Featured" and report.judge["clip"] == "letters"
    assert entry.clip and entry.clip.others and entry.clip.others.n <= 5
    monkeypatch.setattr(feature_distances, "FEWEST_IMAGES", 99)
    report = evaluate(pipe, [DoNothing("Van_Gogh", "style")], S, tmp_path, judge=Featured(), clip=Letters())
    entry = report.of("none", "Van_Gogh")
    assert entry.distance is None and entry.clip and entry.clip.others is None, "too few say nothing"


def test_what_is_no_model_is_refused_before_anything_is_drawn(pipe: Any, tmp_path: Path):
    with pytest.raises(SettingsError, match=r"pass `neuraleraser\.judges\.Clip"):
        evaluate(pipe, [DoNothing("Van_Gogh", "style")], S, tmp_path, judge=StampJudge(), clip="openai/clip")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
