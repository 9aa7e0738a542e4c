"""Textual inversion as an attack: it learns, its gradients go through gates and corrections, and it leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser import attach
from neuraleraser.attacks import WORD, learn_embeddings, learned_word
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import denoiser_calls, record

PROMPTS = [f"a {WORD}", f"b {WORD} c"]
S = Sampling(num_inference_steps=2, batch_size=2)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def images(n: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)


def learn(pipe: Any, **settings: Any) -> torch.Tensor:
    given: dict[str, Any] = {"count": 2, "steps": 4, "batch_size": 2, **settings}
    return learn_embeddings(pipe, images(), PROMPTS, **given)


def test_the_loss_falls(pipe: Any) -> None:
    losses: list[float] = []
    learn(pipe, steps=60, batch_size=4, on_step=lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    assert np.mean(losses[-15:]) < 0.99 * np.mean(losses[:15])


def test_embeddings_stand_where_the_word_does(pipe: Any) -> None:
    """Those of known words give what the words give."""
    words = ["b", "c"]
    ids = pipe.tokenizer.convert_tokens_to_ids([f"{w}</w>" for w in words])
    vectors = pipe.text_encoder.get_input_embeddings().weight[ids].detach()
    plain = generate(pipe, ["a b c", "b c a"], [0, 1], S)
    with learned_word(pipe, vectors):
        found = generate(pipe, [f"a {WORD}", f"{WORD} a"], [0, 1], S)
        changed = generate(pipe, [f"a {WORD} b", f"{WORD}"], [0, 1], S)
    assert np.array_equal(plain, found)
    assert not np.array_equal(plain, changed)


def test_nothing_stays_behind(pipe: Any) -> None:
    before, hooks = generate(pipe, ["a", "b"], [0, 1], S), pipelines.left(pipe)
    tokenizer, flags = pipe.tokenizer, [p.requires_grad for p in pipe.unet.parameters()]
    learn(pipe)
    with pytest.raises(ZeroDivisionError), learned_word(pipe, torch.zeros(1, 32)):
        _ = 1 / 0
    assert pipe.tokenizer is tokenizer and pipelines.left(pipe) == hooks
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags
    assert all(p.grad is None for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))
    assert np.array_equal(before, generate(pipe, ["a", "b"], [0, 1], S))


def test_learning_is_deterministic(pipe: Any) -> None:
    one, two, other = (learn(pipe, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_gradients_go_through_the_eraser(pipe: Any) -> None:
    """A correction of the prompt changes what is learnt; a shut eraser does not."""
    base = learn(pipe)
    opened, shut = make_eraser("stable_diffusion"), make_eraser("stable_diffusion", **SHUT)
    assert torch.equal(base, learn(pipe, applied=lambda using: attach(using, shut)))
    assert not torch.equal(base, learn(pipe, applied=lambda using: attach(using, opened)))


def test_every_step_is_a_drawing_of_its_own(pipe: Any) -> None:
    """An image gate that opened in one step is not held open in the next: each step is of other pictures."""
    eraser = with_picture(make_eraser("stable_diffusion", **SHUT), pipe)
    gate = eraser.image_gate
    assert gate is not None
    low = gate.low.clone()
    low[1] = 1e6  # shut above timestep 500
    eraser = replace(eraser, image_gate=replace(gate, low=low, high=2 * low + 1e-3))
    seen: list[bool] = []
    times: list[bool] = []
    with (
        attach(pipe, eraser) as trace,
        denoiser_calls(pipe, lambda call: times.append(bool((call.timestep < 500).any()))),
    ):
        learn(pipe, steps=8, batch_size=1, on_step=lambda step, loss: seen.append(len(trace.fired) > sum(seen)))
    assert seen == times and True in seen and False in seen


def test_gates_are_blinded(pipe: Any) -> None:
    """With the loss for their evidence, known gates see less than without."""
    gate = make_eraser("stable_diffusion").gate

    def evidence(vectors: torch.Tensor) -> float:
        seen: list[float] = []
        with (
            learned_word(pipe, vectors),
            record(pipe, [gate.site], lambda s, x, c: seen.append(float(gate.evidence(x).mean()))),
        ):
            generate(pipe, PROMPTS, [0, 1], S)
        return sum(seen)

    low = torch.full_like(gate.low, 0.01)
    gate = replace(gate, low=low, high=2 * low)
    plain, blind = learn(pipe, steps=25), learn(pipe, steps=25, gates=[gate], blinding=10.0)
    assert evidence(blind) < evidence(plain)


def test_wrong_pipelines_and_prompts(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="several text encoders"):
        learn(pipelines.stable_diffusion_xl())
    with pytest.raises(SettingsError, match=f"'b' does not hold {WORD}"):
        learn_embeddings(pipe, images(), [PROMPTS[0], "b"])
    with pytest.raises(SettingsError, match="3 images, 2 prompts"):
        learn_embeddings(pipe, images(3), PROMPTS)
    with pytest.raises(SettingsError, match="count is 0"):
        learn(pipe, count=0)
    with pytest.raises(SettingsError, match="0 images, 0 prompts"):
        learn_embeddings(pipe, images()[:0], [])
    with pytest.raises(DataError, match="uint8"):
        learn_embeddings(pipe, images().astype(np.float32), PROMPTS)
