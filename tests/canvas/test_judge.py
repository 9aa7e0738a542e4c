"""The judges' training, calibration, distance and file, on a handful of renders. The shipped judges: test_judges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuraleraser.canvas import train
from neuraleraser.canvas.artefact_distance import damage_images, fit_artefact, image_features
from neuraleraser.canvas.data import Renders
from neuraleraser.canvas.judge import (
    STEPS,
    TrainedJudge,
    artefact_share,
    augment,
    best_threshold,
    fit_judge,
    judge_loss,
    load_judge,
    object_targets,
    save_judge,
    to_tensor,
    train_judge,
)
from neuraleraser.canvas.judge_nets import Which, build_judge
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import DataError, FileError
from neuraleraser.io import tensor_file


@pytest.fixture(scope="module")
def renders() -> Renders:
    """Four renders of each style, with no, one and two objects."""
    images, style, objects = [], [], []
    for i in range(4 * len(STYLES)):
        pair = [i % 20, (i + 7) % 20][: (1, 2, 0, 1)[i % 4]]
        images.append(render(Content(tuple(OBJECTS[o] for o in pair), STYLES[i % 25]), seed=i))
        style.append(i % 25)
        objects.append([*pair, -1, -1][:2])
    return Renders(np.stack(images), np.array(style, np.int16), np.array(objects, np.int16))


@pytest.mark.parametrize("which", STEPS)
def test_a_judge_is_small_and_has_both_heads(which: Which):
    net = build_judge(which)
    style, objects, maps = net(torch.zeros(2, 3, 64, 64))
    assert sum(p.numel() for p in net.parameters()) < 1.2e6
    assert (style.shape, objects.shape) == ((2, len(STYLES)), (2, len(OBJECTS)))
    assert all(m.ndim == 4 for m in maps)


def test_the_two_judges_share_no_architecture():
    first, second = (set(build_judge(which).state_dict()) for which in STEPS)
    assert {"style.weight", "objects.weight"} <= first & second
    assert not [k for k in first & second if not k.startswith(("style.", "objects."))]


def test_presence_reads_no_one_and_two_objects(renders: Renders):
    there = object_targets(renders, slice(0, 3))
    assert there.sum(1).tolist() == [1, 2, 0]
    assert there[1].nonzero()[:, 0].tolist() == sorted(renders.objects[1].tolist())


def test_augmenting_is_slight_and_repeats_itself(renders: Renders):
    x = to_tensor(renders.images)
    a, b, c = (augment(x, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == x.shape
    # Means of whole pictures move by brightness, contrast and a shift only.
    assert (a.mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 0.25


def test_the_loss_is_least_for_the_right_answer():
    class Fixed(torch.nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.sign = sign

        def forward(self, x: torch.Tensor):
            style, objects = torch.full((1, 25), -3.0), torch.full((1, 20), -3.0)
            style[0, 4], objects[0, 2] = 3 * self.sign, 3 * self.sign
            return style, objects, []

    there = torch.zeros(1, 20)
    there[0, 2] = 1
    right, wrong = (judge_loss(Fixed(s), torch.zeros(1, 3, 4, 4), torch.tensor([4]), there) for s in (1.0, -1.0))
    assert right < wrong


@pytest.mark.parametrize("which", STEPS)
def test_training_that_was_killed_ends_in_the_same_bits(
    which: Which, renders: Renders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    straight = train_judge(which, renders, tmp_path / "a.safetensors", steps=4, batch=8)

    update = train.TrainState.update

    def killed(self: train.TrainState) -> None:
        if self.step == 2:
            self.save()
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.TrainState, "update", killed)
        with pytest.raises(KeyboardInterrupt):
            train_judge(which, renders, tmp_path / "b.safetensors", steps=4, batch=8)
    resumed = train_judge(which, renders, tmp_path / "b.safetensors", steps=4, batch=8)
    again = train_judge(which, renders, tmp_path / "b.safetensors", steps=4, batch=8)  # nothing left to do
    for other in (resumed, again):
        for name, x in straight.state_dict().items():
            assert torch.equal(x, other.state_dict()[name]), name


@given(st.floats(0.1, 0.45), st.floats(0.55, 0.9), st.integers(1, 20), st.integers(1, 20))
def test_a_threshold_separates_what_can_be_separated(low: float, high: float, n: int, m: int):
    p = torch.cat([torch.linspace(0.01, low, n), torch.linspace(high, 0.99, m)])
    there = torch.cat([torch.zeros(n), torch.ones(m)])
    order = torch.randperm(n + m, generator=torch.Generator().manual_seed(n * m))
    cut = best_threshold(p[order], there[order])
    assert torch.equal((p > cut).float(), there)


def test_distance_knows_each_kind_by_its_own_spread():
    g = torch.Generator().manual_seed(0)
    kind = torch.arange(25).repeat(80)
    spread = torch.where(kind == 0, 5.0, 0.2)[:, None]  # one kind spreads widely
    centres = torch.randn(25, 12, generator=g) * 4
    made = centres[kind] + spread * torch.randn(len(kind), 12, generator=g)
    distance = fit_artefact(made, kind, size=6, bands=4)
    near, far = centres[1:], centres[1:] + 6 * torch.randn(24, 12, generator=g).sign()
    limit = distance(made).quantile(0.99)
    assert (distance(near) < limit).all()
    assert (distance(far) > limit).float().mean() > 0.8
    with pytest.raises(DataError, match="1 real pictures of kind 24"):
        fit_artefact(made[:49], kind[:49], size=6, bands=4)


def test_an_autoencoders_pictures_are_nearer_once_they_were_known(judges: dict[str, TrainedJudge], renders: Renders):
    def through(images: np.ndarray) -> np.ndarray:
        return images // 64 * 64

    known = fit_judge("second", judges["second"].net, _twice(renders), _twice(renders), through)
    shown = through(renders.images[::4])
    near, far = (judge(shown)[2] for judge in (known, judges["second"]))
    assert near is not None and far is not None
    assert near.median() < 0.5 * far.median()
    assert set(known.figures["autoencoded"]) < set(known.figures)
    assert "autoencoded" in known.figures["flagged"]


def test_features_see_noise_blur_and_flatness(renders: Renders):
    net = build_judge("second").eval()
    made = damage_images(renders.images)
    with torch.no_grad():
        f = {k: image_features(x := to_tensor(v[:8]), net(x)[2]) for k, v in made.items()}
    assert all(torch.isfinite(x).all() for x in f.values())
    assert len({x.shape[1] for x in f.values()}) == 1
    assert made["grey"].shape == (256, 64, 64, 3)
    for name in ("blurred", "noise_0.25"):
        assert not torch.allclose(f["clean"], f[name], atol=0.1)


def _twice(renders: Renders) -> Renders:
    return Renders(*(np.concatenate([x, x]) for x in (renders.images, renders.style, renders.objects)))


@pytest.fixture(scope="module")
def judges(renders: Renders) -> dict[str, TrainedJudge]:
    """Judges that nobody trained, calibrated all the same."""
    torch.manual_seed(0)
    twice = _twice(renders)
    return {which: fit_judge(which, build_judge(which).eval(), twice, twice) for which in STEPS}


@pytest.mark.parametrize("which", STEPS)
def test_a_judge_comes_back_from_its_file_bit_for_bit(
    which: Which, judges: dict[str, TrainedJudge], renders: Renders, tmp_path: Path
):
    judge = judges[which]
    save_judge(judge, tmp_path / "j.safetensors")
    back = load_judge(tmp_path / "j.safetensors")
    for a, b in zip(judge(renders.images), back(renders.images), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert replace(back, net=judge.net, artefact=None) == replace(judge, artefact=None)
    assert (back.artefact is None) == (which == "first")
    assert (tmp_path / "j.safetensors").stat().st_size < 3e6


def test_only_the_second_judge_flags(judges: dict[str, TrainedJudge], renders: Renders):
    assert artefact_share(judges["first"], renders.images) == 0
    assert artefact_share(judges["second"], damage_images(renders.images)["grey"]) == 1
    assert set(judges["second"].figures["flagged"]) == set(damage_images(renders.images))
    assert "flagged" not in judges["first"].figures


def test_a_damaged_judge_is_refused(judges: dict[str, TrainedJudge], tmp_path: Path):
    path = tmp_path / "j.safetensors"
    save_judge(judges["second"], path)
    tensors, header = tensor_file.load(path, "judge")
    header = {k: v for k, v in header.items() if k not in ("kind", "version")}
    cases = [
        (tensors, header | {"styles": ["Baroque"]}, "other styles or objects"),
        (tensors, header | {"which": "third"}, "not a whole judge"),
        (tensors, header | {"object_thresholds": [0.5]}, "not a whole judge"),
        (tensors, header | {"temperatures": 1}, "not a whole judge"),
        ({k: v for k, v in tensors.items() if k != "net/stem.weight"}, header, "not a whole judge"),
        (tensors | {"net/stem.weight": torch.zeros(2)}, header, "not a whole judge"),
        (tensors | {"artefact/basis": torch.zeros(3, 3)}, header, "not a whole judge"),
        (tensors | {"other": torch.zeros(2)}, header, "not a whole judge"),
    ]
    for some, head, said in cases:
        tensor_file.save(path, "judge", some, head)
        with pytest.raises(FileError, match=said):
            load_judge(path)
    with pytest.raises(FileError):
        load_judge(tmp_path / "none.safetensors")
