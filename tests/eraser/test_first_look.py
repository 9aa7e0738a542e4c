"""Before anything is drawn, image gates look at the start images, with less noise than sampling begins at."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, SITES, make_eraser, with_picture
from neuraleraser import ConceptRefusedError, attach
from neuraleraser.eraser import Eraser
from neuraleraser.sites import (
    Begin,
    Call,
    DenoiserCall,
    FinishedForward,
    HookedEdits,
    Rows,
    denoiser,
    denoiser_calls,
    record,
)
from neuraleraser.sites.edit import FunctionEdit

TASKS = {
    "sd1_img2img": "stable_diffusion",
    "sd1_inpaint": "stable_diffusion",
    "sd1_inpaint_model": "stable_diffusion",
    "sd1_controlnet_img2img": "stable_diffusion",
    "sdxl_img2img": "stable_diffusion_xl",
    "sdxl_inpaint": "stable_diffusion_xl",
    "sd3_img2img": "stable_diffusion_3",
    "flux_img2img": "flux",
    "flux_inpaint": "flux",
}
pytestmark = pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning")


def clear_sighted(name: str, pipe: Any, **gate: Any) -> Eraser:
    """An eraser whose image gate opens at the cleanest of three levels of noise, and is shut at all others."""
    eraser = make_eraser(TASKS[name], times=(30.0, 600.0, 900.0), **SHUT)
    eraser = with_picture(eraser, pipe, f=8, **gate)
    assert eraser.image_gate is not None
    low = torch.tensor([eraser.image_gate.low[0], 1e6, 1e6])
    return replace(eraser, image_gate=replace(eraser.image_gate, low=low, high=2 * low + 1e-3))


def noisy(pipe: Any, seed: int = 0, **given: Any) -> Tensor:
    """Images of which sampling passes noisy states alone: the first of ten steps."""
    return pipelines.run(pipe, seed, **{"steps": 5, "strength": 0.9, "n": 2, **given})


def first_steps(pipe: Any) -> tuple[Any, list[DenoiserCall]]:
    calls: list[DenoiserCall] = []
    return denoiser_calls(pipe, calls.append), calls


@pytest.mark.parametrize("name", TASKS)
def test_what_it_sees_there_opens_the_gate_from_the_first_step_on(name: str) -> None:
    pipe = pipelines.EVERY[name]()
    watching, base = first_steps(pipe)
    with watching:
        noisy(pipe)
    watching, moved = first_steps(pipe)
    with attach(pipe, clear_sighted(name, pipe)) as trace, watching:
        noisy(pipe)
    assert torch.equal(moved[0].state, base[0].state)
    changed = (moved[0].prediction - base[0].prediction).flatten(1).norm(dim=1) > 1e-5
    assert bool(changed.all())
    assert set(trace.fired) == {0, 1}


@pytest.mark.parametrize("name", TASKS)
def test_shut_it_costs_one_forward_a_call_and_no_bit(name: str) -> None:
    pipe = pipelines.EVERY[name]()
    block = denoiser(pipe).get_submodule(SITES[TASKS[name]][0].path.partition(".")[2])
    passes: list[int] = []
    handle = block.register_forward_hook(lambda *_: passes.append(1))
    base = noisy(pipe)
    plain = len(passes)
    with attach(pipe, clear_sighted(name, pipe, **SHUT)) as trace:
        passes.clear()
        assert torch.equal(noisy(pipe), base)
        assert torch.equal(noisy(pipe), base)
    handle.remove()
    assert not trace.fired and len(passes) == 2 * (plain + 1)


def test_a_gate_without_a_guided_correction_does_not_look_first() -> None:
    """As SAeUron's: its correction acts in the steps that are sampled, where it looks anyway."""
    pipe = pipelines.EVERY["sd1_img2img"]()
    eraser = make_eraser(TASKS["sd1_img2img"])
    eraser = replace(eraser, gate=replace(eraser.gate, picture=True))
    passes: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: passes.append(1))
    noisy(pipe)
    plain = len(passes)
    with attach(pipe, eraser) as trace:
        noisy(pipe)
    handle.remove()
    assert trace.fired and len(passes) == 2 * plain


def test_it_refuses_before_the_second_forward() -> None:
    pipe = pipelines.EVERY["sd1_img2img"]()
    watching, calls = first_steps(pipe)
    with attach(pipe, clear_sighted("sd1_img2img", pipe), action="refuse"), watching:
        with pytest.raises(ConceptRefusedError, match="image 0: Cats"):
            noisy(pipe)
    assert not calls  # its hook comes after ours, which raised


def test_images_are_looked_at_alone() -> None:
    """Of two images one is seen: by bounds between what is found in both."""
    pipe = pipelines.EVERY["sd1_img2img"]()
    eraser = clear_sighted("sd1_img2img", pipe, low=0.0)
    assert eraser.image_gate is not None
    gate, found = eraser.image_gate, list[Tensor]()
    block = pipe.unet.get_submodule(gate.site.path.partition(".")[2])
    handle = block.register_forward_hook(lambda _, args, out: found.append(out[0]))
    with attach(pipe, eraser):
        noisy(pipe)
    handle.remove()
    evidence = gate.evidence(found[1].flatten(2).mT)[2:]  # the second pass, its cleaner block
    middle = evidence.mean()
    low = torch.tensor([middle, 1e6, 1e6])
    before, base = first_steps(pipe)
    with before:
        noisy(pipe)
    watching, moved = first_steps(pipe)
    with attach(pipe, replace(eraser, image_gate=replace(gate, low=low, high=1.0001 * low))), watching:
        noisy(pipe)
    changed = (moved[0].prediction - base[0].prediction).flatten(1).norm(dim=1) > 0
    assert changed.tolist() == (evidence > middle).repeat(2).tolist()


@dataclass
class Watcher:
    """Observer that keeps calls and the first finished forward of each."""

    calls: list[Call] = field(default_factory=list)
    finished: list[FinishedForward] = field(default_factory=list)

    repeats = False

    def new_state(self, begin: Begin) -> None: ...

    def on_call_start(self, call: Call) -> None:
        self.calls.append(call)
        self.finished.clear()

    def on_forward_start(self, call: None, rows: Rows, text: Tensor | None, compiled: bool) -> Begin:
        return {}

    def on_forward_end(self, call: None, rows: Rows, state: None, finished: FinishedForward) -> None:
        self.finished.append(finished)

    def on_decode(self, call: None) -> None: ...


def watch(pipe: Any, run: Any) -> Watcher:
    watcher = Watcher()
    hooked = HookedEdits(pipe, {}, watcher)
    run()
    hooked.close()
    return watcher


def encoded(pipe: Any, pixels: Tensor) -> Tensor:
    """Latents of pixels in 0..1, as diffusers' pipelines take them, written out anew."""
    z = pipe.vae.encode(2 * pixels - 1).latent_dist.mean
    return (z - (pipe.vae.config.get("shift_factor") or 0)) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("n", [1, 2])
def test_a_call_knows_its_start_images_without_noise(name: str, n: int) -> None:
    pipe = pipelines.EVERY[name]()
    pixels = pipelines.pictures(pipe, n, 16, 16)["image"]
    for generators in (1, n):  # with one of each image, diffusers encodes one by one
        made = [torch.Generator().manual_seed(i) for i in range(generators)]
        call = watch(pipe, lambda made=made: noisy(pipe, n=n, generator=made if len(made) > 1 else made[0])).calls[0]
        assert call.start is not None
        with torch.no_grad():
            torch.testing.assert_close(call.start, encoded(pipe, pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")
def test_one_picture_of_several_images_comes_for_each() -> None:
    pipe = pipelines.EVERY["sd1_img2img"]()
    pixels = pipelines.pictures(pipe, 1, 16, 16)["image"]
    call = watch(pipe, lambda: noisy(pipe, n=1, num_images_per_prompt=2, generator=torch.Generator())).calls[0]
    assert call.start is not None
    with torch.no_grad():
        torch.testing.assert_close(call.start, encoded(pipe, pixels).repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_without_a_start_image_there_is_none() -> None:
    pipe = pipelines.stable_diffusion()
    assert watch(pipe, lambda: pipelines.run(pipe, 0)).calls[0].start is None


@pytest.mark.parametrize("name", TASKS)
def test_it_sees_what_the_denoiser_sees_of_a_picture_with_that_noise(name: str) -> None:
    """The state is that of the scheduler, the text that of the first rows; each time's rows are a block."""
    pipe = pipelines.EVERY[name]()
    site, scale = SITES[TASKS[name]][0], 1e-3 if "flux" in name else 1.0
    seen: list[tuple[Tensor, Tensor]] = []
    watcher = Watcher()

    def note(x: Tensor, context: Any) -> None:
        seen.append((x.clone(), context.timestep.clone()))

    hooked = HookedEdits(pipe, {site: FunctionEdit(note)}, watcher)
    noisy(pipe)
    call, finished, scheduler = watcher.calls[0], watcher.finished[0], pipe.scheduler
    assert call.start is not None
    seen.clear()
    with torch.no_grad():
        found = finished.look(scheduler, call.start, [30.0 * scale, 600.0 * scale])
    hooked.close()
    assert found is not None and found[0] == Rows(2, (True, True), (False, False))
    (x, times), schedule = seen[0], scheduler.timesteps.double()
    noise = torch.randn(call.start.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(call.start)
    for block, wanted in enumerate(sorted((600.0, 30.0), key=lambda t: int((schedule - t).abs().argmin()))):
        t = scheduler.timesteps[(schedule - wanted).abs().argmin()]
        torch.testing.assert_close(times[2 * block : 2 * block + 2].double(), (t.double() * scale).expand(2))
        if hasattr(scheduler, "scale_noise"):
            sigma = float(scheduler.sigmas[(schedule - wanted).abs().argmin()])
            state = (1 - sigma) * call.start + sigma * noise
        else:
            kept = scheduler.alphas_cumprod[int(t)]
            state = kept.sqrt() * call.start + (1 - kept).sqrt() * noise
        part = finished.call.rows(torch.tensor([0, 1]))
        if part.state.ndim == 3:
            state = pipe._pack_latents(state, *state.shape)
        elif part.state.shape[1] > state.shape[1]:
            state = torch.cat([state, part.state[:, state.shape[1] :]], 1)
        inside: list[Tensor] = []
        time = (t * scale if scale < 1 else t).expand(2)
        with record(pipe, [site], lambda _, x, c, inside=inside: inside.append(x)), torch.no_grad():
            first = "sample" if hasattr(pipe, "unet") else "hidden_states"
            denoiser(pipe)(**{first: state, "timestep": time}, **part.conditioning, return_dict=False)
        torch.testing.assert_close(x[2 * block : 2 * block + 2], inside[0], rtol=1e-3, atol=1e-4)


def test_what_a_pipeline_encoded_before_a_call_is_not_what_that_starts_from() -> None:
    """A call that failed once its picture was encoded leaves nothing to the next."""
    pipe = pipelines.EVERY["sd1_img2img"]()
    pixels = pipelines.pictures(pipe, 1, 16, 16)["image"]

    def run() -> None:
        one = torch.Generator().manual_seed(0)
        pipe.prepare_latents(1 - 2 * pixels, torch.tensor([500]), 1, 1, torch.float32, "cpu", one)
        pipe("a", image=pixels, strength=0.9, num_inference_steps=4, guidance_scale=1.0, output_type="latent")

    call = watch(pipe, run).calls[0]
    assert call.start is not None
    with torch.no_grad():
        torch.testing.assert_close(call.start, encoded(pipe, pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts:FutureWarning")
@pytest.mark.parametrize("name", [name for name in TASKS if "inpaint" in name])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_a_picture_with_a_mask_the_whole_comes_for_each_image(name: str, count: int) -> None:
    """Pipelines encode the same without the masked part, too: that hides what a look is for."""
    pipe = pipelines.EVERY[name]()
    pixels = pipelines.pictures(pipe, 1, 16, 16)["image"]
    call = watch(pipe, lambda: noisy(pipe, n=1, num_images_per_prompt=count, generator=torch.Generator())).calls[0]
    assert call.start is not None
    with torch.no_grad():
        torch.testing.assert_close(call.start, encoded(pipe, pixels).repeat(count, 1, 1, 1), rtol=1e-4, atol=1e-5)


def test_what_another_call_encoded_is_not_what_one_with_embeddings_starts_from() -> None:
    """No text encoder runs, which would tell that a call begins."""
    pipe = pipelines.EVERY["sd1_img2img"]()
    pixels = pipelines.pictures(pipe, 2, 16, 16)["image"]

    def run() -> None:
        one = torch.Generator().manual_seed(0)
        pipe.scheduler.set_timesteps(7)
        pipe.prepare_latents(1 - 2 * pixels, torch.tensor([500]), 2, 1, torch.float32, "cpu", one)
        noisy(pipe)

    call = watch(pipe, run).calls[0]
    assert call.start is not None
    with torch.no_grad():
        torch.testing.assert_close(call.start, encoded(pipe, pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "given", "strength"),
    [
        ("sd1_img2img", {"strength": 0.5, "num_inference_steps": 25}, 0.5),
        ("sd1_img2img", {"strength": 0.95, "num_inference_steps": 2}, 1 / 2),
        ("sd1_img2img", {"strength": 0.6, "num_inference_steps": 3}, 1 / 3),
        ("flux_img2img", {"strength": 0.6, "num_inference_steps": 3}, 0.6),  # which rounds up
        ("sdxl_img2img", {"strength": 0.9, "num_inference_steps": 10, "denoising_start": 0.7}, 0.3),
        ("sdxl_img2img", {"strength": 0.3, "num_inference_steps": 10, "denoising_start": 0.2}, 0.8),
    ],
)
def test_a_call_s_strength_is_that_of_the_steps_it_takes(name: str, given: dict[str, Any], strength: float) -> None:
    """Else a start image that is too strong to erase passes as one that is not."""
    pipe = pipelines.EVERY[name]()
    assert watch(pipe, lambda: noisy(pipe, **given)).calls[0].strength == pytest.approx(strength)


def test_latents_given_as_start_images_are_looked_at_as_they_are() -> None:
    pipe = pipelines.EVERY["sd1_img2img"]()
    given = torch.randn(2, pipe.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    call = watch(pipe, lambda: noisy(pipe, image=given)).calls[0]
    assert call.start is not None and torch.equal(call.start, given)


@pytest.mark.parametrize("name", ["sd1_img2img", "flux_img2img"])
def test_a_short_schedule_is_no_reason_not_to_look(name: str) -> None:
    """Of two steps one lies at full noise and one halfway: in neither is there much to see."""
    pipe, watcher, scale = pipelines.EVERY[name](), Watcher(), 1e-3 if "flux" in name else 1.0
    site, seen = SITES[TASKS[name]][0], list[Tensor]()
    hooked = HookedEdits(pipe, {site: FunctionEdit(lambda x, context: seen.append(context.timestep.clone()))}, watcher)
    noisy(pipe, num_inference_steps=2, strength=0.99)
    call, finished, schedule = watcher.calls[0], watcher.finished[0], pipe.scheduler.timesteps
    assert call.start is not None
    seen.clear()
    with torch.no_grad():
        found = finished.look(pipe.scheduler, call.start, [30.0 * scale, 220.0 * scale])
    hooked.close()
    assert found is not None and pipe.scheduler.timesteps is schedule
    torch.testing.assert_close(
        seen[0].float(), scale * torch.tensor([220.0, 220.0, 30.0, 30.0]), rtol=0, atol=45 * scale
    )
