"""Hooks: nothing moves but what is edited, whatever the shape, the precision, the compiler or the hooks beside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.site_edits import FAMILIES, MIDDLE, all_sites, leftovers, nothing, recorded, shift, swap_denoiser, zero
from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import EditContext, Site, candidate_sites, denoiser, edit, record
from neuraleraser.sites.layout import add_keeping_bits, from_positions


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.BUILDERS[request.param]()


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


# Law 1: identity.


def test_a_zero_delta_and_no_delta_keep_the_bits(pipe: Any) -> None:
    base = pipelines.run(pipe, 3, n=2)
    for change in (zero, nothing):
        with edit(pipe, dict.fromkeys(all_sites(pipe), change)):
            assert torch.equal(pipelines.run(pipe, 3, n=2), base)
    with record(pipe, all_sites(pipe), lambda site, x, call: None):
        assert torch.equal(pipelines.run(pipe, 3, n=2), base)


def test_detaching_restores_everything(pipe: Any) -> None:
    base = pipelines.run(pipe, 3)
    with edit(pipe, dict.fromkeys(all_sites(pipe), shift)):
        assert leftovers(pipe)
        assert not torch.equal(pipelines.run(pipe, 3), base)
    assert not leftovers(pipe)
    assert torch.equal(pipelines.run(pipe, 3), base)


def test_exceptions_restore_everything(pipe: Any) -> None:
    def fail(x: Tensor, context: EditContext[Any]) -> Tensor:
        raise ZeroDivisionError

    base = pipelines.run(pipe, 3)
    sites = candidate_sites(pipe)
    with pytest.raises(KeyError), edit(pipe, {sites[0]: shift}):
        pipelines.run(pipe, 3)
        raise KeyError
    assert not leftovers(pipe)
    with pytest.raises(ZeroDivisionError), edit(pipe, {sites[0]: shift, sites[1]: fail}):
        pipelines.run(pipe, 3)
    assert not leftovers(pipe)
    assert torch.equal(pipelines.run(pipe, 3), base)


def test_a_failed_call_does_not_spoil_the_next_within_one_context(sd: Any) -> None:
    broken = True

    def sometimes(x: Tensor, context: EditContext[Any]) -> Tensor:
        return x * float("nan") if broken else torch.zeros_like(x)

    base = pipelines.run(sd, 3)
    with edit(sd, {MIDDLE: sometimes}):
        with pytest.raises(EraserNotAppliedError):
            pipelines.run(sd, 3)
        broken = False
        assert torch.equal(pipelines.run(sd, 3), base)


def test_contexts_may_overlap_in_any_order(sd: Any) -> None:
    base = pipelines.run(sd, 3)
    first, second = edit(sd, {MIDDLE: shift}), edit(sd, {MIDDLE: shift})
    with edit(sd, {MIDDLE: shift}):
        once = pipelines.run(sd, 3)
    first.__enter__()
    second.__enter__()
    assert not torch.equal(pipelines.run(sd, 3), once)
    first.__exit__(None, None, None)  # the first goes first
    assert torch.equal(pipelines.run(sd, 3), once)
    with pytest.raises(EraserNotAppliedError):  # the second still watches
        swap_denoiser(sd)
        pipelines.run(sd, 3)
    sd = pipelines.stable_diffusion()
    with pytest.raises(EraserNotAppliedError, match="replaced"):
        second.__exit__(None, None, None)
    assert torch.equal(pipelines.run(sd, 3), base)


def test_a_method_shadowed_by_the_user_is_given_back(sd: Any) -> None:
    ended = []

    def own() -> None:
        ended.append(1)

    sd.maybe_free_model_hooks = own
    with edit(sd, {MIDDLE: shift}):
        pipelines.run(sd, 3)
    assert ended == [1] and vars(sd)["maybe_free_model_hooks"] is own and "progress_bar" not in vars(sd)


# Law 5: differentiable.


def test_gradients_reach_the_edit_and_the_prompt(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    width = recorded(pipe, [site], steps=1)[site][0][0].shape[-1]
    into = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    back = torch.zeros(2, width, requires_grad=True)  # the delta is 0 at first, its gradient is not
    given = pipelines.embeds(pipe)
    given["prompt_embeds"].requires_grad_()
    base = pipelines.run(pipe, 0, **given)
    with edit(pipe, {site: lambda x, call: x @ into @ back}):
        image = pipelines.run(pipe, 0, grad=True, **given)
        assert torch.equal(image, base)
        image.square().sum().backward()
    assert back.grad is not None and back.grad.abs().sum() > 0
    assert given["prompt_embeds"].grad.abs().sum() > 0


def test_the_gradient_is_that_of_a_sum() -> None:
    out = torch.randn(2, 3, 2, 2, dtype=torch.double, requires_grad=True)
    delta = torch.randn(2, 4, 3, dtype=torch.double).where(torch.rand(2, 4, 3) > 0.5, 0).requires_grad_()
    weight = torch.randn_like(out)
    got = torch.autograd.grad((add_keeping_bits(out, delta) * weight).sum(), (out, delta))
    want = torch.autograd.grad(((out + from_positions(delta, out)) * weight).sum(), (out, delta))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    per_row = torch.func.vmap(torch.func.grad(lambda d, o: add_keeping_bits(o[None], d[None]).square().sum()))
    assert per_row(delta.detach(), out.detach()).shape == delta.shape


# Law 6: any shape.


def test_latents_need_not_be_square(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    settings: dict[str, Any] = {"height": 16, "width": 8}
    base = pipelines.run(pipe, 0, **settings)
    whole = recorded(pipe, [site], steps=1)[site][0][0].shape[1]
    assert recorded(pipe, [site], steps=1, **settings)[site][0][0].shape[1] == whole // 2
    with edit(pipe, dict.fromkeys(all_sites(pipe), zero)):
        assert torch.equal(pipelines.run(pipe, 0, **settings), base)


def test_bfloat16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    base = pipelines.run(pipe, 0)
    site = candidate_sites(pipe)[0]
    seen = recorded(pipe, [site])[site]
    assert {x.dtype for x, _ in seen} == {torch.bfloat16}
    assert {context.timestep.dtype for _, context in seen} == {torch.float32}
    with edit(pipe, dict.fromkeys(all_sites(pipe), lambda x, call: torch.zeros(x.shape))):  # float32
        assert torch.equal(pipelines.run(pipe, 0), base)
    with edit(pipe, {site: lambda x, call: torch.ones(x.shape)}):
        image = pipelines.run(pipe, 0)
    assert image.dtype == base.dtype and not torch.equal(image, base)


def test_offloading_and_hooks_hold_together(sd: Any) -> None:
    base = pipelines.run(sd, 0, prompt="a b")
    sd.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        with edit(sd, {MIDDLE: zero, Site("text_encoder.encoder.layers.0"): zero}):
            assert torch.equal(pipelines.run(sd, 0, prompt="a b"), base)
            assert torch.equal(pipelines.run(sd, 0, prompt="a b"), base)
    with edit(sd, {MIDDLE: shift}):
        assert not torch.equal(pipelines.run(sd, 0, prompt="a b"), base)


def small_unet() -> Any:
    pipe = pipelines.stable_diffusion()
    pipe.unet = pipelines.unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    ).eval()
    return pipe


@pytest.mark.parametrize("build", [small_unet, pipelines.pixart])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_whole_with_the_edit_inside(build: Callable[[], Any]) -> None:
    pipe = build()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    early, *_, late = candidate_sites(pipe)
    late = Site(late.path, "update")
    strength = torch.tensor(1.0)

    def gate(x: Tensor, context: EditContext[Any]) -> None:
        context.forward["gate"] = (context.timestep > 1).float()[:, None, None] * x.mean(dim=(1, 2), keepdim=True)

    def change(x: Tensor, context: EditContext[Any]) -> Tensor:
        return strength * context.forward["gate"] * torch.tanh(x)

    edits = {early: gate, late: change, Site(late.path, "input", "text"): change}
    base = pipelines.run(pipe, 0)
    with edit(pipe, edits, dict):
        want = pipelines.run(pipe, 0)
    assert not torch.equal(want, base)
    torch._dynamo.reset()
    try:
        with edit(pipe, edits, dict):
            if name == "unet":
                pipe.unet.compile(backend="eager", fullgraph=True)
            else:
                pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
            assert torch.equal(pipelines.run(pipe, 0), want)
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            pipelines.run(pipe, 0, steps=3)
            strength.zero_()
            assert torch.equal(pipelines.run(pipe, 0), base)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames  # nothing was compiled again
        strength.fill_(1)
        assert torch.equal(pipelines.run(pipe, 0), base)  # the graph with the edit in it is not used any more
        with pytest.raises(EraserNotAppliedError, match="compiled and called before"), edit(pipe, edits, dict):
            pipelines.run(pipe, 0)
        assert torch.equal(pipelines.run(pipe, 0), base)
    finally:
        torch._dynamo.reset()


def test_lora_beside(sd: Any) -> None:
    from peft import LoraConfig

    leaf = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q")
    base = pipelines.run(sd, 0)
    with edit(sd, {MIDDLE: shift}):
        edited = pipelines.run(sd, 0)
        sd.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name="a")
        with_both = pipelines.run(sd, 0)
        with edit(sd, {leaf: shift, Site(leaf.path, "update"): zero}):
            assert not torch.equal(pipelines.run(sd, 0), with_both)
        assert torch.equal(pipelines.run(sd, 0), with_both) and not torch.equal(with_both, edited)
    lora = pipelines.run(sd, 0)
    with edit(sd, {MIDDLE: zero, leaf: zero}):
        assert torch.equal(pipelines.run(sd, 0), lora)
        sd.unet.delete_adapters("a")
        with edit(sd, {MIDDLE: shift}):
            assert torch.equal(pipelines.run(sd, 0), edited)
    assert torch.equal(pipelines.run(sd, 0), base) and not leftovers(sd)


def test_a_deep_copy_carries_its_own_hooks(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    base = pipelines.run(pipe, 0)
    with edit(pipe, {site: shift}):
        edited = pipelines.run(pipe, 0)
        twin = copy.deepcopy(pipe)
        model = pickle.loads(pickle.dumps(denoiser(pipe)))
    assert torch.equal(pipelines.run(pipe, 0), base)
    assert torch.equal(pipelines.run(twin, 0), edited)
    assert type(model) is type(denoiser(pipe)) and any(m._forward_hooks for m in model.modules())
    swap_denoiser(twin)
    with pytest.raises(EraserNotAppliedError):  # the copy watches itself
        pipelines.run(twin, 0)
