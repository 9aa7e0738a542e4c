"""Pictures that people name: read, and scaled to a model's size."""

from __future__ import annotations

import io
import os
import warnings

import numpy as np
from numpy.typing import NDArray

from neuraleraser.errors import FileError
from neuraleraser.io.reading import read_bytes

MAX_PICTURE_BYTES = 64 * 2**20
"""Bytes of a picture's file, at most."""
MAX_PIXELS = 2**26
"""Pixels of a picture, at most."""


def read_picture(path: str | os.PathLike[str], side: int, multiple: int) -> NDArray[np.uint8]:
    """Return a picture scaled to about `side` x `side` pixels in its own proportions, uint8 [height, width, 3].

    Both sides are multiples of `multiple`. What is transparent becomes black.

    Raises FileError where there is no such file, or none that can be read as a picture.
    """
    from PIL import Image, ImageOps

    data = read_bytes(path, MAX_PICTURE_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd, and can be read
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as found:
                if found.width * found.height > MAX_PIXELS:
                    raise FileError(f"{path} has {found.width} x {found.height} pixels: pass a smaller picture")
                picture = ImageOps.exif_transpose(found)
                if picture.mode.startswith("I"):  # 16 bits of grey
                    picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
                if picture.has_transparency_data:
                    ground = Image.new("RGBA", picture.size, "black")
                    picture = Image.alpha_composite(ground, picture.convert("RGBA"))
                picture = picture.convert("RGB")
    except FileError:
        raise
    except Exception as error:  # whatever a decoder raises on a damaged file
        raise FileError(f"{path} cannot be read as a picture: pass a PNG, JPEG or WebP file") from error
    scale = side / (picture.width * picture.height) ** 0.5
    size = [max(multiple, round(n * scale / multiple) * multiple) for n in picture.size]
    if max(size) > 4 * min(size):
        raise FileError(f"{path} has {picture.width} x {picture.height} pixels: pass a picture that is less narrow")
    if (size[0], size[1]) != picture.size:
        picture = picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    return np.asarray(picture)
