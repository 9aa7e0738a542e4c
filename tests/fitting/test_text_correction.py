"""Corrections of the text: aligned as by a naive search, and the best map of its rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.concepts import Pair
from neuraleraser.fitting import text_correction
from neuraleraser.fitting.text_correction import align, fit_text_correction, reduced_rank_map
from neuraleraser.sites import Site, edits_for


def paths(n: int, m: int) -> list[list[tuple[int, int]]]:
    """All ways to go from the first pair of tokens to the last."""
    if (n, m) == (1, 1):
        return [[(0, 0)]]
    before = [(n - i, m - j) for i, j in ((1, 1), (1, 0), (0, 1)) if n > i and m > j]
    return [[*path, (n - 1, m - 1)] for a, b in before for path in paths(a, b)]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_tokens_are_aligned_at_the_least_distance(n: int, m: int, seed: int) -> None:
    x, y = random(3, n, 2, seed=seed), random(3, m, 2, seed=seed + 1)
    found = align(x, y)
    for a, b, index in zip(x.double(), y.double(), found.tolist(), strict=True):
        costs = (a[:, None] - b[None]).square().sum(2)
        best = min(paths(n, m), key=lambda path: sum(float(costs[cell]) for cell in path))
        assert index == [max(j for i, j in best if i == token) for token in range(n)]


def test_what_two_texts_share_is_aligned_with_itself() -> None:
    words = random(9, 4, seed=3)
    shown, plain = words[[0, 1, 7, 8, 2, 3]][None], words[[0, 1, 2, 3]][None]
    index = align(shown, plain)[0].tolist()
    assert index[:2] == [0, 1] and index[-2:] == [2, 3]
    assert torch.equal(align(plain, plain), torch.arange(4)[None])


def test_the_map_is_the_best_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a penalty, as by the singular vectors of the best fit; and what is of that rank is found exactly."""
    monkeypatch.setattr(text_correction, "RIDGE", 0.0)
    x = random(60, 6, seed=1)
    delta = x @ random(6, 6, seed=2) + random(60, 6, seed=3) + 2
    down, up, bias = reduced_rank_map(x, delta, 2)
    inputs, outputs = (v.double().numpy() - v.double().numpy().mean(0) for v in (x, delta))
    best = np.linalg.lstsq(inputs, outputs, rcond=None)[0]
    axes = np.linalg.svd(inputs @ best)[2][:2].T
    want = inputs @ best @ axes @ axes.T + delta.double().numpy().mean(0)
    np.testing.assert_allclose((x @ down @ up + bias).numpy(), want, atol=1e-4)
    low = x @ random(6, 2, seed=4) @ random(2, 6, seed=5) + 1
    down, up, bias = reduced_rank_map(x, low, 2)
    torch.testing.assert_close(x @ down @ up + bias, low, atol=1e-4, rtol=1e-4)


def test_the_penalty_keeps_the_map_small() -> None:
    """In a direction in which the texts hardly differ nothing is changed."""
    x = random(200, 4, seed=1) * torch.tensor([1.0, 1.0, 1.0, 1e-4])
    delta = 10 * random(200, 4, seed=2)
    down, up, _ = reduced_rank_map(x, delta, 4)
    assert float((down @ up)[3].abs().max()) < 10


def test_texts_with_the_concept_become_those_without() -> None:
    words = {word: random(pipelines.WORDS, pipelines.WIDTH, seed=ord(word)) for word in "abcd"}
    shift = random(pipelines.WIDTH, seed=9)
    texts = words | {f"{word} x": text + shift for word, text in words.items()}
    sites = edits_for(pipelines.stable_diffusion(), Site("unet.mid_block.attentions.0"))
    made = fit_text_correction(sites, [Pair(f"{word} x", word) for word in "abcd"], texts, 500.0, rank=4)
    assert made.left < 0.01 and (made.correction.site, *made.correction.also) == sites
    moved = texts["a x"] + made.correction.delta(texts["a x"][None], torch.tensor([500.0]))[0]
    assert (moved - texts["a"]).abs().mean() < 0.1 * shift.abs().mean()


def test_tokens_are_matched_as_they_are_aligned() -> None:
    """Words that stand elsewhere are no distance."""
    pipe: Any = pipelines.stable_diffusion()
    pairs = [Pair("x x a b c", "a b c"), Pair("x x d e f", "d e f")]
    prompts = [p.positive for p in pairs], [p.negative for p in pairs]
    shown, plain = (pipe.encode_prompt(some, "cpu", 1, False)[0].detach() for some in prompts)
    index = align(shown, plain)
    assert not torch.equal(index, torch.arange(shown.shape[1]).expand(2, -1)), "else there is nothing to align"
    texts = dict(zip([*prompts[0], *prompts[1]], [*shown, *plain], strict=True))
    made = fit_text_correction(edits_for(pipe, Site("unet.mid_block.attentions.0")), pairs, texts, 500.0, rank=8)
    wanted = plain.gather(1, index[..., None].expand_as(shown))
    left = wanted - shown - made.correction.delta(shown, torch.tensor([500.0, 500.0]))
    assert float(left.square().sum() / (wanted - shown).square().sum()) == pytest.approx(made.left, rel=1e-3)
