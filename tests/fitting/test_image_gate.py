"""The picture's part of a fit: states of pictures, features learnt on them, bounds by image, and what `fit` returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipelines
from helpers.erasers import make_eraser, random
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import attach
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.families.opening import has_image_to_image, image_to_image
from neuraleraser.fitting.detector import FALSE_OPENINGS
from neuraleraser.fitting.image_gate import (
    corrected_states,
    differing_words,
    fit_guided,
    fit_image_gate,
    fit_image_part,
    image_bounds,
)
from neuraleraser.fitting.learnt_features import evidence_of, learn_features, most_mistaken
from neuraleraser.fitting.noised_pictures import NoisedStates, in_half_precision, noised_states
from neuraleraser.fitting.pictures import Pictures
from neuraleraser.sampling import generate
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import DenoiserCall, Site, default_image_site, denoiser_calls, record

AT = Site("unet.mid_block.attentions.0")
S = Sampling(num_inference_steps=2, batch_size=3)
TIMES = torch.tensor([900.0, 500.0, 100.0])
GRID = (4, 4)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def pictures(n: int = 5, seed: int = 0) -> Pictures:
    images = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    return Pictures(images, ["a", "", "b c", "d", ""][:n], range(seed, seed + n))


def test_states_are_those_of_a_start_image(pipe: Any) -> None:
    """At each level: the first forward of image-to-image at that strength, of the same picture, prompt and noise."""
    shown, levels = pictures(), (0.9, 0.5, 0.1)
    found = noised_states(pipe, AT, shown, levels=levels, batch_size=2)
    assert found.values.shape == (5, 3, 16, 32) and found.grid == (4, 4)
    assert bool((found.times.diff() < 0).all())
    start = image_to_image(pipe)
    for row, level in ((0, 0), (3, 1), (4, 2)):
        seen: list[torch.Tensor] = []
        with record(pipe, [AT], lambda site, x, context, seen=seen: seen.append(x)), torch.no_grad():
            start(
                shown.prompts[row],
                image=torch.from_numpy(shown.images[row : row + 1]).permute(0, 3, 1, 2) / 255,
                strength=levels[level],
                num_inference_steps=100,
                guidance_scale=1.0,
                generator=[torch.Generator().manual_seed(shown.seeds[row])],
                output_type="latent",
            )
        torch.testing.assert_close(found.values[row, level].float(), seen[0][0], rtol=1e-2, atol=1e-2)


def test_each_picture_and_level_costs_one_forward_and_pictures_are_encoded_once(pipe: Any) -> None:
    encoded: list[int] = []
    plain = pipe.vae.encoder.forward
    pipe.vae.encoder.forward = lambda x: encoded.append(len(x)) or plain(x)
    calls: list[DenoiserCall] = []
    try:
        with denoiser_calls(pipe, calls.append):  # no forward ends
            noised_states(pipe, AT, pictures(), levels=(0.9, 0.5, 0.1), batch_size=2)
    finally:
        del pipe.vae.encoder.forward
    assert not calls and sum(encoded) == 5
    assert "encode" not in vars(pipe.vae)
    pipe.vae.encode = own = pipe.vae.encode  # somebody else's, in place of the class's
    try:
        noised_states(pipe, AT, pictures(), levels=(0.9,), batch_size=5)
        assert vars(pipe.vae)["encode"] is own
    finally:
        del pipe.vae.encode


def test_pictures_take_some_levels_by_turns(pipe: Any) -> None:
    """What is seen of a picture at its levels is what is seen of it at all of them."""
    shown, levels = pictures(), (0.9, 0.5, 0.1)
    every = noised_states(pipe, AT, shown, levels=levels, batch_size=2)
    some = noised_states(pipe, AT, shown, levels=levels, each=2, batch_size=2)
    assert some.values.shape == (5, 2, 16, 32) and torch.equal(some.times, every.times)
    assert some.levels.tolist() == [[0, 1], [1, 2], [0, 2], [0, 1], [1, 2]]
    wanted = every.values.gather(1, some.levels[..., None, None].expand(-1, -1, 16, 32))
    torch.testing.assert_close(some.values, wanted, rtol=1e-2, atol=1e-2)
    assert some.of_level(some.levels, 2).tolist() == [2, 2, 2]


def test_a_scheduler_of_few_steps_is_taken_as_far_as_it_goes() -> None:
    pipe = pipelines.stable_diffusion()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    found = noised_states(pipe, AT, pictures(), levels=(0.8, 0.4, 0.1), batch_size=5)
    assert found.values.shape[:2] == (5, 3) and bool((found.times.diff() < 0).all())


def test_activations_that_half_precision_does_not_hold_are_named() -> None:
    assert in_half_precision(torch.tensor([65504.0]), AT).dtype == torch.half
    with pytest.raises(SettingsError, match=r"unet\.mid_block\.attentions\.0.* reach 7e\+04.*num_pictures=0"):
        in_half_precision(torch.tensor([1.0, -70_000.0]), AT)


def test_a_form_without_strength_takes_no_start_image_of_a_gate() -> None:
    assert has_image_to_image(pipelines.stable_diffusion())
    assert not has_image_to_image(pipelines.flux_kontext())


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
        np.zeros((2, 16, 16, 4), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match="uint8" if len(wrong) else "0 pictures, .*and some"):
        Pictures(wrong, [""] * len(wrong), range(len(wrong)))


def test_as_many_prompts_as_pictures() -> None:
    with pytest.raises(DataError, match="2 pictures, 1 prompts"):
        Pictures(np.zeros((2, 16, 16, 3), np.uint8), [""], range(2))


def planted(n: int, shows: bool, seed: int) -> NoisedStates:
    """Random states; those that show the concept have a pattern of two neighbours somewhere."""
    x = random(n, 3, 16, 6, seed=seed)
    if shows:
        rng = np.random.default_rng(seed)
        for i in range(n):
            row, column = rng.integers(4), rng.integers(3)
            place = 4 * row + column
            x[i, :, place, 0] += 5
            x[i, :, place + 1, 1] += 5
    return NoisedStates(x.half(), torch.arange(3).expand(n, 3), TIMES, GRID)


def test_features_find_a_pattern_of_neighbours() -> None:
    shows, lacks = planted(80, True, 1), planted(160, False, 2)
    found = learn_features(shows, lacks, 1 / 16, steps=600)
    on, off = (evidence_of(found, planted(60, s, 3)) for s in (True, False))
    assert float((on[:, None] > off[None]).float().mean()) > 0.95
    assert found.window == 3
    gate, seen, doubt = fit_image_gate(AT, "object", shows, lacks, planted(80, False, 4), FitSettings())
    assert gate.picture and gate.share == 1 / 64 and seen.shape == (4,)
    lacking = gate.evidence(planted(200, False, 5).values[:, 2].float(), GRID)
    assert 0.03 < float((lacking > doubt).float().mean()) < 0.25
    x, t = planted(4, True, 9).values[:, 1].float(), TIMES[1].expand(4)
    z = gate.activations(x, GRID)
    torch.testing.assert_close(gate.evidence(x, GRID), z.amax(1) @ gate.weight)
    assert gate(x, t, GRID).shape == (4,)


def test_a_gate_has_the_evidence_it_was_fitted_with() -> None:
    shows, lacks = planted(40, True, 1), planted(80, False, 2)
    gate, seen, _ = fit_image_gate(AT, "style", shows, lacks, planted(80, False, 4), FitSettings())
    flat = shows.values.flatten(0, 1).float()
    opening = gate(flat, TIMES.repeat(40), GRID).view(40, 3)
    torch.testing.assert_close((opening > 0).float().mean(0), seen[1:])
    assert float(seen[0]) == 0 and gate.times.tolist() == [100, 500, 900, 1300]
    assert not bool(gate(flat, torch.full((len(flat),), 1101.0), GRID).any()), "shut beyond the noisiest level"


def test_what_is_mistaken_most_is_learnt_from_too() -> None:
    shows, lacks = planted(40, True, 1), planted(40, False, 2)
    found, others = learn_features(shows, lacks, 1 / 16, steps=110), planted(50, False, 3)
    hard = most_mistaken(found, others, 10)
    assert hard.values.shape == (10, 3, 16, 6) and hard.grid == GRID
    of_all = evidence_of(found, others).amax(1).sort(descending=True).values  # at one level is enough
    torch.testing.assert_close(evidence_of(found, hard).amax(1).sort(descending=True).values, of_all[:10])
    both = lacks.joined(hard)
    assert torch.equal(both.values[40:], hard.values) and torch.equal(both.levels[:40], lacks.levels)


def test_a_corrected_image_keeps_the_gate_shut_and_one_that_is_not_does_not_count() -> None:
    """What the image stream holds of the text of a corrected prompt is no picture of the concept."""
    shows, lacks, others = planted(40, True, 1), planted(80, False, 2), planted(80, False, 4)
    plain, _, _ = fit_image_gate(AT, "object", shows, lacks, others, FitSettings())
    seen_noisy = planted(12, True, 5)
    seen_noisy.values[:, 2] = 0  # seen in noise, gone at the end
    gate, seen, _ = fit_image_gate(AT, "object", shows, lacks, others, FitSettings(), seen_noisy)
    x = seen_noisy.values.flatten(0, 1).float()
    assert bool(plain(x, TIMES.repeat(12), GRID).any())
    assert not bool(gate(x, TIMES.repeat(12), GRID).any())
    assert float(seen[3]) > 0.9  # at the cleanest level nothing was corrected
    allowed = FitSettings(false_openings=0.2)
    for states in (None, seen_noisy):
        loose, strict = (
            fit_image_gate(AT, "object", shows, lacks, others, s, states)[0] for s in (allowed, FitSettings())
        )
        assert bool((loose.low < strict.low).any())
    still, _, _ = fit_image_gate(AT, "object", shows, lacks, others, FitSettings(), planted(12, True, 5))
    assert torch.equal(still.low, plain.low)


@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(0.1, 50))
def test_no_gate_opens_at_what_it_must_not(seed: int, t: int, scale: float) -> None:
    lacks, above = random(100, t, seed=seed), scale * random(t, seed=seed + 1)
    low, high = image_bounds(list((lacks[:50] + 20).T), lacks, above)
    assert bool((low >= above.clamp(min=0)).all()) and bool((high > low).all())
    assert bool((low[above < 0] == image_bounds(list((lacks[:50] + 20).T), lacks)[0][above < 0]).all())


def test_corrected_states_are_those_of_the_images_an_eraser_makes(pipe: Any) -> None:
    times = torch.tensor([700.0, 100.0])
    like = NoisedStates(torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, dtype=torch.long), times, GRID)
    site = default_image_site(pipe)
    eraser = make_eraser()
    s = replace(S, num_inference_steps=5)
    seen: list[tuple[float, torch.Tensor]] = []
    with attach(pipe, eraser), record(pipe, [site], lambda at, x, c: seen.append((float(c.timestep[0]), x))):
        generate(pipe, ["a", "b"], [0, 1], s)
    states = corrected_states(pipe, eraser, ["a", "b"], [0, 1], s, like)
    taken = [(time, x.view(-1, 3, *x.shape[1:])) for time, x in seen if time < 1000]
    assert states.values.shape[:2] == (2, 2 * len(taken))
    for i, (time, x) in enumerate(taken):
        for branch in (0, 1):
            at = branch * len(taken) + i
            torch.testing.assert_close(states.values[:, at].float(), x[branch, :2], rtol=1e-2, atol=1e-2)
            assert int(states.levels[1, at]) == int(time < 400)


def test_without_a_grid_each_feature_reads_its_own_position() -> None:
    shows, lacks = (replace(planted(10, s, 4), grid=None) for s in (True, False))
    found = learn_features(shows, lacks, 1.0, steps=15, batch=8)
    assert found.window == 1 and found.rows.shape == (64, 6)


def test_learning_is_deterministic() -> None:
    shows, lacks = planted(10, True, 1), planted(20, False, 2)
    one, two = (learn_features(shows, lacks, 1.0, steps=15, batch=8, seed=3) for _ in range(2))
    assert torch.equal(one.rows, two.rows) and torch.equal(one.weight, two.weight)


@given(st.integers(0, 10_000), st.integers(1, 6), st.floats(0.1, 100))
def test_bounds_keep_pictures_without_the_concept_shut(seed: int, t: int, scale: float) -> None:
    lacks = scale * random(300, t, seed=seed)
    shows = list((lacks[:50] + 8 * scale).T)
    low, high = image_bounds(shows, lacks)
    opened = (lacks > low).any(1).float().mean()
    assert float(opened) <= FALSE_OPENINGS + 1 / 300
    assert bool((high > low).all()) and bool((low >= 0).all())
    assert bool((image_bounds(list(lacks.T), lacks)[0] >= SHUT_BOUND).all())  # no telling them apart
    looser, _ = image_bounds(shows, lacks, None, 0.1)
    assert float(opened) < float((lacks > looser).any(1).float().mean()) <= 0.1 + 1e-6


def test_a_level_that_cannot_tell_is_shut_and_asks_nothing_of_the_others() -> None:
    """Its outliers do not raise the bounds of the levels that can."""
    lacks = random(400, 2, seed=1)
    lacks[:, 0] *= 1 + 20 * (random(400, seed=2) > 2)  # heavy tails
    on = [lacks[:50, 0], lacks[:50, 1] + 6]
    low, _ = image_bounds(on, lacks)
    alone, _ = image_bounds(on[1:], lacks[:, 1:])
    assert float(low[0]) >= SHUT_BOUND and float(low[1]) == float(alone[0]) < 6


def test_the_few_pictures_that_stand_out_most_are_given_up() -> None:
    """They do not raise the bounds at any level, however far they stand out."""
    lacks = random(400, 3, seed=4)
    on = [lacks[:50, level] + 6 for level in range(3)]
    most = lacks.amax(0)
    lacks[7, 0] += 40
    lacks[9, 2] += 40
    far, _ = image_bounds(on, lacks)
    kept = torch.cat([lacks[:7], lacks[8:9], lacks[10:]])
    assert bool((far > kept.amax(0)).all()), "there is a margin"
    assert bool((far < most + 0.5).all())
    assert float((lacks > far).any(1).float().mean()) <= FALSE_OPENINGS


@pytest.mark.parametrize(
    ("positive", "negative", "words"),
    [
        ("a cat in Van Gogh style", "a cat", ("in Van Gogh style", "")),
        ("Van Gogh style, a cat", "a cat", ("Van Gogh style,", "")),
        ("a cat in a forest", "an empty scene in a forest", ("a cat", "an empty scene")),
        ("a cat", "a dog", ("cat", "dog")),
        ("a cat", "", ("a cat", "")),
    ],
)
def test_what_differs_between_two_prompts(positive: str, negative: str, words: tuple[str, str]) -> None:
    assert differing_words(Pair(positive, negative)) == words


def test_the_guided_correction_holds_both_prompts(pipe: Any) -> None:
    concept = Concept("x", "other", (Pair("a x y", "a b y"),))
    guided = fit_guided(pipe, concept, S, 2.5)
    assert guided.weight == 2.5 and guided.prompts == ("b", "x")
    for text, prompt in ((guided.without, "b"), (guided.shown, "x")):
        ids = pipe.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        torch.testing.assert_close(text["encoder_hidden_states"], pipe.text_encoder(ids)[0])


def test_a_picture_part_of_generated_pictures(pipe: Any) -> None:
    concept = Concept("x", "object", (Pair("a x", "a"), Pair("b x", "b")))
    told: list[float] = []
    part = fit_image_part(pipe, concept, make_eraser(), FitSettings(num_pictures=8), S, told.append)
    assert part.gate.picture and part.gate.window == 3 and part.seen.shape == (6,)
    assert told == sorted(told) and told[-1] == 1.0
    assert part.guided.weight == 10.0, "twice a style's"
    # Of an object 8 pictures; 8 others, 8 that are looked through, 4 that set the bounds; two that are corrected.
    assert len(part.shows.images) == 8 and len(part.prompts) == 8 + 20 + 2


def test_rendered_pictures_of_an_object_are_twice_as_many(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neuraleraser.fitting.image_gate.has_renders", lambda pipe, concept: True)
    pairs = (Pair("a x", "a"), Pair("b x", "b"))
    for kind, shown, others in (("object", 16, 8 + 16 + 4), ("style", 8, 8 + 4)):
        concept = Concept("x", kind, pairs)
        part = fit_image_part(pipe, concept, make_eraser(), FitSettings(num_pictures=8), S, lambda share: None)
        assert len(part.shows.images) == shown and len(part.prompts) == shown + others + 2
