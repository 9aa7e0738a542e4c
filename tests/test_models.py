"""Opening pipelines, and the sites of each family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuraleraser.canvas.pipeline import assemble, build_text_encoder, build_tokenizer, build_unet, build_vae
from neuraleraser.errors import FileError, SettingsError, SiteError
from neuraleraser.models import (
    called,
    edits_for,
    image_to_image,
    known_sites,
    open_pipeline,
    preset_sites,
    speaks_canvas,
)
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, candidate_sites, cross_attention_sites, text_streams
from tiny import BUILDERS, stable_diffusion


def test_a_saved_folder_opens_to_the_same_bits(tmp_path: Path):
    pipe = stable_diffusion()
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    opened = open_pipeline(str(tmp_path / "model"))
    assert type(opened) is type(pipe)
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(opened.unet.state_dict()[name], value)


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


def test_image_to_image_shares_the_modules():
    pipe = stable_diffusion()
    other = image_to_image(pipe)
    assert other.unet is pipe.unet and other.vae is pipe.vae
    start = np.full((1, 16, 16, 3), 128, np.uint8)
    images = generate(other, ["a"], [0], Sampling(steps=4, batch=1, strength=0.5), init=start)
    assert images.shape == (1, 16, 16, 3)


def test_no_image_to_image_form():
    with pytest.raises(SettingsError, match="no image-to-image form"):
        image_to_image(SimpleNamespace(config={}))


def test_presets_name_only_sites_that_exist():
    expected = {
        "stable_diffusion": ["unet.up_blocks.1.attentions.1"],
        "stable_diffusion_xl": ["unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0"],
        "stable_diffusion_3": [],
        "flux": [],  # has two double blocks, not nineteen
        "pixart": [],
    }
    for name, paths in expected.items():
        found = {site.path for site in preset_sites(BUILDERS[name]())}
        assert found >= set(paths)
        if not paths:
            assert found == set()


def test_presets_say_where_they_were_published():
    sources = {**known_sites(BUILDERS["stable_diffusion"]()), **known_sites(BUILDERS["stable_diffusion_xl"]())}
    assert sources and all("arXiv" in source for source in sources.values())
    assert {site.tap for site, source in sources.items() if "sdxl-unbox" in source} == {"update"}


def test_edits_are_spread_over_what_follows():
    def read(blocks: Sequence[Site]) -> list[Site]:
        return [Site(b.path, "input", "text") for b in blocks]

    sd = BUILDERS["stable_diffusion"]()
    blocks = candidate_sites(sd)
    assert edits_for(sd, blocks[0]) == edits_for(sd, cross_attention_sites(sd)[0]) == [tuple(read(blocks[1:]))]
    assert edits_for(sd, blocks[-1]) == [(blocks[-1],)]  # nothing follows
    for build in BUILDERS.values():
        pipe = build()
        blocks = candidate_sites(pipe)
        if not text_streams(pipe):
            assert edits_for(pipe, blocks[0]) == [tuple(read(blocks[1:]))]
            continue
        after = read(blocks[1:])
        assert edits_for(pipe, blocks[0], 100) == [(site,) for site in after]
        found = edits_for(pipe, blocks[0], 2)
        assert found == [(after[-(-len(after) // 2) - 1],), (after[-1],)]
    with pytest.raises(SiteError, match="pass the sites to edit"):
        edits_for(sd, Site("unet.conv_in"))


def test_the_canvas_is_known_by_its_words():
    tokenizer = build_tokenizer()
    canvas = assemble(build_unet(), build_vae(), build_text_encoder(tokenizer), tokenizer)
    assert speaks_canvas(canvas)
    assert not speaks_canvas(stable_diffusion())
    assert not speaks_canvas(BUILDERS["pixart"]())


def test_a_pipeline_is_called_by_its_id_and_by_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pipe = BUILDERS["stable_diffusion"]()
    assert called(pipe) == "StableDiffusionPipeline"
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name, expected in {"owner/model": "owner/model", "runs/mine": "mine", str(tmp_path / "gone"): "gone"}.items():
        pipe.register_to_config(_name_or_path=name)
        assert called(pipe) == expected
