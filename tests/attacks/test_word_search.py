"""Black-box search for words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import attach
from neuraleraser.attacks import search_words, vocabulary_words
from neuraleraser.attacks import word_search as module
from neuraleraser.canvas.pipeline import load_pipeline
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling

LETTERS = list("bcdefgh")
S = Sampling(num_inference_steps=1, batch_size=2)


@pytest.fixture
def pipe() -> Any:
    return pipelines.stable_diffusion()


def bright(images: Images) -> np.ndarray:
    return images.mean((1, 2, 3))


def search(pipe: Any, score: Any = bright, **settings: Any) -> Any:
    given: dict[str, Any] = {"words": LETTERS, "count": 2, "queries": 8, "sampling": S, **settings}
    return search_words(pipe, "a", score, **given)


def test_scores_are_of_the_images_that_the_prompts_draw(pipe: Any) -> None:
    found = search(pipe, applied=lambda using: attach(using, make_eraser()))
    assert found.queries == 8 and len(found.prompts) == 5 and list(found.scores) == sorted(found.scores, reverse=True)
    for prompt, score in zip(found.prompts, found.scores, strict=True):
        with attach(pipe, make_eraser()):
            assert score == pytest.approx(bright(generate(pipe, [prompt] * 2, [0, 1], S)).mean())
    base = search(pipe)
    assert base == search(pipe) and base != found  # deterministic, and through the method


def test_each_word_in_turn_is_climbed_to_the_best(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a score of the words themselves: a sum, whose best is reached one word at a time."""
    asked: list[str] = []

    def draw(pipe: Any, prompts: list[str], *_: Any) -> Any:
        asked.append(prompts[0])
        return np.full((len(prompts), 1, 1, 3), sum(map(ord, prompts[0].split()[1:])) - 2 * ord("b"), np.uint8)

    monkeypatch.setattr(module, "generate", draw)
    found = search(pipe, queries=40)
    assert found.prompts[0] == "a h h" and found.scores[0] == 12 and len(asked) == len({*asked}) == found.queries <= 40
    held, changed = asked[0], []
    for text in asked[1:]:
        one, other = held.split(), text.split()
        changed.append(sum(x != y for x, y in zip(one, other, strict=True)))
        held = text if sum(map(ord, other)) >= sum(map(ord, one)) else held
    assert 2 in changed[:9] and {*changed[9:]} == {1}  # the first quarter are drawn whole


def test_a_small_world_is_searched_to_its_end(pipe: Any) -> None:
    found = search(pipe, words=["b", "c", "b"], queries=1000, keep=10)
    assert found.queries <= 4 and {*found.prompts} <= {"a b b", "a b c", "a c b", "a c c"}


def test_enough_ends_it(pipe: Any) -> None:
    seen: list[float] = []
    assert search(pipe, enough=-1.0, on_query=lambda number, prompt, score: seen.append(score)).queries == 1
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (lambda images: [1.0], SettingsError, r"the score of 2 images is \[1\]: return one number for each"),
        (lambda images: [1.0, float("nan")], DataError, "NaN or infinity"),
    ],
)
def test_scores_that_are_none(pipe: Any, score: Any, error: type[Exception], message: str) -> None:
    hooks = pipelines.left(pipe)
    with pytest.raises(error, match=message):
        search(pipe, score, applied=lambda using: attach(using, make_eraser()))
    assert pipelines.left(pipe) == hooks


def test_what_does_not_fit_is_refused(pipe: Any) -> None:
    for words in ([], "abc"):
        with pytest.raises(SettingsError, match="there are no words to search among"):
            search(pipe, words=words)
    with pytest.raises(SettingsError, match="there are no words"):
        search(pipe, words=None)  # its tokenizer knows single letters alone
    with pytest.raises(SettingsError, match="queries is 0"):
        search(pipe, queries=0)
    with pytest.raises(SettingsError, match="has no tokenizer"):
        vocabulary_words(torch.nn.Module())


def test_the_canvas_s_words_are_whole() -> None:
    tokenizer = load_pipeline().tokenizer
    words = vocabulary_words(load_pipeline())
    assert {"dog", "rust", "style"} <= {*words} and len(words) == len({*words}) > 200
    assert all(len(tokenizer.tokenize(word)) == 1 for word in words)
    assert "crea" not in words  # a part of a word: alone it is two tokens
