"""Concept Steerers' vectors and edits are those of loops and hooks by hand; the negative prompt moves the other way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.errors import EraserNotAppliedError, SettingsError
from neuraleraser.evaluation.method import Method
from neuraleraser.methods import ConceptSteerers
from neuraleraser.sae import SAE, TrainSettings
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

S = Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=1)
LAYER = "text_encoder.encoder.layers.0"
PHRASES = ["x", "y z"]
FEW = TrainSettings(n_features=24, k=4, steps=5, init_vectors=64, architecture="topk")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def sae() -> SAE:
    rows = torch.nn.functional.normalize(random(12, 16, seed=1), dim=1)
    parts = (random(12, 16, seed=4), random(12, seed=2) / 4, rows, random(16, seed=3) / 4, torch.full((12,), 0.8))
    return SAE(*parts, {"site": LAYER})


def layer(pipe: Any) -> torch.nn.Module:
    return dict(pipe.text_encoder.named_modules())[LAYER.removeprefix("text_encoder.")]


def activations(pipe: Any, text: str) -> Tensor:
    """What the layer makes of a text [tokens, d]."""
    found: list[Tensor] = []

    def keep(m: Any, a: Any, out: Any) -> None:
        found.append(out[0].detach())

    hook = layer(pipe).register_forward_hook(keep)
    pipe.encode_prompt([text], "cpu", 1, False)
    hook.remove()
    return found[0]


def test_vectors_are_what_loops_make(pipe: Any, sae: SAE) -> None:
    for every in (True, False):
        method = ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae, every_feature=every)
        wanted = torch.zeros(pipelines.WORDS, 16, dtype=torch.float64)
        fired = 0
        for text in PHRASES:
            for p, x in enumerate(activations(pipe, text).double()):
                for i in range(12):
                    pre = float((x - sae.b_dec.double()) @ sae.W_enc[i].double() + sae.b_enc[i])
                    if pre > (0 if every else float(sae.threshold[i])):
                        wanted[p] += pre * sae.W_dec[i].double() / len(PHRASES)
                        fired += 1
        assert 0 < fired < 2 * 12 * pipelines.WORDS
        torch.testing.assert_close(method.vectors.double(), wanted, atol=1e-5, rtol=1e-5)


def test_it_is_what_hooks_do_by_hand(pipe: Any, sae: SAE) -> None:
    method = ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae, strength=-2.0)
    base = generate(pipe, ["a b", "c"], [5, 6], S)
    for negative in (True, False):
        signs: list[float] = []

        def by_hand(m: Any, a: Any, out: Tensor, signs: list[float] = signs, negative: bool = negative) -> Tensor:
            signs.append((-1.0 if negative else 0.0) if len(signs) % 2 else 1.0)
            return out - 2.0 * signs[-1] * method.vectors

        hook = layer(pipe).register_forward_hook(by_hand)
        expected = generate(pipe, ["a b", "c"], [5, 6], S)  # for each the prompt, then the negative prompt
        hook.remove()
        assert len(signs) == 4
        with replace(method, negative=negative).applied(pipe):
            found = generate(pipe, ["a b", "c"], [5, 6], S)
        assert abs(found.astype(int) - expected.astype(int)).max() <= 1 and (found != base).any()
        with replace(method, strength=0.0, negative=negative).applied(pipe):
            assert (generate(pipe, ["a b", "c"], [5, 6], S) == base).all()
    assert (generate(pipe, ["a b", "c"], [5, 6], S) == base).all() and pipelines.left(pipe) == []


def test_a_text_is_known_by_its_call(pipe: Any, sae: SAE) -> None:
    """Not by counting: of a prompt that is given as embeddings, the negative prompt is the first to be encoded."""
    method = ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae)
    plain, _ = pipe.encode_prompt(["a"], "cpu", 1, False)
    with method.applied(pipe):
        steered, _ = pipe.encode_prompt(["a"], "cpu", 1, False)
        again, _ = pipe.encode_prompt(["a"], "cpu", 1, False)
        given, opposite = pipe.encode_prompt(None, "cpu", 1, True, "a", prompt_embeds=plain)
        tokens = pipe.tokenizer("a", padding="max_length", return_tensors="pt").input_ids
        alone = pipe.text_encoder(tokens)[0]
    assert torch.equal(steered, again) and torch.equal(given, plain) and torch.allclose(alone, steered, atol=1e-6)
    with replace(method, strength=0.5).applied(pipe):
        assert torch.allclose(pipe.encode_prompt(["a"], "cpu", 1, False)[0], opposite, atol=1e-6)
    assert not torch.allclose(steered, opposite, atol=1e-2) and not torch.allclose(steered, plain, atol=1e-2)
    assert method.vectors.requires_grad is False


def test_gradients_go_through(pipe: Any, sae: SAE) -> None:
    method = ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae, strength=-1.0)

    def gradient() -> Tensor:
        table = pipe.text_encoder.get_input_embeddings().weight
        text, _ = pipe.encode_prompt(["a b"], "cpu", 1, False)
        return torch.autograd.grad(text.square().sum(), table)[0]

    plain = gradient()
    with method.applied(pipe):
        assert gradient().abs().sum() > 0 and not torch.allclose(gradient(), plain)


def test_nothing_is_left_behind(pipe: Any, sae: SAE) -> None:
    method = ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae)
    base = generate(pipe, ["a"], [5], S)
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        generate(pipe, ["a"], [5], S)
        _ = 1 / 0
    with pytest.raises(EraserNotAppliedError), method.applied(pipe):  # which the text encoder never sees
        pipelines.run(pipe, 0, steps=1)
    assert "encode_prompt" not in vars(pipe) and pipelines.left(pipe) == []
    assert (generate(pipe, ["a"], [5], S) == base).all()
    with method.watched(pipe) as trace:
        assert trace is None and (generate(pipe, ["a"], [5], S) == base).all()


def test_an_sae_learns_from_all_tokens_of_prompts(pipe: Any) -> None:
    sae = ConceptSteerers.train_sae(pipe, ["a", "b c", "a"], settings=FEW, phrasings=(0,))
    assert sae.header["site"] == f"{LAYER}:output:image" and (sae.n_features, sae.d_in) == (24, 16)
    again = ConceptSteerers.train_sae(pipe, ["a", "b c"], settings=FEW)
    assert torch.equal(sae.W_enc, again.W_enc)
    method: Method = ConceptSteerers.fit(pipe, "c", "style", ["x"], sae)
    made = method.made_with
    assert made is not None and made.prompts == ("x", "a", "b c") and made.phrasings == (0,) and not made.unknown
    other = ConceptSteerers.train_sae(pipe, ["a", "b c"], Site("text_encoder.encoder.layers.1"), FEW)
    keys = {
        ConceptSteerers.fit(pipe, "c", "style", phrases, s, strength, negative=negative).key
        for phrases, s, strength, negative in (
            (["x"], sae, -0.5, True),
            (["y"], sae, -0.5, True),
            (["x"], other, -0.5, True),
            (["x"], sae, -0.6, True),
            (["x"], sae, -0.5, False),
        )
    }
    assert len(keys) == 5
    stranger = SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, {"site": LAYER, "model": "somebody's"})
    assert "somebody's" in ConceptSteerers.fit(pipe, "c", "style", ["x"], stranger).made_with.unknown


def test_what_cannot_be_is_refused(pipe: Any, sae: SAE) -> None:
    with pytest.raises(SettingsError, match="strength is -101"):
        ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae, strength=-101)
    with pytest.raises(SettingsError, match="no phrases of 'c'"):
        ConceptSteerers.fit(pipe, "c", "style", [], sae)
    with pytest.raises(SettingsError, match="does not name its site"):
        ConceptSteerers.fit(pipe, "c", "style", PHRASES, SAE(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold))
    narrow = SAE(sae.W_enc[:, :8], sae.b_enc, sae.W_dec.roll(1, 0)[:, :8] * 0 + 8**-0.5, sae.b_dec[:8], sae.threshold)
    narrow.header["site"] = LAYER
    with pytest.raises(SettingsError, match="16 wide, and the SAE takes 8"):
        ConceptSteerers.fit(pipe, "c", "style", PHRASES, narrow)
    with pytest.raises(SettingsError, match="no prompts to train"):
        ConceptSteerers.train_sae(pipe, [])
    with pytest.raises(SettingsError, match="no text encoder whose layers"):
        ConceptSteerers.train_sae(pipelines.flux(), ["a"])
    method = ConceptSteerers.fit(pipe, "c", "style", PHRASES, sae)
    short = replace(method, vectors=method.vectors[:4])
    with pytest.raises(SettingsError, match=r"8 tokens of 16 numbers .* are \[4, 16\]"), short.applied(pipe):
        generate(pipe, ["a"], [0], S)
    assert pipelines.left(pipe) == []
