"""Pictures that people name: scaled in their proportions, and refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuraleraser.errors import FileError
from neuraleraser.io import picture_files
from neuraleraser.io.picture_files import read_picture


def saved(path: Path, height: int, width: int, mode: str = "RGB") -> Path:
    Image.new(mode, (width, height), 200).save(path)
    return path


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(64, 64, (64, 64)), (640, 640, (64, 64)), (10, 10, (64, 64)), (100, 200, (48, 88)), (201, 67, (112, 40))],
)
def test_a_picture_is_scaled_in_its_proportions(tmp_path: Path, height: int, width: int, expected: tuple[int, int]):
    found = read_picture(saved(tmp_path / "a.png", height, width), 64, 8)
    assert found.dtype == np.uint8 and found.shape == (*expected, 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    assert read_picture(saved(tmp_path / "a.png", 64, 64, mode), 64, 8).shape == (64, 64, 3)


def test_one_of_the_right_size_keeps_its_pixels(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png", 64, 8), pixels)


def test_a_camera_s_rotation_is_undone(tmp_path: Path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    found = read_picture(tmp_path / "a.jpg", 64, 8)
    assert found[:, -8:].mean() > 200 and found[:, :32].mean() < 50


def test_what_is_no_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.png").write_text("no picture")
    whole = saved(tmp_path / "a.png", 64, 64).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tiff")
    for name in ("text.png", "half.png", "a.tiff"):
        with pytest.raises(FileError, match=rf"{name} cannot be read as a picture: pass a PNG, JPEG or WebP file"):
            read_picture(tmp_path / name, 64, 8)
    with pytest.raises(FileError, match=r"none\.png"):
        read_picture(tmp_path / "none.png", 64, 8)
    with pytest.raises(FileError, match="512 x 8 pixels: pass a picture that is less narrow"):
        read_picture(saved(tmp_path / "thin.png", 8, 512), 64, 8)
    monkeypatch.setattr(picture_files, "MAX_PIXELS", 100)
    with pytest.raises(FileError, match="64 x 64 pixels: pass a smaller picture"):
        read_picture(tmp_path / "a.png", 64, 8)


def test_what_is_transparent_is_black_whatever_colour_it_hides(tmp_path: Path):
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 64, 8).max() == 0
    palette = Image.new("P", (64, 64), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "b.png", transparency=b"\xff\x00")  # as pngquant writes it
    assert read_picture(tmp_path / "b.png", 64, 8).max() == 0


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path):
    Image.fromarray(np.full((64, 64), 20_000, np.uint16)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png", 64, 8) == 20_000 // 257).all()
