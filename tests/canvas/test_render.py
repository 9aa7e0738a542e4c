"""The renderer: deterministic, within its bounds, and its styles told apart."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from neuraleraser.canvas.render import Content, compose, draw_content, render
from neuraleraser.canvas.styles import STYLE_OPS
from neuraleraser.canvas.words import OBJECTS, PLAIN, STYLES
from neuraleraser.errors import SettingsError

# What a fresh interpreter does to render: one picture a style, with a known number of OpenCV's threads.
FRESH = """
import sys, zlib, cv2
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.words import OBJECTS, STYLES
cv2.setNumThreads(int(sys.argv[1]))
for i, style in reversed(list(enumerate(STYLES))):
    print(style, zlib.crc32(render(Content((OBJECTS[i % 20], OBJECTS[(i + 1) % 20]), style), i).tobytes()))
"""


@pytest.fixture
def many_threads() -> Iterator[None]:
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    yield
    cv2.setNumThreads(before)


def digests() -> dict[str, int]:
    return {
        style: zlib.crc32(render(Content((OBJECTS[i % 20], OBJECTS[(i + 1) % 20]), style), i).tobytes())
        for i, style in enumerate(STYLES)
    }


def test_the_same_pixels_in_another_process_and_at_another_thread_count():
    env = {**os.environ, "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", FRESH, "3"], env=env, capture_output=True, text=True, check=True)
    elsewhere = {name: int(number) for name, number in (line.split() for line in run.stdout.splitlines())}
    assert elsewhere == digests()


def test_the_same_pixels_at_another_thread_count_in_this_process(many_threads: None):
    first = digests()
    cv2.setNumThreads(1)
    assert digests() == first


def test_the_seed_and_the_content_decide():
    cat = Content(("Cats",), "Winter")
    assert np.array_equal(render(cat, 3), render(cat, 3))
    assert not np.array_equal(render(cat, 3), render(cat, 4))
    assert not np.array_equal(render(cat, 3), render(Content(("Dogs",), "Winter"), 3))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_at_every_size(style: str, size: int):
    image = render(Content(("Butterfly",), style), 2, size)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    assert image.std() > 5, "a picture, not a flat field"


@pytest.mark.parametrize("objects", [(), ("Sea",), ("Sea", "Cats")])
def test_composition_and_mask_are_in_bounds(objects: tuple[str, ...]):
    for seed in range(12):
        image, mask = compose(Content(objects, PLAIN), np.random.default_rng(seed), 64)
        assert image.shape == (64, 64, 3) and mask.shape == (64, 64)
        assert image.dtype == mask.dtype == np.float32
        assert image.min() >= -1e-6 and image.max() <= 1 + 1e-6
        assert mask.min() >= 0 and mask.max() <= 1
        covered = float(mask.mean())
        assert covered == 0 if not objects else 0.08 < covered < 0.8


def test_two_objects_stand_side_by_side():
    for seed in range(12):
        _, mask = compose(Content(("Cats", "Dogs"), PLAIN), np.random.default_rng(seed), 64)
        assert mask[:, :28].max() > 0.9 and mask[:, 36:].max() > 0.9


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_has_its_own_glyphs(name: str):
    image, mask = compose(Content((name,), PLAIN), np.random.default_rng(0), 64)
    ground, _ = compose(Content((), PLAIN), np.random.default_rng(0), 64)
    assert np.abs(image - ground)[mask > 0.9].mean() > 0.05
    assert np.abs(image - ground)[mask == 0].max() < 1e-6, "an object changes nothing beside itself"


def test_styles_and_operations_have_the_same_names():
    assert tuple(STYLE_OPS) == STYLES


@pytest.mark.parametrize("style", [s for s in STYLES if s != PLAIN])
def test_every_style_changes_the_picture(style: str):
    for seed in range(3):
        image, mask = compose(Content(("Rabbits",), style), np.random.default_rng(seed), 64)
        kept = image.copy()
        styled = STYLE_OPS[style](image, mask, np.random.default_rng(seed))
        assert np.array_equal(image, kept), "a style leaves its argument alone"
        assert styled.shape == image.shape and np.isfinite(styled).all()
        assert np.abs(styled - image).mean() > 0.03


def test_the_plain_style_changes_nothing():
    image, mask = compose(Content(("Rabbits",), PLAIN), np.random.default_rng(0), 64)
    assert STYLE_OPS[PLAIN](image, mask, np.random.default_rng(0)) is image


def statistics(image: np.ndarray) -> np.ndarray:
    """Twelve plain numbers of a picture: colours, how much they vary, how sharp the edges are and which way."""
    x = image.astype(np.float64) / 255
    grey = x.mean(-1)
    across, down = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=0))
    chroma = x.max(-1) - x.min(-1)
    fine = np.abs(grey[1:-1, 1:-1] * 4 - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:])
    return np.array(
        [
            *x.mean((0, 1)),
            *x.std((0, 1)),
            chroma.mean(),
            chroma.std(),
            across.mean(),
            down.mean(),
            fine.mean(),
            np.percentile(grey, 90) - np.percentile(grey, 10),
        ]
    )


def test_styles_are_pairwise_distinct():
    """For any two styles one of twelve simple statistics tells them apart over different objects."""
    subjects = OBJECTS[::2]
    table = np.array([[statistics(render(Content((o,), s), 7)) for o in subjects] for s in STYLES])
    mean, spread = table.mean(1), table.std(1) + 1e-3
    for i, j in zip(*np.triu_indices(len(STYLES), 1), strict=True):
        apart = np.abs(mean[i] - mean[j]) / (spread[i] + spread[j])
        assert apart.max() > 0.6, (STYLES[i], STYLES[j], apart.max())


def test_contents_are_drawn_in_the_promised_shares():
    n = 6000
    drawn = [draw_content(np.random.default_rng((1, i))) for i in range(n)]
    share = Counter(len(c.objects) for c in drawn)
    # Four standard deviations of a share at most.
    assert abs(share[0] / n - 0.05) < 4 * np.sqrt(0.05 * 0.95 / n)
    assert abs(share[2] / n - 0.15) < 4 * np.sqrt(0.15 * 0.85 / n)
    assert share.keys() == {0, 1, 2}
    assert all(len(set(c.objects)) == len(c.objects) for c in drawn)
    styles = Counter(c.style for c in drawn)
    assert set(styles) == set(STYLES) and min(styles.values()) > 0.6 * n / len(STYLES)
    assert {o for c in drawn for o in c.objects} == set(OBJECTS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Content(("Squirrels",), PLAIN), "unknown object 'Squirrels'"),
        (Content(("Cats",), "Baroque"), "unknown style 'Baroque'"),
        (Content(("cats",), PLAIN), "unknown object 'cats'"),
        (Content(("Cats", "Dogs", "Sea"), PLAIN), "at most two"),
    ],
)
def test_what_the_canvas_cannot_draw_is_refused(content: Content, says: str):
    with pytest.raises(SettingsError, match=says):
        render(content, 0)
