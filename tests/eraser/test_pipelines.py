"""Erasers on pipelines as they are used: schedulers, guidance, compilation, offloading, LoRA beside."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from helpers import pipelines
from helpers.erasers import FAMILIES, SHUT, SITES, make_correction, make_eraser, make_gate
from neuraleraser.eraser import Eraser, EraserHeader, attach

TIMES = [50.0, 150.0, 400.0, 600.0, 950.0]


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}),
        ("EulerDiscreteScheduler", {"steps_offset": 1}),
        ("EulerAncestralDiscreteScheduler", {"steps_offset": 1, "timestep_spacing": "trailing"}),
        ("HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
        ("DPMSolverMultistepScheduler", {"steps_offset": 1, "use_karras_sigmas": True}),
    ],
)
def test_schedulers_and_step_counts(sd: Any, scheduler: str, settings: dict[str, Any], steps: int) -> None:
    """Bins are found by the value of the time, whatever the scheduler's times are and however often it asks."""
    sd.scheduler = getattr(diffusers, scheduler)(**settings)
    base = pipelines.run(sd, 0, steps=steps)
    with attach(sd, make_eraser(times=TIMES, **SHUT)):
        assert torch.equal(pipelines.run(sd, 0, steps=steps), base)
    with attach(sd, make_eraser(times=TIMES)) as trace:
        assert not torch.equal(pipelines.run(sd, 0, steps=steps), base)
    asked = torch.as_tensor(sd.scheduler.timesteps).float().unique()
    assert trace.fired == {0: {"Cats": asked.flip(0).tolist()}}


@pytest.mark.parametrize("timestep", [700, 700.0, torch.tensor(700), torch.tensor([700.0]), torch.tensor([700, 700])])
def test_any_form_of_timestep(sd: Any, timestep: Any) -> None:
    state, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, pipelines.WORDS, pipelines.WIDTH)
    with attach(sd, make_eraser(times=TIMES), action="detect") as trace, torch.no_grad():
        sd.unet(state, timestep, text)
    assert trace.fired == {0: {"Cats": [700.0]}, 1: {"Cats": [700.0]}}


def test_each_row_has_its_own_time(sd: Any) -> None:
    """A batch of three times gives what three batches of one time each give."""
    state, text = torch.randn(3, 4, 8, 8), torch.randn(3, pipelines.WORDS, pipelines.WIDTH)
    times = torch.tensor([60.0, 390.0, 980.0])
    with attach(sd, make_eraser()) as trace, torch.no_grad():
        mixed = sd.unet(state, times, text).sample
        apart = [sd.unet(state, t, text).sample[i] for i, t in enumerate(times)]
    torch.testing.assert_close(mixed, torch.stack(apart))
    assert set(trace.fired) == {0, 1, 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guidance_in_one_batch_or_none(family: str, guidance: float) -> None:
    pipe = pipelines.BUILDERS[family]()
    with attach(pipe, make_eraser(family)) as trace:
        pipelines.run(pipe, 0, n=2, guidance=guidance)
    assert trace.fired.keys() == {0, 1}


def test_flux_with_true_guidance_in_two_passes() -> None:
    pipe = pipelines.flux()
    negative = {f"negative_{k}": v + 1 for k, v in pipelines.embeds(pipe, 2).items()}
    settings = {"n": 2, "true_cfg_scale": 2.0, **negative}
    base = pipelines.run(pipe, 0, **settings)
    with attach(pipe, make_eraser("flux", **SHUT)) as trace:
        assert torch.equal(pipelines.run(pipe, 0, **settings), base)
    assert not trace.fired
    with attach(pipe, make_eraser("flux")) as trace:
        assert not torch.equal(pipelines.run(pipe, 0, **settings), base)
    assert trace.fired.keys() == {0, 1}


def compiled(test: Any) -> Any:
    """torch.compile warns of what it traces, and of torch's own tracing of autograd functions."""
    for ignored in ("ignore::UserWarning", "ignore:.*should not be instantiated:DeprecationWarning"):
        test = pytest.mark.filterwarnings(ignored)(test)
    return test


def small() -> Any:
    """One text-conditioned block: little to trace."""
    pipe = pipelines.stable_diffusion()
    torch.manual_seed(0)
    pipe.unet = pipelines.unet(
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")
    ).eval()
    return pipe


@pytest.mark.slow
@compiled
def test_compiled_whole() -> None:
    """One graph without a break, not compiled again from call to call, and traced all the same."""
    pipe = small()
    site, _, d = SITES["stable_diffusion"]
    edits = [make_correction(site, d, mode, seed=i) for i, mode in enumerate(("low_rank", "scaling", "scaling"))]
    many = [
        Eraser(make_gate(site, d, seed=i, times=TIMES), (edit,), EraserHeader(str(i))) for i, edit in enumerate(edits)
    ]
    many.append(Eraser(make_gate(site, d, **SHUT), (make_correction(site, d, seed=3),), EraserHeader("shut")))
    base = pipelines.run(pipe, 0)
    with attach(pipe, many) as plain:
        want = pipelines.run(pipe, 0)
    torch._dynamo.reset()
    try:
        with attach(pipe, many) as trace:
            pipe.unet.compile(backend="eager", fullgraph=True)
            torch.testing.assert_close(pipelines.run(pipe, 0), want)
            assert trace.fired == plain.fired and trace.fired[0].keys() == {"0", "1", "2"}
            pipelines.run(pipe, 0)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            pipelines.run(pipe, 0, steps=12)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
            pipelines.run(pipe, 0, n=2)  # another batch compiles again, and works
        assert torch.equal(pipelines.run(pipe, 0), base)
    finally:
        torch._dynamo.reset()


@compiled
def test_compiled_and_silent_keeps_the_bits() -> None:
    pipe = small()
    site, _, d = SITES["stable_diffusion"]
    shut = Eraser(make_gate(site, d, **SHUT), (make_correction(site, d, "scaling"),), EraserHeader("shut"))
    torch._dynamo.reset()
    try:
        pipe.unet.compile(backend="eager", fullgraph=True)
        base = pipelines.run(pipe, 0)
        torch._dynamo.reset()
        with attach(pipe, [shut, shut]):
            assert torch.equal(pipelines.run(pipe, 0), base)
    finally:
        torch._dynamo.reset()


def test_offloaded(sd: Any) -> None:
    want_base = pipelines.run(sd, 0)
    with attach(sd, make_eraser()):
        want = pipelines.run(sd, 0)
    sd.enable_model_cpu_offload(device="cpu")
    with attach(sd, make_eraser()):
        assert torch.equal(pipelines.run(sd, 0), want)
    assert torch.equal(pipelines.run(sd, 0), want_base)


@pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning")
def test_image_to_image(sd: Any) -> None:
    from neuraleraser.families.opening import image_to_image

    other = image_to_image(sd)
    settings = {"image": torch.full((1, 3, 16, 16), 0.5), "strength": 0.5, "steps": 4, "height": None, "width": None}
    settings = {k: v for k, v in settings.items() if v is not None}
    base = other(**call(other, settings))[0]
    with attach(other, make_eraser(**SHUT)):
        assert torch.equal(other(**call(other, settings))[0], base)
    with attach(other, make_eraser()) as trace:
        assert not torch.equal(other(**call(other, settings))[0], base)
    assert trace.fired.keys() == {0}


def call(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    steps = settings.pop("steps", 4)
    settings["steps"] = steps
    given = {k: v for k, v in settings.items() if k != "steps"}
    return {
        **pipelines.embeds(pipe),
        **given,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "return_dict": False,
    }


def test_contexts_nest(sd: Any) -> None:
    """Two contexts stack and come off in any order; each restores what it found."""
    base = pipelines.run(sd, 0)
    first, second = attach(sd, make_eraser()), attach(sd, make_eraser(seed=60))
    first.__enter__()
    one = pipelines.run(sd, 0)
    second.__enter__()
    assert not torch.equal(pipelines.run(sd, 0), one)
    second.__exit__(None, None, None)
    assert torch.equal(pipelines.run(sd, 0), one)
    first.__exit__(None, None, None)
    assert torch.equal(pipelines.run(sd, 0), base)


def test_one_eraser_on_many_calls_remembers_nothing(sd: Any) -> None:
    with attach(sd, make_eraser()):
        one = pipelines.run(sd, 0)
        pipelines.run(sd, 5, n=3, steps=4)
        assert torch.equal(pipelines.run(sd, 0), one)


def test_gradients_reach_the_eraser_itself(sd: Any) -> None:
    """So that it can be fitted while attached."""
    e = make_eraser(low=0.0, high=50.0)
    bias = e.corrections[0].tensors()["bias"].clone().requires_grad_()
    at, on, d = SITES["stable_diffusion"]
    live = Eraser(make_gate(at, d, low=0.0, high=50.0), (make_correction(on, d, bias=bias),), EraserHeader("x"))
    with attach(sd, live):
        pipelines.run(sd, 0, grad=True).square().sum().backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0
