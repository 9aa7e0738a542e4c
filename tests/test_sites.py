"""Sites: what is read and edited is the model's own, nothing else moves, and nothing fails in silence."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from neuraleraser.errors import NotApplied, SiteError
from neuraleraser.sites import EditContext, Site, candidate_sites, denoiser, edit, record
from neuraleraser.sites.layout import add_keeping_bits, from_positions, to_positions
from neuraleraser.sites.site import resolve

FAMILIES = sorted(tiny.BUILDERS)
MIDDLE = Site("unet.mid_block.attentions.0")


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny.BUILDERS[request.param]()


@pytest.fixture
def sd() -> Any:
    return tiny.stable_diffusion()


def zero(x: Tensor, context: EditContext[Any]) -> Tensor:
    return torch.zeros_like(x)


def shift(x: Tensor, context: EditContext[Any]) -> Tensor:
    return torch.full_like(x, 0.5)


def nothing(x: Tensor, context: EditContext[Any]) -> None:
    return None


def leftovers(pipe: Any) -> list[str]:
    """Everything that a context could have left behind."""
    found = [name for name in ("progress_bar", "maybe_free_model_hooks") if name in vars(pipe)]
    for part in pipe.components.values():
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            found += [path for name, hooks in vars(module).items() if "hooks" in name and hooks]
    return found


def all_sites(pipe: Any) -> list[Site]:
    sites = [Site(site.path, tap) for site in candidate_sites(pipe) for tap in ("output", "update")]
    if type(pipe).__name__ in ("FluxPipeline", "StableDiffusion3Pipeline"):
        sites += [Site(site.path, site.tap, "text") for site in sites if not last_of_sd3(pipe, site)]
    return sites + [Site(site.path, "input", "text") for site in candidate_sites(pipe)]


def last_of_sd3(pipe: Any, site: Site) -> bool:
    return type(pipe).__name__ == "StableDiffusion3Pipeline" and site.path.endswith(".2")


def recorded(pipe: Any, sites: list[Site], **call: Any) -> dict[Site, list[tuple[Tensor, EditContext[Any]]]]:
    seen: dict[Site, list[tuple[Tensor, EditContext[Any]]]] = {site: [] for site in sites}

    def keep(site: Site) -> Callable[[Tensor, EditContext[Any]], None]:
        return lambda x, context: seen[site].append((x.detach().clone(), context))

    with edit(pipe, {site: keep(site) for site in sites}, new_state=dict):
        tiny.run(pipe, 0, **call)
    return seen


# Law 1: identity.


def test_a_zero_delta_and_no_delta_keep_the_bits(pipe: Any) -> None:
    base = tiny.run(pipe, 3, n=2)
    for change in (zero, nothing):
        with edit(pipe, dict.fromkeys(all_sites(pipe), change)):
            assert torch.equal(tiny.run(pipe, 3, n=2), base)
    with record(pipe, all_sites(pipe), lambda site, x, call: None):
        assert torch.equal(tiny.run(pipe, 3, n=2), base)


def test_detaching_restores_everything(pipe: Any) -> None:
    base = tiny.run(pipe, 3)
    with edit(pipe, dict.fromkeys(all_sites(pipe), shift)):
        assert leftovers(pipe)
        assert not torch.equal(tiny.run(pipe, 3), base)
    assert not leftovers(pipe)
    assert torch.equal(tiny.run(pipe, 3), base)


def test_exceptions_restore_everything(pipe: Any) -> None:
    def fail(x: Tensor, context: EditContext[Any]) -> Tensor:
        raise ZeroDivisionError

    base = tiny.run(pipe, 3)
    sites = candidate_sites(pipe)
    with pytest.raises(KeyError), edit(pipe, {sites[0]: shift}):
        tiny.run(pipe, 3)
        raise KeyError
    assert not leftovers(pipe)
    with pytest.raises(ZeroDivisionError), edit(pipe, {sites[0]: shift, sites[1]: fail}):
        tiny.run(pipe, 3)
    assert not leftovers(pipe)
    assert torch.equal(tiny.run(pipe, 3), base)


def test_a_failed_call_does_not_spoil_the_next_within_one_context(sd: Any) -> None:
    broken = True

    def sometimes(x: Tensor, context: EditContext[Any]) -> Tensor:
        return x * float("nan") if broken else torch.zeros_like(x)

    base = tiny.run(sd, 3)
    with edit(sd, {MIDDLE: sometimes}):
        with pytest.raises(NotApplied):
            tiny.run(sd, 3)
        broken = False
        assert torch.equal(tiny.run(sd, 3), base)


def test_contexts_may_overlap_in_any_order(sd: Any) -> None:
    base = tiny.run(sd, 3)
    first, second = edit(sd, {MIDDLE: shift}), edit(sd, {MIDDLE: shift})
    with edit(sd, {MIDDLE: shift}):
        once = tiny.run(sd, 3)
    first.__enter__()
    second.__enter__()
    assert not torch.equal(tiny.run(sd, 3), once)
    first.__exit__(None, None, None)  # the first goes first
    assert torch.equal(tiny.run(sd, 3), once)
    with pytest.raises(NotApplied):  # the second still watches
        swap_denoiser(sd)
        tiny.run(sd, 3)
    sd = tiny.stable_diffusion()
    with pytest.raises(NotApplied, match="replaced"):
        second.__exit__(None, None, None)
    assert torch.equal(tiny.run(sd, 3), base)


def test_a_method_shadowed_by_the_user_is_given_back(sd: Any) -> None:
    ended = []

    def own() -> None:
        ended.append(1)

    sd.maybe_free_model_hooks = own
    with edit(sd, {MIDDLE: shift}):
        tiny.run(sd, 3)
    assert ended == [1] and vars(sd)["maybe_free_model_hooks"] is own and "progress_bar" not in vars(sd)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_addition_keeps_bits_and_strides(layout: str, owned: bool) -> None:
    if layout == "slice":  # FLUX's single blocks return slices of one sequence
        out = torch.randn(2, 9, 4)[:, 3:]
    else:
        out = torch.randn(2, 4, 3, 5)
        out = out.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else out
    out[0, 0] = -0.0
    x = to_positions(out)
    delta = torch.zeros_like(x)
    delta[0] = -0.0
    delta[1, 2] = 1.0
    moved, before = from_positions(delta, out) != 0, out.clone()
    new = add_keeping_bits(out, delta, owned)
    assert new.stride() == out.stride() and torch.equal(out, before)
    assert torch.equal(new[moved], out[moved] + 1)
    assert torch.equal(new[~moved], out[~moved]) and torch.equal(new.signbit()[~moved], out.signbit()[~moved])


# What is read is the model's own.


def naive(pipe: Any, sites: list[Site], **call: Any) -> dict[Site, list[tuple[Any, Any, Any]]]:
    """(args, kwargs, output) of each site's module, by a hook written down plainly."""
    seen: dict[Site, list[tuple[Any, Any, Any]]] = {site: [] for site in sites}
    handles = [
        pipe_module(pipe, site).register_forward_hook(
            lambda module, args, kwargs, output, site=site: seen[site].append((args, kwargs, output)),
            with_kwargs=True,
        )
        for site in sites
    ]
    tiny.run(pipe, 0, **call)
    for handle in handles:
        handle.remove()
    return seen


def pipe_module(pipe: Any, site: Site) -> nn.Module:
    root, path = site.path.split(".", 1)
    return getattr(pipe, root).get_submodule(path)


def test_record_gives_what_a_plain_hook_sees(pipe: Any) -> None:
    sites = all_sites(pipe)
    seen, plain = recorded(pipe, sites, n=2), naive(pipe, sites, n=2)
    two = type(pipe).__name__ in ("FluxPipeline", "StableDiffusion3Pipeline")
    for site in sites:
        assert len(seen[site]) == len(plain[site]) == 2
        for (x, context), (args, kwargs, output) in zip(seen[site], plain[site], strict=True):
            if two:
                after = output[site.stream == "image"]
                before = kwargs["hidden_states" if site.stream == "image" else "encoder_hidden_states"]
            else:
                after = output[0] if isinstance(output, tuple) else output
                before = args[0]
            if site.tap == "input":
                after = kwargs["encoder_hidden_states"]
            elif site.tap == "update":
                after = after - before
            if after.ndim == 4:
                b, d, h, w = after.shape
                after = after.permute(0, 2, 3, 1).reshape(b, h * w, d)
            assert torch.equal(x, after)
            assert context.timestep.shape == (len(x),) and context.timestep.dtype == torch.float32


def test_candidates_are_in_the_order_they_run(pipe: Any) -> None:
    seen: list[Site] = []
    sites = candidate_sites(pipe)
    with record(pipe, reversed(sites), lambda site, x, call: seen.append(site)):
        tiny.run(pipe, 0, steps=1)
    assert seen == sites and len(sites) >= 2


def test_an_edit_can_replace_what_is_there(pipe: Any) -> None:
    # A wrong sign or a wrong layout anywhere would not arrive at the constant.
    widths = {site: seen[0][0].shape[-1] for site, seen in recorded(pipe, all_sites(pipe), steps=1).items()}
    for site, width in widths.items():
        centre = torch.linspace(-1, 1, width)
        found: list[Tensor] = []
        with (
            edit(pipe, {site: lambda x, call, centre=centre: centre - x}),
            record(pipe, [site], lambda site, x, call, found=found: found.append(x)),
        ):
            tiny.run(pipe, 0, steps=1)
        assert len(found) == 1
        for x in found:
            torch.testing.assert_close(x, centre.expand_as(x), atol=1e-5, rtol=0)


def test_adding_to_the_update_is_adding_to_the_output(pipe: Any) -> None:
    site = candidate_sites(pipe)[1]
    with edit(pipe, {site: shift}):
        one = tiny.run(pipe, 0)
    with edit(pipe, {Site(site.path, "update"): shift}):
        other = tiny.run(pipe, 0)
    assert torch.equal(one, other)


def test_two_taps_of_one_block_see_the_same_activations(sd: Any) -> None:
    update = Site(MIDDLE.path, "update")
    base = recorded(sd, [update], steps=1)[update][0][0]
    seen: list[Tensor] = []

    def keep(x: Tensor, context: EditContext[Any]) -> None:
        seen.append(x)

    with edit(sd, {update: keep, MIDDLE: shift}):
        tiny.run(sd, 0, steps=1)
    assert torch.equal(seen[0], base)


def test_each_stream_is_edited_alone() -> None:
    pipe = tiny.flux()
    path = "transformer.transformer_blocks.0"
    text, image = Site(path, stream="text"), Site(path)
    base = recorded(pipe, [text, image], steps=1)
    assert base[text][0][0].shape == (1, tiny.WORDS, 16) and base[image][0][0].shape == (1, 16, 16)
    for edited, other in ((text, image), (image, text)):
        with edit(pipe, {edited: shift}):
            seen = recorded(pipe, [text, image], steps=1)
        assert torch.equal(seen[edited][0][0], base[edited][0][0] + 0.5)
        assert torch.equal(seen[other][0][0], base[other][0][0])


def test_an_input_is_the_prompt_that_a_block_reads(pipe: Any) -> None:
    site = Site(candidate_sites(pipe)[-1].path, "input", "text")
    given: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given.append(kwargs["encoder_hidden_states"])

    base = tiny.run(pipe, 0, n=2, steps=1)
    handle = resolve(pipe, site).register_forward_hook(see, with_kwargs=True)
    seen = recorded(pipe, [site], n=2, steps=1)[site]
    assert all(torch.equal(x, text) for (x, _), text in zip(seen, given, strict=True))
    rows = seen[0][0].shape[0]
    given.clear()
    with edit(pipe, {site: lambda x, call: (torch.arange(rows) == 1).view(-1, 1, 1) * torch.ones_like(x)}):
        edited = tiny.run(pipe, 0, n=2, steps=1)
    handle.remove()
    x = seen[0][0]
    assert torch.equal(given[0][0], x[0]) and torch.equal(given[0][1], x[1] + 1)  # the hook saw the changed text
    assert not torch.equal(edited, base) and torch.equal(tiny.run(pipe, 0, n=2, steps=1), base)


def test_an_input_edit_leaves_what_other_blocks_read(sd: Any) -> None:
    sites = [Site(site.path, "input", "text") for site in candidate_sites(sd)]
    base = recorded(sd, sites, steps=1)
    with edit(sd, {sites[1]: shift}):
        seen = recorded(sd, sites, steps=1)
    for site in sites:
        want = base[site][0][0] + (0.5 if site == sites[1] else 0)
        assert torch.equal(seen[site][0][0], want)


def test_an_adapters_images_beside_the_text_stay(sd: Any) -> None:
    class Reads(nn.Module):
        def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
            self.given = encoder_hidden_states
            return hidden_states

    class Hands(nn.Module):  # as a UNet with an IP-Adapter does
        has_cross_attention = True

        def __init__(self) -> None:
            super().__init__()
            self.inner = Reads()

        def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
            return self.inner(hidden_states, temb, (encoder_hidden_states, images))

    sd.unet.mid_block = Hands()
    text, images = torch.randn(1, tiny.WORDS, tiny.WIDTH), [torch.randn(1, 1, 4, tiny.WIDTH)]
    with edit(sd, {Site("unet.mid_block.inner", "input", "text"): shift}):
        sd.unet(torch.randn(1, 4, 8, 8), 5, text)
    new, beside = sd.unet.mid_block.inner.given
    assert torch.equal(new, text + 0.5) and beside is images


def test_a_down_block_is_edited_on_its_skip_too(sd: Any) -> None:
    site = Site("unet.down_blocks.1")
    outputs: list[Any] = []
    with edit(sd, {site: shift}):
        handle = sd.unet.down_blocks[1].register_forward_hook(lambda m, args, output: outputs.append(output))
        tiny.run(sd, 0, steps=1)
        handle.remove()
    hidden, skips = outputs[0]
    assert skips[-1] is hidden and len(skips) == 1


@pytest.mark.parametrize("path", ["unet", "vae.decoder.mid_block", "text_encoder", "unet.up_blocks.1.resnets.0"])
def test_roots_and_blocks_of_other_parts(sd: Any, path: str) -> None:
    base = tiny.run(sd, 0, prompt="a b", output_type="pt")
    with edit(sd, {Site(path): zero}):
        assert torch.equal(tiny.run(sd, 0, prompt="a b", output_type="pt"), base)
    with edit(sd, {Site(path): lambda x, call: x}):
        assert not torch.equal(tiny.run(sd, 0, prompt="a b", output_type="pt"), base)


def test_text_encoder_layers_have_no_time_and_one_memo_a_forward(sd: Any) -> None:
    layers = [Site("text_encoder.encoder.layers.0"), Site("text_encoder.encoder.layers.1")]
    seen = recorded(sd, layers, prompt="a b")  # the prompt, then the negative one
    for site in layers:
        assert [x.shape for x, _ in seen[site]] == [(1, tiny.WORDS, tiny.WIDTH)] * 2
        assert all(torch.equal(context.timestep, torch.zeros(1)) for _, context in seen[site])
    memos = [[context.forward for _, context in seen[site]] for site in layers]
    assert memos[0][0] is memos[1][0] and memos[0][1] is memos[1][1] and memos[0][0] is not memos[0][1]


def test_a_gate_left_at_an_early_site_reaches_later_ones(pipe: Any) -> None:
    early, *_, late = candidate_sites(pipe)
    found: list[Tensor] = []

    def gate(x: Tensor, context: EditContext[Any]) -> None:
        assert not context.forward  # each forward starts with an empty one
        context.forward["gate"] = x.mean(dim=(1, 2))

    def use(x: Tensor, context: EditContext[Any]) -> Tensor:
        found.append(context.forward["gate"])
        return context.forward["gate"][:, None, None].expand_as(x)

    with edit(pipe, {late: use, early: gate}, new_state=dict):
        tiny.run(pipe, 0)
    assert len(found) == 2 and not torch.equal(found[0], found[1])


# Law 3: time is data.


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_timestep_is_the_schedulers(pipe: Any, guidance: float, n: int) -> None:
    site = candidate_sites(pipe)[-1]
    seen = recorded(pipe, [site], n=n, guidance=guidance, steps=3)[site]
    flux = type(pipe).__name__ == "FluxPipeline"
    times = pipe.scheduler.timesteps.float() / (1000 if flux else 1)
    rows = 2 * n if guidance > 1 and not flux else n
    assert len(seen) == len(times) == 3
    for (x, context), t in zip(seen, times, strict=True):
        assert x.shape[0] == rows and torch.equal(context.timestep, t.expand(rows))


def test_flux_with_true_guidance_binds_each_of_its_two_passes() -> None:
    pipe = tiny.flux()
    site = candidate_sites(pipe)[0]
    negative = {f"negative_{k}": v + 1 for k, v in tiny.embeds(pipe).items()}
    seen = recorded(pipe, [site], true_cfg_scale=2.0, **negative)[site]
    assert [context.timestep.item() for _, context in seen] == [1.0, 1.0, 0.5, 0.5]
    assert len({id(context.forward) for _, context in seen}) == 4


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_repeated_and_fractional_times_of_heun(sd: Any) -> None:
    from diffusers import HeunDiscreteScheduler

    sd.scheduler = HeunDiscreteScheduler(timestep_spacing="linspace")
    seen = recorded(sd, [MIDDLE], steps=3)[MIDDLE]
    times = [context.timestep[0].item() for _, context in seen]
    assert times == sd.scheduler.timesteps.tolist() == [999.0, 499.5, 499.5, 0.0, 0.0]


@pytest.mark.parametrize("timestep", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor([7, 7])])
@pytest.mark.parametrize("by_name", [True, False])
def test_any_form_of_timestep(sd: Any, timestep: Any, by_name: bool) -> None:
    seen: list[Tensor] = []
    state, words = torch.zeros(2, 4, 8, 8), torch.zeros(2, tiny.WORDS, tiny.WIDTH)
    with record(sd, [MIDDLE], lambda site, x, context: seen.append(context.timestep)), torch.no_grad():
        if by_name:
            sd.unet(state, encoder_hidden_states=words, timestep=timestep)
        else:
            sd.unet(state, timestep, words)
    assert torch.equal(seen[0], torch.tensor([7.0, 7.0]))


# Law 5: differentiable.


def test_gradients_reach_the_edit_and_the_prompt(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    width = recorded(pipe, [site], steps=1)[site][0][0].shape[-1]
    into = torch.randn(width, 2, generator=torch.Generator().manual_seed(0))
    back = torch.zeros(2, width, requires_grad=True)  # the delta is 0 at first, its gradient is not
    given = tiny.embeds(pipe)
    given["prompt_embeds"].requires_grad_()
    base = tiny.run(pipe, 0, **given)
    with edit(pipe, {site: lambda x, call: x @ into @ back}):
        image = tiny.run(pipe, 0, grad=True, **given)
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
    base = tiny.run(pipe, 0, **settings)
    whole = recorded(pipe, [site], steps=1)[site][0][0].shape[1]
    assert recorded(pipe, [site], steps=1, **settings)[site][0][0].shape[1] == whole // 2
    with edit(pipe, dict.fromkeys(all_sites(pipe), zero)):
        assert torch.equal(tiny.run(pipe, 0, **settings), base)


def test_bfloat16(pipe: Any) -> None:
    pipe.to(torch.bfloat16)
    base = tiny.run(pipe, 0)
    site = candidate_sites(pipe)[0]
    seen = recorded(pipe, [site])[site]
    assert {x.dtype for x, _ in seen} == {torch.bfloat16}
    assert {context.timestep.dtype for _, context in seen} == {torch.float32}
    with edit(pipe, dict.fromkeys(all_sites(pipe), lambda x, call: torch.zeros(x.shape))):  # float32
        assert torch.equal(tiny.run(pipe, 0), base)
    with edit(pipe, {site: lambda x, call: torch.ones(x.shape)}):
        image = tiny.run(pipe, 0)
    assert image.dtype == base.dtype and not torch.equal(image, base)


def test_offloading_and_hooks_hold_together(sd: Any) -> None:
    base = tiny.run(sd, 0, prompt="a b")
    sd.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        with edit(sd, {MIDDLE: zero, Site("text_encoder.encoder.layers.0"): zero}):
            assert torch.equal(tiny.run(sd, 0, prompt="a b"), base)
            assert torch.equal(tiny.run(sd, 0, prompt="a b"), base)
    with edit(sd, {MIDDLE: shift}):
        assert not torch.equal(tiny.run(sd, 0, prompt="a b"), base)


def small_unet() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.unet = tiny.unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    ).eval()
    return pipe


@pytest.mark.parametrize("build", [small_unet, tiny.pixart])
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
    base = tiny.run(pipe, 0)
    with edit(pipe, edits, dict):
        want = tiny.run(pipe, 0)
    assert not torch.equal(want, base)
    torch._dynamo.reset()
    try:
        with edit(pipe, edits, dict):
            if name == "unet":
                pipe.unet.compile(backend="eager", fullgraph=True)
            else:
                pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
            assert torch.equal(tiny.run(pipe, 0), want)
            frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            tiny.run(pipe, 0, steps=3)
            strength.zero_()
            assert torch.equal(tiny.run(pipe, 0), base)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames  # nothing was compiled again
        strength.fill_(1)
        assert torch.equal(tiny.run(pipe, 0), base)  # the graph with the edit in it is not used any more
        with pytest.raises(NotApplied, match="compiled before"), edit(pipe, edits, dict):
            tiny.run(pipe, 0)
        assert torch.equal(tiny.run(pipe, 0), base)
    finally:
        torch._dynamo.reset()


def test_lora_beside(sd: Any) -> None:
    from peft import LoraConfig

    leaf = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q")
    base = tiny.run(sd, 0)
    with edit(sd, {MIDDLE: shift}):
        edited = tiny.run(sd, 0)
        sd.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name="a")
        with_both = tiny.run(sd, 0)
        with edit(sd, {leaf: shift, Site(leaf.path, "update"): zero}):
            assert not torch.equal(tiny.run(sd, 0), with_both)
        assert torch.equal(tiny.run(sd, 0), with_both) and not torch.equal(with_both, edited)
    lora = tiny.run(sd, 0)
    with edit(sd, {MIDDLE: zero, leaf: zero}):
        assert torch.equal(tiny.run(sd, 0), lora)
        sd.unet.delete_adapters("a")
        with edit(sd, {MIDDLE: shift}):
            assert torch.equal(tiny.run(sd, 0), edited)
    assert torch.equal(tiny.run(sd, 0), base) and not leftovers(sd)


def test_a_deep_copy_carries_its_own_hooks(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    base = tiny.run(pipe, 0)
    with edit(pipe, {site: shift}):
        edited = tiny.run(pipe, 0)
        twin = copy.deepcopy(pipe)
        model = pickle.loads(pickle.dumps(denoiser(pipe)))
    assert torch.equal(tiny.run(pipe, 0), base)
    assert torch.equal(tiny.run(twin, 0), edited)
    assert type(model) is type(denoiser(pipe)) and any(m._forward_hooks for m in model.modules())
    swap_denoiser(twin)
    with pytest.raises(NotApplied):  # the copy watches itself
        tiny.run(twin, 0)


# Law 10: fail closed.


def swap_denoiser(pipe: Any) -> nn.Module:
    """Another model in the denoiser's place, as a user would put it; returns the one that was there."""
    own = denoiser(pipe)
    other = copy.deepcopy(own)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    set_denoiser(pipe, other)
    return own


def set_denoiser(pipe: Any, model: nn.Module) -> None:
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", model)


def test_a_replaced_denoiser_is_noticed(pipe: Any) -> None:
    site = candidate_sites(pipe)[0]
    for context in (edit(pipe, {site: shift}), record(pipe, [site], lambda *_: None)):
        with context:
            tiny.run(pipe, 0, steps=1)
            own = swap_denoiser(pipe)
            with pytest.raises(NotApplied, match=site.path):
                tiny.run(pipe, 0, steps=1)
            set_denoiser(pipe, own)


def test_a_forward_before_the_call_does_not_stand_for_one_in_it(sd: Any) -> None:
    with edit(sd, {MIDDLE: shift}), torch.no_grad():
        sd.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, tiny.WORDS, tiny.WIDTH))
        own = swap_denoiser(sd)
        with pytest.raises(NotApplied):
            tiny.run(sd, 0)
        set_denoiser(sd, own)


def test_a_replaced_block_is_noticed(pipe: Any) -> None:
    site = candidate_sites(pipe)[1]
    owner, _, last = site.path.partition(".")[2].rpartition(".")
    blocks = denoiser(pipe).get_submodule(owner)
    with edit(pipe, {site: shift}):
        blocks[int(last)] = copy.deepcopy(blocks[int(last)])
        blocks[int(last)]._forward_hooks.clear()
        with pytest.raises(NotApplied, match=r"did not run in a forward"):
            tiny.run(pipe, 0)


def test_a_skipped_layer_is_noticed() -> None:
    pipe = tiny.stable_diffusion_3()
    with pytest.raises(NotApplied, match=r"blocks\.1:output"), edit(pipe, {candidate_sites(pipe)[1]: shift}):
        tiny.run(pipe, 0, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_noticed(sd: Any, bad: float) -> None:
    def one(x: Tensor, context: EditContext[Any]) -> Tensor:
        delta = torch.zeros_like(x)
        delta[0, 3, 1] = bad
        return delta

    with pytest.raises(NotApplied, match=r"mid_block.*NaN or infinity"), edit(sd, {MIDDLE: one}):
        tiny.run(sd, 0)
    with torch.no_grad():
        sd.unet.mid_block.attentions[0].proj_out.bias[0] = bad
    for change in (nothing, zero):
        with pytest.raises(NotApplied, match=r"mid_block.*NaN or infinity"), edit(sd, {MIDDLE: change}):
            tiny.run(sd, 0)


def test_a_shape_that_is_not_the_activations_is_noticed(sd: Any) -> None:
    with pytest.raises(NotApplied, match=r"returned \[2, 16\], expected \[2, 16, 32\]"):
        with edit(sd, {MIDDLE: lambda x, call: x[..., 0]}):
            tiny.run(sd, 0)


def test_a_block_outside_a_forward_has_no_time(sd: Any) -> None:
    with edit(sd, {MIDDLE: shift}), pytest.raises(NotApplied, match="no timestep is bound"):
        sd.unet.mid_block.attentions[0](torch.zeros(1, 32, 4, 4), torch.zeros(1, tiny.WORDS, tiny.WIDTH))
    with edit(sd, {MIDDLE: shift}), pytest.raises(NotApplied, match="without a timestep"):
        sd.unet(torch.zeros(1, 4, 8, 8), timestep=None, encoder_hidden_states=torch.zeros(1, 8, 16))
    words = torch.zeros(2, tiny.WORDS, tiny.WIDTH)
    sd.unet.forward = lambda state, timestep: sd.unet.mid_block.attentions[0](state, words)
    with edit(sd, {MIDDLE: shift}), pytest.raises(NotApplied, match="timesteps have shape"):
        sd.unet(torch.zeros(2, 32, 4, 4), torch.zeros(3))


def test_gradient_checkpointing_through_a_site_is_refused() -> None:
    pipe = tiny.flux()
    denoiser(pipe).enable_gradient_checkpointing()
    given = tiny.embeds(pipe)
    given["prompt_embeds"].requires_grad_()

    def squared(x: Tensor, context: EditContext[Any]) -> Tensor:
        return 0.1 * x * x  # keeps x for its gradient: the backward pass must run the edit again

    with edit(pipe, {candidate_sites(pipe)[0]: squared}), pytest.raises(NotApplied, match="checkpointing"):
        tiny.run(pipe, 0, grad=True, steps=1, **given).sum().backward()


def test_an_encoder_that_was_not_needed_is_noticed(sd: Any) -> None:
    site = Site("text_encoder.encoder.layers.0")
    with edit(sd, {site: shift}):
        tiny.run(sd, 0, prompt="a b")
        with pytest.raises(NotApplied, match="prompt_embeds"):
            tiny.run(sd, 0)  # from embeddings that the edit never saw


# Names.

PATHS = st.lists(st.from_regex(r"[a-z_0-9]+", fullmatch=True), min_size=1, max_size=5).map(".".join)


@settings(deadline=None, max_examples=30)
@given(PATHS, st.sampled_from(["output", "update", "input"]), st.sampled_from(["image", "text"]))
def test_sites_parse_what_they_print(path: str, tap: Any, stream: Any) -> None:
    site = Site(path, tap, stream)
    assert Site.parse(str(site)) == site
    assert Site.parse(path) == Site(path)
    assert Site.parse(f"{path}:{tap}") == Site(path, tap, "text" if tap == "input" else "image")
    assert Site.parse(f"{path}:{stream}") == Site(path, stream=stream)


@pytest.mark.parametrize("text", ["", "unet:sideways", "unet:text:update", "unet..a", "unet:output:image:x"])
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(SiteError):
        Site.parse(text)


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("unett.mid_block", "unet"),
        ("unet.mid_blok.attentions.0", "unet.mid_block"),
        ("unet.up_blocks.7.attentions.0", "unet.up_blocks.0, unet.up_blocks.1"),
        ("text_encoder.text_model.encoder.layers.0", "text_encoder.encoder"),
        ("unet.conv_in.weight", "Conv2d has no parts"),
        ("transformer.transformer_blocks.0", "text_encoder"),
        ("scheduler.betas", "text_encoder"),
    ],
)
def test_an_unknown_path_names_its_neighbours(sd: Any, path: str, near: str) -> None:
    with pytest.raises(SiteError, match=near.replace(".", r"\.")) as caught, edit(sd, {Site(path): shift}):
        pass
    assert path in str(caught.value) and not leftovers(sd)


def test_streams_and_taps_that_a_block_has_not(sd: Any) -> None:
    cases = [
        (sd, Site(MIDDLE.path, stream="text"), "one stream"),
        (sd, Site("unet.up_blocks.0", "update"), "output minus input"),
        (sd, Site("unet.time_embedding"), "no known layout"),
        (sd, Site(MIDDLE.path, "input"), "only the text is a site"),
        (sd, Site("unet.up_blocks.0.resnets.0", "input", "text"), "reads no prompt"),
        (tiny.pixart(), Site("transformer.transformer_blocks.0", stream="text"), "one stream"),
        (tiny.stable_diffusion_3(), Site("transformer.transformer_blocks.2", stream="text"), "the last"),
    ]
    for pipe, site, message in cases:
        with pytest.raises(SiteError, match=message), edit(pipe, {site: shift}):
            tiny.run(pipe, 0)
        assert not leftovers(pipe)


def test_two_sequences_of_an_unknown_block_are_refused(sd: Any) -> None:
    class TwoStreams(nn.Module):
        def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Any = None) -> Any:
            return hidden_states.flatten(2), hidden_states.flatten(2)

    sd.unet.mid_block = TwoStreams()
    with pytest.raises(SiteError, match="which is the text"), edit(sd, {Site("unet.mid_block"): shift}):
        tiny.run(sd, 0)


def test_a_string_is_no_site_and_a_pipeline_needs_a_denoiser(sd: Any) -> None:
    with pytest.raises(SiteError, match=r"Site\.parse"), edit(sd, {"unet.mid_block": shift}):  # type: ignore[dict-item]
        pass
    sd.unet = None
    with pytest.raises(SiteError, match="neither a unet nor a transformer"):
        denoiser(sd)


# Layouts.


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=4), st.booleans())
def test_layouts_there_and_back(shape: list[int], channels_last: bool) -> None:
    out = torch.randn(shape)
    if channels_last and len(shape) == 4:
        out = out.contiguous(memory_format=torch.channels_last)
    x = to_positions(out)
    positions = shape[1] if len(shape) == 3 else shape[2] * shape[3]
    assert x.shape == (shape[0], positions, shape[2] if len(shape) == 3 else shape[1])
    assert x.data_ptr() == out.data_ptr()  # a view, not a copy
    assert torch.equal(from_positions(x, out), out)
    assert torch.equal(from_positions(x.contiguous(), out), out)
