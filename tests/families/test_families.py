"""Opening pipelines, and the sites of each family."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionXLPipeline

from helpers.pipelines import BUILDERS, stable_diffusion
from neuraleraser import families
from neuraleraser.canvas.pipeline import assemble, build_text_encoder, build_tokenizer, build_unet, build_vae
from neuraleraser.cli.verbs import MachineOptions
from neuraleraser.eraser import EraserHeader
from neuraleraser.errors import FileError, SettingsError, SiteError
from neuraleraser.families import FAMILIES, opening
from neuraleraser.families.canvas import CANVAS
from neuraleraser.families.defaults import default_sampling, model_name, recommended_sites, sampling_for_eraser
from neuraleraser.families.opening import image_to_image, inpainting, open_pipeline
from neuraleraser.families.sdxl import SDXL
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, candidate_sites, cross_attention_sites, default_gate_site, edits_for, text_streams


def test_a_saved_folder_opens_to_the_same_bits(tmp_path: Path):
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    opened = open_pipeline(str(tmp_path / "model"))
    assert type(opened) is type(pipe)
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(opened.unet.state_dict()[name], value)


def test_device_and_dtype_of_what_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    assert open_pipeline(str(tmp_path / "model"), torch.float16).unet.dtype == torch.float16
    assert MachineOptions(dtype="float16").open_pipeline(str(tmp_path / "model")).unet.dtype == torch.float16
    with pytest.raises(SettingsError, match="device nonsense cannot be used"):
        open_pipeline("nobody/nothing", device="nonsense")  # said before anything is fetched
    asked: list[tuple[object, object]] = []
    monkeypatch.setattr(opening, "open_pipeline", lambda name, dtype, device: asked.append((dtype, device)))
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        MachineOptions().open_pipeline("x")
    MachineOptions("cuda:1", "bfloat16").open_pipeline("x")
    assert asked == [(None, "cuda"), (None, "cpu"), (torch.bfloat16, "cuda:1")]


def test_on_a_device_that_is_no_cpu_the_default_is_bfloat16(tmp_path: Path):
    stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    pipe = open_pipeline(str(tmp_path / "model"), device="meta")
    assert (pipe.unet.dtype, pipe.unet.device.type) == (torch.bfloat16, "meta")


def test_pickled_weights_are_refused(tmp_path: Path):
    stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=False)
    with pytest.raises(FileError, match=r"could not be opened from that folder.*safetensors"):
        open_pipeline(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["canvass", "no/such/place", "../x", ""])
def test_an_unknown_name_says_what_to_pass(name: str):
    with pytest.raises(FileError, match="pass 'canvas', a folder"):
        open_pipeline(name)


def test_a_folder_without_a_pipeline(tmp_path: Path):
    with pytest.raises(FileError, match="no model_index"):
        open_pipeline(str(tmp_path))


def test_the_hub_out_of_reach_is_one_sentence():
    with pytest.raises(FileError) as caught:
        open_pipeline("nobody/nothing")
    assert "from the Hub" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_revision_of_either_spelling_reaches_the_hub(monkeypatch: pytest.MonkeyPatch):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    asked: list[tuple[str, str | None]] = []

    def opened(name: str, revision: str | None, **_: Any) -> Any:
        asked.append((name, revision))
        pipe = SimpleNamespace(set_progress_bar_config=lambda **_: None)
        pipe.to = lambda device: pipe
        return pipe

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", opened)
    open_pipeline("owner/model@v1")
    open_pipeline("owner/model", revision="v1")
    open_pipeline("owner/model")
    assert asked == [("owner/model", "v1")] * 2 + [("owner/model", None)]
    with pytest.raises(SettingsError, match="names one revision"):
        open_pipeline("owner/model@v1", revision="v2")


def test_image_to_image_shares_the_modules():
    pipe = stable_diffusion()
    other = image_to_image(pipe)
    assert other.unet is pipe.unet and other.vae is pipe.vae
    start = np.full((1, 16, 16, 3), 128, np.uint8)
    images = generate(other, ["a"], [0], Sampling(num_inference_steps=4, batch_size=1, strength=0.5), image=start)
    assert images.shape == (1, 16, 16, 3)


def test_inpainting_shares_the_modules():
    pipe = stable_diffusion()
    other = inpainting(pipe)
    assert type(other).__name__ == "StableDiffusionInpaintPipeline"
    assert other.unet is pipe.unet and other.vae is pipe.vae


@pytest.mark.parametrize(("form", "name"), [(image_to_image, "image-to-image"), (inpainting, "inpainting")])
def test_no_such_form(form: Any, name: str):
    with pytest.raises(SettingsError, match=f"no {name} form"):
        form(SimpleNamespace(config={}))


def test_presets_name_only_sites_that_exist():
    expected = {
        "stable_diffusion": ["unet.up_blocks.1.attentions.1"],
        "stable_diffusion_xl": ["unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0"],
        "stable_diffusion_3": [],
        "flux": [],  # has two double blocks, not nineteen
        "pixart": [],
    }
    for name, paths in expected.items():
        found = {known.site.path for known in recommended_sites(BUILDERS[name]())}
        assert found >= set(paths)
        if not paths:
            assert found == set()


def test_presets_say_where_they_were_published():
    known = [*recommended_sites(BUILDERS["stable_diffusion"]()), *recommended_sites(sdxl())]
    assert known and all("arXiv" in r.source for r in known)
    assert {r.site.tap for r in known if "sdxl-unbox" in r.source} == {"update"}


def sdxl() -> StableDiffusionXLPipeline:
    """An SDXL with blocks at all the sites that are recommended for it."""
    pipe = BUILDERS["stable_diffusion_xl"]()
    block = pipe.unet.down_blocks[1].attentions[0]
    pipe.unet.down_blocks.append(torch.nn.Module())
    pipe.unet.down_blocks[2].attentions = torch.nn.ModuleList([copy.deepcopy(block), copy.deepcopy(block)])
    pipe.unet.up_blocks[0].attentions.append(copy.deepcopy(block))
    return pipe


def test_each_kind_is_looked_for_where_it_was_found(monkeypatch: pytest.MonkeyPatch):
    """By data, not by the words of a citation: these may change, and a family's sites do not move."""
    composition, style = (
        Site(f"unet.{path}", "update") for path in ("down_blocks.2.attentions.1", "up_blocks.0.attentions.1")
    )
    pipe = sdxl()
    assert default_gate_site(pipe, "object") == composition and default_gate_site(pipe, "style") == style
    assert default_gate_site(pipe, "other") == composition, "the first that is recommended"
    sd = BUILDERS["stable_diffusion"]()
    objects = Site("unet.up_blocks.1.attentions.1")
    assert default_gate_site(sd, "object") == default_gate_site(sd, "other") == objects
    said = tuple(replace(r, carries="style objects any", source="object, any, style") for r in SDXL.sites)
    monkeypatch.setattr(families, "FAMILIES", (replace(SDXL, sites=said[:1] + said[1:][::-1]),))
    assert default_gate_site(pipe, "object") == composition and default_gate_site(pipe, "style") == style
    unknown = BUILDERS["pixart"]()
    blocks = candidate_sites(unknown)
    assert recommended_sites(unknown) == [] and default_gate_site(unknown, "style") == blocks[len(blocks) // 2]


def flux() -> FluxPipeline:
    """A FLUX with as many double blocks as the real one."""
    pipe = BUILDERS["flux"]()
    blocks = pipe.transformer.transformer_blocks
    blocks.extend([blocks[0]] * (19 - len(blocks)))
    return pipe


@pytest.mark.parametrize(
    ("build", "kinds"),
    [(BUILDERS["stable_diffusion"], ("object",)), (sdxl, ("object", "style")), (flux, ("object", "style"))],
)
def test_a_gate_is_looked_for_where_a_reference_is_published(build: Any, kinds: tuple[str, ...]):
    """So that `erase --model ID` finds it without being told a site."""
    pipe = build()
    entries = [p for family in FAMILIES for p in family.published if _has_site(pipe, p.site)]
    assert entries
    for kind in kinds:
        assert default_gate_site(pipe, kind) in {p.site for p in entries}
    assert all(edits_for(pipe, p.site) for p in entries), "an eraser could edit from each"


def _has_site(pipe: Any, site: Site) -> bool:
    try:
        edits_for(pipe, site)
    except SiteError:
        return False
    return True


def test_the_sampling_that_an_eraser_was_fitted_with():
    pipe = stable_diffusion()
    usual = default_sampling(pipe)
    assert (usual.num_inference_steps, usual.guidance_scale) == (50, 7.5), "as its own call has it, not as the canvas"
    fitted = Sampling(num_inference_steps=1, guidance_scale=0.0, batch_size=64, height=32, width=48)
    header = EraserHeader("x", sampling=fitted)
    assert sampling_for_eraser(pipe, header.sampling) == replace(fitted, batch_size=usual.batch_size) != fitted
    assert sampling_for_eraser(pipe, EraserHeader("x").sampling) == usual


def test_edits_are_what_all_blocks_read() -> None:
    def read(blocks: Sequence[Site]) -> tuple[Site, ...]:
        return tuple(Site(b.path, "input", "text") for b in blocks)

    sd = BUILDERS["stable_diffusion"]()
    blocks = candidate_sites(sd)
    for at in (blocks[0], cross_attention_sites(sd)[0], blocks[-1]):
        assert edits_for(sd, at) == read(blocks), "wherever the gate looks"
    for build in BUILDERS.values():
        pipe = build()
        blocks = candidate_sites(pipe)
        assert edits_for(pipe, blocks[0]) == read(blocks[:1] if text_streams(pipe) else blocks)
    with pytest.raises(SiteError, match="pass the sites to edit"):
        edits_for(sd, Site("unet.conv_in"))


def test_the_canvas_is_known_by_its_words():
    tokenizer = build_tokenizer()
    canvas = assemble(build_unet(), build_vae(), build_text_encoder(tokenizer), tokenizer)
    assert CANVAS.matches(canvas)
    assert not CANVAS.matches(stable_diffusion())
    assert not CANVAS.matches(BUILDERS["pixart"]())


def test_a_pipeline_is_called_by_its_id_and_by_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pipe = BUILDERS["stable_diffusion"]()
    assert model_name(pipe) == "StableDiffusionPipeline"
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name, expected in {"owner/model": "owner/model", "runs/mine": "mine", str(tmp_path / "gone"): "gone"}.items():
        pipe.register_to_config(_name_or_path=name)
        assert model_name(pipe) == expected
