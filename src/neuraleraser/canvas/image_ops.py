"""Arithmetic on pictures, with which the styles are painted.

A picture is [S, S, 3] in 0..1, a field (grey, mask, noise) [S, S] in 0..1.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.floating]
"""A picture or a field: float32, but for steps inside a style that numpy takes in float64."""


def grey(x: Image) -> Image:
    """A picture's brightness, by the weights of ITU-R BT.601."""
    return (x @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.float32)


def blur(x: Image, sigma: float) -> Image:
    """Gaussian blur of a picture or a field, `sigma` in pixels."""
    return np.asarray(cv2.GaussianBlur(x, (0, 0), sigma), np.float32)


def mix(a: Image, b: Image, w: Image) -> Image:
    """`a` where the field `w` is 0, `b` where it is 1; either may be one colour."""
    return np.asarray(a * (1 - w[..., None]) + b * w[..., None], np.float32)


def colour(*rgb: float) -> Image:
    """One colour [3], or one grey [1]."""
    return np.array(rgb, np.float32)


def saturate(x: Image, s: float) -> Image:
    """Colours `s` times as far from grey."""
    g = grey(x)[..., None]
    return np.clip(g + (x - g) * s, 0, 1)


def contrast(g: Image) -> Image:
    """Stretch a field so that it spans 0..1, but for its extremes."""
    low, high = np.percentile(g, (2, 98))
    return np.clip((g - low) / max(float(high - low), 0.05), 0, 1).astype(np.float32)


def edges(x: Image, mask: Image, sigma: float = 0.7) -> Image:
    """Strength of contours in 0..1, from all three colours and the outline of the objects."""
    y = np.concatenate([blur(x, sigma), blur(mask, sigma)[..., None]], -1)
    gx = cv2.Sobel(y, cv2.CV_32F, 1, 0)
    gy = cv2.Sobel(y, cv2.CV_32F, 0, 1)
    return np.clip(np.sqrt(gx * gx + gy * gy).max(-1) / 1.6, 0, 1).astype(np.float32)


def noise(size: int, sigma: float, rng: np.random.Generator) -> Image:
    """Smooth noise in 0..1, flattened to the same contrast at every scale."""
    n = blur(rng.random((size, size), np.float32), sigma)
    return np.clip(0.5 + (n - n.mean()) / (n.std() * 4 + 1e-6), 0, 1).astype(np.float32)


def palette(g: Image, *stops: tuple[float, float, float]) -> Image:
    """Map grey 0..1 through evenly spaced colours."""
    xs = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(g, xs, [s[c] for s in stops]) for c in range(3)], -1).astype(np.float32)


def grid(size: int) -> tuple[Image, Image]:
    """Row and column of every pixel, both [S, S]."""
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    return yy, xx


def fixed(p: NDArray[np.float64], bits: int) -> tuple[int, int]:
    """A point in pixels with fractions as OpenCV takes it: whole numbers of 1 / 2**bits pixels."""
    return int(p[0] * 2**bits), int(p[1] * 2**bits)


def ellipse(y: Image, c: NDArray[np.float64], axes: NDArray[np.float64], angle: float, tone: Image) -> None:
    """Fill an ellipse in place: centre and half axes in pixels with fractions, angle in degrees."""
    cv2.ellipse(y, fixed(c, 8), fixed(axes, 8), angle, 0, 360, [float(v) for v in tone], -1, cv2.LINE_AA, 8)


def line_integral_convolution(x: Image, vx: Image, vy: Image, steps: int) -> Image:
    """Each pixel of `x` [S, S, C] averaged along the flow (vx, vy) through it, `steps` steps either way.

    Line integral convolution (Cabral and Leedom 1993).
    """
    size = len(x)
    total = x.copy()
    yy, xx = grid(size)
    ways = [(1, xx.copy(), yy.copy()), (-1, xx, yy)]
    for _ in range(steps):
        for sign, px, py in ways:
            ux = cv2.remap(vx, px, py, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            uy = cv2.remap(vy, px, py, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            px += sign * ux * size / 64
            py += sign * uy * size / 64
            total += cv2.remap(x, px, py, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    total /= 2 * steps + 1
    return total


def noise_colour(size: int, rng: np.random.Generator) -> Image:
    """Large soft clouds, each colour by itself."""
    return np.stack([noise(size, size / 5, rng) for _ in range(3)], -1)
