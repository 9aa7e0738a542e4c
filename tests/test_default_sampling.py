"""Without a sampling given, every function draws as the pipeline is usually sampled, never as the canvas is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from helpers import pipelines
from helpers.erasers import make_correction, make_gate, random
from helpers.published_saes import saeuron
from neuraleraser import (
    activation_matrix,
    activation_stream,
    calibrate,
    collect,
    diagnose,
    generate,
    import_reference,
    make_reference,
    measure_loss_recovered,
)
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, EraserHeader
from neuraleraser.errors import ConceptError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting import fit
from neuraleraser.fitting.reference import reference_from_sae
from neuraleraser.sae import SAE
from neuraleraser.settings import FitSettings, Sampling, StreamSettings
from neuraleraser.sites import DenoiserCall, Site, denoiser_calls

AT = Site("unet.mid_block.attentions.0")
CONCEPT = Concept("x", "object", tuple(Pair(f"x x {c}", f"b c {c}") for c in "abcd"))
PROMPTS = ["a b", "c d", "e f", "g h", "i j"]
STEPS, BATCH = 3, 4  # without guidance, so a call has as many rows


class Turbo(StableDiffusionPipeline):
    """Few steps and no guidance, by its own call's defaults."""

    def __call__(self, prompt: Any = None, num_inference_steps: int = STEPS, guidance_scale: float = 1.0, **given: Any):
        return super().__call__(prompt, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, **given)


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (pipelines.stable_diffusion, "stabilityai/sd-turbo", (1, 0.0)),
        (pipelines.stable_diffusion, "", (50, 7.5)),
        (pipelines.stable_diffusion_xl, "/models/SDXL-Turbo", (1, 0.0)),
        (pipelines.flux, "black-forest-labs/FLUX.1-schnell", (4, 0.0)),
        (pipelines.flux, "black-forest-labs/FLUX.1-dev", (28, 3.5)),
    ],
)
def test_distilled_models_that_are_known_are_sampled_as_their_authors_say(
    make: Any, name: str, expected: tuple[int, float]
) -> None:
    pipe = make()
    pipe.register_to_config(_name_or_path=name)
    usual = default_sampling(pipe)
    assert (usual.num_inference_steps, usual.guidance_scale) == expected
    assert default_sampling(pipe, 7, 2.0).num_inference_steps == 7


class NoScale(StableDiffusionPipeline):
    """As Qwen-Image: its scale is for distilled models alone, and unset."""

    def __call__(self, prompt: Any = None, guidance_scale: float | None = None, **given: Any) -> Any:
        raise NotImplementedError


def test_a_scale_that_is_unset_is_no_guidance() -> None:
    made = NoScale(**pipelines.stable_diffusion().components, requires_safety_checker=False)
    assert default_sampling(made).guidance_scale == 1


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = Turbo(**pipelines.stable_diffusion().components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def sae() -> SAE:
    w = torch.nn.functional.normalize(random(40, 32, seed=1), dim=1)
    return SAE(w, random(40, seed=2), w, 0.1 * random(32, seed=3), torch.full((40,), 0.1))


def eraser(sampling: Sampling | None = None) -> Eraser:
    gate = make_gate(AT, 32, f=40)
    correction = make_correction(Site("unet.up_blocks.0.attentions.1"), 32)
    return Eraser(gate, (correction,), EraserHeader("x", kind="object", seeds=(0, 1), sampling=sampling))


def fitting(pipe: Any, folder: Path) -> None:
    known = reference_from_sae(pipe, sae(), AT, [(p, frozenset()) for p in PROMPTS], default_sampling(pipe))
    settings = FitSettings(num_pictures=0, num_pairs=2, rank=1, steps=2)
    assert fit(pipe, CONCEPT, settings, reference=known).header.sampling == default_sampling(pipe)


def calibrating(pipe: Any, folder: Path) -> None:
    with pytest.raises(ConceptError, match="do not tell it"):  # random features; what is drawn is what counts
        calibrate(pipe, eraser(), CONCEPT, num_pairs=4)


def streaming(pipe: Any, folder: Path) -> None:
    batches = activation_stream(
        pipe,
        PROMPTS,
        [AT],
        StreamSettings(train_batch_size=8, vectors_per_image=8, num_images=4, buffer_chunks=1, prefetch=0),
    )(0)
    next(iter(batches))
    batches.close()


VERBS: dict[str, Callable[[Any, Path], Any]] = {
    "fit": fitting,
    "calibrate": calibrating,
    "doctor": lambda pipe, folder: diagnose(pipe, [eraser()], [CONCEPT], [("g", "h")], num_images=4),
    "make_reference": lambda pipe, folder: make_reference(pipe, CONCEPT, [], AT, folder, num_images=8),
    "import_reference": lambda pipe, folder: import_reference(
        pipe, saeuron(folder / "theirs", random(64, 32)), AT, PROMPTS, vectors_per_image=8
    ),
    "activation_stream": streaming,
    "generate": lambda pipe, folder: generate(pipe, PROMPTS, range(5)),
    "collect": lambda pipe, folder: collect(pipe, PROMPTS, range(5), [AT], lambda seen: None),
    "activation_matrix": lambda pipe, folder: activation_matrix(pipe, PROMPTS, range(5), [AT], 8),
    "measure_loss_recovered": lambda pipe, folder: measure_loss_recovered(
        pipe, sae(), AT, PROMPTS[:4], range(4), num_timesteps=2
    ),
}


@pytest.mark.parametrize("name", VERBS)
def test_images_are_drawn_as_the_pipeline_usually_is(name: str, pipe: Any, tmp_path: Path) -> None:
    rows: set[int] = set()
    times: set[float] = set()

    def on(call: DenoiserCall) -> None:
        rows.add(call.state.shape[0])
        times.update(call.timestep.flatten().tolist())

    with denoiser_calls(pipe, on):
        VERBS[name](pipe, tmp_path)
    pipe.scheduler.set_timesteps(STEPS)
    own = set(pipe.scheduler.timesteps.tolist())
    pipe.scheduler.set_timesteps(1)  # of probes
    assert max(rows) <= BATCH and own <= times <= own | set(pipe.scheduler.timesteps.tolist())


@pytest.mark.parametrize("verb", [VERBS["doctor"], VERBS["calibrate"]], ids=["doctor", "calibrate"])
def test_an_eraser_is_looked_at_as_it_was_fitted(
    verb: Callable[[Any, Path], Any], pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, float]] = []
    fitted = eraser(Sampling(num_inference_steps=2, guidance_scale=4.0, batch_size=1))
    monkeypatch.setitem(globals(), "eraser", lambda: fitted)
    with denoiser_calls(pipe, lambda call: calls.append((call.state.shape[0], float(call.timestep.flatten()[0])))):
        verb(pipe, tmp_path)
    pipe.scheduler.set_timesteps(2)
    assert {time for _, time in calls} == set(pipe.scheduler.timesteps.tolist())
    assert 2 * BATCH in {rows for rows, _ in calls}, "with guidance, and as many together as is usual here"


def test_a_sampling_that_is_given_is_kept(pipe: Any) -> None:
    given = replace(Sampling(num_inference_steps=2, batch_size=2), guidance_scale=1.0)
    assert default_sampling(pipe) == Sampling(num_inference_steps=STEPS, guidance_scale=1.0, batch_size=BATCH)
    with pytest.raises(ConceptError, match="do not tell it"):
        calibrate(pipe, eraser(), CONCEPT, num_pairs=2, sampling=given)
