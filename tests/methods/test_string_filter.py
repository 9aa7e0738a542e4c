"""The filter of prompts: what it takes out, and that it stands before any pipeline's encoder and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import pipelines
from neuraleraser.canvas import words
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.evaluation.protocol import FRAGMENTS, HELD_OUT
from neuraleraser.evaluation.vocabulary_cells import VocabularyCells
from neuraleraser.methods import DoNothing, StringFilter, string_filters
from neuraleraser.settings import EvaluateSettings
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS


@pytest.mark.parametrize(
    ("concept", "prompt", "clean"),
    [
        ("Cats", "a cat as a Van Gogh painting", "an empty scene as a Van Gogh painting"),
        ("Cats", "in cartoon style, a kitten", "in cartoon style, nothing"),
        ("Cats", "a cat and a dog in Van Gogh style", "a dog in Van Gogh style"),
        ("Cats", "a dog and a cat as a cartoon", "a dog as a cartoon"),
        ("Cats", "a dog and a cat and a horse", "a dog and a horse"),
        ("Cats", "a picture of a feline with whiskers", "a picture of an empty picture"),
        ("Cats", "A CAT, in waxy strokes", "an empty scene, in waxy strokes"),
        ("Cats", "a catamaran and a picture of cat", "a catamaran and a picture of cat"),
        ("Van_Gogh", "a cat as a Van Gogh painting", "a cat"),
        ("Van_Gogh", "in Van Gogh style, a cat", "a cat"),
        ("Van_Gogh", "a cat, in Van Gogh style", "a cat"),
        ("Van_Gogh", "a cat, in Van Gogh style, at night", "a cat, at night"),
        ("Van_Gogh", "a cat in Van Gogh style and a dog", "a cat and a dog"),
        ("Van_Gogh", "in Van Gogh style", ""),
        ("Van_Gogh", "a cat, swirling brush", "a cat, swirling brush"),
        ("Flowers", "a sea wave as a blossom season picture", "a sea wave as a blossom season picture"),
        ("Flowers", "a blossom as a blossom season picture", "nothing as a blossom season picture"),
        ("Fishes", "a fish with scales on wet sand", "an empty picture on wet sand"),
    ],
)
def test_what_is_taken_out(concept: str, prompt: str, clean: str):
    everything, seen = string_filters(words.VOCABULARY, concept)
    assert everything(prompt) == clean
    if not any(phrase in prompt for phrase in words.VOCABULARY.phrases_of(concept)[HELD_OUT_PHRASINGS]):
        assert seen(prompt) == clean


def test_what_it_must_reach_on_the_benchmark():
    """Both know every prompt that names their concept in a training phrasing, and touch none that does not."""
    s = EvaluateSettings(grid_rounds=1, target_rounds=1)
    for name in (*words.VOCABULARY.open_styles, *words.VOCABULARY.open_objects):
        if name == words.PLAIN:
            continue
        everything, seen = string_filters(words.VOCABULARY, name)
        cells = VocabularyCells.of(words.VOCABULARY, s)
        for c in (*cells.grid(1), *cells.target(name)):
            acts, acts_too = everything(c.prompt) != c.prompt, seen(c.prompt) != c.prompt
            if c.group == HELD_OUT:
                assert acts and (not acts_too or name == "Fishes")  # "a fish with scales" holds "a fish"
            else:
                assert acts == acts_too == (c.asks_for(name) and c.group != FRAGMENTS), (name, c.prompt)


def test_phrases_are_checked():
    for phrases in ({}, {" ": ""}):
        with pytest.raises(SettingsError, match="pass one or more of 'Cats'"):
            StringFilter("Cats", "object", phrases)
    with pytest.raises(ConceptError, match="'Unicorns'"):
        string_filters(words.VOCABULARY, "Unicorns")
    assert len({f.key for name in ("Cats", "Dogs") for f in string_filters(words.VOCABULARY, name)}) == 4


FILTER = StringFilter("x", "style", {"x": ""})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def test_the_untouched_model_draws_the_cleaned_prompt(pipe: Any):
    def draw(*prompts: str) -> torch.Tensor:
        return pipelines.run(pipe, 3, n=len(prompts), prompt=list(prompts), negative_prompt=["x"] * len(prompts))

    plain, cleaned, named = draw("a b", "c"), draw("a b", "d"), draw("a b", "d x")
    assert not torch.equal(plain, cleaned) and not torch.equal(cleaned, named)
    before = dict(vars(pipe))
    with FILTER.applied(pipe) as trace:
        assert torch.equal(draw("a b", "d x"), cleaned), "and the negative prompt is left alone"
        assert list(trace.fired) == [1]
        assert torch.equal(draw("c", "x d"), draw("c", "d")) and list(trace.fired) == [1, 3]
    with FILTER.watched(pipe) as trace:
        assert torch.equal(draw("a b", "d x"), named) and list(trace.fired) == [1]
    with pytest.raises(KeyError), FILTER.applied(pipe):
        raise KeyError
    assert vars(pipe) == before and torch.equal(draw("a b", "d x"), named)


def test_filters_in_a_row_each_see_the_prompt(pipe: Any):
    other = StringFilter("y", "style", {"y": ""})
    with FILTER.watched(pipe) as a, other.watched(pipe) as b, DoNothing("z", "style").watched(pipe) as c:
        pipelines.run(pipe, 0, n=3, prompt=["x", "y", "z"])
    assert (list(a.fired), list(b.fired), list(c.fired)) == ([0], [1], [])
    with FILTER.applied(pipe), other.applied(pipe):
        both = pipelines.run(pipe, 0, prompt="a x y")
    assert torch.equal(both, pipelines.run(pipe, 0, prompt="a"))


def test_every_prompt_of_a_pipeline_with_several_encoders_is_cleaned():
    """SDXL and its kind pass prompts by name, and a second one beside."""

    class Encoders:
        def encode_prompt(self, prompt: Any, prompt_2: Any = None, device: str = "", *, negative_prompt: Any = None):
            return prompt, prompt_2, device, negative_prompt

    pipe = Encoders()
    with FILTER.applied(pipe) as trace:
        assert pipe.encode_prompt("a x", ["x b"], "cpu", negative_prompt="x") == ("a", ["b"], "cpu", "x")
        assert pipe.encode_prompt(prompt=None, prompt_2=None) == (None, None, "", None)  # embeddings go round it
    assert list(trace.fired) == [0] and "encode_prompt" not in vars(pipe)
    with pytest.raises(SettingsError, match="object has no encode_prompt"), FILTER.applied(object()):
        pass
