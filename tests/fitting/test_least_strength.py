"""The least strength: both the eraser's images and the base model's answer must lack the concept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser.fitting import least_strength as module
from neuraleraser.fitting.image_gate import ImageFit
from neuraleraser.fitting.least_strength import STRENGTHS, least_strength
from neuraleraser.fitting.pictures import Pictures
from neuraleraser.settings import Sampling
from neuraleraser.sites import IMAGE_ROUTES, PROMPT_ROUTES

S = Sampling(num_inference_steps=5, batch_size=4)
INFINITY = float("inf")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def measured(pipe: Any, doubt: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float | None, list[tuple[str, float]]]:
    """The least strength, and the prompt and strength of each series that is generated for it."""
    eraser = with_picture(make_eraser("stable_diffusion", **SHUT), pipe)
    eraser = replace(eraser, header=replace(eraser.header, routes=(*PROMPT_ROUTES, *IMAGE_ROUTES)))
    assert eraser.image_gate is not None and eraser.guided is not None
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    shows = Pictures(images, ["a"] * 4, range(4))
    picture = ImageFit(eraser.image_gate, eraser.guided, torch.ones(2), doubt, shows, ())
    series: list[tuple[str, float]] = []
    plain = module.generate

    def generate(using: Any, prompts: Any, seeds: Any, sampling: Sampling, **more: Any) -> Any:
        series.append((prompts[0], sampling.strength))
        return plain(using, prompts, seeds, sampling, **more)

    monkeypatch.setattr(module, "generate", generate)
    return least_strength(pipe, eraser, picture, S), series


def test_pictures_that_are_never_in_doubt_have_none(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(pipe, INFINITY, monkeypatch) == (None, [])


def test_a_concept_that_stays_at_each_strength(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bisection ends at the highest; where the base model's own answer shows it, the eraser's images are not made."""
    least, series = measured(pipe, -INFINITY, monkeypatch)
    assert least == 1.0 and [strength for _, strength in series] == [0.6, STRENGTHS[-1]]


@pytest.mark.parametrize(
    ("in_doubt", "strengths"),
    [({3}, [0.6, 0.4, 0.5, 0.5]), ({5, 8}, [0.6, 0.4, 0.3, 0.3, 0.6, 0.5, 0.4])],
    ids=["base", "eraser"],
)
def test_both_are_asked_and_the_first_strength_at_which_both_lack_it_counts(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, in_doubt: set[int], strengths: list[float]
) -> None:
    gate = make_eraser("stable_diffusion").gate
    asked: list[int] = []
    plain = type(gate).evidence

    def evidence(self: Any, x: torch.Tensor, grid: Any = None) -> torch.Tensor:
        """In doubt: the start images; the base's answer at 0.4, or the eraser's images at 0.3 and 0.4."""
        if len(x) != 4 or grid is None:
            return plain(self, x, grid)
        asked.append(1)
        return torch.full((4,), 1.0 if len(asked) in {1, *in_doubt} else -1.0)

    monkeypatch.setattr(type(gate), "evidence", evidence)
    least, series = measured(pipe, 0.0, monkeypatch)
    assert least == 0.5
    assert [strength for _, strength in series] == strengths
