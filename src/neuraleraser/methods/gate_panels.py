"""Pictures of what an eraser's gate reads: its features, and where and when they fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.figures import FeaturePanel, overlay, spaced_sample
from neuraleraser.evaluation.protocol import Cell
from neuraleraser.settings import Sampling

MAX_FEATURES = 6
"""Features that are shown of a gate, at most."""
IMAGES_PER_FEATURE = 3
"""Images that each is shown in."""


def feature_panels(pipe: Any, eraser: Eraser, cells: Sequence[Cell], sampling: Sampling) -> list[FeaturePanel]:
    """Return the gate's features that contribute most on `cells`, and where and when they fire in a few base images,
    which are drawn for it."""
    part = list(dict.fromkeys(spaced_sample(cells, IMAGES_PER_FEATURE)))
    if not part:
        return []
    seen: dict[float, Tensor] = {}

    def on_activations(s: ActivationBatch) -> None:
        if s.branch == CONDITIONAL:
            seen[s.timestep] = eraser.gate.activations(s.x.float().cpu())  # [images, P, f]

    images = collect(
        pipe,
        [c.prompt for c in part],
        [c.seed for c in part],
        [eraser.gate.site],
        on_activations,
        replace(sampling, batch_size=len(part)),
    )
    times = sorted(seen, reverse=True)
    z = torch.stack([seen[t] for t in times])  # [T, images, P, f]
    weight = eraser.gate.weight.float().cpu()
    evidence = z.mean((0, 1, 2)) * weight
    share = evidence / evidence.sum().clamp(min=1e-9)
    panels = []
    for k in evidence.argsort(descending=True).tolist()[:MAX_FEATURES]:
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
    """Return where one feature fires, z [T, images, P]: each image over all steps, and the first at three timesteps."""
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
