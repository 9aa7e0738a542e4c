"""CPE's gates, losses, factors and edits are those of loops and hooks by hand; training erases, and attacks bring
back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.errors import SettingsError, SiteError
from neuraleraser.evaluation.method import Method
from neuraleraser.methods import ConceptPinpointEraser, CPESettings
from neuraleraser.methods.attention_gates import (
    AttentionGate,
    GatedLayer,
    anchor_loss,
    attack_loss,
    erase_loss,
    lipschitz_factors,
)
from neuraleraser.methods.concept_pinpoint_eraser import _Lesson
from neuraleraser.methods.unified_concept_editing import text_projections
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=1)
PAIRS, STAYS = [("x a", "a"), ("x b", "b")], ["y a", "y b", "z c"]
FEW = CPESettings(first_steps=5, steps=2, stages=2, embeddings=3, anchors=4, gate_rank=3)
T, D = pipelines.WORDS, pipelines.WIDTH


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def gate() -> AttentionGate:
    return AttentionGate(random(D, 3, seed=1) / 2, random(D, seed=2))


def layers(rank: int = 2) -> list[GatedLayer]:
    return [
        GatedLayer(str(i), random(5, D, seed=3 + i), 0.5 + i, random(D, rank, seed=6 + i), random(rank, 5, seed=9 + i))
        for i in range(3)
    ]


def gated_by_hand(one: AttentionGate, text: Tensor) -> Tensor:
    """s (A E) of one text [T, d], a token at a time."""
    q = [text[t] @ one.query for t in range(len(text))]
    rows = []
    for t in range(len(text)):
        weights = torch.stack([(q[t] @ q[other]).exp() for other in range(len(text))])
        mean = sum(weights[other] / weights.sum() * text[other] for other in range(len(text)))
        rows.append(mean / (1 + (-(mean @ one.scaler)).exp()))  # type: ignore[arg-type]
    return torch.stack(rows)


def test_the_gate_is_the_formula() -> None:
    texts = random(2, T, D, seed=4)
    found = gate()(texts)
    for text, row in zip(texts, found, strict=True):
        torch.testing.assert_close(row, gated_by_hand(gate(), text), atol=1e-5, rtol=1e-4)
    assert gate()(texts.half()).dtype == torch.float32


def test_losses_are_the_formulas() -> None:
    g, parts = gate(), layers()
    shown, instead, texts = (random(n, T, D, seed=20 + n) for n in (1, 2, 3))
    instead = instead[:1]
    erase, attack, anchor = 0.0, 0.0, 0.0
    for layer in parts:
        e, b, a = 0.0, 0.0, 0.0
        for text in texts:
            added = gated_by_hand(g, text) @ layer.down @ layer.up
            for t in range(T):
                own = layer.weight @ text[t]
                target = layer.weight @ instead[0, t] + 0.7 * layer.weight @ (instead[0, t] - shown[0, t])
                e += float((own + added[t] - target).square().sum())
                b += float((own + added[t] - layer.weight @ shown[0, t]).square().sum())
                a += float(added[t].square().sum())
        erase, attack, anchor = (
            total + layer.factor * part / (3 * T * 5) / 3 for total, part in ((erase, e), (attack, b), (anchor, a))
        )
    assert float(erase_loss(parts, g, texts, shown, instead, 0.7)) == pytest.approx(erase, rel=1e-4)
    assert float(attack_loss(parts, g, texts, shown)) == pytest.approx(attack, rel=1e-4)
    assert float(anchor_loss(parts, g, texts)) == pytest.approx(anchor, rel=1e-4)


def test_factors_are_the_largest_singular_values(pipe: Any) -> None:
    found = lipschitz_factors(pipe.unet, text_projections(pipe), T)
    for name, factor in found.items():
        block = pipe.unet.get_submodule(name.rpartition(".")[0])
        q, v, o = (m.weight.detach() for m in (block.to_q, block.to_v, block.to_out[0]))
        size = torch.linalg.svdvals
        wanted = size(o)[0] if name.endswith("to_v") else size(o @ v)[0] * size(q)[0] / T
        assert factor == pytest.approx(float(wanted), rel=1e-4)
    assert len(found) == 2 * len({name.rpartition(".")[0] for name in found}) > 2


@pytest.fixture(scope="module")
def method(pipe: Any) -> ConceptPinpointEraser:
    """Random, not trained."""
    found = {
        name: (random(D, 2, seed=30 + i), random(2, layer.out_features, seed=60 + i))
        for i, (name, layer) in enumerate(text_projections(pipe).items())
    }
    return ConceptPinpointEraser("x", "style", gate(), found)


def test_it_is_what_hooks_do_by_hand(pipe: Any, method: ConceptPinpointEraser) -> None:
    base = generate(pipe, ["x a", "b"], [5, 6], S)
    hooks = []
    for name, (down, up) in method.layers.items():

        def by_hand(m: Any, args: Any, out: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
            return out + torch.stack([gated_by_hand(method.gate, text) for text in args[0]]) @ down @ up

        hooks.append(pipe.unet.get_submodule(name).register_forward_hook(by_hand))
    wanted = generate(pipe, ["x a", "b"], [5, 6], S)
    for hook in hooks:
        hook.remove()
    with method.applied(pipe):
        found = generate(pipe, ["x a", "b"], [5, 6], S)
    assert abs(found.astype(int) - wanted.astype(int)).max() <= 1 and (found != base).any()
    assert (generate(pipe, ["x a", "b"], [5, 6], S) == base).all() and pipelines.left(pipe) == []
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        _ = 1 / 0
    with method.watched(pipe) as trace:
        assert trace is None and (generate(pipe, ["x a", "b"], [5, 6], S) == base).all()
    assert pipelines.left(pipe) == []


def test_gradients_reach_the_text(pipe: Any, method: ConceptPinpointEraser) -> None:
    """What is added has a gradient of its own: half of the change is not in the layers alone."""
    text = random(1, T, D, seed=8).requires_grad_()
    state, time = random(1, 4, 8, 8, seed=9), torch.tensor([500])
    grads = []
    for context in (method.watched(pipe), method.applied(pipe)):
        with context:
            out = pipe.unet(state, time, encoder_hidden_states=text).sample.sum()
            grads.append(torch.autograd.grad(out, text)[0])
    assert (grads[1] - grads[0]).abs().max() > 1e-4


def lesson(pipe: Any, **more: Any) -> _Lesson:
    return _Lesson.of(pipe, PAIRS, STAYS, replace(FEW, **more), None)


def test_untrained_it_adds_nothing_and_its_gate_is_half_open(pipe: Any) -> None:
    start = lesson(pipe)
    assert float(anchor_loss(start.layers, start.gate, start.stays).detach()) == 0
    torch.testing.assert_close(
        start.gate(start.shown).detach(), 0.5 * start.shown.mean(1, keepdim=True).expand_as(start.shown)
    )
    assert start.shown.shape == (2, T, D) and start.stays.shape == (3, T, D)
    torch.testing.assert_close(start.empty[0], pipe.encode_prompt([""], "cpu", 1, False)[0][0])
    torch.testing.assert_close(start.instead[1], pipe.encode_prompt(["b"], "cpu", 1, False)[0][0])


def test_anchors_are_the_empty_text_and_mixtures_of_two(pipe: Any) -> None:
    start = lesson(pipe, noise=0.0, anchors=40)
    found = start._anchors()
    assert torch.equal(found[:1], start.empty) and len(found) == 41
    a, b, c = start.stays.flatten(1)
    shares = []
    for text in found[1:].flatten(1):
        fits = [
            (first, second, float(share), float((text - second - share * (first - second)).norm()))
            for first, second in ((a, b), (a, c), (b, c), (a, a))
            for share in [((text - second) @ (first - second)) / (first - second).square().sum().clamp_min(1e-9)]
        ]
        singles = [float((text - one).norm()) for one in (a, b, c)]
        _, _, share, off = min(fits, key=lambda fit: fit[3])
        assert min(off, *singles) < 1e-3 and -1e-4 <= share <= 1 + 1e-4
        shares.append(share)
    assert max(shares) - min(shares) > 0.5
    one = _Lesson.of(pipe, PAIRS, ["y a"], replace(FEW, noise=0.1, anchors=2000), None)
    away = one._anchors()[1:] - one.stays
    # A mixture of two independent noises, each a tenth of the text's norm on each number: 2/3 of one's mean square.
    wanted = 0.1 * float(one.stays.norm()) * (2 / 3) ** 0.5
    assert float(away.square().mean().sqrt()) == pytest.approx(wanted, rel=0.02)


def test_training_erases_and_an_attack_brings_back(pipe: Any) -> None:
    start = lesson(pipe, anchor_weight=1.0)

    def now(texts: Tensor) -> float:
        return float(erase_loss(start.layers, start.gate, texts, start.shown[:1], start.instead[:1], 0.5).detach())

    first = now(start.shown[:1])
    start.train_gates(200, 1e-2, None, cycles=2)
    trained = now(start.shown[:1])
    assert trained < 0.7 * first
    before = [x.detach().clone() for x in (start.gate.query, *(one.up for one in start.layers))]
    start.s = replace(start.s, steps=60, attack_rate=0.05)
    attacks = start.attack()
    assert attacks.shape == (3, T, D) and not attacks.requires_grad

    def brought_back(texts: Tensor) -> float:
        return float(attack_loss(start.layers, start.gate, texts, start.shown[:1]).detach())

    shown = start.shown[:1]
    assert brought_back(shown + attacks) < 0.7 * brought_back(shown)
    after = (start.gate.query, *(one.up for one in start.layers))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    attacked = now(shown + attacks)
    start.train_gates(100, 1e-2, attacks)
    assert now(shown + attacks) < attacked


def test_anchors_hold_what_stays(pipe: Any) -> None:
    moved = []
    for weight in (0.0, 100.0):
        start = lesson(pipe, anchor_weight=weight, noise=0.0)
        start.train_gates(200, 1e-2, None)
        moved.append(float(anchor_loss(start.layers, start.gate, start.stays).detach()))
    assert moved[1] < 0.3 * moved[0]


def test_it_is_a_method(pipe: Any, method: ConceptPinpointEraser) -> None:
    shares: list[float] = []
    weights = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    trained = ConceptPinpointEraser.train(pipe, "x", "style", PAIRS, STAYS, FEW, shares.append)
    assert shares == pytest.approx([(i + 1) / 13 for i in range(13)])
    assert all(torch.equal(x, weights[name]) for name, x in pipe.unet.state_dict().items())
    known: Method = trained
    assert (known.name, known.concept, known.kind) == ("cpe", "x", "style")
    assert known.made_with is not None and known.made_with.prompts == ("x a", "a", "x b", "b", "y a", "y b", "z c")
    assert known.made_with.seeds == () and trained.layers.keys() == text_projections(pipe).keys()
    assert trained.gate.query.shape == (D, 3) and not trained.gate.query.requires_grad
    again = ConceptPinpointEraser.train(pipe, "x", "style", PAIRS, STAYS, FEW)
    other = ConceptPinpointEraser.train(pipe, "x", "style", PAIRS, STAYS, replace(FEW, seed=1))
    assert again.key == trained.key != other.key
    name, (down, up) = next(iter(method.layers.items()))
    changed = [
        replace(method, gate=replace(method.gate, scaler=2 * method.gate.scaler)),
        replace(method, gate=replace(method.gate, query=2 * method.gate.query)),
        replace(method, layers={**method.layers, name: (2 * down, up)}),
        replace(method, layers={**method.layers, name: (down, 2 * up)}),
    ]
    assert len({method.key, *(one.key for one in changed)}) == 5


def test_what_cannot_be_is_refused(pipe: Any, method: ConceptPinpointEraser) -> None:
    with pytest.raises(SettingsError, match="pass pairs of a prompt of 'x'"):
        ConceptPinpointEraser.train(pipe, "x", "style", [], STAYS, FEW)
    with pytest.raises(SettingsError, match="stays is"):
        ConceptPinpointEraser.train(pipe, "x", "style", PAIRS, [], FEW)
    with pytest.raises(SettingsError, match="no UNet that reads the text of one encoder"):
        ConceptPinpointEraser.train(pipelines.stable_diffusion_xl(), "x", "style", PAIRS, STAYS, FEW)
    with pytest.raises(SiteError, match="has no module"), method.applied(pipelines.flux()):
        pass
    for bad in ({"steps": 0}, {"stages": -1}, {"first_rate": 0.0}, {"anchor_weight": -1.0}, {"noise": 2.0}):
        with pytest.raises(SettingsError, match=next(iter(bad))):
            CPESettings(**bad)  # type: ignore[arg-type]
