"""From words to an eraser: what is asked for and cannot be is said."""

from __future__ import annotations

from typing import Any

import pytest

import neuraleraser
from helpers.pipelines import stable_diffusion
from neuraleraser.errors import SettingsError
from neuraleraser.fitting import Reference


def test_a_site_that_the_reference_does_not_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the canvas, too, where the reference that ships decides where features are looked for."""
    monkeypatch.setattr("neuraleraser.fitting.from_phrase.fit", lambda *args, **kwargs: "fitted")
    pipe: Any = neuraleraser.open_pipeline("canvas")
    read = str(Reference.from_pretrained(pipe_reference(pipe)).site)
    assert neuraleraser.erase(pipe, "cat", site=read) == "fitted"
    with pytest.raises(SettingsError, match=r"site is unet\.mid_block.*the reference reads .*leave the site out"):
        neuraleraser.erase(pipe, "cat", site="unet.mid_block.attentions.0")


def pipe_reference(pipe: Any) -> Any:
    from neuraleraser.families import family_of

    return family_of(pipe).reference


def test_a_phrase_that_means_nothing_is_refused() -> None:
    with pytest.raises(neuraleraser.ConceptError, match="empty phrase"):
        neuraleraser.erase(stable_diffusion(), " ")
