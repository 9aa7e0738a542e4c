"""A correction that is trained on: nearer to its target, the same each time, and the model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import make_correction
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import LowRank
from neuraleraser.fitting.correction_training import EVERY, Lesson, draw_lessons, train_correction
from neuraleraser.fitting.prompt_correction import _context_pairs, fit_prompt_correction
from neuraleraser.fitting.text_correction import read_prompts
from neuraleraser.sampling import generate
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import DenoiserCall, candidate_sites, denoiser_calls, edits_for

SAMPLING = Sampling(num_inference_steps=3, batch_size=2)
PAIRS = [Pair("a x", "a"), Pair("b x", "b"), Pair("x b", "b"), Pair("c x", "c")]
SHOWN = [pair.positive for pair in PAIRS]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def start(pipe: Any) -> LowRank:
    reads = edits_for(pipe, candidate_sites(pipe)[0])
    made = make_correction(reads[0], pipelines.WIDTH, times=(500.0,), also=reads[1:])
    assert isinstance(made, LowRank)
    return made


def test_lessons_are_steps_of_what_is_drawn_without_the_concept(pipe: Any) -> None:
    calls: list[DenoiserCall] = []
    with denoiser_calls(pipe, calls.append):
        lessons = draw_lessons(pipe, PAIRS, 7, SAMPLING)
    assert len(calls) == 6 and len(lessons) == 3, "of three images one step each"
    assert [lesson.shown for lesson in lessons] == [["a x"], ["b x", "x b"], ["c x"]]
    assert EVERY == 3, "so of each batch the first step is kept"
    for lesson, call, row in zip(lessons, [calls[0], calls[0], calls[3]], [2, 3, 2], strict=True):
        assert torch.equal(lesson.call.state, call.state[row : row + 1])  # of the conditional half
        assert torch.equal(lesson.call.prediction, call.prediction[row : row + 1])


def test_prompts_are_read_with_their_conditioning(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the autoencoder, which takes as long again."""
    monkeypatch.setattr(pipe.vae, "decode", None)
    read = read_prompts(pipe, start(pipe).site, SHOWN, SAMPLING)
    monkeypatch.undo()
    texts = pipe.encode_prompt(SHOWN, "cpu", 1, False)[0]
    for prompt, text in zip(SHOWN, texts, strict=True):
        torch.testing.assert_close(read.texts[prompt], text)
        torch.testing.assert_close(read.calls[prompt].conditioning["encoder_hidden_states"][0], text)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # FLUX's norms, in bfloat16
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux", "pixart"])
def test_training_comes_nearer_to_the_prediction_without(name: str) -> None:
    pipe: Any = pipelines.EVERY[name]()
    calls: list[DenoiserCall] = []
    with denoiser_calls(pipe, calls.append):
        pipelines.run(pipe, 0, n=2, guidance=1.0)
        pipelines.run(pipe, 5, n=2, guidance=1.0)
    rows = [call.rows(torch.tensor([row])) for call in calls for row in range(2)]
    lessons = [Lesson(call, ["shown"]) for call in rows[:4]]
    reads = edits_for(pipe, candidate_sites(pipe)[0])
    found: list[float] = []
    nothing = torch.zeros(1, 2, pipelines.WIDTH)
    made = make_correction(reads[0], pipelines.WIDTH, times=(500.0,), also=reads[1:], up=nothing, bias=nothing[:, 0])
    assert isinstance(made, LowRank)
    given: dict[str, Any] = {"steps": 12, "batch": 4, "lr": 2e-2}
    trained = train_correction(pipe, made, lessons, {"shown": rows[4]}, **given, on_step=lambda _, x: found.append(x))
    assert len(found) == 12 and sum(found[-3:]) < sum(found[:3])
    assert not any(v.requires_grad for v in trained.tensors().values())
    assert (trained.site, trained.also) == (made.site, made.also) and torch.equal(trained.times, made.times)


def test_training_repeats_and_leaves_the_model_as_it_was(pipe: Any) -> None:
    base = generate(pipe, ["a", "b"], [1, 2], SAMPLING)
    needs = [p.requires_grad for p in pipe.unet.parameters()]
    lessons, read = draw_lessons(pipe, PAIRS, 7, SAMPLING), read_prompts(pipe, start(pipe).site, SHOWN, SAMPLING)
    given: dict[str, Any] = {"steps": 2, "batch": 2}
    one, same = (train_correction(pipe, start(pipe), lessons, read.calls, **given).tensors() for _ in range(2))
    other = train_correction(pipe, start(pipe), lessons, read.calls, **given, seed=1).tensors()
    assert all(torch.equal(one[k], same[k]) for k in one) and not torch.equal(one["down"], other["down"])
    assert not torch.equal(one["down"], start(pipe).down) and not torch.equal(one["bias"], start(pipe).bias)

    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_correction(pipe, start(pipe), lessons, read.calls, **given, on_step=stop)
    assert [p.requires_grad for p in pipe.unet.parameters()] == needs and not pipe.unet._forward_hooks
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert (generate(pipe, ["a", "b"], [1, 2], SAMPLING) == base).all()


def test_prompts_of_what_stays_are_spread_over_all() -> None:
    context = tuple(Pair(f"x and {c}{way}", c) for c in "abcdef" for way in "12")
    concept = Concept("x", "other", (Pair("a x", "a"),), context)
    assert [pair.negative for pair in _context_pairs(concept, 3)] == ["a", "a", "c", "c", "e", "e"]
    assert _context_pairs(concept, 100) == list(context) and not _context_pairs(concept, 0)


def test_it_is_trained_only_where_the_closed_form_leaves_much(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    beside = Pair("x and y", "y"), Pair("y and x", "y")
    concept = Concept("x", "other", tuple(Pair(f"{c} x", c) for c in "abc"), beside)
    sites, settings = edits_for(pipe, candidate_sites(pipe)[0]), FitSettings(num_pairs=2, rank=2, steps=2)

    def made() -> Any:
        return fit_prompt_correction(pipe, concept, sites, 500.0, 3, settings, SAMPLING, lambda share: None)

    trained = made()
    assert trained.left > 0.1 and trained.seeds == 3  # two pairs and what stands beside it
    monkeypatch.setattr("neuraleraser.fitting.prompt_correction.ENOUGH", 1.0)
    closed = made()
    assert (closed.left, closed.seeds, closed.prompts) == (trained.left, 0, trained.prompts)
    assert not torch.equal(closed.correction.up, trained.correction.up)
