"""SAeUron's features, chosen by timestep and blocked: what is chosen, what an eraser does with it, what is refused."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import random
from neuraleraser import concepts
from neuraleraser.activations import activation_matrix
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.concepts import Concept, Pair, canvas_concept
from neuraleraser.eraser import Eraser, attach
from neuraleraser.errors import ConceptError, FileError, SettingsError, SiteError
from neuraleraser.families.canvas import CANVAS
from neuraleraser.fitting import calibrate, fit_saeuron, unlabelled_sae
from neuraleraser.fitting.unlabelled_sae import active_features, sae_provenance, train_unlabelled_sae
from neuraleraser.sae import SAE, TrainSettings, pool_batches, train
from neuraleraser.sae.scores import Profile
from neuraleraser.sampling import generate
from neuraleraser.settings import SAeUronSettings, Sampling
from neuraleraser.sites import PROMPT_ROUTES, EditContext, Site, candidate_sites, default_block_site, record
from neuraleraser.vocabulary import Vocabulary

SITE = Site("unet.up_blocks.1.attentions.0")  # 16 wide
SAMPLING = Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=2)
CONCEPT = Concept("x", "style", (Pair("a x", "a"), Pair("b x", "b")))
OTHER = Concept("y", "style", (Pair("c d", "c"),))
FEW = SAeUronSettings(num_features=3, num_images=4, sae_images=4)
MODULE = import_module("neuraleraser.fitting.fit_saeuron")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def sae(pipe: Any) -> SAE:
    x = activation_matrix(pipe, ["a x", "c d"], [800, 801], [SITE], 128, SAMPLING)[SITE]
    return train(pool_batches(x, 64), TrainSettings(32, 4, 60, bf16=False), on_step=None)


@pytest.fixture(scope="module")
def eraser(pipe: Any, sae: SAE) -> Eraser:
    return fit_saeuron(pipe, CONCEPT, neighbours=[OTHER], sae=sae, site=SITE, settings=FEW, sampling=SAMPLING)


# The choice.


def firing(mean: Tensor, density: Tensor) -> Any:
    """mean and density [C, n] of concepts x, y, ... at one timestep."""
    profile = Profile(tuple("xyz"[: len(mean)]), torch.tensor([1.0]), mean[:, None], torch.zeros_like(mean)[:, None])
    return MODULE.Firing(profile, density)


def test_features_are_chosen_by_their_share_of_all_activation() -> None:
    mean = torch.tensor([[4.0, 1.0, 0.0, 5.0], [1.0, 3.0, 4.0, 2.0]])  # shares .4 .1 0 .5 against .1 .3 .4 .2
    alike = firing(mean, torch.full((2, 4), 0.1))
    chosen = [MODULE.choose_features_by_time(alike, "x", k)[0].tolist() for k in (1, 2, 4)]
    # Two have the same gap of 0.3; never one that fires less for the concept.
    assert [sum(c) for c in chosen] == [1, 2, 2] and chosen[2] == [True, False, False, True]
    assert MODULE.choose_features_by_time(alike, "y", 1)[0].tolist() == [False, False, True, False]


def test_what_fires_everywhere_is_not_chosen() -> None:
    """Everywhere else, that is: the concept's own feature may fill its own images."""
    mean = torch.tensor([[9.0, 1.0, 1.0], [1.0, 1.0, 2.0]])
    few, many = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0.9, 0.1, 0.1])
    own, common = (firing(mean, torch.stack(rows)) for rows in ((many, few), (few, many)))
    assert MODULE.choose_features_by_time(own, "x", 2)[0].tolist() == [True, False, False]
    with pytest.raises(ConceptError, match="no feature fires more for 'x'"):
        MODULE.choose_features_by_time(common, "x", 2)


def test_blocking_is_the_formula_and_never_the_sae_s_error() -> None:
    """With an SAE that reconstructs badly: decode(z') - decode(z), with z' = multiplier * mean * z above the mean."""
    d, n, t = 6, 10, 3
    w = torch.nn.functional.normalize(random(n, d, seed=1), dim=1)
    sae = SAE(random(n, d, seed=2), random(n, seed=3), w, random(d, seed=4), random(n, seed=5).abs())
    mean = random(2, t, n, seed=6).abs() * 2
    seen = Profile(("x", "y"), torch.tensor([10.0, 500.0, 900.0]), mean, mean)
    chosen = torch.zeros(t, n, dtype=torch.bool)
    chosen[0, [1, 4]] = chosen[2, [4, 7]] = True
    gate, correction = MODULE.block_features(sae, SITE, seen, "x", chosen, -1.5)
    x = 2 * random(t, 200, d, seed=7)
    z = sae.encode(x)
    assert float((sae(x) - x).norm() / x.norm()) > 0.5
    wanted = torch.zeros_like(x)
    for k, i in chosen.nonzero().tolist():
        fires = z[k, :, i] > mean[:, k, i].mean()
        assert 0 < int(fires.sum()) < int((z[k, :, i] > 0).sum())
        wanted[k] += (fires * (-1.5 * mean[0, k, i] - 1) * z[k, :, i])[:, None] * w[i]
    delta = correction.delta(x, seen.times)
    torch.testing.assert_close(delta, wanted, atol=1e-4, rtol=1e-4)
    quiet = (wanted == 0).all(-1)
    assert quiet[1].all() and 0 < int(quiet.sum()) < quiet.numel() and not delta[quiet].any()
    assert gate(x, seen.times).tolist() == [1, 0, 1]  # wide open, and shut where nothing is chosen
    assert gate.features.tolist() == [1, 4, 7]


# The eraser.


def test_an_eraser_of_saeuron_says_what_it_is(eraser: Eraser, tmp_path: Path) -> None:
    header, c = eraser.header, eraser.corrections[0]
    assert (header.method, header.concept, header.kind, header.seeds) == ("saeuron", "x", "style", (0, 7))
    assert header.settings == replace(FEW, multiplier=-1.0) and header.sampling == SAMPLING
    assert "start image" in header.routes and set(header.prompts) == {"a x", "b x", "c d"}
    assert header.reference is not None and header.reference.sae  # where its SAE was trained is not known
    assert (eraser.gate.site, eraser.gate.picture, c.site, c.KIND) == (SITE, True, SITE, "scaling")
    eraser.save(tmp_path / "x.safetensors")
    back = Eraser.load(tmp_path / "x.safetensors")
    assert back.header == header and back.gate.picture
    for name, value in c.tensors().items():
        torch.testing.assert_close(back.corrections[0].tensors()[name], value, atol=1e-2, rtol=1e-2)  # half precision


def test_it_acts_where_a_feature_fires_and_nowhere_else(pipe: Any, eraser: Eraser) -> None:
    base = generate(pipe, ["a x"], [5], SAMPLING)
    with attach(pipe, eraser) as trace:
        assert (generate(pipe, ["a x"], [5], SAMPLING) != base).any()
    assert trace.fired
    gate = replace(eraser.gate, threshold=torch.full_like(eraser.gate.threshold, 1e6))
    for quiet, strength in ((replace(eraser, gate=gate), 1.0), (eraser, 0.0)):
        with attach(pipe, quiet, strength):
            assert (generate(pipe, ["a x"], [5], SAMPLING) == base).all()


def changes(pipe: Any, eraser: Eraser) -> Tensor:
    """What is added at the site in the first step, by guidance branch [2, P, d]."""
    seen: list[Tensor] = []
    one = replace(SAMPLING, num_inference_steps=1, batch_size=1)

    def note(site: Site, x: Tensor, context: EditContext[None]) -> None:
        seen.append(x.clone())

    with record(pipe, [SITE], note):
        generate(pipe, ["a x"], [5], one)
    with attach(pipe, eraser), record(pipe, [SITE], note):
        generate(pipe, ["a x"], [5], one)
    return seen[1] - seen[0]


def test_an_image_gate_sees_both_guidance_branches(pipe: Any, eraser: Eraser) -> None:
    always = replace(eraser.gate, low=torch.zeros_like(eraser.gate.low), high=torch.full_like(eraser.gate.high, 1e-6))
    both = changes(pipe, replace(eraser, gate=always))
    of_prompts = replace(eraser.header, routes=PROMPT_ROUTES)
    drawn = changes(pipe, replace(eraser, gate=replace(always, picture=False), header=of_prompts))
    assert both[0].any() and both[1].any() and not drawn[0].any() and torch.equal(drawn[1], both[1])


def test_no_bounds_are_refitted(pipe: Any, eraser: Eraser) -> None:
    with pytest.raises(SettingsError, match="opens wherever a feature fires"):
        calibrate(pipe, eraser, CONCEPT, [OTHER], num_pairs=2)


# Its SAE.


def test_an_sae_is_made_once_and_goes_on_where_it_was_stopped(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unlabelled_sae, "TRAINING_STEPS", 30)
    monkeypatch.setattr(unlabelled_sae, "VECTORS_PER_IMAGE", 64)

    def make(folder: str, stop: float = 2.0) -> SAE:
        def progress(what: str, share: float) -> None:
            if share >= stop:
                raise KeyboardInterrupt

        path = tmp_path / folder / "sae.safetensors"
        return train_unlabelled_sae(pipe, SITE, ["a x", "c d", "b"], path, 4, SAMPLING, progress=progress)

    whole = make("whole")
    for stop in (0.5, 0.9):
        with pytest.raises(KeyboardInterrupt):
            make("stopped", stop)
    assert torch.equal(make("stopped").W_enc, whole.W_enc)
    assert (whole.n_features, whole.d_in, whole.header["settings"]["k"]) == (256, 16, 8)
    assert [p.name for p in (tmp_path / "stopped").iterdir()] == ["sae.safetensors"]
    kept = SAE.load(tmp_path / "stopped" / "sae.safetensors")
    assert sae_provenance(kept).prompts == ("a x", "c d", "b") and not sae_provenance(kept).sae
    kept.header["provenance"] = {"seeds": 5}
    with pytest.raises(FileError, match="provenance"):
        sae_provenance(kept)


def test_saeuron_s_k_at_its_width() -> None:
    assert (active_features(1280), active_features(64)) == (32, 8)


def test_without_an_sae_one_is_made_in_the_folder(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlabelled_sae, "TRAINING_STEPS", 5)
    monkeypatch.setattr(unlabelled_sae, "VECTORS_PER_IMAGE", 64)
    said: list[str] = []
    shares: list[float] = []

    def make() -> Eraser:
        return fit_saeuron(
            pipe,
            CONCEPT,
            neighbours=[OTHER],
            settings=FEW,
            sampling=SAMPLING,
            folder=tmp_path,
            announce=said.append,
            progress=lambda what, share: shares.append(share),
        )

    first, second = make(), make()
    assert len(said) == 1 and "Training an SAE of unet." in said[0] and shares[: len(shares) // 2]
    assert first.content_hash == second.content_hash and first.gate.site == default_block_site(pipe, "style")
    assert first.header.reference is not None and not first.header.reference.sae
    assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"]


# The site, the prompts, and what is refused.


def test_the_site_is_a_block_of_the_image_stream(pipe: Any) -> None:
    blocks = candidate_sites(pipe)
    assert default_block_site(pipe, "style") == blocks[-2]
    assert default_block_site(pipelines.stable_diffusion_3(), "style") in candidate_sites(
        pipelines.stable_diffusion_3()
    )


@pytest.fixture
def canvas(monkeypatch: pytest.MonkeyPatch) -> Vocabulary:
    """The canvas's family, whatever the pipeline."""
    for module in (MODULE, concepts):
        monkeypatch.setattr(module, "family_of", lambda pipe: CANVAS)
    return VOCABULARY


@pytest.mark.parametrize("name", ["Rust", "Trees"])
def test_what_is_sealed_is_not_drawn(name: str, canvas: Vocabulary) -> None:
    concept = canvas_concept(name)
    others = MODULE._others(None, concept, ())
    prompts, labels = MODULE._scored_prompts(None, concept, others, 40)
    closed = [phrase for sealed in canvas.sealed for phrase in canvas.phrases_of(sealed)]
    assert labels.count(name) == 40 and len(set(labels)) == len(others) + 1 > 13
    assert not any(phrase in prompt for prompt in prompts for phrase in closed)
    everything = [pair.positive for pair in concept.pairs]
    assert any(phrase in prompt for prompt in everything for phrase in closed)  # there was something to leave out


def test_what_cannot_be_is_refused_before_anything_is_drawn(
    pipe: Any, sae: SAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "measure_site", None)

    def refused(match: str, error: type[Exception], concept: Concept = CONCEPT, **given: Any) -> None:
        with pytest.raises(error, match=match):
            fit_saeuron(pipe, concept, **({"neighbours": [OTHER], "sae": sae, "sampling": SAMPLING} | given))

    refused("16 wide|32 wide", SiteError, site="unet.mid_block.attentions.0")
    labelled = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, {"site": str(SITE)})
    refused("the SAE reads unet.up_blocks.1", SiteError, sae=labelled, site="unet.up_blocks.0.attentions.0")
    refused("take one each", SettingsError, settings=SAeUronSettings(seed=990))
    refused("has no other concepts", ConceptError, Concept("x", "other", CONCEPT.pairs), neighbours=())
    refused("has no other concepts", ConceptError, neighbours=[CONCEPT])


@pytest.mark.parametrize(
    "wrong", [{"num_features": 0}, {"multiplier": float("nan")}, {"num_images": 0}, {"sae_images": 0}, {"seed": -1}]
)
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        SAeUronSettings(**wrong)
