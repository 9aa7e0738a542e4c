"""Pictures of a report: PNG bytes, differences, the contact sheet. Images are uint8 [height, width, 3]."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from neuraleraser.bench.files import write_bytes
from neuraleraser.bench.report import Pair
from neuraleraser.errors import DataError

PAPER, INK, MUTED, LINE = (252, 251, 249), (34, 34, 38), (122, 120, 116), (226, 223, 217)
GAIN = 4
"""By how much a difference is amplified."""


def png(image: np.ndarray) -> bytes:
    """`image` as a PNG file's bytes."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", optimize=True)
    return out.getvalue()


def difference(pair: Pair) -> np.ndarray:
    """|after - before|, `GAIN` times amplified and cut off at white: uint8, black where nothing changed."""
    gap = np.abs(pair.after.astype(np.int16) - pair.before.astype(np.int16))
    return np.minimum(gap * GAIN, 255).astype(np.uint8)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Pair]]], path: str | os.PathLike[str], *, tile: int = 128) -> None:
    """Write a PNG: one row a concept, its label on the left, then its pairs, before and after side by side.

    Each picture fills a square of `tile` pixels, its proportions kept.

    Raises:
        DataError: no rows, or a row without pairs.
        FileError: the system refuses the file.
    """
    from PIL import Image, ImageDraw, ImageFont

    empty = [label for label, pairs in rows if not pairs]
    if not rows or empty:
        raise DataError(
            f"A contact sheet of {len(rows)} rows, of which {empty} hold no pairs; pass a pair or more each."
        )
    big, small = (ImageFont.load_default(size=max(9, round(tile * share))) for share in (0.15, 0.105))
    margin, gap, block_gap = tile // 4, max(2, tile // 32), tile // 6
    head, foot = round(tile * 0.32), round(tile * 0.1)
    label_width = max(int(big.getlength(_words(label))) for label, _ in rows) + block_gap
    block = 2 * tile + gap
    columns = max(len(pairs) for _, pairs in rows)
    width = 2 * margin + label_width + columns * (block + block_gap) - block_gap
    height = 2 * margin + head + len(rows) * (tile + foot) - foot
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column in range(columns):
        left = margin + label_width + column * (block + block_gap)
        for x, word in ((left, "before"), (left + tile + gap, "after")):
            draw.text((x + tile // 2, margin + head // 2), word, fill=MUTED, font=small, anchor="mm")
    for number, (label, pairs) in enumerate(rows):
        top = margin + head + number * (tile + foot)
        draw.text((margin, top + tile // 2), _words(label), fill=INK, font=big, anchor="lm")
        for column, pair in enumerate(pairs):
            left = margin + label_width + column * (block + block_gap)
            sheet.paste(_fitted(pair.before, tile), (left, top))
            sheet.paste(_fitted(pair.after, tile), (left + tile + gap, top))
    out = io.BytesIO()
    sheet.save(out, format="PNG", optimize=True)
    write_bytes(path, out.getvalue())


def _words(name: str) -> str:
    return name.replace("_", " ")


def _fitted(image: np.ndarray, tile: int) -> Any:
    """`image` as large as a square of `tile` pixels takes, on a plain ground."""
    from PIL import Image

    scale = tile / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (tile, tile), LINE)
    ground.paste(picture, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return ground
