"""Pictures: PNG bytes, differences, heatmaps, sheets. Images are uint8 [height, width, 3]."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from neuraleraser.errors import DataError
from neuraleraser.io.atomic import write_bytes

T = TypeVar("T")
PAPER, INK, MUTED, LINE = (252, 251, 249), (34, 34, 38), (122, 120, 116), (226, 223, 217)
DIFFERENCE_GAIN = 4
"""Factor by which a difference is amplified."""
TILE_SCALE = 2
"""Pixels of a heatmap for each pixel of its image."""
_GOLDEN_RATIO = 0.618


@dataclass(frozen=True, eq=False)
class ImagePair:
    """An image before and after erasure, at the same prompt and seed."""

    prompt: str
    seed: int
    before: np.ndarray
    """[height, width, 3] uint8"""
    after: np.ndarray
    """[height, width, 3] uint8"""
    route: str = ""
    """Route by which the concept entered; "" where the prompt names it."""

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            check_image(getattr(self, name), f"the image {name!r} of {self.prompt!r} at seed {self.seed}")
        if self.before.shape != self.after.shape:
            raise DataError(
                f"{self.prompt!r} at seed {self.seed}: before and after have the shapes "
                f"{self.before.shape} and {self.after.shape}, expected the same"
            )

    @property
    def identical(self) -> bool:
        """True if both have the same bits."""
        return bool(np.array_equal(self.before, self.after))


@dataclass(frozen=True, eq=False)
class FeaturePanel:
    """One feature of an eraser, with pictures of where it fires."""

    label: str
    note: str = ""
    heatmaps: Sequence[tuple[str, np.ndarray]] = ()
    """(caption, [height, width, 3] uint8)"""

    def __post_init__(self) -> None:
        for caption, image in self.heatmaps:
            check_image(image, f"the heatmap {caption!r} of feature {self.label!r}")


@dataclass(frozen=True, eq=False)
class GatePanel:
    """One gate of an eraser: its name, what it reads and when it opens, its evidence in pictures, and its features."""

    title: str
    note: str = ""
    heatmaps: Sequence[tuple[str, np.ndarray]] = ()
    """(caption, [height, width, 3] uint8): where its evidence lies"""
    features: Sequence[FeaturePanel] = ()

    def __post_init__(self) -> None:
        for caption, image in self.heatmaps:
            check_image(image, f"the heatmap {caption!r} of the gate {self.title!r}")


def check_image(image: Any, what: str) -> None:
    """Raise DataError unless `image` is [height, width, 3] uint8."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"{what} is {got}: expected a uint8 array [height, width, 3]")
    if not image.size:
        raise DataError(f"{what} has shape {image.shape}, which holds no pixels")


def spaced_sample(items: Sequence[T], count: int) -> list[T]:
    """Return `count` of the items, one of each of as many equal parts; each more than once if they are fewer, none if
    there are none. Which one of its part is varied: even steps through a table would always meet the same column."""
    return [items[int((i + i * _GOLDEN_RATIO % 1) * len(items) / count)] for i in range(count)] if items else []


def reduced(image: np.ndarray, side: int) -> np.ndarray:
    """Return `image` with its longer side at most `side` pixels: as it is, or the means of what falls on each pixel."""
    from PIL import Image

    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def png(image: np.ndarray) -> bytes:
    """Return `image` as a PNG file's bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", optimize=True)
    return out.getvalue()


def difference(pair: ImagePair) -> np.ndarray:
    """Return |after - before|, times `DIFFERENCE_GAIN`, cut off at white: uint8, black where nothing changed."""
    gap = np.abs(pair.after.astype(np.int16) - pair.before.astype(np.int16))
    return np.minimum(gap * DIFFERENCE_GAIN, 255).astype(np.uint8)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay `heat` [h, w] in 0..1 over the greyed image [H, W, 3] uint8 -> [SCALE H, SCALE W, 3] uint8.

    Each value is a block of pixels (nearest), so that one sees the resolution at which the feature fires.
    """
    height, width = TILE_SCALE * image.shape[0], TILE_SCALE * image.shape[1]
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), heat.shape, strict=True))
    value = np.clip(heat, 0, 1)[rows][:, columns, None].astype(np.float32)
    big = image.repeat(TILE_SCALE, 0).repeat(TILE_SCALE, 1).astype(np.float32)
    grey = 0.6 * big.mean(-1, keepdims=True) * np.ones(3, np.float32)
    # Dark red to yellow: brightness rises with the value, so that it reads without colour too.
    colour = np.concatenate([80 + 175 * value, 255 * value**1.5, 40 * value], -1)
    mix = np.minimum(1.0, 2.5 * value) * 0.75
    return np.clip(grey * (1 - mix) + colour * mix, 0, 255).astype(np.uint8)


def grid_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], heads: Sequence[str]) -> np.ndarray:
    """Return a contact sheet uint8 [H, W, 3]: a labelled row of equally large images each, a head above each column."""
    from PIL import Image, ImageDraw, ImageFont

    tile, gap = rows[0][1][0].shape[0], 4
    font = ImageFont.load_default(size=max(9, tile // 9))
    left = gap + max(int(font.getlength(label)) for label, _ in rows) + 2 * gap
    top = tile // 5
    size = (left + len(heads) * (tile + gap), top + len(rows) * (tile + gap))
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        x = left + column * (tile + gap)
        pen.text((x + tile // 2, top // 2), _without_underscores(head), fill=MUTED, font=font, anchor="mm")
    for number, (label, images) in enumerate(rows):
        y = top + number * (tile + gap)
        pen.text((gap, y + tile // 2), _without_underscores(label), fill=INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (left + column * (tile + gap), y))
    return np.asarray(sheet)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[ImagePair]]], path: str | os.PathLike[str], *, tile: int = 128
) -> None:
    """Write a PNG: one row per concept, its label on the left, then its pairs, before and after side by side.

    Above each column stands the route of its pairs, where the prompt does not name the concept.

    Each picture fills a square of `tile` pixels, its proportions kept. Raises DataError for no rows, or a row without
    pairs, FileError if the system refuses the file.
    """
    from PIL import Image, ImageDraw, ImageFont

    empty = [label for label, pairs in rows if not pairs]
    if not rows or empty:
        raise DataError(
            f"a contact sheet of {len(rows)} rows, of which {empty} hold no pairs: pass a pair or more each"
        )
    big, small = (ImageFont.load_default(size=max(9, round(tile * share))) for share in (0.15, 0.105))
    margin, gap, block_gap = tile // 4, max(2, tile // 32), tile // 6
    head, foot = round(tile * 0.32), round(tile * 0.1)
    label_width = max(int(big.getlength(_without_underscores(label))) for label, _ in rows) + block_gap
    block = 2 * tile + gap
    columns = max(len(pairs) for _, pairs in rows)
    width = 2 * margin + label_width + columns * (block + block_gap) - block_gap
    height = 2 * margin + head + len(rows) * (tile + foot) - foot
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        left = margin + label_width + column * (block + block_gap)
        routes = {pairs[column].route for _, pairs in rows if column < len(pairs)} - {""}
        before = ", ".join(("before", *sorted(routes)))
        for x, word in ((left, before), (left + tile + gap, "after")):
            pen.text((x + tile // 2, margin + head // 2), word, fill=MUTED, font=small, anchor="mm")
    for number, (label, pairs) in enumerate(rows):
        top = margin + head + number * (tile + foot)
        pen.text((margin, top + tile // 2), _without_underscores(label), fill=INK, font=big, anchor="lm")
        for column, pair in enumerate(pairs):
            left = margin + label_width + column * (block + block_gap)
            sheet.paste(_fit_to_tile(pair.before, tile), (left, top))
            sheet.paste(_fit_to_tile(pair.after, tile), (left + tile + gap, top))
    out = io.BytesIO()
    sheet.save(out, format="PNG", optimize=True)
    write_bytes(path, out.getvalue())


def _without_underscores(name: str) -> str:
    return name.replace("_", " ")


def _fit_to_tile(image: np.ndarray, tile: int) -> Any:
    """Return `image` as large as a square of `tile` pixels takes, on a plain ground."""
    from PIL import Image

    scale = tile / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (tile, tile), LINE)
    ground.paste(picture, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return ground
