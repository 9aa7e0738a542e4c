"""The fitted edits: nearer to their target, the same each time, and the model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.fitting.correction_training import TrainingExample, train_corrections
from neuraleraser.fitting.trajectories import record_trajectories
from neuraleraser.sae import SAE
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, Site

AT, ON = Site("unet.mid_block.attentions.0"), Site("unet.up_blocks.0.attentions.1")
READ = tuple(Site(f"unet.up_blocks.{i}.attentions.0", "input", "text") for i in (0, 1))
SAMPLING = Sampling(num_inference_steps=3, batch_size=2)
PLAIN, SHOWS, SEEDS = ["a", "b", "c"], ["a x", "b x", "c x"], [1, 2, 3]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def sae() -> SAE:
    w = torch.nn.functional.normalize(random(40, 32, seed=1), dim=1)
    return SAE(w, random(40, seed=2), w, 0.1 * random(32, seed=3), torch.full((40,), 0.2))


def examples(pipe: Any, sae: SAE) -> list[TrainingExample]:
    plain, _ = record_trajectories(pipe, PLAIN, SEEDS, SAMPLING, sae, AT)
    shown, _ = record_trajectories(pipe, SHOWS, SEEDS, SAMPLING, sae, AT)
    return [
        TrainingExample(DenoiserCall(a.state, a.timestep, b.conditioning, b.prediction), a.prediction)
        for a, b in zip(plain, shown, strict=True)
    ]


def test_a_learnt_edit_comes_nearer_to_its_target(pipe: Any, sae: SAE) -> None:
    base = generate(pipe, PLAIN, SEEDS, SAMPLING)
    needs = [p.requires_grad for p in pipe.unet.parameters()]
    losses: list[float] = []
    made = train_corrections(
        pipe,
        [(AT,), (ON,), READ],
        examples(pipe, sae),
        rank=2,
        steps=12,
        batch=6,
        lr=2e-2,
        on_step=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    assert [(c.site, *c.also) for c in made] == [(AT,), (ON,), READ]
    for c, d in zip(made, (32, 32, pipelines.WIDTH), strict=True):
        shapes = {k: tuple(v.shape) for k, v in c.tensors().items()}
        assert shapes == {"times": (1,), "down": (1, d, 2), "up": (1, 2, d), "bias": (1, d)}
        assert not any(v.requires_grad for v in c.tensors().values())
    assert [p.requires_grad for p in pipe.unet.parameters()] == needs
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert (generate(pipe, PLAIN, SEEDS, SAMPLING) == base).all()


def test_a_learnt_edit_repeats(pipe: Any, sae: SAE) -> None:
    given: dict[str, Any] = {"rank": 2, "steps": 2, "batch": 2}
    given_examples = examples(pipe, sae)
    one, same = (train_corrections(pipe, [(AT,)], given_examples, **given)[0].tensors() for _ in range(2))
    other = train_corrections(pipe, [(AT,)], given_examples, **given, seed=1)[0].tensors()
    assert all(torch.equal(one[k], same[k]) for k in one) and not torch.equal(one["down"], other["down"])
    assert one["up"].any() and one["bias"].any()


def test_a_fit_that_fails_leaves_the_model_as_it_was(pipe: Any, sae: SAE) -> None:
    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    needs = [p.requires_grad for p in pipe.unet.parameters()]
    given_states = examples(pipe, sae)
    with pytest.raises(KeyboardInterrupt):
        train_corrections(pipe, [(AT,)], given_states, rank=1, steps=2, batch=1, on_step=stop)
    assert [p.requires_grad for p in pipe.unet.parameters()] == needs and not pipe.unet._forward_hooks
