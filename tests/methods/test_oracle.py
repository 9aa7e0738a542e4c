"""The oracle: asked for the same without the concept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.errors import ConceptError
from neuraleraser.evaluation.vocabulary_cells import vocabulary_protocol
from neuraleraser.families.opening import open_pipeline
from neuraleraser.methods import Oracle
from neuraleraser.sampling import generate
from neuraleraser.settings import EvaluateSettings, Sampling

SMALL = EvaluateSettings(styles=("Van_Gogh", "Mosaic", V.plain), objects=("Cats", "Dogs"), fragment_prompts=6)


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_no_prompt_that_stands_instead_names_the_concept(name: str) -> None:
    cells = vocabulary_protocol(V, [name], SMALL).cells[name]
    oracle = Oracle.of(V, name, cells)
    assert len({c.group for c in cells}) > 8
    for cell in cells:
        after = oracle(cell.prompt)
        assert not any(phrase in after for phrase in V.phrases_of(name)), after
        brings = cell.asks_for(name) or cell.group == "fragments"
        shown = cell.start is not None and name in cell.start.shows
        if brings:
            assert after != cell.prompt
        if not brings and not shown and cell.prompt not in {c.prompt for c in cells if c.start}:
            assert after == cell.prompt


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_what_stands_beside_the_concept_is_still_asked_for(name: str) -> None:
    cells = vocabulary_protocol(V, [name], SMALL).cells[name]
    oracle = Oracle.of(V, name, cells)
    for cell in cells:
        beside = [n for n in (cell.style, *cell.objects) if n not in ("", name, V.plain)]
        if cell.asks_for(name):
            assert all(any(phrase in oracle(cell.prompt) for phrase in V.phrases_of(n)) for n in beside), cell


def test_a_learned_word_is_left_out() -> None:
    for name in ("Van_Gogh", "Cats"):
        cells = vocabulary_protocol(V, [name], replace(SMALL, embedding_steps=1)).cells[name]
        learned = [c.prompt for c in cells if c.group == "learned embeddings"]
        oracle = Oracle.of(V, name, cells)
        assert learned and not any("<learned>" in oracle(prompt) for prompt in learned)


def test_start_images_are_asked_to_be_plain() -> None:
    cells = vocabulary_protocol(V, ["Van_Gogh"], SMALL).cells["Van_Gogh"]
    oracle = Oracle.of(V, "Van_Gogh", cells)
    assert oracle("") == "as a plain picture"
    neutral = next(c for c in cells if c.group == "image-to-image, neutral")
    assert oracle(neutral.prompt).endswith(" as a plain picture")
    objects = vocabulary_protocol(V, ["Cats"], SMALL).cells["Cats"]
    assert Oracle.of(V, "Cats", objects)("") == "an empty scene"


def test_it_draws_the_base_models_image_of_the_other_prompt_and_leaves_the_pipeline() -> None:
    canvas = open_pipeline("canvas")
    quick, ask = Sampling(num_inference_steps=2, guidance_scale=3.0), "a cat in Van Gogh style"
    oracle = Oracle("Van_Gogh", "style", {ask: "a cat"})
    base, plain = (generate(canvas, [prompt], [0], quick) for prompt in (ask, "a cat"))
    with oracle.applied(canvas) as trace:
        assert np.array_equal(generate(canvas, [ask], [0], quick), plain)
    assert 0 in trace.fired
    with oracle.watched(canvas) as trace:
        assert np.array_equal(generate(canvas, [ask], [0], quick), base)
    assert 0 in trace.fired
    assert np.array_equal(generate(canvas, [ask], [0], quick), base)


def test_the_key_holds_the_prompts() -> None:
    assert Oracle("A", "style", {"a": "b"}).key != Oracle("A", "style", {"a": "c"}).key


def test_an_unknown_concept_is_refused() -> None:
    with pytest.raises(ConceptError, match="has no concept 'Nothing'"):
        Oracle.of(V, "Nothing", [])
