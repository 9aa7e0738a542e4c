"""From a concept to an eraser on a model that has learnt nothing: what comes out holds together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.activations import activation_matrix
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.concepts import Concept, Pair
from neuraleraser.eraser import Eraser, attach
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.eraser.provenance import Provenance
from neuraleraser.errors import ConceptError, FileError, SettingsError
from neuraleraser.fitting import Reference, fit
from neuraleraser.fitting.detector import BUDGETS, gate_bounds
from neuraleraser.fitting.fit import _labels, _sample_pairs
from neuraleraser.fitting.reference import reference_from_sae
from neuraleraser.fitting.trajectories import SHARES, branches_as_rows, conditional_rows, pooled_features
from neuraleraser.sae import SAE
from neuraleraser.sampling import generate
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import DenoiserCall, Site, denoiser_calls, edit, edits_for
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS
from neuraleraser.vocabulary import labelled_prompts

AT = Site("unet.mid_block.attentions.0")
SAMPLING = Sampling(num_inference_steps=2, batch_size=2)
CONCEPT = Concept("x", "other", (Pair("a x", "a"), Pair("b x", "b"), Pair("c x", "c")))
BACKGROUND = [("a", frozenset({"Cats", "Rust"})), ("b", frozenset({"Dogs", "Cats"})), ("c", frozenset[str]())]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def known(pipe: Any) -> Reference:
    return reference_from_sae(pipe, *_sae(), BACKGROUND, SAMPLING)


def test_a_reference_there_and_back(known: Reference, tmp_path: Path) -> None:
    # Three images, the unconditional branch of one of them, one timestep in two.
    assert known.pooled.shape == (4, 1, 2, 40)
    assert known.prompts == ["a", "b", "c", "a"] and known.labels == [
        shown for _, shown in [*BACKGROUND, BACKGROUND[0]]
    ]
    known.save(tmp_path)
    back = Reference.load(tmp_path)
    assert back.site == AT and torch.equal(back.times, known.times)
    assert (back.prompts, back.labels, back.provenance) == (known.prompts, known.labels, known.provenance)
    assert back.provenance == Provenance(((500, 502),), ("a", "b", "c"), (), ("Cats", "Rust", "Dogs"))
    largest = float(known.pooled.max())
    torch.testing.assert_close(back.pooled.float(), known.pooled.float(), atol=largest / 200, rtol=1e-2)
    assert torch.equal(back.sae.W_enc, known.sae.W_enc)


def test_a_damaged_reference(known: Reference, tmp_path: Path) -> None:
    known.save(tmp_path)
    data = (tmp_path / "background.safetensors").read_bytes()
    (tmp_path / "background.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(FileError):
        Reference.load(tmp_path)


def test_the_whole_fit(pipe: Any, known: Reference, tmp_path: Path) -> None:
    base = generate(pipe, ["a x", "b"], [1, 2], SAMPLING)
    told: list[float] = []
    settings = FitSettings(num_pictures=0, num_pairs=3, rank=2, steps=2)
    eraser = fit(pipe, CONCEPT, settings, lambda what, share: told.append(share), reference=known, sampling=SAMPLING)
    assert told == sorted(told) and told[-1] == 1.0
    assert eraser.validation_error() is None and eraser.name == "x" and eraser.gate.site == AT
    assert eraser.header.seeds == (0, 5) and set(eraser.header.prompts) == {"a x", "b x", "c x", "a", "b", "c"}
    assert eraser.header.reference == known.provenance.in_short()
    assert eraser.header.seconds is not None and eraser.header.peak_bytes and eraser.header.peak_bytes > 2**20
    assert eraser.header.routes == ("named", "paraphrased")
    assert torch.equal(eraser.gate.rows, known.sae.W_enc[eraser.gate.features])
    (made,) = eraser.corrections  # one, for all that the blocks read
    assert eraser.gate.holds and eraser.gate.text_tokens == pipelines.WORDS
    assert (made.site, *made.also) == edits_for(pipe, AT) and made.tensors()["down"].shape == (1, pipelines.WIDTH, 2)
    eraser.save(tmp_path / "x.safetensors")
    with attach(pipe, Eraser.load(tmp_path / "x.safetensors")):
        generate(pipe, ["a x", "b"], [1, 2], SAMPLING)
    assert (generate(pipe, ["a x", "b"], [1, 2], SAMPLING) == base).all()


def test_the_gate_stays_shut_at_a_hard_negative(pipe: Any, known: Reference) -> None:
    """The same prompt opens the gate of a concept that does not name it as one."""
    settings = FitSettings(num_pictures=0, num_pairs=3, rank=2, steps=2)
    base = generate(pipe, ["d x", "a x"], [0, 1], SAMPLING)

    def changed(concept: Concept) -> list[bool]:
        eraser = fit(pipe, concept, settings, reference=known, sampling=SAMPLING)
        assert set(concept.hard_negatives) <= set(eraser.header.prompts)
        with attach(pipe, eraser):
            made = generate(pipe, ["d x", "a x"], [0, 1], SAMPLING)
        return [not bool((a == b).all()) for a, b in zip(made, base, strict=True)]

    assert changed(CONCEPT) == [True, True]
    assert changed(replace(CONCEPT, hard_negatives=("d x",)))[0] is False


def test_a_fit_keeps_to_the_damage_that_it_may_do(pipe: Any, known: Reference) -> None:
    """One in five rows of a large background stands out: the bound lies above all of it, or below half of it."""
    times = -(-300 // len(known.pooled))
    pooled = known.pooled.repeat(times, 1, 1, 1)
    pooled[::5] *= 8
    many = replace(known, pooled=pooled, prompts=[*known.prompts] * times, labels=[*known.labels] * times)
    plain = FitSettings(num_pictures=0, num_pairs=3, rank=2, steps=2)
    strict, loose = (
        fit(pipe, CONCEPT, replace(plain, false_openings=share), reference=many, sampling=SAMPLING)
        for share in (0.0, 0.5)
    )
    assert bool((loose.gate.low < strict.gate.low).any())
    assert strict.header.tradeoff == loose.header.tradeoff and strict.header.tradeoff[0][2] == 0.0


def test_a_fit_with_pictures(pipe: Any, known: Reference, tmp_path: Path) -> None:
    """Its eraser has an image gate, and says so; what it does to prompts is what it would do without."""
    told: list[float] = []
    plain = FitSettings(num_pictures=0, num_pairs=3, rank=2, steps=2)
    settings = replace(plain, num_pictures=8, guided_weight=2.0)
    eraser = fit(pipe, CONCEPT, settings, lambda what, share: told.append(share), reference=known, sampling=SAMPLING)
    assert told == sorted(told) and told[-1] == 1.0
    assert eraser.image_gate is not None and eraser.guided is not None and eraser.guided.weight == 4.0
    assert eraser.header.routes == ("named", "paraphrased", "start image", "inpainting")
    assert len(eraser.header.image_separation) == len(eraser.image_gate.times)
    assert eraser.header.seeds == (0, 11)  # those of the images that are corrected, too
    assert [row[0] for row in eraser.header.tradeoff] == list(BUDGETS)
    without = fit(pipe, CONCEPT, plain, reference=known, sampling=SAMPLING)
    assert without.image_gate is None and torch.equal(without.gate.low, eraser.gate.low)
    for name, x in without.corrections[0].tensors().items():
        assert torch.equal(eraser.corrections[0].tensors()[name], x)
    eraser.save(tmp_path / "x.safetensors")
    with attach(pipe, Eraser.load(tmp_path / "x.safetensors")):
        generate(pipe, ["a x", "b"], [1, 2], SAMPLING)


def test_a_pair_is_drawn_from_the_same_noise(pipe: Any, known: Reference) -> None:
    """With and without the concept: else the edit would learn to change one picture into another."""
    first: list[torch.Tensor] = []

    def on(call: DenoiserCall) -> None:
        drawn = call.state.shape[0] == 2 * SAMPLING.batch_size  # guided; the look at widths has one image
        if drawn and float(call.timestep.flatten()[0]) == float(pipe.scheduler.timesteps[0]):
            first.append(call.state.clone())

    with denoiser_calls(pipe, on):
        fit(
            pipe,
            CONCEPT,
            FitSettings(num_pictures=0, num_pairs=3, rank=1, steps=2),
            reference=known,
            sampling=SAMPLING,
        )
    assert len(first) >= 4, "two batches without, two with; what follows reads texts"
    assert torch.equal(first[0], first[2]) and torch.equal(first[1], first[3])
    assert not torch.equal(first[0][0], first[0][1]) and not torch.equal(first[0][0], first[1][0])


def test_the_edit_brings_predictions_to_the_matched_prompt_s(pipe: Any, known: Reference) -> None:
    settings = FitSettings(num_pictures=0, num_pairs=3, rank=8, steps=2)
    eraser = fit(pipe, CONCEPT, settings, reference=known, sampling=SAMPLING)
    (correction,) = eraser.corrections
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def predictions(prompts: list[str], edits: dict[Site, Any]) -> torch.Tensor:
        text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        with edit(pipe, edits), torch.no_grad():
            return pipe.unet(noise, 500, text, return_dict=False)[0]

    shown, plain = [p.positive for p in CONCEPT.pairs], [p.negative for p in CONCEPT.pairs]
    added = {site: lambda x, call: correction.delta(x, call.timestep) for site in (correction.site, *correction.also)}
    want = predictions(plain, {})
    before, after = ((predictions(shown, e) - want).square().mean() for e in ({}, added))
    assert after < 0.5 * before
    assert eraser.header.text_left is not None and 0 < eraser.header.text_left < 0.5


def test_rows_that_show_the_concept_are_no_background(pipe: Any, known: Reference) -> None:
    """By label or by the words of their prompts: with them the reference makes the same gate as without."""
    settings = FitSettings(num_pictures=0, num_pairs=3, rank=1, steps=2)

    def gate(reference: Reference) -> Any:
        return fit(pipe, CONCEPT, settings, reference=reference, sampling=SAMPLING).gate

    want = gate(known)
    loud = torch.full_like(known.pooled[:2], float(known.pooled.max()) * 10)  # as rows of the concept itself read
    pooled = torch.cat([known.pooled, loud])
    named = [*known.labels, frozenset({"x", "Cats"}), frozenset({"x"})]
    nameless = [frozenset[str]()] * len(pooled)
    for labels, prompts in (
        (named, [*known.prompts, "hidden", "away"]),
        (nameless, [*known.prompts, "a x", "an X, b"]),
    ):
        found = gate(replace(known, pooled=pooled, labels=labels, prompts=prompts))
        for name in ("features", "weight", "low", "high"):
            assert torch.equal(getattr(found, name), getattr(want, name)), name
    with pytest.raises(ConceptError):  # as background they leave no feature that tells the concept
        gate(replace(known, pooled=pooled, labels=nameless, prompts=[*known.prompts, "b", "c"]))


def test_the_concept_s_matched_prompts_are_background(pipe: Any) -> None:
    """Of both guidance branches, beside the reference's: the gate's bounds lie above what they show."""
    site = Site(f"{AT.path}.transformer_blocks.0.attn2")  # reads the prompt, and the image a little
    four = Sampling(num_inference_steps=4, batch_size=2)
    concept = Concept("x", "other", tuple(Pair(f"x x x x {c}", f"b c d e {c}") for c in "abc"))
    pairs = _sample_pairs(concept.pairs, 3, 0)
    prompts = [[p.negative for p in pairs], [p.positive for p in pairs]]
    plain, shown = (activation_matrix(pipe, p, [0, 1, 2], [site], 64, four)[site].mean(0) for p in prompts)
    w = torch.nn.functional.normalize(torch.stack([shown - plain, plain - shown]), dim=1)
    sae = SAE(w, torch.zeros(2), w, (plain + shown) / 2, torch.zeros(2))
    known = reference_from_sae(pipe, sae, site, [("b c", frozenset()), ("d e", frozenset())], four)
    settings = FitSettings(num_pictures=0, num_pairs=3, rank=1, steps=2)
    gate = fit(pipe, concept, settings, reference=known, sampling=four).gate
    off, on = (pooled_features(pipe, sae, site, p, [0, 1, 2], four)[0] for p in prompts)
    at = [off.times.tolist().index(t) for t in known.times.tolist()]

    def evidence(pooled: torch.Tensor) -> torch.Tensor:
        return pooled[:, :, SHARES.index(gate.share)][..., gate.features].float() @ gate.weight

    own, matched = evidence(conditional_rows(on)[:, at]), evidence(branches_as_rows(off.values)[:, at])
    (low, high), alone = (
        gate_bounds(own, lacks) for lacks in (torch.cat([evidence(known.pooled), matched]), evidence(known.pooled))
    )
    assert not bool((low == SHUT_BOUND).any()), "a gate that opens"
    torch.testing.assert_close(gate.low, low.flip(0))
    torch.testing.assert_close(gate.high, high.flip(0))
    assert not torch.allclose(alone[0].flip(0), gate.low, rtol=5e-5), "else these prompts would not matter here"


def test_no_reference_is_taken_for_another_pipeline_s(pipe: Any, known: Reference) -> None:
    drawn: list[DenoiserCall] = []
    with denoiser_calls(pipe, drawn.append), pytest.raises(SettingsError, match="no reference ships for this Stable"):
        fit(pipe, CONCEPT)
    assert not drawn
    w = torch.nn.functional.normalize(random(40, 16), dim=1)
    narrow = SAE(w, random(40), w, random(16), torch.ones(40))
    with (
        denoiser_calls(pipe, drawn.append),
        pytest.raises(SettingsError, match="is 32 wide, and the reference's SAE takes 16"),
    ):
        fit(pipe, CONCEPT, reference=replace(known, sae=narrow), sampling=SAMPLING)
    assert len(drawn) <= 1, "one step, to see how wide the site is"


def test_what_stands_beside_the_concept_is_learnt_from(pipe: Any, known: Reference) -> None:
    beside = (Pair("x and y", "y"), Pair("y and x", "y"), Pair("x and z", "z"), Pair("x and w", "w"))
    settings = FitSettings(num_pictures=0, num_pairs=3, num_context_pairs=2, rank=2, steps=2)
    alone = fit(pipe, CONCEPT, settings, reference=known, sampling=SAMPLING)
    both = fit(pipe, replace(CONCEPT, context_pairs=beside), settings, reference=known, sampling=SAMPLING)
    assert both.header.seeds == (0, 7)  # two prompts of what stays, beside those without the concept
    assert both.header.prompts[6:] == ("x and y", "y", "y and x", "x and z", "z")
    assert both.gate.features.tolist() == alone.gate.features.tolist()  # the gate is chosen by the concept alone
    assert not torch.equal(both.corrections[0].tensors()["up"], alone.corrections[0].tensors()["up"])


def _sae() -> tuple[SAE, Site]:
    w = torch.nn.functional.normalize(random(40, 32, seed=1), dim=1)
    return SAE(w, random(40, seed=2), w, 0.1 * random(32, seed=3), torch.full((40,), 0.1)), AT


def test_the_background_shows_everything_in_seen_words_only() -> None:
    from neuraleraser.canvas import words

    made = labelled_prompts(VOCABULARY, 400, seed=0)
    assert made == labelled_prompts(VOCABULARY, 400, seed=0) != labelled_prompts(VOCABULARY, 400, seed=1)
    assert {name for _, shown in made for name in shown} == {*words.STYLES, *words.OBJECTS}
    assert all(len(shown & set(words.STYLES)) == 1 and len(shown) <= 3 for _, shown in made)
    held_out = [p for n in (*words.OBJECTS, *words.STYLES) for p in words.VOCABULARY.phrases_of(n)[HELD_OUT_PHRASINGS]]
    assert not [prompt for prompt, _ in made if any(h in prompt for h in held_out)]


def test_labels_of_features_are_kept_for_the_reader() -> None:
    """Of an SAE that was set with labels the first features are those labels' own."""
    sae, _ = _sae()
    tensors = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)
    labelled = SAE(*tensors, header={"labels": ["x", "y"]})
    assert _labels(labelled, torch.tensor([1, 7])) == {"labels": ["y"]}
    assert _labels(labelled, torch.tensor([2])) == {} == _labels(sae, torch.tensor([0]))
