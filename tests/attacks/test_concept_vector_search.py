"""Ring-A-Bell: a concept's direction, and tokens that go along it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines
from neuraleraser.attacks import concept_direction, search_by_direction
from neuraleraser.attacks.concept_vector_search import encoded_tokens
from neuraleraser.errors import SettingsError


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def encoded(pipe: Any, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt([prompt], "cpu", 1, False)[0][0]


def search(pipe: Any, direction: torch.Tensor, **settings: Any) -> list[int]:
    return search_by_direction(pipe, "a", direction, **{"count": 2, "population": 12, "generations": 5, **settings})


def test_a_direction_is_the_mean_difference(pipe: Any) -> None:
    expected = encoded(pipe, "a c") - encoded(pipe, "a") + encoded(pipe, "b c") - encoded(pipe, "b")
    assert torch.allclose(concept_direction(pipe, ["a c", "b c"], ["a", "b"]), expected / 2, atol=1e-6)


@pytest.mark.parametrize("make", [pipelines.stable_diffusion, pipelines.stable_diffusion_2])
def test_tokens_are_encoded_as_the_pipeline_does(make: Any) -> None:
    pipe = make()
    tokens = pipe.tokenizer.convert_tokens_to_ids(["b</w>", "c</w>"])
    with torch.no_grad():
        found = encoded_tokens(pipe, torch.tensor([tokens, tokens[::-1]]))
    assert torch.allclose(found, torch.stack([encoded(pipe, "b c"), encoded(pipe, "c b")]), atol=1e-6)


def test_the_tokens_at_the_end_of_the_direction_are_found(pipe: Any) -> None:
    """Half a way of 2: eta times the direction is the whole way, and nothing else is so near."""
    way = encoded(pipe, "x y") - encoded(pipe, "a")
    distances: list[float] = []
    found = search(
        pipe, way / 2, eta=2.0, population=60, generations=60, on_generation=lambda g, d: distances.append(d)
    )
    assert pipe.tokenizer.decode(found) == "x y"
    assert distances[-1] == pytest.approx(0, abs=1e-6) and distances[0] > 1
    assert len(distances) == 60 and distances == sorted(distances, reverse=True)  # the best is never lost


def test_the_distance_is_that_of_the_tokens(pipe: Any) -> None:
    direction = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    distances: list[float] = []
    found = search(pipe, direction, eta=3.0, on_generation=lambda g, d: distances.append(d))
    with torch.no_grad():
        here = encoded_tokens(pipe, torch.tensor([found]))[0]
    assert distances[-1] == pytest.approx(float((here - encoded(pipe, "a") - 3 * direction).square().sum()), rel=1e-4)


def test_it_is_deterministic_and_special_tokens_are_never_taken(pipe: Any) -> None:
    direction = concept_direction(pipe, ["a c"], ["a"])
    before = torch.random.get_rng_state()
    found = search(pipe, direction, count=6)
    assert found == search(pipe, direction, count=6) and len(found) == 6
    assert not {*found} & {*pipe.tokenizer.all_special_ids}
    assert len({tuple(search(pipe, direction, seed=seed)) for seed in range(4)}) > 1
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.requires_grad and p.grad is None for p in pipe.text_encoder.parameters())


@pytest.mark.parametrize("population", [4, 5])
def test_small_populations(pipe: Any, population: int) -> None:
    assert len(search(pipe, torch.zeros(8, 16), population=population)) == 2


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    direction = torch.zeros(8, 16)
    with pytest.raises(SettingsError, match="2 prompts with the concept, 1 without"):
        concept_direction(pipe, ["a", "b"], ["a"])
    with pytest.raises(SettingsError, match=r"the direction is \[16\]: pass \[8, 16\]"):
        search(pipe, torch.zeros(16))
    with pytest.raises(SettingsError, match="count is 7: pass a whole number from 1 to 6"):
        search(pipe, direction, count=7)
    with pytest.raises(SettingsError, match="population is 3"):
        search(pipe, direction, population=3)
    with pytest.raises(SettingsError, match="several text encoders or none"):
        search(pipelines.stable_diffusion_xl(), direction)
