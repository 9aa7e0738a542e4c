"""A tiny pipeline and what is measured on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.canvas_cells import WITH_TINY, canvas_protocol
from helpers.erasers import half_open, open_eraser
from helpers.measured import S
from helpers.stamp_judge import reader
from neuraleraser import families
from neuraleraser.assessment import controls
from neuraleraser.canvas import words
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.method import Method
from neuraleraser.methods import EraserMethod


@pytest.fixture(autouse=True, scope="module")
def family() -> Iterator[None]:
    """A tiny pipeline is asked for the canvas's concepts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", WITH_TINY)
        yield


@pytest.fixture(scope="module")
def pipe() -> Any:
    return reader()


@pytest.fixture(scope="module")
def erasers(pipe: Any) -> list[Eraser]:
    cells = canvas_protocol(["Van_Gogh"], S).cells["Van_Gogh"]
    made = [open_eraser("Van_Gogh"), open_eraser("Cats", "object", seed=1)]
    return [half_open(e, pipe, [c.prompt for c in cells], [c.seed for c in cells], S.sampling) for e in made]


@pytest.fixture(scope="module")
def methods(erasers: list[Eraser]) -> list[Method]:
    return [method for e in map(EraserMethod, erasers) for method in (e, *controls(e, words.VOCABULARY))]
