"""Pipelines that share a denoiser, in one thread or several: loaded erasers belong to the denoiser."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import make_eraser
from helpers.prompted_calls import LOUD, QUIET, hears, prompts, twin
from neuraleraser import (
    ConceptRefusedError,
    attach,
    delete_erasers,
    disable_erasers,
    eraser_trace,
    get_list_erasers,
    load_eraser,
    set_erasers,
    unload_erasers,
)
from neuraleraser.eraser import EraserHeader
from neuraleraser.errors import SettingsError


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


# Loaded erasers belong to the denoiser.


def test_any_pipeline_of_the_modules_takes_erasers_off(sd: Any) -> None:
    other, base = twin(sd), prompts(sd, LOUD)
    load_eraser(sd, make_eraser())
    erased = prompts(other, LOUD)
    assert not torch.equal(erased, base)
    disable_erasers(other)
    assert torch.equal(prompts(sd, LOUD), base)
    set_erasers(other, "Cats")
    assert torch.equal(prompts(sd, LOUD), erased)
    unload_erasers(other)
    assert torch.equal(prompts(sd, LOUD), base) and torch.equal(prompts(other, LOUD), base)
    unload_erasers(sd)  # nothing is there
    load_eraser(other, make_eraser())
    unload_erasers(sd)
    assert torch.equal(prompts(other, LOUD), base)
    load_eraser(sd, make_eraser())
    load_eraser(sd, make_eraser(seed=40, name="Dogs"))
    delete_erasers(other, "Dogs")
    assert get_list_erasers(sd) == ["Cats"] and torch.equal(prompts(sd, LOUD), erased)
    delete_erasers(other, "Cats")
    assert get_list_erasers(sd) == [] and torch.equal(prompts(sd, LOUD), base)
    assert not [name for owner in (sd, other, sd.unet) for name in vars(owner) if "neuraleraser" in name]


def test_one_eraser_loaded_in_two_pipelines_acts_once_and_each_has_its_trace(sd: Any) -> None:
    other, eraser = twin(sd), make_eraser()
    with attach(sd, eraser):
        once = prompts(sd, LOUD)
    assert load_eraser(sd, eraser, "vg") == load_eraser(other, eraser, "vg") == "vg"
    assert torch.equal(prompts(sd, LOUD), once) and torch.equal(prompts(other, LOUD), once)
    prompts(other, QUIET, LOUD)
    assert [r["image"] for r in eraser_trace(sd).records()] == [0]
    assert [r["image"] for r in eraser_trace(other).records()] == [0, 1, 2]
    load_eraser(other, make_eraser(seed=40, name="Dogs"))  # traces go on
    prompts(sd, LOUD)
    assert len(eraser_trace(sd).records()) == 2 and len(eraser_trace(other).records()) == 3


def test_strengths_by_image_hold_in_a_twin(sd: Any) -> None:
    load_eraser(sd, make_eraser())
    set_erasers(sd, "Cats", [[1.0, 0.0]])
    images = []
    with pytest.raises(SettingsError, match="strengths for 2 images, but this call draws 4"):
        images.append(prompts(twin(sd), *[LOUD] * 4))
    assert not images
    first, second = prompts(twin(sd), LOUD, QUIET)
    set_erasers(sd, "Cats", 0.0)
    plain_first, plain_second = prompts(twin(sd), LOUD, QUIET)
    assert not torch.equal(first, plain_first) and torch.equal(second, plain_second)


def test_an_eraser_acts_once_however_often_it_is_given(sd: Any) -> None:
    eraser = hears(sd)
    pictures = {}
    plans: list[tuple[str, Any, Any]] = [
        ("once", eraser, 1.0),
        ("thrice", [eraser] * 3, 1.0),
        ("weaker beside", [eraser, eraser], [1.0, 0.5]),
        ("a fit of the same features", [eraser, replace(eraser, header=EraserHeader("again"))], [1.0, 0.9]),
    ]
    for name, erasers, strength in plans:
        with attach(sd, erasers, strength):
            pictures[name] = prompts(sd, LOUD, QUIET)
    assert all(torch.equal(picture, pictures["once"]) for picture in pictures.values())
    with attach(sd, [eraser] * 2, [[1.0, 0.0], [0.0, 1.0]]):  # of each image the larger
        assert torch.equal(prompts(sd, LOUD, QUIET), pictures["once"])
    load_eraser(sd, eraser)
    with pytest.raises(SettingsError, match="attached to these modules already"), attach(twin(sd), eraser):
        pass
    with pytest.raises(SettingsError, match="loaded already, as 'Cats'"):
        load_eraser(sd, eraser, "again")
    assert torch.equal(prompts(sd, LOUD, QUIET), pictures["once"])


def test_two_erasers_of_one_concept_are_warned_of(sd: Any) -> None:
    with pytest.warns(UserWarning, match="two different erasers of 'Cats'"):
        with attach(sd, [make_eraser(), make_eraser(seed=40)]):
            pass
    with attach(sd, [make_eraser(), make_eraser(seed=40)], action=["erase", "detect"]):
        pass


# Threads.


def test_threads_draw_as_if_alone() -> None:
    """Four pipelines over one denoiser in four threads, at a high rate of switching; embeddings are made before, as
    threads may not share a tokenizer."""
    calls = 6
    wrong = threads_apart(calls)
    assert not wrong


@pytest.mark.slow
def test_threads_draw_as_if_alone_500_times() -> None:
    assert not threads_apart(500)


def threads_apart(calls: int) -> list[str]:
    """Draw in four threads with two erasers, one of which refuses -> what went wrong."""
    import sys

    sd = pipelines.stable_diffusion()
    pipes = [sd, *(twin(sd, scheduler=copy.deepcopy(sd.scheduler)) for _ in range(3))]
    texts = [LOUD, QUIET, "d e", "f"]
    embeds = [sd.encode_prompt(text, "cpu", 1, True, "") for text in texts]
    refuses = hears(sd, "f", "d e", seed=70, name="Dogs")

    def draw(pipe: Any, i: int, k: int) -> Tensor | str:
        positive, negative = embeds[(i + k) % 4]
        call: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": (1.0, 4.0)[k % 2], "output_type": "latent"}
        try:
            generator = torch.Generator().manual_seed(k)
            return pipe(prompt_embeds=positive, negative_prompt_embeds=negative, generator=generator, **call).images
        except ConceptRefusedError:
            return "refused"

    wrong: list[str] = []

    def work(i: int) -> None:
        for k in range(calls):
            got, want = draw(pipes[i], i, k), alone[i][k % len(alone[i])]
            same = got == want if isinstance(got, str) or isinstance(want, str) else torch.equal(got, want)
            if not same:
                wrong.append(f"thread {i}, call {k}")

    load_eraser(sd, hears(sd), "cats")
    load_eraser(sd, refuses, "dogs", action="refuse")
    period = 4  # prompts and guidance come again; the seed is part of the call
    alone = [[draw(pipes[i], i, k) for k in range(calls)] for i in range(4)] if calls <= 100 else []
    if not alone:
        plain = draw
        draw = lambda pipe, i, k: plain(pipe, i, k % period)  # noqa: E731
        alone = [[draw(pipes[i], i, k) for k in range(period)] for i in range(4)]
    kinds = {type(x).__name__ for row in alone for x in row}
    assert kinds == {"str", "Tensor"}  # some are refused, some not
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    unload_erasers(sd)
    return wrong
