"""Reading and editing: what is read is the model's own, and an edit changes what it says and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import pipelines
from helpers.site_edits import FAMILIES, MIDDLE, all_sites, recorded, shift, zero
from neuraleraser.sites import EditContext, Site, candidate_sites, edit, record
from neuraleraser.sites.modules import resolve


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.BUILDERS[request.param]()


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


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
    pipelines.run(pipe, 0, **call)
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
        pipelines.run(pipe, 0, steps=1)
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
            pipelines.run(pipe, 0, steps=1)
        assert len(found) == 1
        for x in found:
            torch.testing.assert_close(x, centre.expand_as(x), atol=1e-5, rtol=0)


def test_adding_to_the_update_is_adding_to_the_output(pipe: Any) -> None:
    site = candidate_sites(pipe)[1]
    with edit(pipe, {site: shift}):
        one = pipelines.run(pipe, 0)
    with edit(pipe, {Site(site.path, "update"): shift}):
        other = pipelines.run(pipe, 0)
    assert torch.equal(one, other)


def test_two_taps_of_one_block_see_the_same_activations(sd: Any) -> None:
    update = Site(MIDDLE.path, "update")
    base = recorded(sd, [update], steps=1)[update][0][0]
    seen: list[Tensor] = []

    def keep(x: Tensor, context: EditContext[Any]) -> None:
        seen.append(x)

    with edit(sd, {update: keep, MIDDLE: shift}):
        pipelines.run(sd, 0, steps=1)
    assert torch.equal(seen[0], base)


def test_each_stream_is_edited_alone() -> None:
    pipe = pipelines.flux()
    path = "transformer.transformer_blocks.0"
    text, image = Site(path, stream="text"), Site(path)
    base = recorded(pipe, [text, image], steps=1)
    assert base[text][0][0].shape == (1, pipelines.WORDS, 16) and base[image][0][0].shape == (1, 16, 16)
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

    base = pipelines.run(pipe, 0, n=2, steps=1)
    handle = resolve(pipe, site).register_forward_hook(see, with_kwargs=True)
    seen = recorded(pipe, [site], n=2, steps=1)[site]
    assert all(torch.equal(x, text) for (x, _), text in zip(seen, given, strict=True))
    rows = seen[0][0].shape[0]
    given.clear()
    with edit(pipe, {site: lambda x, call: (torch.arange(rows) == 1).view(-1, 1, 1) * torch.ones_like(x)}):
        edited = pipelines.run(pipe, 0, n=2, steps=1)
    handle.remove()
    x = seen[0][0]
    assert torch.equal(given[0][0], x[0]) and torch.equal(given[0][1], x[1] + 1)  # the hook saw the changed text
    assert not torch.equal(edited, base) and torch.equal(pipelines.run(pipe, 0, n=2, steps=1), base)


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
    text, images = torch.randn(1, pipelines.WORDS, pipelines.WIDTH), [torch.randn(1, 1, 4, pipelines.WIDTH)]
    with edit(sd, {Site("unet.mid_block.inner", "input", "text"): shift}):
        sd.unet(torch.randn(1, 4, 8, 8), 5, text)
    new, beside = sd.unet.mid_block.inner.given
    assert torch.equal(new, text + 0.5) and beside is images


def test_a_down_block_is_edited_on_its_skip_too(sd: Any) -> None:
    site = Site("unet.down_blocks.1")
    outputs: list[Any] = []
    with edit(sd, {site: shift}):
        handle = sd.unet.down_blocks[1].register_forward_hook(lambda m, args, output: outputs.append(output))
        pipelines.run(sd, 0, steps=1)
        handle.remove()
    hidden, skips = outputs[0]
    assert skips[-1] is hidden and len(skips) == 1


@pytest.mark.parametrize("path", ["unet", "vae.decoder.mid_block", "text_encoder", "unet.up_blocks.1.resnets.0"])
def test_roots_and_blocks_of_other_parts(sd: Any, path: str) -> None:
    base = pipelines.run(sd, 0, prompt="a b", output_type="pt")
    with edit(sd, {Site(path): zero}):
        assert torch.equal(pipelines.run(sd, 0, prompt="a b", output_type="pt"), base)
    with edit(sd, {Site(path): lambda x, call: x}):
        assert not torch.equal(pipelines.run(sd, 0, prompt="a b", output_type="pt"), base)


def test_text_encoder_layers_have_no_time_and_one_memo_a_forward(sd: Any) -> None:
    layers = [Site("text_encoder.encoder.layers.0"), Site("text_encoder.encoder.layers.1")]
    seen = recorded(sd, layers, prompt="a b")  # the prompt, then the negative one
    for site in layers:
        assert [x.shape for x, _ in seen[site]] == [(1, pipelines.WORDS, pipelines.WIDTH)] * 2
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
        pipelines.run(pipe, 0)
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
    pipe = pipelines.flux()
    site = candidate_sites(pipe)[0]
    negative = {f"negative_{k}": v + 1 for k, v in pipelines.embeds(pipe).items()}
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
    state, words = torch.zeros(2, 4, 8, 8), torch.zeros(2, pipelines.WORDS, pipelines.WIDTH)
    with record(sd, [MIDDLE], lambda site, x, context: seen.append(context.timestep)), torch.no_grad():
        if by_name:
            sd.unet(state, encoder_hidden_states=words, timestep=timestep)
        else:
            sd.unet(state, timestep, words)
    assert torch.equal(seen[0], torch.tensor([7.0, 7.0]))
