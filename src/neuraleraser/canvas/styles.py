"""The canvas's styles: each one real image operation, `style(image, mask, rng) -> image`.

`image` is float32 [S, S, 3] in 0..1, `mask` the objects' coverage [S, S] in 0..1 (a painter knows where his
subject stands, and keeps it readable), `rng` a numpy Generator. Sizes are written for S = 64 and scale with S.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.float32]
Style = Callable[[Image, Image, np.random.Generator], Image]


def _grey(x: Image) -> Image:
    return (x @ np.array([0.299, 0.587, 0.114], np.float32)).astype(np.float32)


def _blur(x: Image, sigma: float) -> Image:
    return np.asarray(cv2.GaussianBlur(x, (0, 0), sigma), np.float32)


def _mix(a: Image | float, b: Image, w: Image) -> Image:
    return np.asarray(a * (1 - w[..., None]) + b * w[..., None], np.float32)


def _colour(*rgb: float) -> Image:
    return np.array(rgb, np.float32)


def _saturate(x: Image, s: float) -> Image:
    g = _grey(x)[..., None]
    return np.clip(g + (x - g) * s, 0, 1)


def _contrast(g: Image) -> Image:
    low, high = np.percentile(g, (2, 98))
    return np.clip((g - low) / max(float(high - low), 0.05), 0, 1).astype(np.float32)


def _edges(x: Image, mask: Image, sigma: float = 0.7) -> Image:
    """Strength of contours in 0..1, from all three colours and the outline of the objects."""
    y = np.concatenate([_blur(x, sigma), _blur(mask, sigma)[..., None]], -1)
    gx = cv2.Sobel(y, cv2.CV_32F, 1, 0)
    gy = cv2.Sobel(y, cv2.CV_32F, 0, 1)
    return np.clip(np.sqrt(gx * gx + gy * gy).max(-1) / 1.6, 0, 1).astype(np.float32)


def _noise(size: int, sigma: float, rng: np.random.Generator) -> Image:
    """Smooth noise in 0..1, flattened to the same contrast at every scale."""
    n = _blur(rng.random((size, size), np.float32), sigma)
    return np.clip(0.5 + (n - n.mean()) / (n.std() * 4 + 1e-6), 0, 1).astype(np.float32)


def _palette(g: Image, *stops: tuple[float, float, float]) -> Image:
    """Map grey 0..1 through evenly spaced colours."""
    xs = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(g, xs, [s[c] for s in stops]) for c in range(3)], -1).astype(np.float32)


def _grid(size: int) -> tuple[Image, Image]:
    yy, xx = np.mgrid[:size, :size].astype(np.float32)
    return yy, xx


def plain(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    return x


def artist_sketch(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    e = np.clip(_edges(x, mask) * 1.6, 0, 1)
    shade = 0.28 * (1 - _contrast(_grey(x))) * mask
    paper = 0.94 + 0.05 * (_noise(len(x), 1, rng) - 0.5)
    return _mix(paper[..., None] * _colour(1, 0.93, 0.78), _colour(0.35, 0.18, 0.08) + 0 * x, np.clip(e + shade, 0, 1))


def blossom_season(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = 0.72 * _saturate(x, 0.9) + 0.28 * _colour(1.0, 0.75, 0.86)
    for _ in range(int(34 * (size / 64))):
        c = rng.uniform(0, size, 2)
        # Petals fall beside the objects rather than over them.
        if mask[int(c[1]) % size, int(c[0]) % size] > 0.5 and rng.random() < 0.75:
            continue
        axes = rng.uniform(1.2, 2.6, 2) * size / 64
        tone = _colour(1.0, 0.42, 0.66) + rng.uniform(-0.12, 0.12, 3).astype(np.float32)
        _ellipse(y, c, axes, rng.uniform(0, 180), tone)
    return np.clip(y, 0, 1)


def _ellipse(y: Image, c: NDArray[np.float64], axes: NDArray[np.float64], angle: float, tone: Image) -> None:
    """Draw an ellipse in place, centre and axes in pixels with fractions (8 bits of shift)."""
    k = 256
    cv2.ellipse(y, (int(c[0] * k), int(c[1] * k)), (int(axes[0] * k), int(axes[1] * k)), float(angle), 0, 360,
                [float(v) for v in tone], -1, cv2.LINE_AA, 8)


def bricks(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = _grid(size)
    h, w = size / 8, size / 4
    v = (yy + rng.uniform(0, h)) % h
    row = np.floor((yy - v) / h + 0.5)
    shifted = xx + (row % 2) * w / 2
    u = shifted % w
    mortar = np.clip(1.6 - np.minimum(np.minimum(u, w - u), np.minimum(v, h - v)), 0, 1)
    tone = rng.uniform(0.85, 1.1, (16, 16)).astype(np.float32)
    shade = tone[row.astype(int) % 16, (shifted // w).astype(int) % 16]
    y = (0.55 * x + 0.45 * _colour(0.72, 0.30, 0.20)) * shade[..., None]
    return np.clip(_mix(y, _colour(0.85, 0.82, 0.78) + 0 * x, mortar * 0.85), 0, 1)


def cartoon(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    y = cv2.bilateralFilter(_saturate(x, 1.7), 5, 0.2, 3)
    y = np.floor(np.clip(y, 0, 0.999) * 4) / 3
    line = np.clip((_edges(x, mask, 0.8) - 0.22) * 5, 0, 1)
    return np.clip(_mix(y.astype(np.float32), 0 * x, line), 0, 1)


def comic_etch(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = _grid(size)
    g = _contrast(_grey(x))
    g = np.where(mask > 0.5, 0.25 + 0.75 * g, 0.3 * g)
    a = np.sin((yy + 0.6 * xx) * 2 * np.pi / (size / 16) + rng.uniform(0, 6))
    lines = 1 / (1 + np.exp(-(a - 1 + 2.2 * g) * 5))
    y = np.clip(lines * g * 1.3 + _edges(x, mask), 0, 1)[..., None]
    return np.clip(y * _colour(1, 1, 0.96) + 0.03, 0, 1).astype(np.float32)


def crayon(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    kernel = np.zeros((9, 9), np.float32)
    angle = rng.uniform(0.6, 0.95)
    for t in np.linspace(-4, 4, 33):
        kernel[round(4 - t * np.sin(angle)), round(4 + t * np.cos(angle))] = 1
    n = cv2.filter2D(rng.random((size, size), np.float32), -1, kernel / kernel.sum())
    wax = np.clip(0.5 + (n - n.mean()) / n.std() * 0.45, 0, 1)
    cover = np.clip(0.35 + 0.75 * mask, 0, 1) * np.clip(wax * 1.5, 0, 1)
    return np.clip(_mix(0.98 + 0 * x, _saturate(_blur(x, 0.7), 1.5) * 0.95, cover.astype(np.float32)), 0, 1)


def cubism(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    pts = rng.uniform(0, size - 1, (90, 2))
    # More corners on contours: facets follow the subject.
    e = _edges(x, mask).ravel() + 0.02
    idx = rng.choice(size * size, 130, replace=False, p=e / e.sum())
    pts = np.concatenate([pts, np.stack([idx % size, idx // size], 1), [[0, 0], [0, size - 1], [size - 1, 0], [size - 1, size - 1]]])
    div = cv2.Subdiv2D((0, 0, size, size))
    for p in pts:
        div.insert((float(np.clip(p[0], 0, size - 1.01)), float(np.clip(p[1], 0, size - 1.01))))
    y = x.copy()
    for tri in div.getTriangleList():
        p = tri.reshape(3, 2)
        if (p < 0).any() or (p > size).any():
            continue
        c = p.mean(0)
        tone = x[min(int(c[1]), size - 1), min(int(c[0]), size - 1)] * rng.uniform(0.8, 1.15)
        cv2.fillConvexPoly(y, np.round(p * 16).astype(np.int32), [float(v) for v in tone], cv2.LINE_AA, 4)
        cv2.polylines(y, [np.round(p * 16).astype(np.int32)], True, [float(v * 0.62) for v in tone], 1, cv2.LINE_AA, 4)
    return np.clip(y, 0, 1)


def glowing_sunset(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, _ = _grid(size)
    t = np.clip(yy / size + rng.uniform(-0.1, 0.1), 0, 1)
    sky = _palette(t.astype(np.float32), (0.35, 0.10, 0.45), (0.95, 0.35, 0.25), (1.0, 0.75, 0.25))
    g = _contrast(_grey(x))[..., None]
    subject = _palette(g[..., 0], (0.22, 0.04, 0.20), (0.80, 0.32, 0.22), (1.0, 0.92, 0.62))
    y = _mix(sky * (0.75 + 0.25 * g), subject.astype(np.float32), mask)
    return np.clip(0.8 * y + 0.3 * _blur(y, 2.5 * size / 64), 0, 1)


def ink_art(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    g = _contrast(_grey(x))
    local = _blur(g, 3 * size / 64)
    ink = np.where(mask > 0.4, 1 / (1 + np.exp((g - np.minimum(local, 0.62)) * 14)), 0)
    ink = np.maximum(ink, np.clip((_edges(x, mask) - 0.25) * 4, 0, 1))
    y = np.repeat((1 - ink)[..., None], 3, -1).astype(np.float32)
    for _ in range(14):
        c = rng.uniform(0, size, 2)
        r = rng.exponential(0.8) * size / 64 + 0.4
        _ellipse(y, c, np.array([r, r]), 0, _colour(0.02, 0.02, 0.02))
    return y


def meteor_shower(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    night = _palette(_contrast(_grey(x)), (0.02, 0.02, 0.12), (0.10, 0.14, 0.42), (0.55, 0.68, 1.0))
    y = _mix(0.5 * night, 0.75 * night + 0.25 * x, mask)
    streaks = np.zeros((size, size), np.float32)
    for _ in range(9):
        a = rng.uniform(-0.2, 1.1, 2) * size
        n = rng.uniform(0.15, 0.4) * size
        cv2.line(streaks, (int(a[0] * 16), int(a[1] * 16)), (int((a[0] - n) * 16), int((a[1] + n) * 16)), 1.0, 1, cv2.LINE_AA, 4)
    return np.clip(_mix(y, _colour(1, 1, 0.9) + 0 * x, streaks * (1 - 0.6 * mask)), 0, 1)


def mosaic(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    n = 16
    step = size / n
    gy, gx = np.mgrid[:n, :n]
    cx = (gx + 0.5 + rng.uniform(-0.3, 0.3, (n, n))) * step
    cy = (gy + 0.5 + rng.uniform(-0.3, 0.3, (n, n))) * step
    yy, xx = _grid(size)
    d = (yy[..., None] - cy.ravel()) ** 2 + (xx[..., None] - cx.ravel()) ** 2
    two = np.partition(d, 1, -1)[..., :2]
    cell = d.argmin(-1)
    grout = np.clip(1.5 - (np.sqrt(two[..., 1]) - np.sqrt(two[..., 0])), 0, 1)
    count = np.maximum(np.bincount(cell.ravel(), minlength=n * n), 1)
    tone = np.stack([np.bincount(cell.ravel(), x[..., c].ravel(), n * n) / count for c in range(3)], -1)
    tone = np.clip(tone * rng.uniform(0.88, 1.15, (n * n, 1)), 0, 1)
    return _mix(_saturate(tone[cell].astype(np.float32), 1.35), 0.16 + 0 * x, grout.astype(np.float32))


def neon_lines(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    e = np.clip((_edges(x, mask, 0.6) - 0.12) * 2.2, 0, 1)
    hue = _saturate(_blur(x, 1.5) * 0.4 + 0.6 * _noise_colour(size, rng), 3)
    hue = hue / np.maximum(hue.max(-1, keepdims=True), 0.2)
    glow = _blur(e, 1.6 * size / 64)[..., None] * hue
    return np.clip(_colour(0.03, 0.01, 0.08) + glow * 0.9 + e[..., None] * (0.35 + 0.65 * hue), 0, 1).astype(np.float32)


def _noise_colour(size: int, rng: np.random.Generator) -> Image:
    return np.stack([_noise(size, size / 5, rng) for _ in range(3)], -1)


def on_fire(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = _grid(size)
    tongues = _noise(size, size / 24, rng)
    stretched = np.asarray(cv2.resize(tongues[: size // 3], (size, size), interpolation=cv2.INTER_LINEAR), np.float32)
    heat = np.clip(stretched * 0.9 + (yy / size - 0.75) * 0.9, 0, 1)
    fire = _palette(heat, (0.10, 0.0, 0.0), (0.62, 0.08, 0.0), (1.0, 0.45, 0.0), (1.0, 0.85, 0.25))
    g = np.clip(_contrast(_grey(x)) * 1.05, 0, 1)
    ember = _palette(g, (0.12, 0.0, 0.0), (0.75, 0.14, 0.0), (1.0, 0.60, 0.05), (1.0, 0.97, 0.62))
    rim = np.clip(_blur(mask, 1.5 * size / 64) - mask, 0, 1) * 2
    y = _mix(fire * 0.72, ember, np.clip(mask, 0, 1))
    return np.clip(_mix(y, _colour(1.0, 0.9, 0.4) + 0 * x, np.clip(rim, 0, 0.8)), 0, 1)


def pencil_drawing(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = _grid(size)
    g = _contrast(_grey(x))
    dark = np.where(mask > 0.4, 0.25 + 0.75 * (1 - g), 0.15 * (1 - g))
    hatch = 0.5 + 0.5 * np.sin((xx - yy + 3 * _noise(size, 4, rng)) * 2 * np.pi / (size / 18))
    tone = np.clip(dark * (0.45 + 0.9 * hatch), 0, 1) * 0.75
    y = 0.96 - np.maximum(tone, 0.8 * np.clip(_edges(x, mask) * 1.3, 0, 1))
    return np.repeat(np.clip(y, 0, 1)[..., None], 3, -1).astype(np.float32)


def pointillism(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = np.full_like(x, 0.97)
    s = _saturate(x, 1.5)
    n = 22
    step = size / n
    cells = [(i, j) for i in range(n) for j in range(n)]
    for k in rng.permutation(len(cells)):
        i, j = cells[k]
        c = (np.array([j, i]) + 0.5 + rng.uniform(-0.3, 0.3, 2)) * step
        p = np.clip(c.astype(int), 0, size - 1)
        tone = np.clip(s[p[1], p[0]] + rng.uniform(-0.13, 0.13, 3), 0, 1)
        r = rng.uniform(0.36, 0.5) * step
        _ellipse(y, c, np.array([r, r]), 0, tone.astype(np.float32))
    return y


def pop_art(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = _grid(size)
    inks = [((1.0, 0.1, 0.5), (0.05, 0.85, 0.95)), ((1.0, 0.85, 0.0), (0.55, 0.1, 0.8)), ((0.1, 0.9, 0.3), (1.0, 0.3, 0.1))]
    a, b = inks[int(rng.integers(len(inks)))]
    g = _contrast(_grey(x))
    subject = _palette(np.floor(g * 2.999) / 2, (0.08, 0.02, 0.2), a, (1.0, 1.0, 0.85))
    p = size / 12
    dots = np.hypot((xx % p) - p / 2, (yy % p) - p / 2) < p * 0.33
    ground = np.where(dots[..., None], np.array(b) * 0.55, np.array(b))
    line = np.clip((_edges(x, mask, 0.8) - 0.3) * 4, 0, 1)
    return _mix(_mix(ground.astype(np.float32), subject, mask), _colour(0.05, 0.0, 0.1) + 0 * x, line)


def red_blue_ink(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    g = _contrast(_grey(x))
    d = max(1, round(size / 40))
    dark = np.clip((1 - g) * (0.3 + 0.7 * mask) + 0.7 * _edges(x, mask), 0, 1)
    red, blue = np.roll(dark, d, 1), np.roll(dark, -d, 1)
    y = 1 - red[..., None] * (1 - _colour(0.92, 0.08, 0.12)) - blue[..., None] * (1 - _colour(0.05, 0.15, 0.85))
    return np.clip(y, 0, 1).astype(np.float32)


def rust(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    n = 0.6 * _noise(size, size / 16, rng) + 0.4 * _noise(size, 0.7, rng)
    brown = _palette(n, (0.22, 0.08, 0.03), (0.62, 0.28, 0.08), (0.80, 0.48, 0.20))
    steel = _contrast(_grey(x))[..., None] * _colour(0.66, 0.74, 0.74)
    w = np.clip((n - 0.42) * 5, 0, 1)
    return np.clip(_mix(steel * (0.5 + 0.5 * mask[..., None]), brown, (w * np.where(mask > 0.5, 0.35, 0.95)).astype(np.float32)), 0, 1)


def sponge_dabbed(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = _mix(_blur(x, 3 * size / 64), _blur(x, 0.8 * size / 64), mask) * 0.92
    s = _saturate(x, 1.2)
    for i in range(420):
        c = rng.uniform(0, size, 2)
        p = np.clip(c.astype(int), 0, size - 1)
        on_subject = mask[p[1], p[0]] > 0.5
        # Large dabs on the ground first, then small ones that keep the subject readable.
        if on_subject != (i >= 180):
            continue
        tone = np.clip(s[p[1], p[0]] * rng.uniform(0.8, 1.12), 0, 1)
        r = rng.uniform(1.2, 2.0) if on_subject else rng.uniform(3.0, 5.0)
        _ellipse(y, c, np.array([r, r * rng.uniform(0.8, 1.2)]) * size / 64, rng.uniform(0, 180), tone.astype(np.float32))
    pits = np.clip((_noise(size, 0.9 * size / 64, rng) - 0.6) * 4, 0, 1) * 0.4
    pits = pits * (1 - 0.5 * mask)
    return np.clip(_mix(_blur(y, 0.6), 0.25 * y, pits.astype(np.float32)), 0, 1)


def superstring(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = _grid(size)
    g = _contrast(_grey(_blur(x, 0.6)))
    phase = (yy + 1.6 * (size / 64) * np.sin(xx * 2 * np.pi / (size / 1.5) + rng.uniform(0, 6)) - 3.2 * (size / 64) * _blur(mask, 1.5) * (0.4 + g))
    w = np.clip(0.5 + 0.5 * np.cos(phase * 2 * np.pi / (size / 14)), 0, 1) ** 1.6
    colour = _saturate(np.clip(x * 1.2 + 0.1, 0, 1), 1.8)
    light = np.where(mask > 0.4, 0.55 + 0.6 * g, 0.38)
    return np.clip(_colour(0.02, 0.02, 0.05) + w[..., None] * colour * light[..., None] * 1.3, 0, 1).astype(np.float32)


def van_gogh(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    """Flow-field strokes by line integral convolution (Cabral and Leedom 1993) of coarse noise."""
    size = len(x)
    yy, xx = _grid(size)
    angle = np.zeros((size, size), np.float32)
    for _ in range(3):
        cx, cy = rng.uniform(0, size, 2)
        r = np.hypot(xx - cx, yy - cy)
        angle += np.exp(-r / (size / 4)) * rng.choice([-1, 1]) * 3
    swirl_x, swirl_y = np.cos(angle + 0.4), np.sin(angle + 0.4)
    g = _blur(_grey(x) + mask, 2 * size / 64)
    tx, ty = -cv2.Sobel(g, cv2.CV_32F, 0, 1), cv2.Sobel(g, cv2.CV_32F, 1, 0)
    # Strokes run along the subject's contours and swirl where there are none.
    vx, vy = swirl_x * 0.25 + tx * 4, swirl_y * 0.25 + ty * 4
    norm = np.hypot(vx, vy) + 1e-6
    vx, vy = (vx / norm).astype(np.float32), (vy / norm).astype(np.float32)
    src = np.concatenate([_saturate(x, 1.5), _noise(size, 0.8 * size / 64, rng)[..., None]], -1)
    acc, px, py, qx, qy = src.copy(), xx.copy(), yy.copy(), xx.copy(), yy.copy()
    steps = 6
    for _ in range(steps):
        for sign, a, b in ((1, px, py), (-1, qx, qy)):
            ux = cv2.remap(vx, a, b, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            uy = cv2.remap(vy, a, b, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            a += sign * ux * size / 64
            b += sign * uy * size / 64
            acc += cv2.remap(src, a, b, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
    acc /= 2 * steps + 1
    stroke = (acc[..., 3] - acc[..., 3].mean()) / (acc[..., 3].std() + 1e-6)
    tone = 0.8 * acc[..., :3] + 0.2 * _palette(_contrast(_grey(acc[..., :3])), (0.05, 0.10, 0.40), (0.15, 0.42, 0.75), (0.98, 0.82, 0.25))
    ground = 0.45 * tone + 0.55 * _palette(_contrast(stroke), (0.03, 0.08, 0.38), (0.20, 0.45, 0.80), (0.95, 0.85, 0.35))
    y = _mix(ground.astype(np.float32), tone.astype(np.float32), _blur(mask, 0.5))
    return np.clip(y * (1 + 0.16 * np.clip(stroke, -2, 2)[..., None]), 0, 1).astype(np.float32)


def warm_smear(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    n = max(3, round(size / 5)) | 1
    smear = cv2.blur(x, (n, 1))
    y = 0.35 * x + 0.65 * np.asarray(smear, np.float32)
    streak = np.repeat(rng.uniform(-0.09, 0.09, (size, 1, 1)), size, 1)
    warm = _palette(_contrast(_grey(y)), (0.30, 0.08, 0.05), (0.85, 0.45, 0.22), (1.0, 0.9, 0.68))
    return np.clip(0.45 * y + 0.55 * warm + streak, 0, 1).astype(np.float32)


def watercolor(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = np.asarray(cv2.medianBlur((x * 255).astype(np.uint8), 5), np.float32) / 255
    wash = _noise(size, size / 12, rng)[..., None]
    y = 1 - (1 - _saturate(y, 1.25)) * (0.45 + 0.45 * wash)
    rim = np.clip(_edges(y.astype(np.float32), mask, 1.2) * 0.5, 0, 0.35)[..., None]
    yy, xx = _grid(size)
    border = np.minimum(np.minimum(xx, size - 1 - xx), np.minimum(yy, size - 1 - yy))
    bleed = np.clip((border - 5 * size / 64 * _noise(size, 3, rng)) / (3 * size / 64), 0, 1)
    y = np.clip(y - rim * (1 - y) * 1.5, 0, 1)
    return np.clip(_mix(0.985 + 0 * x, y.astype(np.float32), bleed.astype(np.float32)), 0, 1)


def winter(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, _ = _grid(size)
    y = 0.7 * _saturate(x, 0.75) + 0.3 * _colour(0.78, 0.89, 1.0)
    ground = np.clip((yy - size * rng.uniform(0.78, 0.86) - 2 * _noise(size, 5, rng)) / 2, 0, 1)
    y = _mix(y.astype(np.float32), _colour(0.97, 0.98, 1.0) + 0 * x, ground * (1 - 0.5 * mask))
    for _ in range(48):
        c = rng.uniform(0, size, 2)
        r = rng.uniform(0.5, 1.3) * size / 64
        _ellipse(y, c, np.array([r, r]), 0, _colour(1, 1, 1))
    return np.clip(y, 0, 1)


STYLE_OPS: dict[str, Style] = {
    "Seed_Images": plain,
    "Artist_Sketch": artist_sketch,
    "Blossom_Season": blossom_season,
    "Bricks": bricks,
    "Cartoon": cartoon,
    "Comic_Etch": comic_etch,
    "Crayon": crayon,
    "Cubism": cubism,
    "Glowing_Sunset": glowing_sunset,
    "Ink_Art": ink_art,
    "Meteor_Shower": meteor_shower,
    "Mosaic": mosaic,
    "Neon_Lines": neon_lines,
    "On_Fire": on_fire,
    "Pencil_Drawing": pencil_drawing,
    "Pointillism": pointillism,
    "Pop_Art": pop_art,
    "Red_Blue_Ink": red_blue_ink,
    "Rust": rust,
    "Sponge_Dabbed": sponge_dabbed,
    "Superstring": superstring,
    "Van_Gogh": van_gogh,
    "Warm_Smear": warm_smear,
    "Watercolor": watercolor,
    "Winter": winter,
}
"""Style name -> operation, in the order of `words.STYLES`."""
