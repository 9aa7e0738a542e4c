"""Renders in bulk: the training set of the canvas in memory-mapped arrays, and UnlearnCanvas folders."""

from __future__ import annotations

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

from neuraleraser.canvas.render import Content, draw_content, render
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import DataError

CHUNK = 250


@dataclass(frozen=True)
class Renders:
    """Renders with their labels: `images` uint8 [N, S, S, 3], `style` [N] index, `objects` [N, 2] index or -1."""

    images: NDArray[np.uint8]
    style: NDArray[np.int16]
    objects: NDArray[np.int16]

    def content(self, i: int) -> Content:
        """What render `i` shows."""
        return Content(tuple(OBJECTS[o] for o in self.objects[i] if o >= 0), STYLES[self.style[i]])


def content_of(seed: int, i: int) -> Content:
    """The content of render `i` of the set `seed`."""
    return draw_content(np.random.default_rng((seed, i, 7)))


def _chunk(args: tuple[int, int, int, int]) -> tuple[int, NDArray[np.uint8]]:
    seed, start, stop, size = args
    return start, np.stack([render(content_of(seed, i), seed * 10_000_000 + i, size) for i in range(start, stop)])


def _labels(contents: list[Content]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    style = np.array([STYLES.index(c.style) for c in contents], np.int16)
    objects = np.full((len(contents), 2), -1, np.int16)
    for i, c in enumerate(contents):
        objects[i, : len(c.objects)] = [OBJECTS.index(o) for o in c.objects]
    return style, objects


def render_set(n: int, seed: int, size: int = 64, folder: Path | None = None, workers: int | None = None) -> Renders:
    """Render `n` pictures of random content. With `folder` they are kept there and found again.

    A set of another seed shares no picture with it. Raises DataError if `folder` holds another set.
    """
    contents = [content_of(seed, i) for i in range(n)]
    path = folder and folder / f"renders-{seed}-{n}-{size}-{_version():08x}.npy"
    if path and path.exists():
        images = np.load(path, mmap_mode="r")
        if images.shape != (n, size, size, 3):
            raise DataError(f"{path} holds renders of shape {images.shape}, expected {(n, size, size, 3)}: delete it")
        return Renders(images, *_labels(contents))
    images = np.empty((n, size, size, 3), np.uint8)
    jobs = [(seed, s, min(s + CHUNK, n), size) for s in range(0, n, CHUNK)]
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool, tqdm(total=n, desc="render", unit="img") as bar:
        for start, block in pool.map(_chunk, jobs):
            images[start : start + len(block)] = block
            bar.update(len(block))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        np.save(part, images)
        part.replace(path)
    return Renders(images, *_labels(contents))


def _version() -> int:
    """A number that changes with the renderer, so that stale renders are never read."""
    here = Path(__file__).parent
    parts = (here / name for name in ("render.py", "styles.py", "words.py", "sprites.png", "sprites.json"))
    return zlib.crc32(b"".join(p.read_bytes() for p in parts))


def write_folder(root: Path, seeds: range, size: int = 64) -> Iterator[Path]:
    """Write one render a style, object and seed as `root/{style}/{object}/{seed}.png`; yields each path."""
    for style in STYLES:
        for name in OBJECTS:
            for seed in seeds:
                path = root / style / name / f"{seed}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                PILImage.fromarray(render(Content((name,), style), seed, size)).save(path)
                yield path
