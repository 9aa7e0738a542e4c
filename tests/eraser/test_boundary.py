"""The boundary of a call: erasers act, refuse and fail closed whoever runs the modules that they are attached to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from helpers import pipelines
from helpers.erasers import make_eraser, make_gate
from helpers.prompted_calls import LOUD, QUIET, OwnLoop, hears, loop, prompts, twin
from neuraleraser import (
    ConceptRefusedError,
    attach,
    load_eraser,
    unload_erasers,
)
from neuraleraser.eraser import Eraser, EraserHeader
from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.sites import Site


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


# Who runs the modules.


def drawn_by(pipe: Any, run: Any = None) -> Callable[..., Any]:
    return lambda *texts, **settings: (run or prompts)(pipe, *texts, **settings)


def offloaded(pipe: Any) -> Any:
    pipe.enable_model_cpu_offload(device="cpu")
    return drawn_by(pipe)


WHO: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "itself": drawn_by,
    "twin": lambda pipe: drawn_by(twin(pipe)),
    "from_pipe": lambda pipe: drawn_by(StableDiffusionImg2ImgPipeline.from_pipe(pipe)),
    "shallow copy": lambda pipe: drawn_by(copy.copy(pipe)),
    "deep copy": lambda pipe: drawn_by(copy.deepcopy(pipe)),
    "own loop": lambda pipe: drawn_by(twin(pipe, OwnLoop)),
    "function": lambda pipe: lambda *texts: loop(pipe, list(texts), decode=True),
    "latents": lambda pipe: lambda *texts: prompts(pipe, *texts, output_type="latent"),
    "latents of a twin": lambda pipe: lambda *texts: prompts(twin(pipe), *texts, output_type="latent"),
    "offloaded": offloaded,
}


@pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning")
@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_refused_picture_is_never_seen(sd: Any, who: str, loaded: bool) -> None:
    eraser, images = hears(sd), []
    context = nullcontext() if loaded else attach(sd, eraser, action="refuse")
    if loaded:
        load_eraser(sd, eraser, action="refuse")
    context.__enter__()
    draw = WHO[who](sd)
    images.append(draw(QUIET))
    with pytest.raises(ConceptRefusedError) as refused:
        images.append(draw(QUIET, LOUD))
    assert refused.value.images == {1: ["Cats"]} and len(images) == 1
    draw(QUIET)  # what was refused is not held against the next call
    context.__exit__(None, None, None)
    unload_erasers(sd)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("way", ["module.compile()", "torch.compile(module)"])
@pytest.mark.parametrize("compiled_first", [True, False])
@pytest.mark.parametrize("who", ["itself", "twin", "latents"])
def test_a_compiled_denoiser_refuses_too(way: str, compiled_first: bool, who: str) -> None:
    pipe = pipelines.stable_diffusion(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    eraser, images = hears(pipe, kind="scaling"), []
    eraser = replace(eraser, corrections=(replace(eraser.corrections[0], site=Site("unet.mid_block.attentions.0")),))
    torch._dynamo.reset()
    base = prompts(pipe, QUIET)

    def compile() -> None:
        if way == "module.compile()":
            pipe.unet.compile(backend="eager", fullgraph=True)
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)

    try:
        if compiled_first:
            compile()
        with attach(pipe, eraser, action="refuse") as trace:
            if not compiled_first:
                compile()
            draw = WHO[who](pipe)
            torch.testing.assert_close(prompts(pipe, QUIET), base)
            with pytest.raises(ConceptRefusedError):
                images.append(draw(LOUD))
            assert not images and list(trace.fired) == [1]
        torch.testing.assert_close(prompts(pipe, QUIET), base)
        held = getattr(pipe.unet, "_orig_mod", pipe.unet)
        assert type(held._compiled_call_impl).__name__ != "GuardedCall"
    finally:
        torch._dynamo.reset()


def test_a_replaced_denoiser_is_noticed_by_whatever_runs_next(sd: Any) -> None:
    eraser, bare, images = make_eraser(), copy.deepcopy(sd.unet), []
    for runs in (drawn_by(sd), lambda *t: prompts(sd, *t, output_type="latent"), drawn_by(twin(sd, OwnLoop))):
        pipe = runs.__closure__[0].cell_contents if runs.__closure__ else sd
        pipe = pipe if isinstance(pipe, StableDiffusionPipeline) else sd
        own = pipe.unet
        with pytest.raises(EraserNotAppliedError, match="its unet was replaced"), attach(pipe, eraser):
            pipe.unet = bare
            images.append(runs(QUIET))
        pipe.unet = own
    with pytest.raises(EraserNotAppliedError, match="replaced"), attach(sd, eraser):
        sd.unet = bare  # and nothing is generated
    assert not images


def test_another_pipeline_that_shares_all_but_the_denoiser_is_left_alone(sd: Any) -> None:
    other = twin(sd, unet=pipelines.stable_diffusion(seed=5).unet)
    base = prompts(other, LOUD)
    with attach(sd, make_eraser(), action="refuse"):
        assert torch.equal(prompts(other, LOUD), base)


# One call is not held against another.


def test_a_forward_outside_a_call_is_not_held_against_the_next(sd: Any) -> None:
    load_eraser(sd, hears(sd), action="refuse")
    with torch.no_grad():
        text, _ = sd.encode_prompt(LOUD, "cpu", 1, False)
        sd.unet(torch.zeros(1, 4, 8, 8), 500, text)  # a warm-up, a training step
    prompts(sd, QUIET)
    with torch.no_grad():
        sd.unet(torch.zeros(1, 4, 8, 8), 500, text)
        with pytest.raises(ConceptRefusedError):
            sd.vae.decode(torch.zeros(1, 4, 8, 8))
        text, _ = sd.encode_prompt(QUIET, "cpu", 1, False)
        sd.unet(torch.zeros(1, 4, 8, 8), 500, text)
        sd.vae.decode(torch.zeros(1, 4, 8, 8))


def test_a_refused_loop_that_never_decodes_is_said_at_the_end(sd: Any) -> None:
    with pytest.raises(ConceptRefusedError), attach(sd, hears(sd), action="refuse"):
        loop(sd, [LOUD])
    with attach(sd, hears(sd), action="refuse"):
        loop(sd, [QUIET])


def test_a_call_that_was_stopped_leaves_the_next_alone(sd: Any) -> None:
    base = prompts(sd, QUIET)
    load_eraser(sd, hears(sd), action="refuse")

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prompts(sd, QUIET, callback_on_step_end=stop)
    assert torch.equal(prompts(sd, QUIET), base)


# Two denoisers.


def wan() -> Any:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(0)

    def model() -> Any:
        return WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=3, rope_max_seq_len=32
        )

    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    steps = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, vae, steps, model(), model(), boundary_ratio=0.875)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_a_second_denoiser_without_the_eraser_is_an_error() -> None:
    from helpers.erasers import make_correction

    pipe = wan()

    def eraser(component: str) -> Eraser:
        reads = Site(f"{component}.blocks.1", "input", "text")
        return Eraser(make_gate(Site(f"{component}.blocks.0"), 24), (make_correction(reads, 24),), EraserHeader("Cats"))

    call: dict[str, Any] = {
        "prompt_embeds": torch.ones(1, 8, 32), "negative_prompt_embeds": torch.zeros(1, 8, 32), "height": 16,
        "width": 16, "num_frames": 9, "num_inference_steps": 6, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
    }  # fmt: skip
    with pytest.raises(SiteError, match="denoises with transformer_2, too"), attach(pipe, eraser("transformer")):
        pass
    with attach(pipe, [eraser("transformer"), eraser("transformer_2")], action="detect") as trace:
        pipe(**call)
    times = [t for found in trace.fired[0].values() for t in found]
    assert sorted(times, reverse=True) == [float(t) for t in pipe.scheduler.timesteps] and len(trace.records()) == 1
    pipe.register_modules(transformer_2=None)
    with attach(pipe, eraser("transformer"), action="detect"):
        pass
