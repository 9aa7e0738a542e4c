"""Activations: of the right image, branch and time, and nothing of the padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import pipelines
from neuraleraser.activations import CONDITIONAL, UNCONDITIONAL, ActivationBatch, activation_matrix, collect
from neuraleraser.errors import DataError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

EARLY, LATE = Site("unet.mid_block.attentions.0"), Site("unet.up_blocks.1.attentions.0", "update")
PROMPTS, SEEDS = ["a", "b c", "d", "e", "f g h"], [3, 1, 4, 2, 5]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def seen_by(pipe: Any, s: Sampling, prompts: list[str] = PROMPTS, **more: Any) -> dict[Any, Tensor]:
    """(site, time, branch, image) -> [P, d]; every one is told exactly once."""
    found: dict[Any, Tensor] = {}

    def on(seen: ActivationBatch) -> None:
        assert len(seen.images) == len(seen.x)
        for i, x in zip(seen.images, seen.x, strict=True):
            key = seen.site, seen.timestep, seen.branch, i
            assert key not in found
            found[key] = x.clone()

    collect(pipe, prompts, SEEDS[: len(prompts)], [EARLY, LATE], on, s, **more)
    return found


def test_every_image_step_branch_and_site_is_told_once(pipe: Any) -> None:
    found = seen_by(pipe, Sampling(num_inference_steps=3, batch_size=2))
    times = [float(t) for t in pipe.scheduler.timesteps]
    want = {(s, t, b, i) for s in (EARLY, LATE) for t in times for b in (UNCONDITIONAL, CONDITIONAL) for i in range(5)}
    assert found.keys() == want
    assert {x.shape for (s, *_), x in found.items() if s == EARLY} == {(16, 32)}
    assert {x.shape for (s, *_), x in found.items() if s == LATE} == {(64, 16)}


@pytest.mark.parametrize(("size", "pad"), [(2, False), (5, True), (4, False), (64, False)])
def test_the_batch_decides_nothing(pipe: Any, size: int, pad: bool) -> None:
    """A short last batch too has its halves in the right order."""
    one = seen_by(pipe, Sampling(num_inference_steps=2, batch_size=2))
    other = seen_by(pipe, Sampling(num_inference_steps=2, batch_size=size, pad_last_batch=pad))
    assert one.keys() == other.keys()
    for key, x in one.items():
        torch.testing.assert_close(other[key], x, atol=1e-4, rtol=1e-4)


def test_branches_are_what_they_say(pipe: Any) -> None:
    """At the first step the unconditional branch does not know the prompt, and the conditional one is what a run
    without guidance sees."""
    s = Sampling(num_inference_steps=1, batch_size=2)
    found, other = seen_by(pipe, s), seen_by(pipe, s, prompts=["x", "y", "z", "u", "v"])
    alone = seen_by(pipe, Sampling(num_inference_steps=1, batch_size=2, guidance_scale=1.0))
    t = float(pipe.scheduler.timesteps[0])
    assert {branch for _, _, branch, _ in alone} == {CONDITIONAL}
    for i in range(5):
        assert torch.equal(found[EARLY, t, UNCONDITIONAL, i], other[EARLY, t, UNCONDITIONAL, i])
        assert not torch.equal(found[EARLY, t, CONDITIONAL, i], other[EARLY, t, CONDITIONAL, i])
        torch.testing.assert_close(
            alone[EARLY, t, CONDITIONAL, i], found[EARLY, t, CONDITIONAL, i], atol=1e-4, rtol=1e-4
        )


def test_collecting_changes_nothing(pipe: Any) -> None:
    s = Sampling(num_inference_steps=2, batch_size=3)
    images = collect(pipe, PROMPTS, SEEDS, [EARLY], lambda seen: None, s)
    assert (images == generate(pipe, PROMPTS, SEEDS, s)).all()


def test_from_start_images(pipe: Any) -> None:
    from neuraleraser.families.opening import image_to_image

    start = np.full((5, 16, 16, 3), 100, np.uint8)
    found = seen_by(image_to_image(pipe), Sampling(num_inference_steps=4, batch_size=2, strength=0.5), image=start)
    assert len({t for _, t, _, _ in found}) == 2 and {i for *_, i in found} == set(range(5))


def distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def test_a_bank_is_a_random_sample_of_the_stream(pipe: Any) -> None:
    s = Sampling(num_inference_steps=2, batch_size=2)
    found = seen_by(pipe, s)
    made = activation_matrix(pipe, PROMPTS, SEEDS, [EARLY, LATE], vectors_per_image=8, sampling=s)
    for site, d in ((EARLY, 32), (LATE, 16)):
        x = made[site]
        assert x.shape == (8 * 5, d) and x.dtype == torch.float32
        rows = torch.cat([v for (at, *_), v in found.items() if at == site])
        assert distance(x, rows).amin(1).max() == 0  # each is one that was seen
        per_image = [torch.cat([v for (at, *_, i), v in found.items() if at == site and i == k]) for k in range(5)]
        owners = torch.stack([distance(x, part).amin(1) for part in per_image]).argmin(0)
        assert owners.bincount(minlength=5).tolist() == [8] * 5
        assert (owners.diff() != 0).sum() > 10  # shuffled


def test_a_bank_repeats_and_its_seed_matters(pipe: Any) -> None:
    s = Sampling(num_inference_steps=2, batch_size=2)
    one, same, other = (
        activation_matrix(pipe, PROMPTS[:2], SEEDS[:2], [EARLY], 6, s, seed)[EARLY] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize(("per_image", "want"), [(1, 1), (7, 7), (10_000, 2 * 2 * 16)])
def test_a_bank_is_never_larger_than_asked(pipe: Any, per_image: int, want: int) -> None:
    s = Sampling(num_inference_steps=2, batch_size=2)
    assert len(activation_matrix(pipe, PROMPTS, SEEDS, [EARLY], per_image, s)[EARLY]) == 5 * want


def test_nan_is_named() -> None:
    pipe = pipelines.stable_diffusion()
    pipe.unet.mid_block.attentions[0].proj_out.bias.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"unet.mid_block.attentions.0.* timestep \d+, prompts \['a', 'b c'\]"):
        activation_matrix(pipe, PROMPTS, SEEDS, [EARLY], 4, Sampling(num_inference_steps=1, batch_size=2))


def test_no_prompts(pipe: Any) -> None:
    with pytest.raises(DataError, match="no prompts"):
        activation_matrix(pipe, [], [], [EARLY])
