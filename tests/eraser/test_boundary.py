"""The boundary of a call: erasers act, refuse and fail closed whoever runs the modules that they are attached to."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

import tiny
from handmade import SHUT, make_eraser, make_gate
from neuraleraser import (
    Refused,
    attach,
    disable_erasers,
    eraser_trace,
    load_eraser,
    set_erasers,
    unload_erasers,
)
from neuraleraser.eraser import Eraser
from neuraleraser.errors import NotApplied, SettingsError, SiteError
from neuraleraser.sites import Site, record

LOUD, QUIET = "a", "b c"


@pytest.fixture
def sd() -> Any:
    return tiny.stable_diffusion()


def prompts(pipe: Any, *texts: str, guidance: float = 4.0, negative: str = "", **settings: Any) -> Any:
    """Images of these prompts, image i from seed i."""
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": guidance,
        "negative_prompt": [negative] * len(texts),
        "generator": [torch.Generator().manual_seed(i) for i in range(len(texts))],
        "output_type": "pt",
    }
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        call |= {"image": torch.full((len(texts), 3, 16, 16), 0.5), "strength": 1.0}
    return pipe(list(texts), **(call | settings)).images


READS = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2")
"""A cross-attention: of random weights it attends to all words alike, so that it says what the prompt is."""


def hears(pipe: Any, text: str = LOUD, other: str = QUIET, **kind: Any) -> Eraser:
    """An eraser whose gate opens for one of two prompts, whatever the picture."""
    found: list[Tensor] = []
    with record(pipe, [READS], lambda site, x, context: found.append(x.mean(1))):
        prompts(pipe, text, other, guidance=1.0)
    loud, quiet = torch.stack(found).mean(0)
    row = (loud - quiet) / (loud - quiet).square().sum()  # 1 apart
    gate = make_gate(READS, 32, f=1, low=10.5, high=10.6)
    gate = replace(
        gate, rows=row[None], bias=10.0 - (row @ quiet)[None], threshold=torch.zeros(1), weight=torch.ones(1)
    )
    return replace(make_eraser(**kind), gate=gate)


# Who runs the modules.


class OwnLoop(StableDiffusionPipeline):
    """A pipeline with a plain loop: neither a progress bar nor an end that anyone announces."""

    @torch.no_grad()
    def __call__(self, prompt: list[str], **_: Any) -> Any:  # type: ignore[override]
        return type("Output", (), {"images": loop(self, prompt)})


@torch.no_grad()
def loop(pipe: Any, texts: list[str], decode: bool = False) -> Tensor:
    text, _ = pipe.encode_prompt(texts, "cpu", 1, False)
    pipe.scheduler.set_timesteps(2)
    x = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
    return pipe.vae.decode(x).sample if decode else x


def twin(pipe: Any, kind: Any = StableDiffusionPipeline, **other: Any) -> Any:
    made = kind(**{**pipe.components, **other}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


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


@pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRoute")
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
    with pytest.raises(Refused) as refused:
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
    pipe = tiny.stable_diffusion(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
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
            with pytest.raises(Refused):
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
        with pytest.raises(NotApplied, match="its unet was replaced"), attach(pipe, eraser):
            pipe.unet = bare
            images.append(runs(QUIET))
        pipe.unet = own
    with pytest.raises(NotApplied, match="replaced"), attach(sd, eraser):
        sd.unet = bare  # and nothing is drawn
    assert not images


def test_another_pipeline_that_shares_all_but_the_denoiser_is_left_alone(sd: Any) -> None:
    other = twin(sd, unet=tiny.stable_diffusion(seed=5).unet)
    base = prompts(other, LOUD)
    with attach(sd, make_eraser(), action="refuse"):
        assert torch.equal(prompts(other, LOUD), base)


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
        ("a fit of the same features", [eraser, replace(eraser, header={"concept": "again"})], [1.0, 0.9]),
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


# One call is not held against another.


def test_a_forward_outside_a_call_is_not_held_against_the_next(sd: Any) -> None:
    load_eraser(sd, hears(sd), action="refuse")
    with torch.no_grad():
        text, _ = sd.encode_prompt(LOUD, "cpu", 1, False)
        sd.unet(torch.zeros(1, 4, 8, 8), 500, text)  # a warm-up, a training step
    prompts(sd, QUIET)
    with torch.no_grad():
        sd.unet(torch.zeros(1, 4, 8, 8), 500, text)
        with pytest.raises(Refused):
            sd.vae.decode(torch.zeros(1, 4, 8, 8))
        text, _ = sd.encode_prompt(QUIET, "cpu", 1, False)
        sd.unet(torch.zeros(1, 4, 8, 8), 500, text)
        sd.vae.decode(torch.zeros(1, 4, 8, 8))


def test_a_refused_loop_that_never_decodes_is_said_at_the_end(sd: Any) -> None:
    with pytest.raises(Refused), attach(sd, hears(sd), action="refuse"):
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


# The negative prompt.


@pytest.mark.parametrize("action", ["erase", "detect", "refuse"])
def test_a_concept_in_the_negative_prompt_is_not_asked_for(sd: Any, action: str) -> None:
    base = prompts(sd, QUIET, QUIET, negative=LOUD)
    with attach(sd, hears(sd), action=action) as trace:
        assert torch.equal(prompts(sd, QUIET, QUIET, negative=LOUD), base)
    assert not trace.fired
    with attach(sd, hears(sd), action="detect") as trace:
        prompts(sd, LOUD, QUIET, negative=LOUD)
    assert list(trace.fired) == [0]


def test_while_guidance_does_not_push_away_the_negative_prompt_counts(sd: Any) -> None:
    """A callback turns guidance down: what is drawn then leans to the negative prompt."""

    def weaker(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.5
        return given

    with attach(sd, hears(sd), action="detect") as trace:
        prompts(sd, QUIET, negative=LOUD)
    assert not trace.fired
    pipe = type("Guided", (StableDiffusionPipeline,), {"do_classifier_free_guidance": property(lambda self: True)})
    always = twin(sd, pipe)
    with attach(always, hears(sd), action="detect") as trace:
        prompts(always, QUIET, negative=LOUD, callback_on_step_end=weaker)
    assert trace.fired == {0: {"Cats": [1.0]}}


def test_a_negative_pass_of_its_own() -> None:
    pipe = tiny.flux()
    given = tiny.embeds(pipe, 2)
    negative = {f"negative_{name}": value + 1 for name, value in given.items()}
    call: dict[str, Any] = {"n": 2, "true_cfg_scale": 2.0, **negative}
    seen: list[tuple[bool, ...]] = []
    eraser = make_eraser("flux")
    with record(pipe, [eraser.gate.site], lambda site, x, context: seen.append(context.rows.counts)):
        tiny.run(pipe, 0, **call)
    assert seen == [(True,), (False,)] * 2
    with attach(pipe, eraser, action="detect") as trace:
        tiny.run(pipe, 0, **call)
    assert sorted(trace.fired) == [0, 1]


# Rows that are no halves of images.


def test_frames_of_a_video_are_one_image() -> None:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    pipe = tiny.stable_diffusion()
    adapter = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )  # fmt: skip
    video = AnimateDiffPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, adapter, pipe.scheduler)
    video.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        "num_frames": 3, "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent",
        "generator": torch.Generator().manual_seed(0), "prompt": LOUD,
    }  # fmt: skip
    eraser = make_eraser()
    with attach(video, eraser) as trace:
        video(**call)
    assert sorted(trace.fired) == [0] and len(trace.records()) == 1
    with pytest.raises(Refused) as refused, attach(video, eraser, action="refuse"):
        video(**call)
    assert refused.value.images == {0: ["Cats"]}


def test_a_pipeline_without_prepared_latents_draws_one_image() -> None:
    from diffusers import LDMTextToImagePipeline

    pipe = tiny.stable_diffusion()

    class Bert(torch.nn.Module):
        """Encoder of the kind that the pipeline calls."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        @property
        def device(self) -> torch.device:
            return self.inner.device

        def forward(self, ids: Tensor) -> Any:
            return self.inner(ids)

    tokenizer = tiny.tokenizer(77)
    text = tiny.CLIPTextModel(tiny.clip_text(max_position_embeddings=77)).eval()
    ldm: Any = LDMTextToImagePipeline(pipe.vae, Bert(text), tokenizer, pipe.unet, pipe.scheduler)
    ldm.set_progress_bar_config(disable=True)
    with pytest.raises(Refused) as refused, attach(ldm, make_eraser(), action="refuse"):
        ldm(LOUD, height=16, width=16, num_inference_steps=2, guidance_scale=4.0, output_type="np")
    assert refused.value.images == {0: ["Cats"]}


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

    sd = tiny.stable_diffusion()
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
        except Refused:
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


# What a first-time user writes.


@pytest.mark.parametrize("erasers", ["van-gogh.safetensors", None, 5, [None], ["x"], {"a": 1}])
def test_what_is_no_eraser_is_one_sentence(sd: Any, erasers: Any) -> None:
    with pytest.raises(SettingsError, match=r"Eraser\.load\(path\)") as caught:
        attach(sd, erasers)
    assert "\n" not in str(caught.value)


def test_arguments_in_the_wrong_order(sd: Any) -> None:
    for wrong in (lambda: attach(make_eraser(), sd), lambda: attach(sd, sd)):  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="the pipeline comes first"):
            wrong()
    for call in (load_eraser, set_erasers):
        with pytest.raises(SiteError, match="UNet2DConditionModel is no diffusers DiffusionPipeline"):
            call(sd.unet, make_eraser() if call is load_eraser else "Cats")
    with pytest.raises(SiteError, match="no diffusers DiffusionPipeline"), attach(sd.unet, make_eraser()):
        pass


def test_attach_without_with_is_warned_of(sd: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(sd, make_eraser())
        gc.collect()
    assert ["with attach(pipe, eraser):" in str(w.message) for w in caught] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(sd, make_eraser(**SHUT)):
            pass
        gc.collect()


def test_modular_pipelines_are_refused_in_one_sentence() -> None:
    from diffusers import StableDiffusionXLAutoBlocks

    parts: Any = tiny.stable_diffusion_xl()
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(unet=parts.unet, vae=parts.vae, scheduler=parts.scheduler)
    eraser = make_eraser("stable_diffusion_xl")
    for call in (lambda: attach(pipe, eraser).__enter__(), lambda: load_eraser(pipe, eraser)):
        with pytest.raises(SiteError, match="modular pipelines are not supported"):
            call()


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
    from handmade import make_correction

    pipe = wan()

    def eraser(component: str) -> Eraser:
        reads = Site(f"{component}.blocks.1", "input", "text")
        return Eraser(make_gate(Site(f"{component}.blocks.0"), 24), (make_correction(reads, 24),), {"concept": "Cats"})

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
