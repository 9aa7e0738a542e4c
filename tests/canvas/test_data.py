"""Renders in bulk: kept, found again, labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neuraleraser.canvas import data
from neuraleraser.canvas.data import content_of, render_set, write_folder
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.styles import STYLE_OPS
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import DataError, FileError

N, SIZE = 24, 16


@pytest.fixture
def chunks_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "RENDERS_PER_JOB", 10)


def never(job: object) -> Any:
    raise AssertionError(f"rendered again: {job}")


def test_images_and_labels_are_those_of_single_renders(chunks_of_ten: None):
    made = render_set(N, 3, SIZE, workers=1)
    assert made.images.shape == (N, SIZE, SIZE, 3) and made.images.dtype == np.uint8
    for i in range(N):
        assert made.content(i) == content_of(3, i)
        assert np.array_equal(made.images[i], render(content_of(3, i), 30_000_000 + i, SIZE))


def test_labels_are_indices_with_empty_places_marked():
    made = render_set(60, 3, SIZE, workers=1)
    counts = [len(content_of(3, i).objects) for i in range(60)]
    assert set(counts) == {0, 1, 2}
    assert ((made.objects >= 0).sum(1) == counts).all() and made.objects.min() == -1
    assert made.objects.max() < len(OBJECTS) and 0 <= made.style.min() and made.style.max() < len(STYLES)


def test_a_longer_set_begins_with_the_shorter_one_and_seeds_differ():
    short, long = (render_set(n, 3, SIZE, workers=1).images for n in (10, N))
    assert np.array_equal(long[:10], short)
    assert not (render_set(10, 4, SIZE, workers=1).images == short).all((1, 2, 3)).any()


def test_processes_make_no_difference(chunks_of_ten: None, monkeypatch: pytest.MonkeyPatch):
    alone = render_set(N, 3, SIZE, workers=1)
    shared = render_set(N, 3, SIZE, workers=2)
    assert np.array_equal(alone.images, shared.images)


def test_a_kept_set_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = render_set(N, 3, SIZE, folder=tmp_path, workers=1)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(data, "_render_job", never)
    found = render_set(N, 3, SIZE, folder=tmp_path, workers=1)
    assert isinstance(found.images, np.memmap)
    for a, b in ((made.images, found.images), (made.style, found.style), (made.objects, found.objects)):
        assert np.array_equal(a, b)
    with pytest.raises(AssertionError, match="rendered again"):  # another length is another set
        render_set(N + 1, 3, SIZE, folder=tmp_path, workers=1)


def test_killed_halfway_it_leaves_nothing_and_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks_of_ten: None
):
    chunk = data._render_job

    def killed(job: tuple[int, int, int, int]) -> Any:
        if job[1] >= 10:
            raise KeyboardInterrupt
        return chunk(job)

    with monkeypatch.context() as patch:
        patch.setattr(data, "_render_job", killed)
        with pytest.raises(KeyboardInterrupt):
            render_set(N, 3, SIZE, folder=tmp_path, workers=1)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:

        def full(*args: object) -> None:
            args[0].write(b"half")  # type: ignore[attr-defined]
            raise OSError("no space left")

        patch.setattr(data.np, "save", full)
        with pytest.raises(FileError, match="no space"):
            render_set(N, 3, SIZE, folder=tmp_path, workers=1)
    assert not list(tmp_path.iterdir())
    again = render_set(N, 3, SIZE, folder=tmp_path, workers=1)
    assert np.array_equal(again.images, render_set(N, 3, SIZE, workers=1).images)


@pytest.mark.parametrize("damage", ["cut", "empty", "shape", "dtype", "text"])
def test_a_damaged_set_is_refused(tmp_path: Path, damage: str):
    render_set(N, 3, SIZE, folder=tmp_path, workers=1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "shape":
        np.save(path, np.zeros((N, SIZE, SIZE), np.uint8))
    elif damage == "dtype":
        np.save(path, np.zeros((N, SIZE, SIZE, 3), np.float32))
    else:
        path.write_bytes({"cut": whole[:-100], "empty": b"", "text": b"not an array at all"}[damage])
    with pytest.raises(DataError, match="delete it"):
        render_set(N, 3, SIZE, folder=tmp_path, workers=1)


def test_the_version_follows_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = data._version(SIZE)
    assert data._version(SIZE) == before
    assert data._version(2 * SIZE) != before
    for style in ("Seed_Images", "Rust", "Winter"):
        op = STYLE_OPS[style]
        with monkeypatch.context() as patch:
            patch.setitem(STYLE_OPS, style, lambda x, mask, rng, op=op: op(x, mask, rng) * np.float32(0.97))
            assert data._version(SIZE) != before
    with monkeypatch.context() as patch:
        patch.setattr(data, "content_of", lambda seed, i: Content(("Cats",), "Rust"))
        assert data._version(SIZE) != before
    assert data._version(SIZE) == before


def test_the_folder_is_laid_out_as_unlearncanvas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "STYLES", ("Rust", "Winter"))
    monkeypatch.setattr(data, "OBJECTS", ("Cats", "Sea", "Dogs"))
    paths = list(write_folder(tmp_path, range(4, 6), SIZE))
    assert len(paths) == len(set(paths)) == 2 * 3 * 2
    assert sorted(paths) == sorted(p for p in tmp_path.rglob("*") if p.is_file())
    path = tmp_path / "Winter" / "Sea" / "5.png"
    assert path in paths
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), render(Content(("Sea",), "Winter"), 5, SIZE))
