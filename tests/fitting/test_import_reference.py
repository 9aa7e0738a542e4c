"""SAEs in the shape that SAeUron and sdxl-unbox publish: read, profiled, and made into erasers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import pipelines, text_encoders
from helpers.published_saes import saeuron, unbox
from neuraleraser import Eraser, import_reference
from neuraleraser.activations import activation_matrix
from neuraleraser.cli import main
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import attach
from neuraleraser.errors import DataError, SiteError
from neuraleraser.fitting import Reference, fit
from neuraleraser.fitting.background import rows_without
from neuraleraser.fitting.trajectories import conditional_rows, pooled_features
from neuraleraser.sae.scores import margin_score, profile
from neuraleraser.sampling import generate
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site

S = Sampling(num_inference_steps=2, batch_size=2)
PROMPTS = ["a b", "c d", "e f", "g h", "i j", "k l"]
CONCEPT = Concept("x", "other", (Pair("x x", "b c"), Pair("x x d", "b c d"), Pair("e x x", "e b c")))


def sdxl() -> Any:
    return text_encoders.build("stable_diffusion_xl")


@pytest.mark.parametrize(
    ("build", "publish", "site", "format"),
    [
        (pipelines.stable_diffusion, saeuron, Site("unet.down_blocks.1.attentions.0"), "saeuron"),
        (sdxl, unbox, Site("unet.down_blocks.1.attentions.0", "update"), "sdxl-unbox"),
    ],
)
def test_published_dictionaries_become_erasers(
    build: Any, publish: Any, site: Site, format: str, tmp_path: Path
) -> None:
    pipe = build()
    x = activation_matrix(pipe, PROMPTS, range(6), [site], 64, S)[site]
    known = import_reference(pipe, publish(tmp_path / "theirs", x), site, PROMPTS, sampling=S)
    seen = known.sae.header["calibration"]
    assert known.sae.header["format"] == format and known.sae.header["k"] == 4
    assert 0 <= seen["disagreement"] < 1 and seen["l0"] > 0 and known.site == site
    # Its features profile ...
    pooled, _ = pooled_features(pipe, known.sae, site, ["x x", "b c"], [0, 0], S)
    stats = profile(conditional_rows(pooled)[:, :, 0], pooled.times, ["x", "no x"])
    assert float(margin_score(stats, "x").max()) > 0
    # ... and become an eraser, whose file says how far the thresholds differ.
    eraser = fit(
        pipe,
        CONCEPT,
        FitSettings(num_pictures=0, num_pairs=3, rank=2, steps=2),
        reference=known,
        sampling=S,
    )
    eraser.save(tmp_path / "x.safetensors")
    back = Eraser.load(tmp_path / "x.safetensors")
    assert back.header.sae == {"format": format, "k": 4, "calibration": seen}
    with attach(pipe, back):
        generate(pipe, ["x x"], [1], S)
    known.save(tmp_path / "ours")
    assert Reference.load(tmp_path / "ours").sae.header["calibration"] == seen


def test_what_shows_the_concept_is_no_background_for_it(tmp_path: Path) -> None:
    """Six prompts of other things, two of the concept: by their labels or by their words these are left out."""
    pipe, site = pipelines.stable_diffusion(), Site("unet.down_blocks.1.attentions.0")
    theirs = saeuron(tmp_path / "theirs", activation_matrix(pipe, PROMPTS, range(6), [site], 64, S)[site])
    prompts = [*PROMPTS, "x x", "x x d"]
    labels = [*[("grass",)] * 6, ("x", "grass"), ("x",)]
    for given, named in ((labels, labels), (None, [()] * 8)):
        known = import_reference(pipe, theirs, site, prompts, given, sampling=S)
        # Eight conditional rows, then the unconditional ones of every fifth image.
        assert known.prompts == [*prompts, prompts[0], prompts[5]]
        assert known.labels == [frozenset(of) for of in [*named, named[0], named[5]]]
        assert rows_without(CONCEPT, known.prompts, known.labels) == [0, 1, 2, 3, 4, 5, 8, 9]
        assert known.provenance.sae == "saeuron" and known.provenance.seeds == ((500, 507),)
    with pytest.raises(DataError, match="1 labels for 8 prompts"):
        import_reference(pipe, theirs, site, prompts, [()], sampling=S)


def test_what_does_not_fit(tmp_path: Path) -> None:
    pipe, site = pipelines.stable_diffusion(), Site("unet.down_blocks.1.attentions.0")
    theirs = saeuron(tmp_path / "theirs", torch.randn(64, 16))
    with pytest.raises(SiteError, match="is 32 wide"):
        import_reference(pipe, theirs, site, PROMPTS, sampling=S)
    with pytest.raises(DataError, match="no prompts"):
        import_reference(pipe, theirs, site, [], sampling=S)
    with pytest.raises(SiteError, match="pass the sites to edit"):
        import_reference(pipe, theirs, Site("unet.conv_in"), PROMPTS, sampling=S)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, site = pipelines.stable_diffusion(), Site("unet.down_blocks.1.attentions.0")
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    theirs = saeuron(tmp_path / "theirs", activation_matrix(pipe, PROMPTS, range(6), [site], 64, S)[site])
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\nx x\tx, grass")
    argv = ["reference", str(theirs), str(site), "--model", str(tmp_path / "model")]
    assert main([*argv, "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "64 features of saeuron" in said and "calibrated thresholds disagree with it on" in said
    made = Reference.load(tmp_path / "ours")
    assert made.sae.header["site"] == str(site) and made.labels[6] == {"x", "grass"} and not made.labels[0]
