"""Renders in bulk: the training set of the canvas in memory-mapped arrays, and UnlearnCanvas folders."""

from __future__ import annotations

import multiprocessing
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from tqdm import tqdm

from neuraleraser.canvas.render import CANVAS_FOLDER, Content, draw_content, render
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import DataError
from neuraleraser.io.atomic import replacing

RENDERS_PER_JOB = 250


@dataclass(frozen=True)
class Renders:
    """Renders with their labels: `images` uint8 [N, S, S, 3], `style` [N] index, `objects` [N, 2] index or -1."""

    images: NDArray[np.uint8]
    style: NDArray[np.int16]
    objects: NDArray[np.int16]

    def content(self, i: int) -> Content:
        """Return the content of render `i`."""
        return Content(tuple(OBJECTS[o] for o in self.objects[i] if o >= 0), STYLES[self.style[i]])


def content_of(seed: int, i: int) -> Content:
    """The content of render `i` of the set `seed`."""
    return draw_content(np.random.default_rng((seed, i, 7)))


def render_set(n: int, seed: int, size: int = 64, folder: Path | None = None, workers: int | None = None) -> Renders:
    """Render `n` pictures of random content. With `folder` they are kept there and found again.

    `workers` processes share the work (None: one a core; 1: this process alone); the pixels do not depend on
    them. A set of another seed shares no picture with it. Killed halfway, it starts again and leaves no set.
    Raises DataError if the file in `folder` is damaged or holds another set, FileError if it cannot be written.
    """
    contents = [content_of(seed, i) for i in range(n)]
    style = np.array([STYLES.index(c.style) for c in contents], np.int16)
    objects = np.full((n, 2), -1, np.int16)
    for i, c in enumerate(contents):
        objects[i, : len(c.objects)] = [OBJECTS.index(o) for o in c.objects]
    path = folder and folder / f"renders-{seed}-{n}-{size}-{_version(size):08x}.npy"
    if path and path.exists():
        return Renders(_open_cached(path, (n, size, size, 3)), style, objects)
    images = _render_all(n, seed, size, workers)
    if path:
        with replacing(path) as temp_path, open(temp_path, "wb") as file:
            np.save(file, images)
    return Renders(images, style, objects)


def _render_all(n: int, seed: int, size: int, workers: int | None) -> NDArray[np.uint8]:
    """Render the whole set in several processes: uint8 [n, size, size, 3]."""
    images = np.empty((n, size, size, 3), np.uint8)
    jobs = [(seed, start, min(start + RENDERS_PER_JOB, n), size) for start in range(0, n, RENDERS_PER_JOB)]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    with tqdm(total=n, desc="render", unit="img") as bar:

        def take(start: int, block: NDArray[np.uint8]) -> None:
            images[start : start + len(block)] = block
            bar.update(len(block))

        if workers <= 1:
            for job in jobs:
                take(*_render_job(job))
            return images
        # Spawned, not forked: by now torch may have threads, and a fork of threads can hang.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for start, block in pool.map(_render_job, jobs):
                take(start, block)
    return images


def _render_job(job: tuple[int, int, int, int]) -> tuple[int, NDArray[np.uint8]]:
    """Renders `start` to `stop` of a set, and `start`; a job is (seed, start, stop, size)."""
    seed, start, stop, size = job
    return start, np.stack([render(content_of(seed, i), seed * 10_000_000 + i, size) for i in range(start, stop)])


def _open_cached(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Open a set that was rendered before, without reading it. Raises DataError where it is not whole."""
    try:
        images = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as e:
        raise DataError(f"{path} is not a whole set of renders ({e}): delete it") from e
    if images.shape != shape or images.dtype != np.uint8:
        raise DataError(f"{path} holds {images.dtype} {images.shape}, expected uint8 {shape}: delete it")
    return images


def _version(size: int) -> int:
    """A number that changes with what is drawn, so that stale renders are never read.

    Taken from contents, glyphs and pixels, not from the source: a comment changes no picture. One render a style,
    each object at least once, at the set's own `size`, since some strokes are rounded to whole pixels.
    """
    number = zlib.crc32("".join(str(content_of(0, i)) for i in range(64)).encode())
    number = zlib.crc32((CANVAS_FOLDER / "sprites.png").read_bytes(), number)
    for i, style in enumerate(STYLES):
        number = zlib.crc32(render(Content((OBJECTS[i % len(OBJECTS)],), style), i, size).tobytes(), number)
    return number


def write_folder(root: Path, seeds: range, size: int = 64) -> Iterator[Path]:
    """Write one render a style, object and seed as `root/{style}/{object}/{seed}.png`; yields each path."""
    for style in STYLES:
        for name in OBJECTS:
            for seed in seeds:
                path = root / style / name / f"{seed}.png"
                with replacing(path) as temp_path:
                    PILImage.fromarray(render(Content((name,), style), seed, size)).save(temp_path, "PNG")
                yield path
