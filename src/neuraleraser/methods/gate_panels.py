"""Pictures of what an eraser's gates read: their features, and where and when they fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.eraser import Eraser, time_bin
from neuraleraser.eraser.part import Part
from neuraleraser.eraser.sight import features_text, gate_name, least_strength_text, seen_text
from neuraleraser.evaluation.figures import FeaturePanel, GatePanel, overlay, spaced_sample
from neuraleraser.evaluation.protocol import Cell
from neuraleraser.settings import Sampling

MAX_FEATURES = 6
"""Features that are shown of a gate, at most."""
NUM_IMAGES = 8
"""Base images that are drawn to look at."""
IMAGES_PER_FEATURE = 3
"""Those that a feature is shown in: where it fires most."""


@dataclass(frozen=True)
class _Seen:
    """Activations z [T, images, P, f] of a gate's features at `times` [T] descending; grid of the positions, or None;
    the images and their cells."""

    z: Tensor
    times: Tensor
    grid: tuple[int, int] | None
    images: np.ndarray
    cells: Sequence[Cell]


def gate_panels(pipe: Any, eraser: Eraser, cells: Sequence[Cell], sampling: Sampling) -> list[GatePanel]:
    """Return for each gate of the eraser the features that contribute most on `cells`, and where and when they fire in
    the base images that they fire most in, of a few that are drawn for it."""
    chosen = list(dict.fromkeys(spaced_sample(cells, NUM_IMAGES)))
    if not chosen:
        return []
    parts = [part.to(torch.device("cpu")) for part in eraser.parts]
    found: list[dict[float, Tensor]] = [{} for _ in parts]
    grids: list[tuple[int, int] | None] = [None for _ in parts]

    def on_activations(s: ActivationBatch) -> None:
        for k, part in enumerate(parts):
            if s.branch == CONDITIONAL and s.site == part.gate.site:
                found[k][s.timestep] = part.gate.activations(s.x.float().cpu(), s.grid)  # [images, P, f]
                grids[k] = s.grid

    images = collect(
        pipe,
        [c.prompt for c in chosen],
        [c.seed for c in chosen],
        list(dict.fromkeys(part.gate.site for part in parts)),
        on_activations,
        replace(sampling, batch_size=len(chosen)),
    )
    panels = []
    for part, seen, grid in zip(parts, found, grids, strict=True):
        times = sorted(seen, reverse=True)
        z = torch.stack([seen[t] for t in times])
        panels.append(_gate_panel(eraser, part, _Seen(z, torch.tensor(times), grid, images, chosen)))
    return panels


def _gate_panel(eraser: Eraser, part: Part, seen: _Seen) -> GatePanel:
    gate, weight = part.gate, part.gate.weight
    pooled = seen.z.topk(max(1, round(seen.z.shape[2] * gate.share)), 2).values.mean(2)  # [T, images, f]
    evidence, low = pooled @ weight, gate.low[time_bin(gate.times, seen.times)]
    opened = evidence > low[:, None]
    note = f"{gate.site}; {features_text(part, eraser.header)}. On {len(seen.cells)} images here it opens in "
    note += f"{int(opened.any(0).sum())}, at {float(opened.float().mean()):.0%} of their steps."
    if part.guided is not None:
        note += f" When it was made it opened at {seen_text(gate, eraser.header)}."
        note += f" Start images: {least_strength_text(eraser.header)}."
    worth = (pooled.mean((0, 1)) * weight).clamp(min=0)
    share = worth / worth.sum().clamp(min=1e-9)
    features = []
    for k in worth.argsort(descending=True).tolist()[:MAX_FEATURES]:
        z = seen.z[..., k]
        said = f"{share[k]:.0%} of what speaks for the concept in these images; fires above {gate.threshold[k]:.2f}. "
        features.append(
            FeaturePanel(
                f"Feature {int(gate.features[k])}",
                f"{said}Brightest: {z.max():.2f}.",
                _heatmaps(z, pooled[..., k].mean(0), seen) if gate.site.stream == "image" else (),
            )
        )
    shown = _heatmaps((seen.z @ weight).clamp(min=0), evidence.mean(0), seen) if gate.picture else ()
    return GatePanel(gate_name(gate).capitalize(), note, shown, features)


def _heatmaps(z: Tensor, strength: Tensor, seen: _Seen) -> list[tuple[str, np.ndarray]]:
    """Return where z [T, images, P] is large: the images of most `strength` [images] over all steps, and the first of
    them at three timesteps."""
    best = strength.argsort(descending=True).tolist()[:IMAGES_PER_FEATURE]
    first, steps = best[0], len(seen.times)
    maps = [(f"{seen.cells[i].prompt}, all steps", z[:, i].mean(0), i) for i in best]
    for step in (steps // 8, steps // 2, steps - 1):
        maps.append((f"{seen.cells[first].prompt}, t = {seen.times[step]:g}", z[step, first], first))
    mean_top, top = max(float(m.max()) for _, m, _ in maps[: len(best)]), float(z[:, first].max())
    tiles = []
    for number, (caption, values, i) in enumerate(maps):
        heat = _on_grid(values, seen.images[i], seen.grid)
        if heat is not None:
            tiles.append((caption, overlay(seen.images[i], heat / max(mean_top if number < len(best) else top, 1e-9))))
    return tiles


def _on_grid(values: Tensor, image: np.ndarray, grid: tuple[int, int] | None) -> np.ndarray | None:
    """[P] -> [h, w] of the grid, or else of the image's proportions; None where P positions are no such grid."""
    height = grid[0] if grid else round((len(values) * image.shape[0] / image.shape[1]) ** 0.5)
    return values.reshape(height, -1).numpy() if height and len(values) % height == 0 else None
