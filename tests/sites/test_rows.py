"""Rows of a denoiser's batch: the image and the branch of each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites.rows import CallFacts, Rows, decode_rows, match_rows


def text(*values: float) -> Tensor:
    """One row a value, of three tokens."""
    return torch.tensor(values)[:, None, None].expand(-1, 3, 2).clone()


PROMPT, NEGATIVE = text(1, 2), text(7, 7)


def said(guidance: float | None = 4.0, prompt: Tensor | None = PROMPT, negative: Tensor | None = NEGATIVE) -> CallFacts:
    return CallFacts(2, prompt, negative, guidance)


def test_the_negative_half_is_known_by_its_text_in_either_order() -> None:
    assert decode_rows(4, torch.cat([NEGATIVE, PROMPT]), said()) == Rows(2, (True, False), (False, True))
    assert decode_rows(4, torch.cat([PROMPT, NEGATIVE]), said()) == Rows(2, (False, True), (True, False))
    thirds = torch.cat([NEGATIVE, PROMPT, PROMPT])  # a perturbed branch reads the prompt again
    assert decode_rows(6, thirds, said()) == Rows(2, (True, False, False), (False, True, True))


def test_two_passes() -> None:
    assert decode_rows(2, PROMPT, said()) == Rows(2)
    assert decode_rows(2, NEGATIVE, said()) == Rows(2, (True,), (False,))


@pytest.mark.parametrize("guidance", [None, 0.0, 0.5, 1.0])
def test_without_guidance_above_1_the_negative_prompt_is_drawn(guidance: float | None) -> None:
    """Below 1 the prediction leans to the negative prompt; unknown guidance is taken for that."""
    assert decode_rows(4, torch.cat([NEGATIVE, PROMPT]), said(guidance)).counts == (True, True)
    assert decode_rows(2, NEGATIVE, said(guidance)).counts == (True,)


def test_a_prompt_that_equals_the_negative_one_is_drawn() -> None:
    same = said(prompt=NEGATIVE)
    assert decode_rows(4, torch.cat([NEGATIVE, NEGATIVE]), same).counts == (True, True)
    assert decode_rows(2, NEGATIVE, same).counts == (True,)


def test_what_the_call_does_not_say_leaves_every_row_an_image() -> None:
    for facts in (CallFacts(), CallFacts(images=3), CallFacts(images=0)):
        assert decode_rows(4, torch.cat([NEGATIVE, PROMPT]), facts) == Rows(4)
    assert decode_rows(4, torch.cat([NEGATIVE, PROMPT]), said(negative=None)) == Rows(2, (False, False), (True, True))
    assert decode_rows(4, None, said()).counts == (True, True)


def test_texts_of_frames_of_several_dtypes_and_of_one_negative_for_all() -> None:
    frames = torch.cat([NEGATIVE, PROMPT]).repeat_interleave(3, 0)
    assert decode_rows(4, frames, said()).counts == (False, True)
    assert decode_rows(4, torch.cat([NEGATIVE, PROMPT]).half(), said()).counts == (False, True)
    assert decode_rows(4, torch.cat([NEGATIVE, PROMPT]), said(negative=NEGATIVE[:1])).counts == (False, True)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_row_has_its_image(images: int, blocks: int, frames: int) -> None:
    rows = Rows(images, (False,) * blocks, (True,) * blocks)
    found = torch.tensor(rows.image_of(rows.size * frames)).view(blocks, images, frames)
    assert torch.equal(found, torch.arange(images)[None, :, None].expand_as(found))
    values = torch.arange(rows.size * frames)
    assert torch.equal(torch.cat([part for _, part in rows.branches(values)]), values)


def test_rows_that_cannot_be_assigned_are_an_error() -> None:
    with pytest.raises(EraserNotAppliedError, match="5 rows where the denoiser was given 4"):
        Rows(2, (True, False), (False, True)).image_of(5)
    with pytest.raises(EraserNotAppliedError, match="3 rows and the site it acts at 2"):
        match_rows(torch.ones(3), 2)


def test_amounts_follow_frames_and_texts_take_the_largest_of_theirs() -> None:
    assert match_rows(torch.tensor([1.0, 2.0]), 4).tolist() == [1, 1, 2, 2]
    assert match_rows(torch.tensor([0.0, 1.0, 0.5, 0.0]), 2).tolist() == [1.0, 0.5]
