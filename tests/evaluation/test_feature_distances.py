"""KID and FID in a judge's features: against sums written out, of twins, and from a run's folder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from helpers.canvas_cells import canvas_protocol
from helpers.measured import S
from helpers.stamp_judge import StampJudge, stamping
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.errors import DataError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation import feature_distances
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.feature_distances import feature_distance
from neuraleraser.evaluation.protocol import GRID
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.judges import FeatureJudge, JudgeSpec
from neuraleraser.methods import DoNothing, StringFilter


def some(seed: int, n: int, shift: float = 0.0, d: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def test_kid_is_the_sum_over_pairs_of_different_images():
    x, y = some(0, 7), some(1, 7, 0.5)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    total = sum(
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i in range(7) for j in range(7) if i != j
    )
    found = feature_distance(x, y).kid
    assert found.n == 7 and found.value == pytest.approx(1000 * total / 42)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kid_is_torchmetrics_own_but_for_the_twins():
    x, y = (torch.from_numpy(v) for v in (some(0, 40), some(1, 40, 0.5)))
    own = KernelInceptionDistance(feature=feature_distances._AsTheyAre(3), subsets=1, subset_size=40)
    own.update(x, real=True)
    own.update(y, real=False)
    cross = (x @ y.T / 3 + 1) ** 3
    with_twins, without = cross.mean(), (cross.sum() - cross.trace()) / (40 * 39)
    expected = own.compute()[0] + 2 * with_twins - 2 * without
    assert feature_distance(x.numpy(), y.numpy()).kid.value == pytest.approx(1000 * float(expected))


def test_fid_is_the_distance_of_two_normals():
    x, y = some(0, 200), some(1, 200, 0.5) * 1.5
    a, b = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T  # of a b as root(a) b root(a), which is symmetric
    trace = np.sqrt(np.linalg.eigvalsh(root @ b @ root)).sum()
    gap = x.mean(0) - y.mean(0)
    assert feature_distance(x, y).fid == pytest.approx(gap @ gap + np.trace(a) + np.trace(b) - 2 * trace)


def test_doing_nothing_scores_nothing_and_a_shift_more_the_larger_it_is():
    x = some(0, 60)
    same = feature_distance(x, x.copy())
    # Matrix products of some processors give two equal sets sums that differ in the last bits.
    assert max(map(abs, (same.kid.value, same.kid.low, same.kid.high))) < 1e-9 and same.fid < 1e-6
    near, far = (feature_distance(x, x + shift) for shift in (0.3, 0.9))
    assert 0 < near.kid.low < near.kid.value < near.kid.high < far.kid.value and near.fid < far.fid
    assert near == feature_distance(x, x + 0.3), "the same each time"


def test_kid_of_two_samples_of_one_kind_is_0_on_average():
    """At any n, which FID is not."""
    found = [feature_distance(some(k, 12), some(1000 + k, 12)) for k in range(300)]
    values = np.array([f.kid.value for f in found])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values)) and np.mean([f.fid for f in found]) > 0.3


@pytest.mark.parametrize("shapes", [((3, 2), (3, 3)), ((1, 2), (1, 2)), ((4,), (4,))])
def test_features_of_other_shapes_are_refused(shapes: tuple[Any, Any]):
    with pytest.raises(DataError, match=r"expected \[n, d\] twice"):
        feature_distance(np.zeros(shapes[0]), np.zeros(shapes[1]))


class Featured(StampJudge):
    """Sees as features some bytes of the picture, and counts them."""

    seen = 0

    def features(self, images: np.ndarray, /) -> np.ndarray:
        self.seen += len(images)
        return (images.reshape(len(images), -1)[:, 100:104] / 255).astype(np.float32)


def test_distances_are_of_the_pictures_in_the_folder(pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(drawing, "generate", stamping)
    monkeypatch.setattr(feature_distances, "FEWEST_IMAGES", 4)
    # Deletes "a": prompts without the concept change as well.
    methods = [StringFilter("Van_Gogh", "style", {"a": ""}), DoNothing("Van_Gogh", "style")]
    judge = Featured()
    report = evaluate(pipe, methods, S, tmp_path, judge=judge)
    cells = [c for c in canvas_protocol(["Van_Gogh"], S).cells["Van_Gogh"] if c.group == GRID]
    cells = [c for c in cells if not c.asks_for("Van_Gogh")]
    run = RunFolder(tmp_path, JudgeSpec.of(judge))
    base = np.stack([run.image("base", "", c) for c in cells]).reshape(len(cells), -1)[:, 100:104] / 255
    after = np.stack([run.image(methods[0].name, "Van_Gogh", c) for c in cells]).reshape(len(cells), -1)[:, 100:104]
    changed = report.of(methods[0].name, "Van_Gogh").distance
    assert changed is not None and changed.kid.n == len(cells) == 6
    order = np.argsort([c.key for c in cells], axis=0)[:, 1]  # any order gives the same
    wanted = feature_distance(base.astype(np.float32)[order], (after / 255).astype(np.float32)[order])
    assert changed.kid.value == pytest.approx(wanted.kid.value) and changed.fid == pytest.approx(wanted.fid, abs=1e-6)
    none = report.of("none", "Van_Gogh").distance
    assert none is not None and none.kid.value == 0 and judge.seen == 2 * len(cells), "none is judged twice"
    page = write_report(report, tmp_path)[0].read_text()
    assert "In the features of Featured, not Inception's" in page
    entry = json.loads((tmp_path / "report.json").read_text())["concepts"][0]["distance"]
    assert entry["kid"] == changed.kid.value and entry["ns"] == {"kid": 6} and entry["fid"] == changed.fid
    assert f"{methods[0].name},,,fid,{changed.fid}" in (tmp_path / "figures.csv").read_text()


def test_the_canvas_judges_have_features():
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    for which, width in (("first", 256), ("second", 160)):
        judge = CanvasJudge.load(which)
        features = judge.features(images)
        assert isinstance(judge, FeatureJudge) and features.shape == (3, width) and features.dtype == np.float32
        net = judge._judge.net
        logits = features @ net.style.weight.detach().numpy().T + net.style.bias.detach().numpy()
        p = np.exp(logits / judge._judge.temperatures[0])
        assert np.allclose(p / p.sum(1, keepdims=True), judge(images).p_style, atol=1e-4), "what the heads read"
    assert not isinstance(StampJudge(), FeatureJudge)
    with pytest.raises(DataError):
        judge.features(images[:, :32])
