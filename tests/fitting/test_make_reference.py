"""A reference that a pipeline gets from its own images of a concept and its neighbours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from helpers import pipelines
from neuraleraser import attach
from neuraleraser.concepts import Concept, Pair, default_neighbours
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting import fit
from neuraleraser.fitting.make_reference import estimate_cost, make_reference, own_prompts
from neuraleraser.sampling import generate
from neuraleraser.settings import STREAM_SEEDS, FitSettings, Sampling
from neuraleraser.sites import Site, default_gate_site

S = Sampling(num_inference_steps=2, batch_size=2)
SITE = Site("unet.up_blocks.0.attentions.0")
X = Concept("x", "object", (Pair("x x", "b c"), Pair("x d", "b d"), Pair("e x", "e b")))
Y = Concept("y", "object", (Pair("y y", "b c"), Pair("y d", "b d")))


def test_prompts_and_what_they_show():
    cat, dog, bird = (Concept.from_phrase(p) for p in ("a cat", "a dog", "a bird"))
    made = own_prompts(cat, [dog, bird], 200, 1)
    assert made == own_prompts(cat, [dog, bird], 200, 1) != own_prompts(cat, [dog, bird], 200, 2)
    shown = Counter(name for _, names in made for name in names)
    assert shown["a cat"] > shown["a dog"] > 30 and shown["a bird"] > 30
    assert sum(not names for _, names in made) == 40
    for prompt, names in made:
        assert {c.name for c in (cat, dog, bird) if c.name in prompt} == set(names)
    assert 40 < sum(len(names) == 2 for _, names in made) < 120, "two objects in about half of those that show one"
    style, other = Concept.from_phrase("Van Gogh style"), Concept.from_phrase("cartoon style")
    assert all(len(names) < 2 for _, names in own_prompts(style, [other], 100, 1))
    alone = own_prompts(cat, [], 10, 1)
    assert [names for _, names in alone] == [("a cat",), ("a cat",), (), (), ()] * 2


def test_neighbours_that_ship():
    def names(phrase: str) -> set[str]:
        return {c.name for c in default_neighbours(Concept.from_phrase(phrase))}

    assert "a dog" in names("a cat") and "a cat" not in names("a cat") and "a house" not in names("a cat")
    assert "Snoopy" in names("Mickey Mouse") and "Mickey Mouse" not in names("Mickey Mouse")
    assert "Claude Monet style" in names("Van Gogh style") and "Claude Monet style" not in names("Monet style")
    assert names("a teapot") >= {"a cat", "a man", "a car"}  # in no group: some of each
    assert all(1 < len(names(p)) <= 8 for p in ("a cat", "a teapot", "a naked woman", "Van Gogh style"))
    assert default_neighbours(Concept("z", "other", (Pair("a", "b"),))) == ()


def test_the_site_and_the_sampling_of_a_family():
    sd = pipelines.stable_diffusion()
    assert default_gate_site(pipelines.flux(), "style").path.startswith("transformer.")
    assert default_gate_site(sd, "object").path.startswith("unet.")
    assert default_sampling(sd) == Sampling(num_inference_steps=50, guidance_scale=7.5, batch_size=4)
    assert default_sampling(sd, 3, 1.0, 2) == Sampling(num_inference_steps=3, guidance_scale=1.0, batch_size=2)


def test_made_from_nothing_then_found_again(tmp_path: Path):
    pipe, told = pipelines.stable_diffusion(), list[float]()
    known = make_reference(
        pipe, X, [Y], SITE, tmp_path, num_images=12, sampling=S, progress=lambda _, share: told.append(share)
    )
    assert told == sorted(told) and told[-1] == 1
    assert known.sae.header["labels"] == ["x", "y"] and known.site == SITE
    x, y, none = frozenset("x"), frozenset("y"), frozenset()
    assert {x, y, x | y, none} >= set(known.labels) >= {x, y, none}
    made = known.provenance
    assert made.labels == ("x", "y") and set(known.prompts) < set(made.prompts)
    assert made.seeds[1:] == ((500, 505),) and made.seeds[0] == (STREAM_SEEDS[0], STREAM_SEEDS[-1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["background.safetensors", "sae.safetensors"]
    again = make_reference(pipe, X, [Y], SITE, tmp_path, num_images=12, sampling=S)  # opened, not made
    assert torch.equal(again.sae.W_enc, known.sae.W_enc)
    for near, site in (([], SITE), ([Y], Site("unet.mid_block.attentions.0"))):
        with pytest.raises(SettingsError, match="holds a reference of x, y at unet"):
            make_reference(pipe, X, near, site, tmp_path, num_images=12, sampling=S)
    eraser = fit(pipe, X, FitSettings(num_pictures=0, num_pairs=4, steps=2), reference=known, sampling=S)
    with attach(pipe, eraser):
        generate(pipe, ["x x"], [0], S)


def test_interrupted_it_goes_on_and_ends_in_the_same_bits(tmp_path: Path):
    pipe = pipelines.stable_diffusion()

    def make(name: str, stop: float = 2.0) -> torch.Tensor:
        def say(what: str, share: float) -> None:
            if share >= stop:
                raise KeyboardInterrupt

        return make_reference(pipe, X, [Y], SITE, tmp_path / name, num_images=8, sampling=S, progress=say).sae.W_enc

    whole = make("whole")
    for stop in (0.3, 0.62, 0.7):
        with pytest.raises(KeyboardInterrupt):
            make("pieces", stop)
        assert not (tmp_path / "pieces" / "background.safetensors").exists()
    assert torch.equal(make("pieces"), whole)


def test_what_cannot_be_made_is_refused(tmp_path: Path):
    pipe = pipelines.stable_diffusion()
    with pytest.raises(ConceptError, match="x is named twice"):
        make_reference(pipe, X, [Y, X], SITE, tmp_path, num_images=8, sampling=S)

    def stop(what: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_reference(pipe, X, [Y], SITE, tmp_path, num_images=8, sampling=S, progress=stop)
    with pytest.raises(SettingsError, match="holds a stream of"):
        make_reference(pipe, X, [], SITE, tmp_path, num_images=8, sampling=S)


def test_what_it_will_take():
    pipe = pipelines.stable_diffusion()
    few, many = (estimate_cost(pipe, SITE, images, S) for images in (4, 400))
    assert 0 < few.seconds < many.seconds and many.bytes == 100 * few.bytes
