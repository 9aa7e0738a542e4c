"""STEREO's loss is its formula, attacks go through the weights as they are then, and the pipeline is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.naive_guidance import draw
from neuraleraser.attacks import WORD, learned_word
from neuraleraser.errors import SettingsError
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods import Stereo, StereoSettings, fine_tuning, stereo
from neuraleraser.methods.fine_tuning import StateBatch, drawn_states
from neuraleraser.methods.stereo import compositional_loss
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
SMALL: dict[str, Any] = {
    "erase_steps": 3,
    "attack_steps": 2,
    "attack_batch": 2,
    "pictures": 3,
    "steps": 3,
    "batch": 3,
    "refresh": 2,
    "images": 4,
}


def train(pipe: Any, phrases: Any = ("x",), anchors: Any = ("x a", "x b"), **settings: Any) -> Stereo:
    further = {name: settings.pop(name) for name in ("templates", "progress") if name in settings}
    return Stereo.train(pipe, "x", "style", phrases, anchors, S, StereoSettings(**SMALL | settings), **further)


@torch.no_grad()
def test_the_loss_is_its_formula():
    pipe = pipelines.stable_diffusion().to(torch.float64)
    word = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = drawn_states(pipe, ["x", "x a"], [0, 1], [3, 4], S)[2:4]
    empty, concept, shown, anchor, other = prompt_texts(pipe, ["", "x", "x a", "b", "c"], S)
    with learned_word(pipe, word):
        (learned,) = prompt_texts(pipe, [f"d {WORD}"], S)
        (raw,) = pipe.encode_prompt([f"d {WORD}"], "cpu", 1, False)[0]
    name = next(n for n, _ in pipe.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    changed = {name: pipe.unet.get_parameter(name) + 0.5}

    def ask(i: int, text: str | Tensor) -> Tensor:
        encoded = pipe.encode_prompt([text], "cpu", 1, False)[0] if isinstance(text, str) else text[None]
        return pipe.unet(states[i].call.state, states[i].call.timestep, encoded).sample

    total = 0.0
    for i, (own, anchored) in enumerate([("x a", "b"), (raw, "c")]):
        without = ask(i, "")
        negatives = [ask(i, "x a" if i == 0 else "x") - without, ask(i, raw) - without]
        target = without + 0.7 * (ask(i, anchored) - without) - 3 * (negatives[0] + negatives[1]) / 2
        pipe.unet.get_parameter(name).data += 0.5
        total += float((ask(i, own) - target).square().mean()) / 2
        pipe.unet.get_parameter(name).data -= 0.5
    found = compositional_loss(
        StateBatch.of(pipe.unet, states),
        changed,
        empty,
        [shown, learned],
        [[shown, concept], [learned, learned]],
        [anchor, other],
        3.0,
        0.7,
    )
    assert float(found) == pytest.approx(total, rel=1e-6)


def spy_on_attacks(monkeypatch: pytest.MonkeyPatch, scale: float = 1.0) -> list[dict[str, Any]]:
    """Words are drawn at random; returned: what each attack was given, with the weights that it went through."""
    attacks: list[dict[str, Any]] = []

    def learn(pipe: Any, pictures: Any, prompts: Any, *, applied: Any, **given: Any) -> Tensor:
        name = next(n for n, _ in pipe.unet.named_parameters() if ".attn2." in n)
        with applied(pipe):
            weight = pipe.unet.get_parameter(name).detach().clone()
        attacks.append({**given, "pictures": pictures, "prompts": prompts, "weight": weight})
        return scale * torch.randn(2, 16, generator=torch.Generator().manual_seed(len(attacks)))

    monkeypatch.setattr(stereo, "learn_embeddings", learn)
    return attacks


def test_each_attack_goes_through_the_weights_as_they_are_then(monkeypatch: pytest.MonkeyPatch):
    attacks, pipe = spy_on_attacks(monkeypatch), pipelines.stable_diffusion()
    method = train(pipe, ["x", "x a"], templates=[WORD, f"{WORD} a"], rounds=3, embeddings=2, seed=4)
    own = next(p for n, p in pipe.unet.named_parameters() if ".attn2." in n)
    weights = [own, *(attack["weight"] for attack in attacks)]
    assert not any(torch.equal(weights[i], weights[i + 1]) for i in range(3))
    assert [(a["count"], a["steps"], a["batch_size"], a["seed"]) for a in attacks] == [(2, 2, 2, k) for k in (4, 5, 6)]
    assert all(a["prompts"] == [WORD, f"{WORD} a", WORD] for a in attacks)
    assert (attacks[0]["pictures"] == generate(pipe, ["x", "x a", "x"], [4, 5, 6], S)).all()
    assert len(method.words) == 3 and method.words[0].shape == (2, 16)


def test_erasures_are_of_the_last_word_and_stage_two_starts_from_the_model(monkeypatch: pytest.MonkeyPatch):
    pipe = pipelines.stable_diffusion()
    given: dict[str, Any] = {"erase_rate": 0.1, "learning_rate": 1e-4, "steps": 1}
    first = spy_on_attacks(monkeypatch)
    method = train(pipe, **given)
    for name, x in method.weights.items():
        assert (x - pipe.unet.get_parameter(name)).abs().max() <= 1.01e-4, "one step of Adam at its rate"
    other = spy_on_attacks(monkeypatch, scale=3.0)
    changed = train(pipe, **given)
    assert torch.equal(first[0]["weight"], other[0]["weight"]), "the first erasure is of the concept's own prompt"
    assert not torch.equal(first[1]["weight"], other[1]["weight"]), "the second is of the word found"
    assert changed.key != method.key, "and the last is of both"


def test_an_erasure_goes_on_from_the_last(monkeypatch: pytest.MonkeyPatch):
    attacks, pipe, targets = spy_on_attacks(monkeypatch), pipelines.stable_diffusion(), list[Tensor]()
    plain, name = stereo.negative_guidance_loss, next(n for n, _ in pipe.unet.named_parameters() if ".attn2." in n)

    def spy(batch: Any, weights: Any, before: Any, *rest: Any) -> Tensor:
        targets.append(before[name])
        return plain(batch, weights, before, *rest)

    monkeypatch.setattr(stereo, "negative_guidance_loss", spy)
    train(pipe, erase_rate=1e-2)
    first, second = pipe.unet.get_parameter(name), attacks[0]["weight"]
    assert all(torch.equal(x, first) for x in targets[:3]) and all(torch.equal(x, second) for x in targets[3:])
    assert len(targets) == 6 and not torch.equal(first, second)


def test_every_group_is_drawn_however_few_the_images(monkeypatch: pytest.MonkeyPatch):
    spy_on_attacks(monkeypatch)
    drawn: list[tuple[str, ...]] = []
    plain = stereo.drawn_states

    def spy(pipe: Any, prompts: Any, numbers: Any, seeds: Any, sampling: Any) -> Any:
        drawn.extend(tuple(prompts) for _ in seeds)
        return plain(pipe, prompts, numbers, seeds, sampling)

    monkeypatch.setattr(stereo, "drawn_states", spy)
    train(pipelines.stable_diffusion(), templates=[f"{WORD} b"], images=2, refresh=1, erase_steps=1, steps=3)
    assert [prompts[0] for prompts in drawn[:4]] == ["x", "x", f"{WORD} b", f"{WORD} b"], "the last word alone"
    assert sorted(prompts[0] for prompts in drawn[4:]) == [f"{WORD} b"] * 4 + ["x"] * 2


def test_its_seeds_are_all_that_it_drew(monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []

    def spy(pipe: Any, prompts: Any, seeds: Any, *args: Any, **settings: Any) -> Any:
        seen.extend(seeds)
        return generate(pipe, prompts, seeds, *args, **settings)

    for room in (stereo, fine_tuning):
        monkeypatch.setattr(room, "generate", spy)
    method = train(pipelines.stable_diffusion(), seed=7)
    assert sorted(seen) == list(range(7, max(seen) + 1)) and method.made_with.seeds == ((7, max(seen)),)
    assert method.made_with.prompts == ("x", "x a", "x b")


def test_it_moves_away_and_leaves_the_pipeline_as_it_was():
    pipe, shares = pipelines.stable_diffusion(), list[float]()
    before, hooks, tokenizer = (
        {n: x.clone() for n, x in pipe.unet.state_dict().items()},
        pipelines.left(pipe),
        pipe.tokenizer,
    )
    base = draw(pipe, "x a")
    method = train(pipe, progress=shares.append, learning_rate=1e-3)
    assert shares == sorted(shares) and len(shares) == 13 and shares[-1] == 1
    assert all(torch.equal(x, before[n]) for n, x in pipe.unet.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())
    assert pipe.tokenizer is tokenizer and pipelines.left(pipe) == hooks
    assert method.weights and all(".attn2." in n for n in method.weights)
    with method.applied(pipe):
        assert not torch.equal(draw(pipe, "x a"), base)
    assert torch.equal(draw(pipe, "x a"), base)
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        _ = 1 / 0
    assert torch.equal(draw(pipe, "x a"), base)


def test_training_that_breaks_off_leaves_the_pipeline_as_it_was():
    pipe = pipelines.stable_diffusion()
    base, hooks, tokenizer = draw(pipe, "x a"), pipelines.left(pipe), pipe.tokenizer

    def stop(share: float) -> None:
        if share > 0.4:  # in the second erasure
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pipe, progress=stop)
    assert torch.equal(draw(pipe, "x a"), base) and pipelines.left(pipe) == hooks and pipe.tokenizer is tokenizer


def test_it_is_the_same_again_and_its_key_tells_others_apart():
    first, again, other = (train(pipelines.stable_diffusion(), seed=seed) for seed in (0, 0, 1))
    assert first.key == again.key != other.key
    assert len({first.key, *(train(pipelines.stable_diffusion(), **{n: 0.5}).key for n in ("away", "toward"))}) == 3


def test_what_is_wrong_is_refused_before_anything_is_drawn(monkeypatch: pytest.MonkeyPatch):
    pipe = pipelines.stable_diffusion()
    monkeypatch.setattr(type(pipe), "__call__", lambda *args, **settings: pytest.fail("it drew"))
    with pytest.raises(SettingsError, match=r"anchors is \(\): pass a list"):
        train(pipe, anchors=())
    with pytest.raises(SettingsError, match="1 phrases, 2 templates"):
        train(pipe, templates=[WORD, WORD])
    with pytest.raises(SettingsError, match="'a' does not hold <learned>"):
        train(pipe, templates=["a"])
    with pytest.raises(SettingsError, match="several text encoders or none"):
        train(pipelines.flux())
    with pytest.raises(SettingsError, match="rounds is 0"):
        StereoSettings(rounds=0)
    with pytest.raises(SettingsError, match="the last seed is"):
        StereoSettings(seed=2**63 - 1)
