"""Facts of families: one object makes a new kind of model known, and what is stated of diffusers' models is so."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor, nn

from helpers import pipelines
from helpers.site_edits import leftovers
from neuraleraser import families
from neuraleraser.errors import SiteError
from neuraleraser.families import FAMILIES, UNKNOWN, Blocks, Family, family_of, known_names
from neuraleraser.families.family import has_transformer
from neuraleraser.sae.formats import openai, sparsify
from neuraleraser.sites import (
    DenoiserCall,
    EditContext,
    Site,
    candidate_sites,
    denoisers,
    edit,
    record,
    text_streams,
)
from neuraleraser.sites.caller import find_caller

IMAGE, TEXT, WIDTH = 4, 3, 8


class BraidBlock(nn.Module):
    """Block of a kind that no family states: two streams, the text first."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        image = self.image(hidden_states) + encoder_hidden_states.mean(1, keepdim=True)
        return encoder_hidden_states + self.text(encoder_hidden_states), hidden_states + image


class LongBraidBlock(BraidBlock):
    """Block that inherits its streams."""


class BraidTransformer(nn.Module):
    """Denoiser with its blocks in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.strands = nn.ModuleList([BraidBlock(), LongBraidBlock()])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
        for block in self.strands:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class BraidPipeline(DiffusionPipeline):
    """Pipeline of the new kind, with a name of its own for the scale of guidance."""

    def __init__(self, transformer: nn.Module, braider: nn.Module | None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, braider=braider)
        self.scale: float | None = None

    @torch.no_grad()
    def __call__(self, braid_scale: float = 3.0) -> Tensor:
        prompt_embeds, latents = torch.ones(1, TEXT, WIDTH), torch.ones(1, IMAGE, WIDTH)
        for step in (500.0, 0.0):
            latents = self.transformer(latents, prompt_embeds, torch.tensor(step))[0]
        caller = find_caller()
        self.scale = caller.facts.guidance if caller else None
        return latents


BRAID = Family(
    name="braid",
    matches=has_transformer("BraidTransformer"),
    blocks=Blocks(lists=("strands",), text_first=("BraidBlock",)),
    further_denoisers=("braider",),
    guidance_names=("braid_scale",),
    position_arguments=("knots",),
)


@pytest.fixture
def braid() -> BraidPipeline:
    torch.manual_seed(0)
    return BraidPipeline(BraidTransformer().eval(), None)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, BRAID))


def shift(x: Tensor, context: EditContext[None]) -> Tensor:
    return torch.ones_like(x)


def test_blocks_of_an_unknown_kind_have_no_text_stream(braid: BraidPipeline) -> None:
    assert family_of(braid) is UNKNOWN and candidate_sites(braid) == []
    with pytest.raises(SiteError, match="BraidBlock has one stream"):
        with edit(braid, {Site("transformer.strands.0", stream="text"): shift}):
            pass
    with pytest.raises(SiteError, match="two sequences, and which is the text is not known"):
        with edit(braid, {Site("transformer.strands.0"): shift}):
            braid()
    braid()
    assert braid.scale is None and denoisers(braid) == ["transformer"]


@pytest.mark.usefixtures("known")
def test_a_family_makes_them_known(braid: BraidPipeline) -> None:
    assert family_of(braid) is BRAID
    images, texts = candidate_sites(braid), text_streams(braid)
    assert [str(site) for site in images] == [f"transformer.strands.{i}:output:image" for i in range(2)]
    assert texts == [Site(site.path, stream="text") for site in images], "a subclass is of its parent's kind"
    plain, shapes = braid(), {}
    with record(braid, [*images, *texts], lambda site, x, context: shapes.update({site: list(x.shape)})):
        assert torch.equal(braid(), plain)
    assert shapes == {site: [1, TEXT if site.stream == "text" else IMAGE, WIDTH] for site in (*images, *texts)}
    with edit(braid, {texts[0]: shift}):  # the second block reads what was written into the text
        assert not torch.equal(braid(), plain)
    with edit(braid, {texts[1]: shift}):  # nothing reads the last text
        assert torch.equal(braid(), plain)
    assert torch.equal(braid(), plain) and not leftovers(braid)


@pytest.mark.usefixtures("known")
def test_names_that_a_family_states_hold_everywhere(braid: BraidPipeline) -> None:
    braid(braid_scale=2.5)
    assert braid.scale == 2.5
    braid.register_modules(braider=nn.Linear(1, 1))
    assert denoisers(braid) == ["transformer", "braider"]
    given = {"knots": torch.zeros(2, 3), "other": torch.zeros(2, 3)}
    call = DenoiserCall(torch.zeros(2, 1), torch.zeros(2), given, torch.zeros(2, 1)).rows([0])
    assert {name: len(value) for name, value in call.conditioning.items()} == {"knots": 2, "other": 1}


@pytest.mark.usefixtures("known")
def test_a_compiled_denoiser_is_of_its_family(braid: BraidPipeline) -> None:
    plain = candidate_sites(braid)
    braid.transformer = torch.compile(braid.transformer, backend="eager")
    assert family_of(braid) is BRAID and candidate_sites(braid) == plain != []
    whole = pipelines.flux()
    sites = candidate_sites(whole)
    whole.transformer = torch.compile(whole.transformer, backend="eager")
    assert family_of(whole).name == "flux" and candidate_sites(whole) == sites != []


def test_the_first_family_that_matches_is_taken(braid: BraidPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", (replace(BRAID, name="first"), BRAID))
    assert family_of(braid).name == "first"


MODELS = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted((Path(diffusers.__file__).parent / "models").rglob("*.py"))
)


def test_classes_that_families_state_are_diffusers_own() -> None:
    """By their spelling: small pipelines cover most kinds, and not all."""
    stated = (
        *known_names(lambda family: family.blocks.text_first),
        *known_names(lambda family: family.blocks.one_sequence),
    )
    assert stated and [name for name in stated if not re.search(rf"^class {name}\(", MODELS, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("name", "transformer"),
    [
        ("stable-diffusion-3", "SD3Transformer2DModel"),
        ("flux", "FluxTransformer2DModel"),
        ("flux-2", "Flux2Transformer2DModel"),
        ("chroma", "ChromaTransformer2DModel"),
        ("auraflow", "AuraFlowTransformer2DModel"),
        ("qwen-image", "QwenImageTransformer2DModel"),
        ("wan", "WanTransformer3DModel"),
        ("unknown", "PixArtTransformer2DModel"),
    ],
)
def test_a_pipeline_s_family_is_that_of_its_transformer(name: str, transformer: str) -> None:
    assert re.search(rf"^class {transformer}\(", MODELS, re.MULTILINE)
    own = type(transformer, (), {})
    for kind in (own, type("FineTune", (own,), {})):
        pipe: Any = SimpleNamespace(transformer=kind())
        assert family_of(pipe).name == name


def test_files_of_published_saes_are_those_of_their_formats() -> None:
    unbox = (openai.UNBOX_CONFIG, openai.UNBOX_WEIGHTS, *openai.STATISTICS.values())
    of = {"flux": unbox, "sdxl": unbox, "stable-diffusion": (sparsify.CONFIG, sparsify.WEIGHTS)}
    published = {family.name: {sae.files for sae in family.published} for family in FAMILIES if family.published}
    assert published == {name: {files} for name, files in of.items()}


def test_families_load_no_model_library() -> None:
    """Every pipeline asks for its family, so the canvas's room is read when it is used."""
    heavy = {"diffusers", "transformers", "cv2"}
    code = f"import sys, neuraleraser.families; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"
