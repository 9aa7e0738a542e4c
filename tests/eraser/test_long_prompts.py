"""Prompts longer than the text encoder reads at once: each part is seen as a short prompt is, or it is an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import make_eraser, make_gate
from neuraleraser import ConceptRefusedError, attach
from neuraleraser.eraser import Eraser
from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import Site, record

READS = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2")
LOUD, QUIET = "a", "b c"


@pytest.fixture(scope="module")
def sd() -> Any:
    return pipelines.stable_diffusion()


def encoded(pipe: Any, *chunks: str) -> Tensor:
    """Embeddings of a prompt in several chunks, each encoded by itself: [1, chunks * tokens, d]."""
    return torch.cat([pipe.encode_prompt(chunk, "cpu", 1, False)[0] for chunk in chunks], 1)


def drawn(pipe: Any, text: Tensor, steps: int = 2) -> Tensor:
    return pipe(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        num_inference_steps=steps,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def hears(pipe: Any, tokens: int | None, name: str = "Cats") -> Eraser:
    """An eraser whose evidence is 11 for a loud prompt and 10 for a quiet one, and whose gate opens above 10.7."""
    found: list[Tensor] = []
    with record(pipe, [READS], lambda site, x, context: found.append(x[-1:].mean(1))):
        for text in (LOUD, QUIET):
            drawn(pipe, encoded(pipe, text), 1)
    loud, quiet = found
    row = (loud - quiet)[0] / (loud - quiet).square().sum()
    gate = make_gate(READS, 32, f=1, low=10.7, high=10.8)
    gate = replace(
        gate,
        rows=row[None],
        bias=10.0 - (quiet @ row),
        threshold=torch.zeros(1),
        weight=torch.ones(1),
        text_tokens=tokens,
    )
    return replace(make_eraser(name=name), gate=gate)


@pytest.mark.parametrize("chunks", [(LOUD, QUIET), (QUIET, LOUD), (QUIET, QUIET, LOUD)])
def test_a_concept_in_any_chunk_is_seen(sd: Any, chunks: tuple[str, ...]) -> None:
    long, tokens = encoded(sd, *chunks), encoded(sd, LOUD).shape[1]
    with attach(sd, hears(sd, None)) as whole:
        drawn(sd, long)
    assert not whole.fired, "read at once, the other words water it down"
    with pytest.raises(ConceptRefusedError), attach(sd, hears(sd, tokens), action="refuse"):
        drawn(sd, long)


def test_a_long_prompt_without_the_concept_keeps_its_bits(sd: Any) -> None:
    long, tokens = encoded(sd, QUIET, QUIET, QUIET), encoded(sd, LOUD).shape[1]
    base = drawn(sd, long)
    with attach(sd, hears(sd, tokens)) as trace:
        assert torch.equal(drawn(sd, long), base)
    assert not trace.fired


def test_each_of_several_erasers_reads_in_its_own_way(sd: Any) -> None:
    long, tokens = encoded(sd, QUIET, LOUD), encoded(sd, LOUD).shape[1]
    with attach(sd, [hears(sd, None, "Dogs"), hears(sd, tokens)], action="detect") as trace:
        drawn(sd, long)
    assert [set(erasers) for erasers in trace.fired.values()] == [{"Cats"}]


def test_what_a_long_prompt_reads_is_what_a_short_one_does(sd: Any) -> None:
    """One chunk repeated is read as the chunk alone: the same image, to the rounding of attention over more words."""
    tokens = encoded(sd, LOUD).shape[1]
    with attach(sd, hears(sd, tokens)) as trace:
        short = drawn(sd, encoded(sd, LOUD))
        long = drawn(sd, encoded(sd, LOUD, LOUD))
    assert len(trace.fired) == 2
    torch.testing.assert_close(long, short, atol=1e-3, rtol=0)


def test_a_text_that_cannot_be_taken_apart_is_refused() -> None:
    """In PixArt a mask says which tokens are words: parts of it would be other texts."""
    pipe = pipelines.pixart()
    site = Site("transformer.transformer_blocks.0.attn2")
    gate = replace(make_gate(site, 16), text_tokens=1)
    eraser = replace(make_eraser("pixart"), gate=gate)
    with pytest.raises(EraserNotAppliedError, match="longer than 1 tokens"), attach(pipe, eraser, action="detect"):
        pipelines.run(pipe, 0, steps=1)
