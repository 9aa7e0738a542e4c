"""What a report shows beside its figures: pairs of pictures, where features fire, versions; and writing it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, Seen, collect
from neuraleraser.bench.cells import Cell
from neuraleraser.bench.page import save_html
from neuraleraser.bench.pictures import INK, MUTED, PAPER, contact_sheet
from neuraleraser.bench.report import FeaturePanel, Pair, Report
from neuraleraser.bench.store import Store
from neuraleraser.eraser import Eraser
from neuraleraser.settings import Sampling

T = TypeVar("T")
FEATURES = 6
IMAGES = 3
GOLDEN = 0.618
SCALE = 2
"""Pixels of a heatmap for each pixel of its image."""


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, one of each of as many equal parts; each more than once if they are fewer, none if there
    are none. Which one of its part is varied: even steps through a table would always meet the same column."""
    return [items[int((i + i * GOLDEN % 1) * len(items) / count)] for i in range(count)] if items else []


def pairs_of(store: Store, name: str, cells: Sequence[Cell], count: int) -> list[Pair]:
    """Before and after the erasure of `name`, for cells evenly spaced over `cells`."""
    pairs = []
    for cell in dict.fromkeys(spread(cells, count)):
        before = store.image("base", cell)
        after = store.image(name, cell) if store.drawn_again(name, cell) else before
        pairs.append(Pair(cell.prompt, cell.seed, before, after))
    return pairs


def feature_panels(pipe: Any, eraser: Eraser, cells: Sequence[Cell], sampling: Sampling) -> list[FeaturePanel]:
    """The gate's features that contribute most on `cells`, and where and when they fire in a few base images."""
    part = list(dict.fromkeys(spread(cells, IMAGES)))
    seen: dict[float, Tensor] = {}

    def on(s: Seen) -> None:
        if s.branch == CONDITIONAL:
            seen[s.timestep] = eraser.gate.activations(s.x.float().cpu())  # [images, P, f]

    images = collect(
        pipe,
        [c.prompt for c in part],
        [c.seed for c in part],
        [eraser.gate.site],
        on,
        replace(sampling, batch=len(part)),
    )
    times = sorted(seen, reverse=True)
    z = torch.stack([seen[t] for t in times])  # [T, images, P, f]
    weight = eraser.gate.weight.float().cpu()
    evidence = z.mean((0, 1, 2)) * weight
    share = evidence / evidence.sum().clamp(min=1e-9)
    panels = []
    for k in evidence.argsort(descending=True).tolist()[:FEATURES]:
        panels.append(
            FeaturePanel(
                label=f"Feature {int(eraser.gate.features[k])}",
                note=f"{100 * share[k]:.0f} % of the gate's evidence on these images; fires above "
                f"{eraser.gate.threshold[k]:.2f}. Brightest: {z[..., k].max():.2f}.",
                heatmaps=_heatmaps(z[..., k], times, part, images) if eraser.gate.site.stream == "image" else (),
            )
        )
    return panels


def _heatmaps(
    z: Tensor, times: Sequence[float], cells: Sequence[Cell], images: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Where one feature fires, z [T, images, P]: each image over all steps, and the first at three timesteps."""
    top = float(z.max())
    maps = [(f"{c.prompt}, all steps", z[:, i].mean(0), images[i]) for i, c in enumerate(cells)]
    for step in (len(times) // 8, len(times) // 2, len(times) - 1):
        maps.append((f"{cells[0].prompt}, t = {times[step]:g}", z[step, 0], images[0]))
    mean_top = max(float(m.max()) for _, m, _ in maps[: len(cells)])
    tiles = []
    for number, (caption, values, image) in enumerate(maps):
        grid = _square(values, image)
        if grid is not None:
            tiles.append((caption, overlay(image, grid / max(mean_top if number < len(cells) else top, 1e-9))))
    return tiles


def _square(values: Tensor, image: np.ndarray) -> np.ndarray | None:
    """[P] -> [h, w] of the image's proportions; None where P positions are no such grid."""
    h = round((len(values) * image.shape[0] / image.shape[1]) ** 0.5)
    return values.reshape(h, -1).numpy() if h and len(values) % h == 0 else None


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """`heat` [h, w] in 0..1 over the greyed image [H, W, 3] uint8 -> [SCALE H, SCALE W, 3] uint8.

    Each value is a block of pixels (nearest), so that one sees the resolution at which the feature fires.
    """
    height, width = SCALE * image.shape[0], SCALE * image.shape[1]
    rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), heat.shape, strict=True))
    value = np.clip(heat, 0, 1)[rows][:, columns, None].astype(np.float32)
    big = image.repeat(SCALE, 0).repeat(SCALE, 1).astype(np.float32)
    grey = 0.6 * big.mean(-1, keepdims=True) * np.ones(3, np.float32)
    # Dark red to yellow: brightness rises with the value, so that it reads without colour too.
    colour = np.concatenate([80 + 175 * value, 255 * value**1.5, 40 * value], -1)
    mix = np.minimum(1.0, 2.5 * value) * 0.75
    return np.clip(grey * (1 - mix) + colour * mix, 0, 255).astype(np.uint8)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write report.json, report.html and contact.png (a row a concept); returns their paths. Raises FileError."""
    paths = [folder / name for name in ("report.html", "report.json", "contact.png")]
    save_html(report, paths[0])
    report.save_json(paths[1])
    contact_sheet([(section.name, section.pairs[:4]) for section in report.concepts if section.pairs], paths[2])
    return paths


def grid_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], heads: Sequence[str]) -> np.ndarray:
    """A contact sheet uint8 [H, W, 3]: a labelled row of equally large images each, a head above each column."""
    from PIL import Image, ImageDraw, ImageFont

    tile, gap = rows[0][1][0].shape[0], 4
    font = ImageFont.load_default(size=max(9, tile // 9))
    left = gap + max(int(font.getlength(label)) for label, _ in rows) + 2 * gap
    top = tile // 5
    size = (left + len(heads) * (tile + gap), top + len(rows) * (tile + gap))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        x = left + column * (tile + gap)
        draw.text((x + tile // 2, top // 2), head.replace("_", " "), fill=MUTED, font=font, anchor="mm")
    for number, (label, images) in enumerate(rows):
        y = top + number * (tile + gap)
        draw.text((gap, y + tile // 2), label.replace("_", " "), fill=INK, font=font, anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (left + column * (tile + gap), y))
    return np.asarray(sheet)


def versions(pipe: Any) -> dict[str, str]:
    """What made these figures: packages, Python, machine, threads, and the pipeline's parts."""
    names = ("neuraleraser", "torch", "diffusers", "transformers", "numpy")
    out = {}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    device = next(pipe.unet.parameters()).device if getattr(pipe, "unet", None) is not None else pipe.device
    return out | {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "device": str(device),
        "pipeline": f"{type(pipe).__name__}, {type(pipe.scheduler).__name__}",
    }
