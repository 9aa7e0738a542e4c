"""Panels of a report: each gate with its features, where they fire most, and what it sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.protocol import Cell
from neuraleraser.methods import gate_panels as panels
from neuraleraser.methods.gate_panels import IMAGES_PER_FEATURE, gate_panels
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

S = Sampling(num_inference_steps=2, height=24, width=16)
CELLS = [Cell(prompt, seed, "", (), "main") for seed, prompt in enumerate("abcde")]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def eraser(pipe: Any) -> Eraser:
    """A prompt gate that stays shut, and a wide image gate that is open at the noisier of two levels."""
    made = with_picture(make_eraser(**SHUT), pipe, window=3, f=9)
    assert made.image_gate is not None
    gate = replace(made.image_gate, low=torch.tensor([1e6, 0.0]), high=torch.tensor([2e6, 1e-3]))
    return replace(made, image_gate=gate, header=replace(made.header, image_separation=(0.9, 0.25)))


def test_a_panel_for_every_gate(pipe: Any, eraser: Eraser) -> None:
    prompt, picture = gate_panels(pipe, eraser, CELLS, S)
    assert (prompt.title, picture.title) == ("Prompt gate", "Image gate")
    assert str(eraser.gate.site) in prompt.note and "opens in 0, at 0% of their steps" in prompt.note
    assert "3 features of an SAE; the header names no labels" in prompt.note and not prompt.heatmaps
    assert "9 features, learnt with labels from pictures" in picture.note
    assert "opens in 5, at 50% of their steps" in picture.note
    assert "opened at t = 750 in 90%, t = 250 in 25% of the concept's pictures" in picture.note
    assert len(prompt.features) == 3 and len(picture.features) == panels.MAX_FEATURES
    for feature in (*prompt.features, *picture.features):
        assert len(feature.heatmaps) == IMAGES_PER_FEATURE + 3
    assert len(picture.heatmaps) == IMAGES_PER_FEATURE + 3


def test_a_feature_is_shown_where_it_fires_most(pipe: Any, eraser: Eraser) -> None:
    gate = eraser.image_gate
    assert gate is not None
    strength: list[torch.Tensor] = []

    def note(s: ActivationBatch) -> None:
        if s.branch == CONDITIONAL:
            strength.append(gate.activations(s.x, s.grid).mean(1))

    prompts, seeds = [c.prompt for c in CELLS], [c.seed for c in CELLS]
    collect(pipe, prompts, seeds, [gate.site], note, replace(S, batch_size=5))
    mean = torch.stack(strength).mean(0)  # [images, f]
    for feature in gate_panels(pipe, eraser, CELLS, S)[1].features:
        k = int(feature.label.removeprefix("Feature "))
        wanted = [prompts[i] for i in mean[:, k].argsort(descending=True)[:IMAGES_PER_FEATURE]]
        assert [caption.split(",")[0] for caption, _ in feature.heatmaps[:IMAGES_PER_FEATURE]] == wanted


def test_without_cells_there_are_none(pipe: Any, eraser: Eraser) -> None:
    assert gate_panels(pipe, eraser, [], S) == []


def test_collect_knows_the_grid(pipe: Any) -> None:
    seen: list[Any] = []
    site = Site("unet.mid_block.attentions.0")
    collect(pipe, ["a"], [0], [site], lambda s: seen.append(s.grid), replace(S, num_inference_steps=1))
    assert set(seen) == {(6, 4)}
