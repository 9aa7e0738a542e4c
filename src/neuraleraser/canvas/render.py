"""Rendering a picture of the canvas world: objects on a ground, then a style.

The same (content, seed, size) gives the same pixels, whatever the process, its threads, or what was drawn before.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from neuraleraser.canvas.image_ops import Image
from neuraleraser.canvas.styles import STYLE_OPS
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import SettingsError

# One thread a picture: many are rendered at once by processes, and pixels must not depend on the thread count.
cv2.setNumThreads(1)

CANVAS_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Content:
    """Content of a picture: no, one or two objects, and a style."""

    objects: tuple[str, ...]
    style: str


@cache
def _sprites() -> dict[str, list[Image]]:
    """Object name -> its glyphs, float32 RGBA [96, 96, 4] in 0..1 with premultiplied colour."""
    index = json.loads((CANVAS_FOLDER / "sprites.json").read_text())
    sheet = np.asarray(PILImage.open(CANVAS_FOLDER / "sprites.png").convert("RGBA"), np.float32) / 255
    sheet = np.concatenate([sheet[..., :3] * sheet[..., 3:], sheet[..., 3:]], -1)
    cell, columns = index["cell"], index["columns"]

    def cut(i: int) -> Image:
        y, x = i // columns * cell, i % columns * cell
        return sheet[y : y + cell, x : x + cell]

    return {name: [cut(i) for i in cells] for name, cells in index["glyphs"].items()}


def _draw_ground(size: int, rng: np.random.Generator) -> Image:
    """A soft two-colour ground, light enough for any object to stand out."""
    a, b = (0.55 + 0.43 * rng.random((2, 3))).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    yy, xx = np.mgrid[:size, :size].astype(np.float32) / (size - 1) - 0.5
    t = np.clip(0.5 + (xx * np.cos(angle) + yy * np.sin(angle)) * 0.9, 0, 1)[..., None]
    return (a * (1 - t) + b * t).astype(np.float32)


def _draw_glyph(name: str, side: float, centre: tuple[float, float], size: int, rng: np.random.Generator) -> Image:
    """One glyph as RGBA [size, size, 4]: `side` and `centre` in pixels, turned a little, mirrored half the time."""
    glyphs = _sprites()[name]
    glyph = glyphs[int(rng.integers(len(glyphs)))]
    if rng.random() < 0.5:
        glyph = np.ascontiguousarray(glyph[:, ::-1])
    cell = glyph.shape[0]
    m = cv2.getRotationMatrix2D((cell / 2, cell / 2), float(rng.uniform(-12, 12)), side / cell)
    m[:, 2] += np.array(centre) - cell / 2
    return np.asarray(cv2.warpAffine(glyph, m, (size, size), flags=cv2.INTER_LINEAR), np.float32)


def compose(content: Content, rng: np.random.Generator, size: int) -> tuple[Image, Image]:
    """The unstyled picture [size, size, 3] and the coverage of its objects [size, size], both in 0..1."""
    big = 2 * size  # drawn at twice the size, then averaged: clean edges
    ground = _draw_ground(big, rng)
    cover = np.zeros((big, big), np.float32)
    n = len(content.objects)
    for i, name in enumerate(content.objects):
        if n == 1:
            side = rng.uniform(0.62, 0.86) * big
            room = (big - side) / 2
            centre = (big / 2 + rng.uniform(-room, room), big / 2 + rng.uniform(-room, room))
        else:
            side = rng.uniform(0.44, 0.52) * big
            centre = ((0.26 + 0.48 * i + rng.uniform(-0.02, 0.02)) * big, (0.5 + rng.uniform(-0.2, 0.2)) * big)
        layer = _draw_glyph(name, side, centre, big, rng)
        alpha = layer[..., 3]
        ground = ground * (1 - alpha[..., None]) + layer[..., :3]
        cover = np.maximum(cover, alpha)
    image = cv2.resize(ground, (size, size), interpolation=cv2.INTER_AREA)
    mask = cv2.resize(cover, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(image, np.float32), np.asarray(mask, np.float32)


def render(content: Content, seed: int, size: int = 64) -> NDArray[np.uint8]:
    """Draw `content` -> uint8 RGB [size, size, 3].

    Raises SettingsError for an unknown object or style, or more than two objects.
    """
    for name in content.objects:
        if name not in OBJECTS:
            raise SettingsError(f"unknown object {name!r}: the canvas knows {', '.join(OBJECTS)}")
    if content.style not in STYLE_OPS:
        raise SettingsError(f"unknown style {content.style!r}: the canvas knows {', '.join(STYLES)}")
    if len(content.objects) > 2:
        raise SettingsError(f"{len(content.objects)} objects asked for: the canvas draws at most two")
    key = zlib.crc32("|".join((*content.objects, content.style)).encode())
    rng = np.random.default_rng((seed, key))
    image, mask = compose(content, rng, size)
    styled = STYLE_OPS[content.style](image, mask, rng)
    return np.asarray(np.clip(styled * 255 + 0.5, 0, 255), np.uint8)


def draw_content(rng: np.random.Generator) -> Content:
    """A random content as training sees it: 5 % hold no object, 15 % two different ones."""
    style = STYLES[int(rng.integers(len(STYLES)))]
    r = rng.random()
    n = 0 if r < 0.05 else 2 if r < 0.20 else 1
    return Content(tuple(OBJECTS[int(i)] for i in rng.permutation(len(OBJECTS))[:n]), style)
