"""UnlearnDiffAtk: it finds tokens that lower the denoiser's loss, through what is applied, and leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import attach
from neuraleraser.attacks import WORD, searched_tokens
from neuraleraser.attacks.searched_tokens import project_to_simplex
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

PROMPTS = [f"{WORD} a", f"{WORD} b c"]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
S = Sampling(num_inference_steps=2, batch_size=2)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def search(pipe: Any, **settings: Any) -> list[int]:
    return searched_tokens(pipe, IMAGES, PROMPTS, **{"count": 2, "turns": 2, "steps": 3, "batch_size": 2, **settings})


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_the_projection_is_the_nearest_point_of_the_simplex(row: list[float]):
    x = torch.tensor([row], dtype=torch.float64)
    p = project_to_simplex(x)[0]
    assert p.min() >= 0 and float(p.sum()) == pytest.approx(1)
    # The nearest point p of a convex set: no vertex v has (x - p)(v - p) > 0.
    assert all(float((x[0] - p) @ (v - p)) < 1e-9 for v in torch.eye(len(row), dtype=torch.float64))


def test_a_search_lowers_the_loss(pipe: Any):
    losses: list[float] = []
    search(pipe, turns=1, steps=40, on_turn=lambda turn, loss: losses.append(loss))
    search(pipe, turns=1, steps=400, on_turn=lambda turn, loss: losses.append(loss))
    assert losses[1] < losses[0]


def test_it_is_the_same_again_and_special_tokens_are_never_taken(pipe: Any):
    found = search(pipe)
    assert len(found) == 2 and found == search(pipe) and not {*found} & {*pipe.tokenizer.all_special_ids}
    others = {tuple(search(pipe, seed=seed)) for seed in range(4)}
    assert len(others) > 1


def test_success_ends_it(pipe: Any):
    seen: list[torch.Tensor] = []
    turns: list[int] = []

    def succeeds(vectors: torch.Tensor) -> bool:
        seen.append(vectors)
        return len(seen) == 2

    found = search(pipe, turns=5, succeeds=succeeds, on_turn=lambda turn, loss: turns.append(turn))
    assert turns == [0, 1] and torch.equal(seen[-1], pipe.text_encoder.get_input_embeddings().weight[found])


def test_gradients_pass_through_an_eraser_and_nothing_stays_behind(pipe: Any):
    before, hooks = generate(pipe, ["a", "b"], [0, 1], S), pipelines.left(pipe)
    changed: list[float] = []
    for eraser in ([], [make_eraser()]):
        search(pipe, applied=lambda using, e=eraser: attach(using, e), on_turn=lambda turn, loss: changed.append(loss))
    assert changed[0] != changed[2]
    assert np.array_equal(generate(pipe, ["a", "b"], [0, 1], S), before) and pipelines.left(pipe) == hooks


def test_what_does_not_fit_is_refused(pipe: Any):
    with pytest.raises(SettingsError, match="does not hold <learned>"):
        searched_tokens(pipe, IMAGES, ["a", "b"])
    with pytest.raises(SettingsError, match="turns is 0"):
        search(pipe, turns=0)
    with pytest.raises(SettingsError, match="several text encoders or none"):
        search(pipelines.stable_diffusion_xl())
