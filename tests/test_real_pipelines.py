"""Law by law on every class and task of pipeline that is supported, and on their text encoders."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import pipelines, text_encoders
from helpers.erasers import SHUT, make_correction, make_gate
from neuraleraser.eraser import CORRECTION_KINDS, Eraser, EraserHeader, attach
from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.sites import (
    EditContext,
    Site,
    candidate_sites,
    cross_attention_sites,
    denoiser,
    edit,
    record,
    text_encoder_sites,
    text_streams,
)

# diffusers' Euler schedulers convert tensors to numpy in a way that numpy deprecates.
# Start images and control images are routes that no gate here sees.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::neuraleraser.errors.UnseenRouteWarning"),
]


@dataclass
class Case:
    """A pipeline, what it draws of two images by itself, and what a record sees of the first step."""

    name: str
    pipe: Any
    base: Tensor
    seen: dict[Site, Tensor]

    def run(self, seed: int = 3, n: int = 2, pipe: Any = None, **settings: Any) -> Tensor:
        usual = {"steps": 1, "guidance": 0.0} if self.name == "sdxl_turbo" else {}
        return pipelines.run(pipe or self.pipe, seed, n=n, **(usual | settings))

    @property
    def scale(self) -> float:
        """Of times: FLUX's denoiser is given them from 0 to 1."""
        return 1e-3 if "flux" in self.name else 1.0

    def eraser(self, kind: str = "low_rank", seed: int = 0, concept: str = "Cats", **gate: Any) -> Eraser:
        """A gate at the first candidate, corrections at the last and at a cross-attention where there is one, and
        low-rank ones of the prompt that all but the first read, or the last where it is a stream."""
        first, *_, last = candidate_sites(self.pipe)
        acts = [(last,), *((at,) for at in cross_attention_sites(self.pipe)[-1:])]
        reads = [Site(b.path, "input", "text") for b in candidate_sites(self.pipe)[1:]]
        acts += ([tuple(reads[-1:] if text_streams(self.pipe) else reads)]) if kind == "low_rank" else []
        times = [self.scale * t for t in (100.0, 500.0, 900.0)]
        edits = tuple(
            make_correction(at, self.seen[at].shape[2], kind, seed=seed, times=times, also=tuple(also))
            for at, *also in acts
        )
        return Eraser(
            make_gate(first, self.seen[first].shape[2], seed=seed, times=times, **gate), edits, EraserHeader(concept)
        )


def useful(pipe: Any) -> list[Site]:
    blocks = candidate_sites(pipe)
    return [
        *blocks,
        *text_streams(pipe),
        *cross_attention_sites(pipe),
        *(Site(b.path, "input", "text") for b in blocks),
    ]


def first_step(case: Case, sites: list[Site]) -> dict[Site, Tensor]:
    seen: dict[Site, Tensor] = {}
    with record(case.pipe, sites, lambda site, x, call: seen.setdefault(site, x.detach().clone())):
        case.run()
    return seen


@functools.cache
def built(name: str) -> Case:
    case = Case(name, pipelines.EVERY[name](), torch.empty(0), {})
    case.base = case.run()
    case.seen = first_step(case, useful(case.pipe))
    return case


@pytest.fixture(params=list(pipelines.EVERY))
def case(request: pytest.FixtureRequest) -> Case:
    return built(request.param)


def hooks(pipe: Any) -> list[Any]:
    """Everything that a context could leave behind."""
    held: list[Any] = [name for name in vars(pipe) if name == "progress_bar" or name.startswith("_neuraleraser")]
    for part in pipe.components.values():
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            held += [
                (path, name, len(kept))
                for name, kept in vars(module).items()
                if isinstance(kept, dict) and "hook" in name and kept
            ]
    return held


def zero(x: Tensor, context: EditContext[Any]) -> Tensor:
    return torch.zeros_like(x)


def test_identity(case: Case) -> None:
    sites = useful(case.pipe)
    updates = [
        Site(site.path, "update", site.stream) for site in sites if "attn" not in site.path and site.tap == "output"
    ]
    with edit(case.pipe, dict.fromkeys([*sites, *updates], zero)):
        assert torch.equal(case.run(), case.base)
    silent = [case.eraser(kind, seed=i + 1, concept=kind, **SHUT) for i, kind in enumerate(sorted(CORRECTION_KINDS))]
    no_feature = case.eraser(threshold=1e6, concept="no feature")
    with attach(case.pipe, [*silent, no_feature, case.eraser()], [1.0] * 3 + [0.0]):
        assert torch.equal(case.run(), case.base)
    with pytest.raises(ZeroDivisionError), attach(case.pipe, case.eraser()):
        assert not torch.equal(case.run(), case.base)
        raise ZeroDivisionError
    assert not hooks(case.pipe) and torch.equal(case.run(), case.base)


def test_the_edit_adds_its_delta_and_nothing_else(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    acts = [candidate_sites(case.pipe)[1], *text_streams(case.pipe)[:1], *cross_attention_sites(case.pipe)[1:2]]
    for site in acts:
        x = case.seen[site]
        delta = torch.randn(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) > 0.5)
        with edit(case.pipe, {site: lambda x, call, delta=delta: delta}):
            seen = first_step(case, list(case.seen))
        assert torch.equal(seen[site], torch.where(delta != 0, x + delta, x))
        untouched = [at for at in case.seen if torch.equal(seen[at], case.seen[at])]
        assert candidate_sites(case.pipe)[0] in untouched or site in text_streams(case.pipe)  # it ran before
        assert candidate_sites(case.pipe)[-1] not in untouched  # it ran after


def test_time_is_what_the_denoiser_was_given(case: Case) -> None:
    given: list[Tensor] = []
    bound: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        time = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).float()
        given.append(time.expand(len(args[0] if args else kwargs["hidden_states"])))

    handle = denoiser(case.pipe).register_forward_pre_hook(note, with_kwargs=True)
    sites = [candidate_sites(case.pipe)[-1], *cross_attention_sites(case.pipe)[-1:]]
    with record(case.pipe, sites, lambda site, x, call: bound.append(call.timestep.clone())):
        case.run()
    handle.remove()
    times = torch.as_tensor(case.pipe.scheduler.timesteps).float()[-len(given) :] * case.scale
    assert len(bound) == len(given) * len(sites) and len(given) == (1 if case.name == "sdxl_turbo" else 2)
    for i, time in enumerate(given):
        assert all(torch.equal(time, other) for other in bound[i * len(sites) : (i + 1) * len(sites)])
        torch.testing.assert_close(time, times[i].expand_as(time))


def swapped_out(pipe: Any) -> nn.Module:
    """The denoiser's twin without hooks, put in its place; returns the one that was there."""
    old = denoiser(pipe)
    other = copy.deepcopy(old)
    for module in other.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", other)
    return old


def test_what_did_not_run_is_an_error(case: Case) -> None:
    images: list[Tensor] = []
    pipe = case.pipe
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    with pytest.raises(EraserNotAppliedError, match="did not run"), attach(pipe, case.eraser()):
        old = swapped_out(pipe)
        images.append(case.run())
    setattr(pipe, name, old)
    site = candidate_sites(pipe)[1]
    owner, _, last = site.path.partition(".")[2].rpartition(".")
    blocks: Any = denoiser(pipe).get_submodule(owner)
    block = blocks[int(last)]
    with pytest.raises(EraserNotAppliedError, match="did not run in a forward"), edit(pipe, {site: zero}):
        blocks[int(last)] = copy.deepcopy(block)
        blocks[int(last)]._forward_hooks.clear()
        images.append(case.run())
    blocks[int(last)] = block
    for at in (cross_attention_sites(pipe) or [site])[:1]:
        with (
            pytest.raises(EraserNotAppliedError, match="NaN or infinity"),
            edit(pipe, {at: lambda x, call: x * math.nan}),
        ):
            images.append(case.run())
    assert not images and not hooks(pipe) and torch.equal(case.run(), case.base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(case: Case, dtype: torch.dtype) -> None:
    pipe = case.pipe if dtype == torch.float32 else copy.deepcopy(case.pipe).to(dtype)
    settings: dict[str, Any] = {"height": 16, "width": 8, "guidance": 0.0 if case.name == "sdxl_turbo" else 1.0}
    base = case.run(n=1, pipe=pipe, **settings)
    with attach(pipe, case.eraser(**SHUT)):
        assert torch.equal(case.run(n=1, pipe=pipe, **settings), base)
    with attach(
        pipe, [case.eraser(kind, seed=i, concept=kind, share=0.1) for i, kind in enumerate(sorted(CORRECTION_KINDS))]
    ):
        out = case.run(n=1, pipe=pipe, **settings)
    assert out.dtype == base.dtype and bool(torch.isfinite(out).all()) and not torch.equal(out, base)


def test_seeds_and_strengths_per_image(case: Case) -> None:
    def draw(*seeds: int) -> Tensor:
        return case.run(n=3, generator=[torch.Generator().manual_seed(s) for s in seeds])

    base = draw(1, 2, 3)
    with attach(case.pipe, case.eraser(low=0.0, high=20.0)):
        one, other = draw(1, 2, 3), draw(1, 8, 9)
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])
    with attach(case.pipe, case.eraser(), [[1.0, 0.0, 2.0]]):
        erased = draw(1, 2, 3)
    assert torch.equal(erased[1], base[1])
    assert not torch.equal(erased[0], base[0]) and not torch.equal(erased[2], base[2])


def test_latents_returned_early_are_checked_too() -> None:
    """SDXL's inpainting returns latents, as for a refiner, without the call that ends all others."""
    case = built("sdxl_inpaint")
    with pytest.raises(EraserNotAppliedError, match="did not run in this call"), attach(case.pipe, case.eraser()):
        old = swapped_out(case.pipe)
        try:
            case.run()
        finally:
            case.pipe.unet = old
    with pytest.raises(ZeroDivisionError), attach(case.pipe, case.eraser()):  # what failed inside is told as it was
        case.run(callback_on_step_end=lambda *args: 1 / 0)


# Parts beside the denoiser.


def test_a_controlnet_has_sites_and_times() -> None:
    case = built("sd1_controlnet")
    site = Site("controlnet.mid_block.attentions.0")
    times: list[float] = []
    with record(case.pipe, [site], lambda site, x, call: times.extend(call.timestep[:1].tolist())):
        assert torch.equal(case.run(), case.base)
    assert times == case.pipe.scheduler.timesteps.tolist()
    with edit(case.pipe, {site: lambda x, call: x}):
        assert not torch.equal(case.run(), case.base)


# SDXL takes the last layer but one of its first encoder, and nothing after it.
UNUSED = {"stable_diffusion_xl": "text_encoder.encoder.layers.2"}


@pytest.mark.parametrize("name", list(text_encoders.READING))
def test_text_encoders_are_sites(name: str) -> None:
    """An edit there acts, and acts alike, whether or not the pipeline was called before it was attached."""
    call = text_encoders.READING[name][1]
    pipe, fresh = text_encoders.build(name), text_encoders.build(name)
    base = pipelines.run(pipe, 0, **call)
    before = hooks(pipe)
    sites = text_encoder_sites(pipe)
    seen: dict[Site, EditContext[Any]] = {}
    with record(pipe, sites, lambda site, x, call: seen.update({site: call})):
        assert torch.equal(pipelines.run(pipe, 0, **call), base)
    assert list(seen) == sites and not any(call.timestep.any() for call in seen.values())
    with edit(pipe, dict.fromkeys(sites, zero)):
        assert torch.equal(pipelines.run(pipe, 0, **call), base)
    for site in sites:
        images = []
        for each in (fresh, pipe):
            with edit(each, {site: lambda x, call: torch.linspace(-2, 2, x.shape[2]).expand_as(x)}):
                images.append(pipelines.run(each, 0, **call))
        assert torch.equal(*images), site
        assert torch.equal(images[0], base) == (site.path == UNUSED.get(name)), site
        fresh = text_encoders.build(name)
    assert hooks(pipe) == before and torch.equal(pipelines.run(pipe, 0, **call), base)
    with pytest.raises(EraserNotAppliedError, match="prompt_embeds"), edit(pipe, {sites[0]: zero}):
        pipelines.run(pipe, 0)


# What is listed.


@pytest.mark.parametrize(
    ("name", "blocks", "texts", "attentions"),
    [
        ("stable_diffusion", 7, 0, 7),
        ("stable_diffusion_xl", 7, 0, 11),  # two transformer blocks in each of the lower ones
        ("stable_diffusion_3", 3, 2, 0),  # the last block returns no text
        ("sd35", 3, 2, 0),  # its second attention is from image to image
        ("flux", 4, 4, 0),
        ("pixart", 2, 0, 2),
        ("sana", 2, 0, 2),
    ],
)
def test_useful_sites(name: str, blocks: int, texts: int, attentions: int) -> None:
    pipe = built(name).pipe
    found = [candidate_sites(pipe), text_streams(pipe), cross_attention_sites(pipe)]
    assert [len(sites) for sites in found] == [blocks, texts, attentions]
    assert all(site.path.endswith(".attn2") for site in found[2])


def test_sites_of_blocks_that_were_compiled_one_by_one() -> None:
    pipe = pipelines.stable_diffusion()
    plain = useful(pipe), text_encoder_sites(pipe)
    for part in pipe.unet.down_blocks:
        part.attentions[0] = torch.compile(part.attentions[0], backend="eager")
    assert (useful(pipe), text_encoder_sites(pipe)) == plain


def test_cross_attentions_are_listed_as_they_run() -> None:
    case = built("stable_diffusion_xl")
    order: list[Site] = []
    sites = cross_attention_sites(case.pipe)
    with record(case.pipe, sites, lambda site, x, call: order.append(site)):
        case.run(steps=1)
    assert order == sites


def test_without_a_denoiser_there_are_no_sites() -> None:
    pipe = pipelines.stable_diffusion()
    pipe.unet = None
    with pytest.raises(SiteError, match="neither a unet nor a transformer"):
        cross_attention_sites(pipe)
