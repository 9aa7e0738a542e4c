"""P4D: tokens with which the erased model predicts what the base model does for another prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser import attach
from neuraleraser.attacks import WORD, match_predictions
from neuraleraser.attacks.latents import latents_of
from neuraleraser.attacks.prediction_matching import nearest
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
PROMPTS, TARGETS = [WORD, f"{WORD} a"], ["c", "c a"]
S = Sampling(num_inference_steps=2, batch_size=2)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def match(pipe: Any, **settings: Any) -> list[int]:
    given: dict[str, Any] = {"count": 1, "rounds": 2, "steps": 3, "batch_size": 4, **settings}
    return match_predictions(pipe, IMAGES, PROMPTS, TARGETS, **given)


def token(pipe: Any, word: str) -> int:
    return pipe.tokenizer.convert_tokens_to_ids(f"{word}</w>")


def test_the_token_of_the_target_s_prompt_is_found(pipe: Any) -> None:
    """On the base model the word itself leaves no loss at all. Of 52 tokens, from seeds that begin with others."""
    losses: list[float] = []
    found = match(
        pipe, rounds=6, steps=15, batch_size=2, rate=0.3, seed=1, on_round=lambda r, loss: losses.append(loss)
    )
    assert found == [token(pipe, "c")]
    assert min(losses) == 0 and losses[0] > 0


def test_the_loss_put_aside_is_of_both_models_predictions(pipe: Any) -> None:
    """Written out, through an eraser: the tokens returned have the loss that the round says."""
    generator = torch.Generator().manual_seed(3)
    torch.randint(52, (1,), generator=generator)
    batches = []
    latents = latents_of(pipe, IMAGES)
    for _ in range(4):
        some, times = torch.randint(2, (4,), generator=generator), torch.randint(1000, (4,), generator=generator)
        batches.append((some.tolist(), times, torch.randn(4, 4, 8, 8, generator=generator)))
    losses: list[float] = []
    eraser = make_eraser()
    (found,) = match(
        pipe, rounds=1, seed=3, applied=lambda using: attach(using, eraser), on_round=lambda r, x: losses.append(x)
    )
    ids = [[0, found, *[1] * 6], [0, found, token(pipe, "a"), *[1] * 5]]
    expected = []
    with torch.no_grad():
        for some, times, noise in batches:
            noisy = pipe.scheduler.add_noise(latents[some], noise, times)
            asked = pipe.encode_prompt([TARGETS[i] for i in some], "cpu", 1, False)[0]
            target = pipe.unet(noisy, times, encoder_hidden_states=asked).sample
            with attach(pipe, eraser):
                pipe.scheduler.set_timesteps(1000)
                text = pipe.text_encoder(torch.tensor([ids[i] for i in some]))[0]
                expected.append(F.mse_loss(pipe.unet(noisy, times, encoder_hidden_states=text).sample, target))
    assert losses[0] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert losses[0] > 0


def test_the_tokens_of_the_least_loss_are_kept(pipe: Any) -> None:
    losses: list[float] = []
    tried: list[torch.Tensor] = []

    def keep(vectors: torch.Tensor) -> bool:
        tried.append(vectors)
        return False

    found = match(
        pipe, count=2, rounds=4, steps=4, rate=0.5, seed=3, succeeds=keep, on_round=lambda r, loss: losses.append(loss)
    )
    best = int(np.argmin(losses))
    assert torch.equal(tried[best], pipe.text_encoder.get_input_embeddings().weight[found])
    assert len({*losses}) > 1 and best < 3  # the last is not always the best


def test_success_ends_it(pipe: Any) -> None:
    tried: list[torch.Tensor] = []

    def succeeds(vectors: torch.Tensor) -> bool:
        tried.append(vectors)
        return len(tried) == 2

    found = match(pipe, rounds=5, rate=0.5, succeeds=succeeds)
    assert len(tried) == 2 and torch.equal(tried[1], pipe.text_encoder.get_input_embeddings().weight[found])


def test_nearest_is_by_cosine_and_among_the_allowed() -> None:
    table = torch.tensor([[1.0, 0.0], [10.0, 9.0], [0.0, 0.1], [-1.0, 0.0]])
    vectors = torch.tensor([[1.0, 0.8], [0.05, 3.0], [2.0, 0.1]])
    assert nearest(vectors, table, torch.arange(4)).tolist() == [1, 2, 0]
    assert nearest(vectors, table, torch.tensor([1, 3])).tolist() == [1, 1, 1]


def test_it_is_deterministic_goes_through_the_eraser_and_leaves_nothing(pipe: Any) -> None:
    before, hooks = generate(pipe, ["a", "b"], [0, 1], S), pipelines.left(pipe)
    losses: list[float] = []
    opened, shut = make_eraser(), make_eraser(**SHUT)
    found = [
        match(pipe, count=2, applied=lambda using, e=e: attach(using, e), on_round=lambda r, loss: losses.append(loss))
        for e in ([], [], [shut], [opened])
    ]
    assert found[0] == found[1] == found[2] and losses[:2] == losses[2:4] == losses[4:6]
    assert losses[6] != losses[0]
    assert len({tuple(match(pipe, count=2, seed=seed)) for seed in range(4)}) > 1
    assert np.array_equal(generate(pipe, ["a", "b"], [0, 1], S), before) and pipelines.left(pipe) == hooks


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    with pytest.raises(SettingsError, match="does not hold <learned>"):
        match_predictions(pipe, IMAGES, ["a", "b"], TARGETS)
    with pytest.raises(SettingsError, match="2 images, 1 targets"):
        match_predictions(pipe, IMAGES, PROMPTS, ["c"])
    with pytest.raises(SettingsError, match="rounds is 0"):
        match(pipe, rounds=0)
    with pytest.raises(SettingsError, match="rate is 0"):
        match(pipe, rate=0)
    with pytest.raises(SettingsError, match="several text encoders or none"):
        match(pipelines.stable_diffusion_xl())
    with attach(pipe, make_eraser()), pytest.raises(SettingsError, match="a target of predictions needs the base"):
        match(pipe)
