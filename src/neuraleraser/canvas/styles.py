"""The canvas's styles: each one real image operation, `style(image, mask, rng) -> image`.

`image` is float32 [S, S, 3] in 0..1, `mask` the objects' coverage [S, S] in 0..1 (a painter knows where his
subject stands, and keeps it readable), `rng` a numpy Generator. Sizes are written for S = 64; most
scale with S.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from neuraleraser.canvas.image_ops import (
    Image,
    blur,
    colour,
    contrast,
    edges,
    ellipse,
    fixed,
    grey,
    grid,
    line_integral_convolution,
    mix,
    noise,
    noise_colour,
    palette,
    saturate,
)

Style = Callable[[Image, Image, np.random.Generator], Image]


def plain(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    return x


def artist_sketch(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    e = np.clip(edges(x, mask) * 1.6, 0, 1)
    shade = 0.28 * (1 - contrast(grey(x))) * mask
    paper = 0.94 + 0.05 * (noise(len(x), 1, rng) - 0.5)
    return mix(paper[..., None] * colour(1, 0.93, 0.78), colour(0.35, 0.18, 0.08), np.clip(e + shade, 0, 1))


def blossom_season(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = 0.72 * saturate(x, 0.9) + 0.28 * colour(1.0, 0.75, 0.86)
    for _ in range(int(34 * (size / 64))):
        c = rng.uniform(0, size, 2)
        # Petals fall beside the objects rather than over them.
        if mask[int(c[1]) % size, int(c[0]) % size] > 0.5 and rng.random() < 0.75:
            continue
        axes = rng.uniform(1.2, 2.6, 2) * size / 64
        tone = colour(1.0, 0.42, 0.66) + rng.uniform(-0.12, 0.12, 3).astype(np.float32)
        ellipse(y, c, axes, rng.uniform(0, 180), tone)
    return np.clip(y, 0, 1)


def bricks(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = grid(size)
    h, w = size / 8, size / 4
    v = (yy + rng.uniform(0, h)) % h
    row = np.floor((yy - v) / h + 0.5)
    shifted = xx + (row % 2) * w / 2
    u = shifted % w
    mortar = np.clip(1.6 - np.minimum(np.minimum(u, w - u), np.minimum(v, h - v)), 0, 1)
    tone = rng.uniform(0.85, 1.1, (16, 16)).astype(np.float32)
    shade = tone[row.astype(int) % 16, (shifted // w).astype(int) % 16]
    y = (0.55 * x + 0.45 * colour(0.72, 0.30, 0.20)) * shade[..., None]
    return np.clip(mix(y, colour(0.85, 0.82, 0.78), mortar * 0.85), 0, 1)


def cartoon(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    y = cv2.bilateralFilter(saturate(x, 1.7), 5, 0.2, 3)
    y = np.floor(np.clip(y, 0, 0.999) * 4) / 3
    line = np.clip((edges(x, mask, 0.8) - 0.22) * 5, 0, 1)
    return np.clip(mix(y.astype(np.float32), colour(0), line), 0, 1)


def comic_etch(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = grid(size)
    g = contrast(grey(x))
    g = np.where(mask > 0.5, 0.25 + 0.75 * g, 0.3 * g)
    a = np.sin((yy + 0.6 * xx) * 2 * np.pi / (size / 16) + rng.uniform(0, 6))
    lines = 1 / (1 + np.exp(-(a - 1 + 2.2 * g) * 5))
    y = np.clip(lines * g * 1.3 + edges(x, mask), 0, 1)[..., None]
    return np.clip(y * colour(1, 1, 0.96) + 0.03, 0, 1).astype(np.float32)


def crayon(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    kernel = np.zeros((9, 9), np.float32)
    angle = rng.uniform(0.6, 0.95)
    for t in np.linspace(-4, 4, 33):
        kernel[round(4 - t * np.sin(angle)), round(4 + t * np.cos(angle))] = 1
    n = cv2.filter2D(rng.random((size, size), np.float32), -1, kernel / kernel.sum())
    wax = np.clip(0.5 + (n - n.mean()) / n.std() * 0.45, 0, 1)
    cover = np.clip(0.35 + 0.75 * mask, 0, 1) * np.clip(wax * 1.5, 0, 1)
    return np.clip(mix(colour(0.98), saturate(blur(x, 0.7), 1.5) * 0.95, cover.astype(np.float32)), 0, 1)


def cubism(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    pts = rng.uniform(0, size - 1, (90, 2))
    # More corners on contours: facets follow the subject.
    e = edges(x, mask).ravel() + 0.02
    idx = rng.choice(size * size, 130, replace=False, p=e / e.sum())
    corners = [[0, 0], [0, size - 1], [size - 1, 0], [size - 1, size - 1]]
    pts = np.concatenate([pts, np.stack([idx % size, idx // size], 1), corners])
    div = cv2.Subdiv2D((0, 0, size, size))
    for p in pts:
        div.insert((float(np.clip(p[0], 0, size - 1.01)), float(np.clip(p[1], 0, size - 1.01))))
    y = x.copy()
    for p in np.asarray(div.getTriangleList()).reshape(-1, 3, 2):
        if (p < 0).any() or (p > size).any():
            continue
        c = p.mean(0)
        tone = x[min(int(c[1]), size - 1), min(int(c[0]), size - 1)] * rng.uniform(0.8, 1.15)
        outline = np.round(p * 16).astype(np.int32)  # 4 bits of fraction
        cv2.fillConvexPoly(y, outline, [float(v) for v in tone], cv2.LINE_AA, 4)
        cv2.polylines(y, [outline], True, [float(v * 0.62) for v in tone], 1, cv2.LINE_AA, 4)
    return np.clip(y, 0, 1)


def glowing_sunset(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, _ = grid(size)
    t = np.clip(yy / size + rng.uniform(-0.1, 0.1), 0, 1)
    sky = palette(t.astype(np.float32), (0.35, 0.10, 0.45), (0.95, 0.35, 0.25), (1.0, 0.75, 0.25))
    g = contrast(grey(x))[..., None]
    subject = palette(g[..., 0], (0.22, 0.04, 0.20), (0.80, 0.32, 0.22), (1.0, 0.92, 0.62))
    y = mix(sky * (0.75 + 0.25 * g), subject.astype(np.float32), mask)
    return np.clip(0.8 * y + 0.3 * blur(y, 2.5 * size / 64), 0, 1)


def ink_art(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    g = contrast(grey(x))
    local = blur(g, 3 * size / 64)
    ink = np.where(mask > 0.4, 1 / (1 + np.exp((g - np.minimum(local, 0.62)) * 14)), 0)
    ink = np.maximum(ink, np.clip((edges(x, mask) - 0.25) * 4, 0, 1))
    y = np.repeat((1 - ink)[..., None], 3, -1).astype(np.float32)
    for _ in range(14):
        c = rng.uniform(0, size, 2)
        r = rng.exponential(0.8) * size / 64 + 0.4
        ellipse(y, c, np.array([r, r]), 0, colour(0.02, 0.02, 0.02))
    return y


def meteor_shower(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    night = palette(contrast(grey(x)), (0.02, 0.02, 0.12), (0.10, 0.14, 0.42), (0.55, 0.68, 1.0))
    y = mix(0.5 * night, 0.75 * night + 0.25 * x, mask)
    streaks = np.zeros((size, size), np.float32)
    for _ in range(9):
        start = rng.uniform(-0.2, 1.1, 2) * size
        end = start + rng.uniform(0.15, 0.4) * size * np.array([-1, 1])
        cv2.line(streaks, fixed(start, 4), fixed(end, 4), 1.0, 1, cv2.LINE_AA, 4)
    return np.clip(mix(y, colour(1, 1, 0.9), streaks * (1 - 0.6 * mask)), 0, 1)


def mosaic(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    n = 16
    step = size / n
    gy, gx = np.mgrid[:n, :n]
    cx = (gx + 0.5 + rng.uniform(-0.3, 0.3, (n, n))) * step
    cy = (gy + 0.5 + rng.uniform(-0.3, 0.3, (n, n))) * step
    yy, xx = grid(size)
    d = (yy[..., None] - cy.ravel()) ** 2 + (xx[..., None] - cx.ravel()) ** 2
    two = np.partition(d, 1, -1)[..., :2]
    cell = d.argmin(-1)
    grout = np.clip(1.5 - (np.sqrt(two[..., 1]) - np.sqrt(two[..., 0])), 0, 1)
    count = np.maximum(np.bincount(cell.ravel(), minlength=n * n), 1)
    tone = np.stack([np.bincount(cell.ravel(), x[..., c].ravel(), n * n) / count for c in range(3)], -1)
    tone = np.clip(tone * rng.uniform(0.88, 1.15, (n * n, 1)), 0, 1)
    return mix(saturate(tone[cell].astype(np.float32), 1.35), colour(0.16), grout.astype(np.float32))


def neon_lines(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    e = np.clip((edges(x, mask, 0.6) - 0.12) * 2.2, 0, 1)
    hue = saturate(blur(x, 1.5) * 0.4 + 0.6 * noise_colour(size, rng), 3)
    hue = hue / np.maximum(hue.max(-1, keepdims=True), 0.2)
    glow = blur(e, 1.6 * size / 64)[..., None] * hue
    return np.clip(colour(0.03, 0.01, 0.08) + glow * 0.9 + e[..., None] * (0.35 + 0.65 * hue), 0, 1).astype(np.float32)


def on_fire(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, _ = grid(size)
    tongues = noise(size, size / 24, rng)
    stretched = np.asarray(cv2.resize(tongues[: size // 3], (size, size), interpolation=cv2.INTER_LINEAR), np.float32)
    heat = np.clip(stretched * 0.9 + (yy / size - 0.75) * 0.9, 0, 1)
    fire = palette(heat, (0.10, 0.0, 0.0), (0.62, 0.08, 0.0), (1.0, 0.45, 0.0), (1.0, 0.85, 0.25))
    g = np.clip(contrast(grey(x)) * 1.05, 0, 1)
    ember = palette(g, (0.12, 0.0, 0.0), (0.75, 0.14, 0.0), (1.0, 0.60, 0.05), (1.0, 0.97, 0.62))
    rim = np.clip(blur(mask, 1.5 * size / 64) - mask, 0, 1) * 2
    y = mix(fire * 0.72, ember, np.clip(mask, 0, 1))
    return np.clip(mix(y, colour(1.0, 0.9, 0.4), np.clip(rim, 0, 0.8)), 0, 1)


def pencil_drawing(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = grid(size)
    g = contrast(grey(x))
    dark = np.where(mask > 0.4, 0.25 + 0.75 * (1 - g), 0.15 * (1 - g))
    hatch = 0.5 + 0.5 * np.sin((xx - yy + 3 * noise(size, 4, rng)) * 2 * np.pi / (size / 18))
    tone = np.clip(dark * (0.45 + 0.9 * hatch), 0, 1) * 0.75
    y = 0.96 - np.maximum(tone, 0.8 * np.clip(edges(x, mask) * 1.3, 0, 1))
    return np.repeat(np.clip(y, 0, 1)[..., None], 3, -1).astype(np.float32)


def pointillism(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = np.full_like(x, 0.97)
    s = saturate(x, 1.5)
    n = 22
    step = size / n
    cells = [(i, j) for i in range(n) for j in range(n)]
    for k in rng.permutation(len(cells)):
        i, j = cells[k]
        c = (np.array([j, i]) + 0.5 + rng.uniform(-0.3, 0.3, 2)) * step
        p = np.clip(c.astype(int), 0, size - 1)
        tone = np.clip(s[p[1], p[0]] + rng.uniform(-0.13, 0.13, 3), 0, 1)
        r = rng.uniform(0.36, 0.5) * step
        ellipse(y, c, np.array([r, r]), 0, tone.astype(np.float32))
    return y


def pop_art(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = grid(size)
    inks = [
        ((1.0, 0.1, 0.5), (0.05, 0.85, 0.95)),
        ((1.0, 0.85, 0.0), (0.55, 0.1, 0.8)),
        ((0.1, 0.9, 0.3), (1.0, 0.3, 0.1)),
    ]
    a, b = inks[int(rng.integers(len(inks)))]
    g = contrast(grey(x))
    subject = palette(np.floor(g * 2.999) / 2, (0.08, 0.02, 0.2), a, (1.0, 1.0, 0.85))
    p = size / 12
    dots = np.hypot((xx % p) - p / 2, (yy % p) - p / 2) < p * 0.33
    ground = np.where(dots[..., None], np.array(b) * 0.55, np.array(b))
    line = np.clip((edges(x, mask, 0.8) - 0.3) * 4, 0, 1)
    return mix(mix(ground.astype(np.float32), subject, mask), colour(0.05, 0.0, 0.1), line)


def red_blue_ink(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    g = contrast(grey(x))
    d = max(1, round(size / 40))
    dark = np.clip((1 - g) * (0.3 + 0.7 * mask) + 0.7 * edges(x, mask), 0, 1)
    red, blue = np.roll(dark, d, 1), np.roll(dark, -d, 1)
    y = 1 - red[..., None] * (1 - colour(0.92, 0.08, 0.12)) - blue[..., None] * (1 - colour(0.05, 0.15, 0.85))
    return np.clip(y, 0, 1).astype(np.float32)


def rust(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    n = 0.6 * noise(size, size / 16, rng) + 0.4 * noise(size, 0.7, rng)
    brown = palette(n, (0.22, 0.08, 0.03), (0.62, 0.28, 0.08), (0.80, 0.48, 0.20))
    steel = contrast(grey(x))[..., None] * colour(0.66, 0.74, 0.74)
    cover = np.clip((n - 0.42) * 5, 0, 1) * np.where(mask > 0.5, 0.35, 0.95)
    return np.clip(mix(steel * (0.5 + 0.5 * mask[..., None]), brown, cover.astype(np.float32)), 0, 1)


def sponge_dabbed(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = mix(blur(x, 3 * size / 64), blur(x, 0.8 * size / 64), mask) * 0.92
    s = saturate(x, 1.2)
    for i in range(420):
        c = rng.uniform(0, size, 2)
        p = np.clip(c.astype(int), 0, size - 1)
        on_subject = mask[p[1], p[0]] > 0.5
        # Large dabs on the ground first, then small ones that keep the subject readable.
        if on_subject != (i >= 180):
            continue
        tone = np.clip(s[p[1], p[0]] * rng.uniform(0.8, 1.12), 0, 1)
        r = rng.uniform(1.2, 2.0) if on_subject else rng.uniform(3.0, 5.0)
        axes = np.array([r, r * rng.uniform(0.8, 1.2)]) * size / 64
        ellipse(y, c, axes, rng.uniform(0, 180), tone.astype(np.float32))
    pits = np.clip((noise(size, 0.9 * size / 64, rng) - 0.6) * 4, 0, 1) * 0.4
    pits = pits * (1 - 0.5 * mask)
    return np.clip(mix(blur(y, 0.6), 0.25 * y, pits.astype(np.float32)), 0, 1)


def superstring(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, xx = grid(size)
    g = contrast(grey(blur(x, 0.6)))
    phase = (
        yy
        + 1.6 * (size / 64) * np.sin(xx * 2 * np.pi / (size / 1.5) + rng.uniform(0, 6))
        - 3.2 * (size / 64) * blur(mask, 1.5) * (0.4 + g)
    )
    w = np.clip(0.5 + 0.5 * np.cos(phase * 2 * np.pi / (size / 14)), 0, 1) ** 1.6
    thread = saturate(np.clip(x * 1.2 + 0.1, 0, 1), 1.8)
    light = np.where(mask > 0.4, 0.55 + 0.6 * g, 0.38)
    return np.clip(colour(0.02, 0.02, 0.05) + w[..., None] * thread * light[..., None] * 1.3, 0, 1).astype(np.float32)


def van_gogh(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    """Strokes along a flow field."""
    size = len(x)
    yy, xx = grid(size)
    angle = np.zeros((size, size), np.float32)
    for _ in range(3):
        cx, cy = rng.uniform(0, size, 2)
        r = np.hypot(xx - cx, yy - cy)
        angle += np.exp(-r / (size / 4)) * rng.choice([-1, 1]) * 3
    swirl_x, swirl_y = np.cos(angle + 0.4), np.sin(angle + 0.4)
    g = blur(grey(x) + mask, 2 * size / 64)
    tx, ty = -cv2.Sobel(g, cv2.CV_32F, 0, 1), cv2.Sobel(g, cv2.CV_32F, 1, 0)
    # Strokes run along the subject's contours and swirl where there are none.
    vx, vy = swirl_x * 0.25 + tx * 4, swirl_y * 0.25 + ty * 4
    norm = np.hypot(vx, vy) + 1e-6
    vx, vy = (vx / norm).astype(np.float32), (vy / norm).astype(np.float32)
    src = np.concatenate([saturate(x, 1.5), noise(size, 0.8 * size / 64, rng)[..., None]], -1)
    acc = line_integral_convolution(src, vx, vy, 6)
    stroke = (acc[..., 3] - acc[..., 3].mean()) / (acc[..., 3].std() + 1e-6)
    paint = acc[..., :3]
    night = palette(contrast(grey(paint)), (0.05, 0.10, 0.40), (0.15, 0.42, 0.75), (0.98, 0.82, 0.25))
    tone = 0.8 * paint + 0.2 * night
    lit = palette(contrast(stroke), (0.03, 0.08, 0.38), (0.20, 0.45, 0.80), (0.95, 0.85, 0.35))
    ground = 0.45 * tone + 0.55 * lit
    y = mix(ground.astype(np.float32), tone.astype(np.float32), blur(mask, 0.5))
    return np.clip(y * (1 + 0.16 * np.clip(stroke, -2, 2)[..., None]), 0, 1).astype(np.float32)


def warm_smear(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    n = max(3, round(size / 5)) | 1
    smear = cv2.blur(x, (n, 1))
    y = 0.35 * x + 0.65 * np.asarray(smear, np.float32)
    streak = np.repeat(rng.uniform(-0.09, 0.09, (size, 1, 1)), size, 1)
    warm = palette(contrast(grey(y)), (0.30, 0.08, 0.05), (0.85, 0.45, 0.22), (1.0, 0.9, 0.68))
    return np.clip(0.45 * y + 0.55 * warm + streak, 0, 1).astype(np.float32)


def watercolor(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    y = np.asarray(cv2.medianBlur((x * 255).astype(np.uint8), 5), np.float32) / 255
    wash = noise(size, size / 12, rng)[..., None]
    y = 1 - (1 - saturate(y, 1.25)) * (0.45 + 0.45 * wash)
    rim = np.clip(edges(y.astype(np.float32), mask, 1.2) * 0.5, 0, 0.35)[..., None]
    yy, xx = grid(size)
    border = np.minimum(np.minimum(xx, size - 1 - xx), np.minimum(yy, size - 1 - yy))
    bleed = np.clip((border - 5 * size / 64 * noise(size, 3, rng)) / (3 * size / 64), 0, 1)
    y = np.clip(y - rim * (1 - y) * 1.5, 0, 1)
    return np.clip(mix(colour(0.985), y.astype(np.float32), bleed.astype(np.float32)), 0, 1)


def winter(x: Image, mask: Image, rng: np.random.Generator) -> Image:
    size = len(x)
    yy, _ = grid(size)
    y = 0.7 * saturate(x, 0.75) + 0.3 * colour(0.78, 0.89, 1.0)
    ground = np.clip((yy - size * rng.uniform(0.78, 0.86) - 2 * noise(size, 5, rng)) / 2, 0, 1)
    y = mix(y.astype(np.float32), colour(0.97, 0.98, 1.0), ground * (1 - 0.5 * mask))
    for _ in range(48):
        c = rng.uniform(0, size, 2)
        r = rng.uniform(0.5, 1.3) * size / 64
        ellipse(y, c, np.array([r, r]), 0, colour(1, 1, 1))
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
