"""Names of sites: parsed as they print, and what a pipeline has not is refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import pipelines
from helpers.site_edits import FAMILIES, MIDDLE, leftovers, shift
from neuraleraser.errors import SiteError
from neuraleraser.sites import Site, denoiser, edit


@pytest.fixture(params=FAMILIES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return pipelines.BUILDERS[request.param]()


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


PATHS = st.lists(st.from_regex(r"[a-z_0-9]+", fullmatch=True), min_size=1, max_size=5).map(".".join)


@settings(deadline=None, max_examples=30)
@given(PATHS, st.sampled_from(["output", "update", "input"]), st.sampled_from(["image", "text"]))
def test_sites_parse_what_they_print(path: str, tap: Any, stream: Any) -> None:
    site = Site(path, tap, stream)
    assert Site.parse(str(site)) == site
    assert Site.parse(path) == Site(path)
    assert Site.parse(f"{path}:{tap}") == Site(path, tap, "text" if tap == "input" else "image")
    assert Site.parse(f"{path}:{stream}") == Site(path, stream=stream)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no module path"),
        ("unet..a", "no module path"),
        ("unet:sideways", r"'sideways' is neither a tap \(output, update, input\) nor a stream \(image, text\)"),
        ("unet:output:image:x", "'x' is neither a tap"),
        ("unet:text:update", "'update' is in the wrong place"),
    ],
)
def test_what_is_no_site_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(SiteError, match=wrong):
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
        (pipelines.pixart(), Site("transformer.transformer_blocks.0", stream="text"), "one stream"),
        (pipelines.stable_diffusion_3(), Site("transformer.transformer_blocks.2", stream="text"), "the last"),
    ]
    for pipe, site, message in cases:
        with pytest.raises(SiteError, match=message), edit(pipe, {site: shift}):
            pipelines.run(pipe, 0)
        assert not leftovers(pipe)


def test_two_sequences_of_an_unknown_block_are_refused(sd: Any) -> None:
    class TwoStreams(nn.Module):
        def forward(self, hidden_states: Tensor, temb: Tensor, encoder_hidden_states: Any = None) -> Any:
            return hidden_states.flatten(2), hidden_states.flatten(2)

    sd.unet.mid_block = TwoStreams()
    with pytest.raises(SiteError, match="which is the text"), edit(sd, {Site("unet.mid_block"): shift}):
        pipelines.run(sd, 0)


def test_a_string_is_no_site_and_a_pipeline_needs_a_denoiser(sd: Any) -> None:
    with pytest.raises(SiteError, match=r"Site\.parse"), edit(sd, {"unet.mid_block": shift}):  # type: ignore[dict-item]
        pass
    sd.unet = None
    with pytest.raises(SiteError, match="neither a unet nor a transformer"):
        denoiser(sd)
